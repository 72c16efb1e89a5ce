"""An ensemble for each record of a packed data set: samples under the conditions that the record's fields hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field, FieldRequest
from scoreray.data.reading.field_values import FieldTensors
from scoreray.data.reading.samples import SampleReader
from scoreray.data.sources.field_source import FieldValue
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.stored_conditions import StoredConditions
from scoreray.trainer.diffusion.condition import Condition

MASK = "_mask"
RECORD, MEMBER = "record", "member"  # fields of the samples: the record's number, and the sample's in its ensemble


@dataclass(frozen=True)
class ConditionsFrom:
    """Which records: those of a packed data set, `per_condition` members of each, side by side.

    num_records, sha256: the data set's samples, and the hash of its manifest when the job began. A member's seed is
    one of (seed, record, member) alone: other members or fewer records change no sample.
    """

    url: str
    per_condition: int
    num_records: int
    sha256: str

    def __post_init__(self) -> None:
        if self.per_condition < 1:
            raise UserError(f"--per-condition {self.per_condition}: at least 1 is needed")

    @staticmethod
    def of(url: str, per_condition: int) -> ConditionsFrom:
        """Reads the manifest. Raises UserError, DataError, StorageError."""
        reader = SampleReader(url)
        return ConditionsFrom(reader.url, per_condition, reader.manifest.num_samples, reader.sha256)

    def check_count(self, count: int) -> None:
        """Raises UserError unless so many samples are whole ensembles of records that are there."""
        if count % self.per_condition or count > self.num_samples:
            raise UserError(
                f"--count {count:,}: of {self.num_records:,} records with --per-condition {self.per_condition} it must "
                f"be a multiple of {self.per_condition}, {self.num_samples:,} at most"
            )
        if self.num_samples >= 2**32:
            raise UserError(f"--conditions-from: {self.num_samples:,} samples in all; fewer than 2^32 have seeds")

    @property
    def num_samples(self) -> int:
        return self.num_records * self.per_condition

    def record_and_member(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 each, of samples [first, last)."""
        record, member = np.divmod(np.arange(first, last), self.per_condition)
        return record, member

    def numbers(self, first: int, last: int) -> Tensor:
        """What tells samples [first, last) apart under one seed, int64: member m of record r is m num_records + r."""
        record, member = self.record_and_member(first, last)
        return torch.from_numpy(member * self.num_records + record)


class EnsembleRecords:
    """The records' conditions for a model, and their fields as the samples' shards hold them.

    target: what the samples' own field is called; a field of this name, the truth, is left out, and so are its latents.
    given: conditions that all samples have whatever the records say. Raises UserError where a condition is neither in
    the data set nor given, DataError where the data set is not the one that the job began with.
    """

    def __init__(self, source: ConditionsFrom, info: ModelInfo, given: Iterable[str] = ()) -> None:
        if not info.conditions:
            raise UserError(f"--conditions-from {source.url}: this model takes no conditions; leave it out")
        self.source, self._reader = source, SampleReader(source.url)
        if self._reader.sha256 != source.sha256:
            raise DataError(f"{source.url}: was changed since this job began; give another --out")
        known = self._reader.manifest.fields
        self._stored = StoredConditions(info, known, f"--conditions-from {source.url}")
        if missing := [name for name in self._stored.missing if name not in set(given)]:
            raise UserError(
                f"--conditions-from {source.url}: has no field for the model's condition '{missing[0]}', it has "
                f"{', '.join(field.name for field in known)}; give --condition {missing[0]}=VALUE"
            )
        modelled = info.target.name if info.target else "image" if info.is_picture else "array"
        self.target = modelled if info.encoding is None else info.encoding.of
        self.fields = [
            # What a few records share has no spread to be normalised by.
            replace(field, class_counts=[0] * len(field.classes), normalisation="none")
            for field in known
            if field.kind != "json" and field.name not in (RECORD, MEMBER, self.target, modelled)
        ]

    def condition(self, first: int, last: int) -> Condition | None:
        """Of samples [first, last)."""
        records, rows = self._records(first, last)
        found = self._stored.of(self._reader.read_fields(records, self._stored.requests))
        return None if found is None else found[rows]

    def values(self, first: int, last: int) -> list[dict[str, FieldValue]]:
        """The other fields of samples [first, last), as `ShardWriter` takes them, record and member among them."""
        records, rows = self._records(first, last)
        found = self._reader.read_fields(records, [FieldRequest(field.name) for field in self.fields])
        each = [{field.name: stored_value(field, found, i) for field in self.fields} for i in range(len(records))]
        numbers = zip(*(part.tolist() for part in self.source.record_and_member(first, last)), strict=True)
        return [
            {**each[row], RECORD: record, MEMBER: member}
            for row, (record, member) in zip(rows.tolist(), numbers, strict=True)
        ]

    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """(dtype, a sample's shape) of what an npz holds beside the samples: record, member and the other fields, those
        that vary in length padded with zeros, beside their masks, NAME_mask."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {RECORD: ("int64", ()), MEMBER: ("int64", ())}
        for field in self.fields:
            shape = tuple(field.shape) or ((1,) if field.kind == "scalar" else ())
            found[field.name] = "float32" if field.dtype == "bfloat16" else field.dtype, shape
            if field.is_varying:
                found[f"{field.name}{MASK}"] = "bool", shape[:1]
        return found

    def array(self, name: str, first: int, last: int) -> np.ndarray:
        """Of samples [first, last), as `arrays` says."""
        if name in (RECORD, MEMBER):
            return self.source.record_and_member(first, last)[name == MEMBER]
        field = name if any(field.name == name for field in self.fields) else name.removesuffix(MASK)
        records, rows = self._records(first, last)
        found = self._reader.read_fields(records, [FieldRequest(field)])
        value = (found.fields if field == name else found.masks)[field][rows].contiguous()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()

    def _records(self, first: int, last: int) -> tuple[np.ndarray, Tensor]:
        """(ascending records, int64 [last - first] which of them each sample's is)."""
        record, _ = self.source.record_and_member(first, last)
        records, rows = np.unique(record, return_inverse=True)
        return records, torch.from_numpy(rows)


NUMBERS = [Field(RECORD, "scalar", [], "int64", "json", RECORD), Field(MEMBER, "scalar", [], "int64", "json", MEMBER)]


def stored_value(field: Field, found: FieldTensors, row: int) -> FieldValue:
    """One sample's value of a field that was read, as it is packed."""
    value = found.fields[field.name][row]
    if field.kind in ("class", "scalar"):
        return value.item()
    if field.name in found.masks:
        value = value[: int(found.masks[field.name][row].sum())]
    if field.kind == "text":
        return bytes(value.tolist()).decode()
    if field.kind == "image":
        return value.permute(1, 2, 0).contiguous().numpy()
    return value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.contiguous().numpy()
