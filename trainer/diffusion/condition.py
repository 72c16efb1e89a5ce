"""What conditions a network: named tensors with one row a sample, and what a network is built for.

A condition of kind
  class     is int64 [B]; -1 is the null class,
  vector    is float [B, D],
  concat    is float [B, C, ...] over the sample's grid or another one, joined to the sample's channels,
  sequence  is float [B, L, D],
  text      is uint8 [B, L], UTF-8 bytes, which an encoder inside the network reads, or float [B, L, width], what it
            made of them (`encoded`),
  level     is float [B, 1], a number that is no data's: what a sampler or a request sets (`levels.py`).
A mask says what is there: bool [B, L] of sequences and text, bool [B] of vectors, grids and levels. Where all of a
row's mask is False the row has none: the network puts what it learned for that in its place (the null of
classifier-free guidance). What stands under a False mask is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, overload

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.fields.encoding import Encoding
from scoreray.data.fields.field_kinds import FieldDtype
from scoreray.data.fields.normalisation import Normaliser

ConditionKind = Literal["class", "vector", "concat", "sequence", "text", "level"]
HAS_LENGTH: frozenset[ConditionKind] = frozenset({"sequence", "text"})
LABEL = "label"  # the class condition's name where a config names none


@dataclass(frozen=True)
class ConditionSpec:
    """One condition that a network is built for, as configs and markers store it.

    shape: of a sample's values: () of a class, (D,) of a vector, (C, ...) of a grid, (L, D) of a sequence of at most L
    tokens, (L,) of a text of at most L bytes, (1,) of a level.  classes: the names of a class condition's classes.
    normaliser: what the data's own units go through on their way to the network.  encoding: the encoder that made the
    data's values of a text; of a sequence or vector then a text may be given as well (`is_unread`).  data_dtype: what
    the encoder's values were rounded to in the data, None where it is not recorded.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: ConditionKind
    shape: tuple[Annotated[int, Field(gt=0)], ...] = ()
    classes: tuple[str, ...] = ()
    normaliser: Normaliser | None = None
    encoding: Encoding | None = None
    data_dtype: FieldDtype | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def takes_text(self) -> bool:
        """Whether a person gives it as a text."""
        return self.kind == "text" or (self.encoding is not None and self.encoding.of_kind == "text")

    def same_values(self, other: ConditionSpec | None) -> bool:
        """Whether both are built for the same values, wherever the encoder is stored now."""
        return other is not None and self._without_place() == other._without_place()

    def _without_place(self) -> ConditionSpec:
        return self if self.encoding is None else replace(self, encoding=self.encoding.without_place(), data_dtype=None)

    @property
    def dtype(self) -> torch.dtype:
        """Of values as a network takes them."""
        return {"class": torch.int64, "text": torch.uint8}.get(self.kind, torch.float32)

    def mask_shape(self, rows: int) -> tuple[int, ...]:
        """(rows, L) of a sequence or text, (rows,) of any other."""
        return (rows, self.shape[0]) if self.kind in HAS_LENGTH else (rows,)

    def null(self, rows: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(values, mask) of `rows` rows without the condition: class -1, or 0 under a mask that is False everywhere."""
        nothing = -1 if self.kind == "class" else 0
        values = torch.full((rows, *self.shape), nothing, dtype=self.dtype, device=device)
        return values, torch.zeros(self.mask_shape(rows), dtype=torch.bool, device=device)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a sample's values may have this shape. A grid may be of any size, as it is resized, and a sequence or
        text of any length: callers check that it is no longer than `shape[0]`."""
        if self.kind in HAS_LENGTH:
            return len(shape) == len(self.shape) and tuple(shape[1:]) == self.shape[1:]
        if self.kind == "concat":
            return len(shape) == len(self.shape) and shape[0] == self.shape[0] and all(shape)
        return tuple(shape) == self.shape


Conditions = Mapping[str, ConditionSpec]
"""What a network is built for, by name; empty: an unconditional one."""


def conditions_of(conditions: Conditions | int) -> Conditions:
    """What a network is built for: as given, or so many classes without names of their own."""
    return class_condition([str(c) for c in range(conditions)]) if isinstance(conditions, int) else conditions


def class_condition(classes: Sequence[str]) -> dict[str, ConditionSpec]:
    """The conditions of a network that knows these classes and nothing else; none of them: an unconditional one."""
    return {LABEL: ConditionSpec("class", classes=tuple(classes))} if classes else {}


def class_name_of(conditions: Conditions) -> str | None:
    """The name of the one class condition, which a plain tensor of labels means; None where it is not one."""
    names = [name for name, spec in conditions.items() if spec.kind == "class"]
    return names[0] if len(names) == 1 else None


def classes_of(conditions: Conditions) -> tuple[str, ...]:
    """The classes of the one class condition; none where it is not one."""
    name = class_name_of(conditions)
    return () if name is None else conditions[name].classes


@dataclass(frozen=True)
class Condition:
    """Named tensors whose first dimension is the batch.

    masks: bool [B, L] of every sequence and text; bool [B] of vectors and grids, left out where all rows have one.
    """

    values: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Rows; 0 of a condition without a name."""
        return next((len(value) for value in self.values.values()), 0)

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        """Some rows: a slice, a bool [B] or int64 [n]."""
        return self._map(lambda tensor: tensor[rows])

    def to(
        self, device: torch.device | str, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> Condition:
        """On `device`; floating-point values as `dtype`, where it is given."""

        def moved(tensor: Tensor) -> Tensor:
            cast = dtype if tensor.is_floating_point() else None
            return tensor.to(device=device, dtype=cast, non_blocking=non_blocking)

        return self._map(moved)

    def drop(self, rows: Tensor | Mapping[str, Tensor]) -> Condition:
        """Where `rows` (bool [B], of all names, or by name) is True, the row has the null in the condition's place."""
        dropped = rows if isinstance(rows, Mapping) else dict.fromkeys(self.values, rows)
        values, masks = dict(self.values), dict(self.masks)
        for name, gone in dropped.items():
            value = values[name]
            if _is_class(value):
                values[name] = value.masked_fill(gone, -1)
            else:
                mask = self.mask(name)
                masks[name] = mask & ~(gone[:, None] if mask.ndim == 2 else gone)
        return Condition(values, masks)

    def null(self, names: Sequence[str] | None = None) -> Condition:
        """The null of all rows, for all names or for some."""
        gone = {name: self._rows(name) for name in (self.values if names is None else names)}
        return self.drop(gone)

    def updated(self, other: Condition | None) -> Condition:
        """With the names of `other`, of as many rows, as `other` has them; the other names as they are here."""
        if other is None:
            return self
        masks = {name: mask for name, mask in self.masks.items() if name not in other.values}
        return Condition({**self.values, **other.values}, {**masks, **other.masks})

    def mask(self, name: str) -> Tensor:
        """bool [B, L] or [B]; all True where `masks` leaves the name out. Of a class: where its label is not -1."""
        if name in self.masks:
            return self.masks[name]
        return self.values[name] >= 0 if _is_class(self.values[name]) else self._rows(name)

    def is_unread(self, conditions: Conditions) -> bool:
        """Whether it has a text that an encoder of the data is to read (`is_unread`)."""
        return any(is_unread(conditions[name], value) for name, value in self.values.items())

    def select(self, names: Iterable[str]) -> Condition | None:
        """Those of `names` that it has; None where it has none of them."""
        kept = [name for name in names if name in self.values]
        masks = {name: self.masks[name] for name in kept if name in self.masks}
        return Condition({name: self.values[name] for name in kept}, masks) if kept else None

    def expand(self, rows: int) -> Condition:
        """One row as so many (views)."""
        return self._map(lambda tensor: tensor.expand(rows, *tensor.shape[1:]))

    def fill(self, rows: int) -> Condition:
        """As many rows, the last one repeated: for networks that are called with batches of one size."""
        missing = rows - len(self)
        if not missing:
            return self
        return self._map(lambda tensor: torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])]))

    def clone(self) -> Condition:
        """A copy that autograd may use where the original was made under inference_mode."""
        return self._map(Tensor.clone)

    @staticmethod
    def cat(parts: Sequence[Condition | None], rows: Sequence[int]) -> Condition | None:
        """Rows put together, `rows[i]` of part i. Sequences are padded to the longest; a name that a part lacks (None
        lacks all) is null in its rows. None where no part has any. Raises UserError where shapes differ."""
        names = dict.fromkeys(name for part in parts if part is not None for name in part.values)
        if not names:
            return None
        values, masks = {}, {}
        for name in names:
            values[name], mask = _joined(name, parts, rows)
            if mask is not None:
                masks[name] = mask
        return Condition(values, masks)

    def _rows(self, name: str) -> Tensor:
        """bool [B], all True."""
        return torch.ones(self.values[name].shape[0], dtype=torch.bool, device=self.values[name].device)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        return Condition(
            {name: function(value) for name, value in self.values.items()},
            {name: function(mask) for name, mask in self.masks.items()},
        )


