"""What conditions a network: named tensors with one row a sample, and what a network is built for.

A condition of kind
  class     is int64 [B]; -1 is the null class,
  vector    is float [B, D],
  concat    is float [B, C, ...] over the sample's grid or another one, joined to the sample's channels,
  sequence  is float [B, L, D],
  text      is uint8 [B, L], UTF-8 bytes, which an encoder inside the network reads, or float [B, L, width], what it
            made of them (`encoded`).
A mask says what is there: bool [B, L] of sequences and text, bool [B] of vectors and grids. Where all of a row's mask
is False the row has none: the network puts what it learned for that in its place (the null of classifier-free
guidance). What stands under a False mask is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, get_args, overload

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.fields.normalisation import Normaliser

ConditionKind = Literal["class", "vector", "concat", "sequence", "text"]
CONDITION_KINDS: tuple[ConditionKind, ...] = get_args(ConditionKind)
HAS_LENGTH: frozenset[ConditionKind] = frozenset({"sequence", "text"})
LABEL = "label"  # the class condition's name where a config names none


@dataclass(frozen=True)
class ConditionSpec:
    """One condition that a network is built for, as configs and markers store it.

    shape: of a sample's values: () of a class, (D,) of a vector, (C, ...) of a grid, (L, D) of a sequence of at most L
    tokens, (L,) of a text of at most L bytes.  classes: the names of a class condition's classes.  normaliser: what the
    data's own units go through on their way to the network.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: ConditionKind
    shape: tuple[Annotated[int, Field(gt=0)], ...] = ()
    classes: tuple[str, ...] = ()
    normaliser: Normaliser | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a sample's values may have this shape. A grid may be of any size, as it is resized, and a sequence or
        text of any length: who takes no longer ones than `shape[0]` checks that."""
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
        gone = {name: torch.ones_like(self._rows(name)) for name in (self.values if names is None else names)}
        return self.drop(gone)

    def mask(self, name: str) -> Tensor:
        """bool [B, L] or [B]; all True where `masks` leaves the name out. Of a class: where its label is not -1."""
        if name in self.masks:
            return self.masks[name]
        return self.values[name] >= 0 if _is_class(self.values[name]) else self._rows(name)

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
        return torch.ones(len(self.values[name]), dtype=torch.bool, device=self.values[name].device)

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


def is_encoded(spec: ConditionSpec, value: Tensor) -> bool:
    """Whether a condition's value is a text that was read already."""
    return spec.kind == "text" and value.is_floating_point()


def example_condition(conditions: Conditions, rows: int, device: torch.device | str = "cpu") -> Condition | None:
    """A value of every name in the shapes that a network was built for, the same at every call, for probes and to warm
    up: classes in turn, normal numbers, sequences and texts of the greatest length and of shorter ones. None of an
    unconditional network."""
    generator = torch.Generator().manual_seed(0)
    values, masks = dict[str, Tensor](), dict[str, Tensor]()
    for name, spec in conditions.items():
        if spec.kind == "class":
            values[name] = torch.arange(rows) % spec.num_classes
            continue
        masks[name] = torch.ones(rows, dtype=torch.bool)
        if spec.kind in HAS_LENGTH:
            length = spec.shape[0]
            masks[name] = torch.arange(length) < (length - torch.arange(rows) % length)[:, None]
        if spec.kind == "text":
            values[name] = torch.randint(ord("a"), ord("z"), (rows, *spec.shape), generator=generator).to(torch.uint8)
        else:
            values[name] = torch.randn(rows, *spec.shape, generator=generator)
    return Condition(values, masks).to(device) if values else None


def null_condition(conditions: Conditions, rows: int, device: torch.device | str = "cpu") -> Condition:
    """The null of every name, in the shapes that a network was built for."""
    values, masks = dict[str, Tensor](), dict[str, Tensor]()
    for name, spec in conditions.items():
        if spec.kind == "class":
            values[name] = torch.full((rows,), -1, device=device)
            continue
        dtype = torch.uint8 if spec.kind == "text" else torch.float32
        values[name] = torch.zeros(rows, *spec.shape, dtype=dtype, device=device)
        lead = (rows, *spec.shape[:1]) if spec.kind in HAS_LENGTH else (rows,)
        masks[name] = torch.zeros(lead, dtype=torch.bool, device=device)
    return Condition(values, masks)


