"""A model's conditions from the fields of a packed data set: to draw under them, and to be measured given them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from scoreray.data.errors import UserError
from scoreray.data.fields.field import Field, FieldRequest, class_field
from scoreray.data.reading.field_values import FieldTensors
from scoreray.sampling.model.describe import ModelInfo
from scoreray.trainer.config.condition_values import condition_of_fields, normalised
from scoreray.trainer.config.run_fields import KINDS
from scoreray.trainer.diffusion.condition import HAS_LENGTH, Condition, ConditionSpec


class StoredConditions:
    """Reads what conditions a model from the fields that its run read, or fields of the conditions' own names.

    requests: what to read (`SampleReader.read_fields`); missing: conditions that the data set has no field for. Classes
    are matched by name; those that the model does not know, like what is missing, are null.
    Raises UserError for a field of another kind or shape than the network was built for.
    """

    def __init__(self, info: ModelInfo, fields: Sequence[Field], where: str) -> None:
        self._conditions = info.conditions
        sections = (info.conditions and info.config.data.conditions) or {}
        by_name = {field.name: field for field in fields}
        self.requests, self.missing = list[FieldRequest](), list[str]()
        self._sources, texts = dict[str, Field](), dict[str, Field]()
        for name, spec in info.conditions.items():
            section = sections.get(name)
            found = by_name.get((section and section.field) or name) or by_name.get(name)
            if found is None and spec.kind == "class" and section is None:
                found = class_field(fields)
            if found is None or (spec.kind == "class" and not set(found.classes) & set(spec.classes)):
                self.missing.append(name)
                continue
            _check(name, spec, found, where)
            length = spec.shape[0] if spec.kind in HAS_LENGTH and found.is_varying else None
            self.requests.append(FieldRequest(found.name, length, section.too_long if section else "refuse"))
            self._sources[name] = found
            text = None if found.encoding is None else by_name.get(found.encoding.of)
            if text is not None and text.kind == "text":
                texts[text.name] = text
        self._texts = {name: text for name, text in texts.items() if name not in self._sources}
        self.requests.extend(FieldRequest(name) for name in self._texts)

    def of(self, found: FieldTensors) -> Condition | None:
        """Of the samples whose fields were read; None where the data set has no field that conditions the model."""
        sources = {name: field.name for name, field in self._sources.items()}
        given = condition_of_fields(found, sources, self._conditions)
        if given is None:
            return None
        values = {name: value.contiguous() for name, value in given.values.items()}
        for name, field in self._sources.items():
            spec = self._conditions[name]
            if spec.kind == "class" and tuple(field.classes) != spec.classes:
                number = {known: i for i, known in enumerate(spec.classes)}
                values[name] = torch.tensor([number.get(known, -1) for known in (*field.classes, "")])[values[name]]
        return normalised(Condition(values, given.masks), self._conditions)

    def requested(self, found: FieldTensors) -> dict[str, list[Any]]:
        """The same as a person writes them, by name, one a sample: a text as str, a class as its name, anything else as
        a tensor in the data's own units; None where there is none. Of what an encoder made of a text, also that text,
        under its field's name, where the data set has it."""
        return {name: _words(field, found) for name, field in (*self._sources.items(), *self._texts.items())}


def _words(field: Field, found: FieldTensors) -> list[Any]:
    values = found.fields[field.name]
    if field.kind == "class":
        return [field.classes[label] if label >= 0 else None for label in values.tolist()]
    if not field.is_varying:
        return list(values)
    rows = [row[mask] if mask.any() else None for row, mask in zip(values, found.masks[field.name], strict=True)]
    if field.kind == "text":
        return [None if row is None else bytes(row.tolist()).decode(errors="replace") for row in rows]
    return rows


def _check(name: str, spec: ConditionSpec, field: Field, where: str) -> None:
    """Raises UserError unless the field's values are what the network takes under `name`."""
    shape = field.shape or [1] * (spec.kind == "vector")  # a scalar is a vector of one number
    if spec.kind not in KINDS[field.kind] or not spec.fits(shape):
        raise UserError(
            f"{where}: field '{field.name}' is of kind {field.kind} {list(field.shape)}, and the model's condition "
            f"'{name}' is a {spec.kind} {list(spec.shape)}"
        )