AnyCondition = Condition | Tensor | None
"""What callers may give: a Condition, labels int64 [B] of a network's one class condition, or nothing."""


def as_condition(condition: AnyCondition, conditions: Conditions) -> Condition | None:
    """What a caller gave, as a Condition for a network built for `conditions`: a plain tensor is the labels of its one
    class condition. Raises UserError where it has none, or several."""
    if not isinstance(condition, Tensor):
        return condition
    if not conditions:
        return None  # a network without conditions ignores labels
    name = class_name_of(conditions)
    if name is None:
        raise UserError(f"class labels alone: this network takes {', '.join(conditions)}; give a Condition with these")
    return Condition({name: condition})


@overload
def encoded(denoiser: Callable[..., Tensor], condition: Condition) -> Condition: ...
@overload
def encoded(denoiser: Callable[..., Tensor], condition: AnyCondition) -> AnyCondition: ...
def encoded(denoiser: Callable[..., Tensor], condition: AnyCondition) -> AnyCondition:
    """`condition` with what `denoiser` makes of it alone computed, where it can (its `encode`): a sampler that calls it
    at many noise levels has its texts read once, to the same bits."""
    encode: Callable[[Condition], Condition] | None = getattr(denoiser, "encode", None)
    return condition if encode is None or not isinstance(condition, Condition) else encode(condition)