def complete(
    condition: Condition | None, conditions: Conditions, rows: int, device: torch.device | str = "cpu"
) -> Condition:
    """`condition` of `rows` rows (None: the null, on `device`) with every name, sequences and texts padded to their
    greatest length, and a mask for each: kernels and compiled graphs are chosen by shapes, so calls should have one."""
    if condition is None:
        return null_condition(conditions, rows, device)
    device = next(iter(condition.values.values())).device
    read = {name for name, value in condition.values.items() if is_encoded(conditions[name], value)}  # complete as such
    others = {name: spec for name, spec in conditions.items() if name not in read}
    found = Condition.cat([condition, null_condition(others, 1, device)], [rows, 1])
    assert found is not None, "a network that takes conditions"
    return found[:rows]


def check_condition(condition: AnyCondition, conditions: Conditions, rows: int) -> None:
    """Raises UserError where names, shapes or (on the CPU, where looking costs no synchronisation) classes of a
    condition of `rows` samples are not those that a network was built for."""
    if isinstance(condition, Tensor) and (condition.shape != (rows,) or condition.is_floating_point()):
        raise UserError(
            f"class_labels are {condition.dtype} {tuple(condition.shape)}: give one integer for each of the {rows} "
            "samples"
        )
    given = as_condition(condition, conditions)
    if given is None:
        return
    for name, value in given.values.items():
        _check_value(name, spec_of(name, conditions), value, given.masks.get(name), rows)


def spec_of(name: str, conditions: Conditions) -> ConditionSpec:
    """What a network takes under this name. Raises UserError where it was not built for it."""
    if name not in conditions:
        known = f"it takes {', '.join(conditions)}" if conditions else "it takes none"
        raise UserError(f"condition '{name}': this network was not built for it; {known}")
    return conditions[name]


def check_labels(name: str, labels: Tensor, num_classes: int) -> None:
    """Raises UserError where a class label int64 [B] is none of the network's."""
    bad = (labels < -1) | (labels >= num_classes)
    if bool(bad.any()):
        what = "class label" if name == LABEL else f"condition '{name}': class label"
        raise UserError(
            f"{what} {int(labels[bad][0])} is out of range: the network knows 0 to {num_classes - 1}, and -1 for no "
            "class"
        )


def _check_value(name: str, spec: ConditionSpec, value: Tensor, mask: Tensor | None, rows: int) -> None:
    if spec.kind == "class":
        if value.shape != (rows,) or value.is_floating_point():
            raise UserError(
                f"condition '{name}': {value.dtype} {list(value.shape)}; give an integer a sample, [{rows}]"
            )
        if value.device.type == "cpu":
            check_labels(name, value, spec.num_classes)
        return
    shape = list(value.shape)
    if is_encoded(spec, value):
        spec = ConditionSpec("sequence", (*spec.shape, *shape[2:]))
    if spec.kind in HAS_LENGTH:
        fits = spec.fits(shape[1:]) and value.shape[1] <= spec.shape[0]
        expected = [rows, f"up to {spec.shape[0]}", *spec.shape[1:]]
        lead = shape[:2]
    else:
        fits = spec.fits(shape[1:])
        expected, lead = [rows, *spec.shape], shape[:1]
    if not fits or shape[0] != rows:
        raise UserError(f"condition '{name}' of shape {shape}: the network was built for {expected}")
    if (mask is None and spec.kind in HAS_LENGTH) or (mask is not None and list(mask.shape) != lead):
        raise UserError(
            f"condition '{name}': its mask must be bool {lead}, it is {mask if mask is None else list(mask.shape)}"
        )


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