@overload
def tiled(condition: Condition | None, copies: int) -> Condition | None: ...
@overload
def tiled(condition: AnyCondition, copies: int) -> AnyCondition: ...
def tiled(condition: AnyCondition, copies: int) -> AnyCondition:
    """All rows of `condition` so many times, one after another."""
    if condition is None or copies == 1:
        return condition
    if isinstance(condition, Tensor):
        return condition.repeat(copies)
    return Condition.cat([condition] * copies, [len(condition)] * copies)


def is_encoded(spec: ConditionSpec, value: Tensor) -> bool:
    """Whether a condition's value is a text that was read already."""
    return spec.kind == "text" and value.is_floating_point()


def is_unread(spec: ConditionSpec, value: Tensor) -> bool:
    """Whether a condition's value is a text, uint8 [B, L], in the place of what an encoder makes of it."""
    return spec.encoding is not None and value.dtype == torch.uint8


def _is_class(value: Tensor) -> bool:
    return value.ndim == 1 and not value.is_floating_point()


def _joined(name: str, parts: Sequence[Condition | None], rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """(values, mask or None) of one name over all parts."""
    found = [(part.values[name], part.masks.get(name)) if part and name in part.values else None for part in parts]
    known = [value for value, _ in filter(None, found)]
    first = known[0]
    if all(map(_is_class, known)):  # the common case, at each call of a batcher
        labels = [
            first.new_full((count,), -1) if pair is None else pair[0] for count, pair in zip(rows, found, strict=True)
        ]
        return torch.cat(labels), None
    masked = None in found or any(mask is not None for _, mask in filter(None, found))
    has_length = any(mask is not None and mask.ndim == 2 for _, mask in filter(None, found))
    length = max(value.shape[1] for value in known) if has_length else 0
    shape = first.shape[2:] if has_length else first.shape[1:]
    if wrong := [v for v in known if (v.shape[2:] if has_length else v.shape[1:]) != shape or v.dtype != first.dtype]:
        raise UserError(
            f"condition '{name}': {wrong[0].dtype} {list(wrong[0].shape)} beside {first.dtype} {list(first.shape)}"
        )
    values, masks = [], []
    for count, pair in zip(rows, found, strict=True):
        lead = (count, length) if has_length else (count,)
        if pair is None:
            values.append(first.new_zeros((*lead, *shape)))
            masks.append(first.new_zeros(lead, dtype=torch.bool))
            continue
        value, mask = pair
        if not masked:
            values.append(value)
            continue
        mask = first.new_ones(lead, dtype=torch.bool) if mask is None else mask
        missing = length - value.shape[1] if has_length else 0
        values.append(F.pad(value, (0,) * (2 * (value.ndim - 2)) + (0, missing)) if missing else value)
        masks.append(F.pad(mask, (0, missing)) if missing else mask)
    return torch.cat(values), torch.cat(masks) if masked else None
