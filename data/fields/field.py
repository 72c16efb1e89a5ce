"""One named field of a data set's samples: its kind, shape and type, where it is stored, statistics of its values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic import Field as Limits

from scoreray.data.fields.encoding import Encoding
from scoreray.data.fields.field_kinds import FieldDtype, FieldKind
from scoreray.data.fields.normalisation import Normalisation

VARYING: frozenset[FieldKind] = frozenset({"sequence", "text", "json"})
"""Kinds whose values are of a length of their own; the first entry of `shape` is the longest one's."""
INLINE: frozenset[FieldKind] = frozenset({"class", "scalar"})
"""Kinds whose values are in the index, and so are read from no member."""
TARGETS: tuple[FieldKind, ...] = ("image", "array", "vector", "scalar")
"""Kinds of what a run can model."""
MAX_FIELDS = 64
MAX_CLASSES = 1_000_000
NAME = r"^[a-z][a-z0-9_]{0,63}$"
_AXES: dict[FieldKind, int] = {"image": 3, "class": 0, "scalar": 0, "vector": 1, "sequence": 2, "text": 1, "json": 1}
_DTYPE: dict[FieldKind, FieldDtype] = {"image": "uint8", "class": "int64", "text": "uint8", "json": "uint8"}


@dataclass(frozen=True)
class Field:
    """One field.

    kind: image (uint8 [C, H, W]), array (any type and shape), class (a number, with names), scalar, vector ([D]),
    sequence ([L, D] of varying length L), text (UTF-8), json (kept, and not read).
    shape: of one sample: (C, H, W), (D,), () of a scalar or class; (longest L, D) of a sequence, (most bytes,) of text.
    dtype: of its values as they come out; int64 of classes, uint8 of text and json.
    member: the extension of the tar member that holds it, "png" or "t5.npy" ("": data sets of version 2 do not say);
    path: where in a json member, "a.b".
    classes, class_counts: names of a class field's classes, and samples of each.
    mean, std, low, high: of each channel, the first axis of `shape` (the last of a sequence), in the data's own units
    (0 to 255 of images); log_mean, log_std: of log1p |x| with x's sign.
    normalisation: what a run applies that does not say otherwise.
    encoding: which encoder made its values, of which other field; None where none did. Statistics of moments are those
    of what is drawn from them.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Limits(pattern=NAME)]
    kind: FieldKind
    shape: list[Annotated[int, Limits(gt=0)]]
    dtype: FieldDtype
    member: str
    path: str = ""
    classes: Annotated[list[Annotated[str, Limits(max_length=255)]], Limits(max_length=MAX_CLASSES)] = field(
        default_factory=list
    )
    class_counts: list[Annotated[int, Limits(ge=0)]] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    log_mean: list[float] = field(default_factory=list)
    log_std: list[float] = field(default_factory=list)
    normalisation: Normalisation = "none"
    encoding: Encoding | None = None

    def __post_init__(self) -> None:
        if len(self.shape) != _AXES.get(self.kind, len(self.shape)) or (self.kind == "array" and not self.shape):
            raise ValueError(f"{self.name}: a field of kind {self.kind} can't have the shape {self.shape}")
        if self.kind == "image" and self.shape[0] not in (1, 3):
            raise ValueError(f"{self.name}: images have 1 or 3 channels, not {self.shape[0]}; others are arrays")
        if self.dtype != _DTYPE.get(self.kind, self.dtype):
            raise ValueError(f"{self.name}: a field of kind {self.kind} is {_DTYPE[self.kind]}, not {self.dtype}")
        if len(self.class_counts) != len(self.classes) or (self.classes and self.kind != "class"):
            raise ValueError(f"{self.name}: classes and class_counts differ in length, or it is no class")
        if self.holds_moments and (self.kind != "array" or self.shape[0] % 2):
            raise ValueError(f"{self.name}: means and standard deviations are an array of an even number of channels")
        for values in (self.mean, self.std, self.low, self.high, self.log_mean, self.log_std):
            if len(values) not in (0, self.num_channels) or not all(map(math.isfinite, values)):
                raise ValueError(f"{self.name}: statistics of {self.num_channels} channels, all finite, are needed")

    @property
    def is_varying(self) -> bool:
        return self.kind in VARYING

    @property
    def is_inline(self) -> bool:
        return self.kind in INLINE

    @property
    def holds_moments(self) -> bool:
        """Whether its values are means and standard deviations, from which a run draws."""
        return self.encoding is not None and self.encoding.moments

    @property
    def drawn_shape(self) -> list[int]:
        """Of a sample as a network sees it: that of a draw, where moments are stored."""
        return [self.shape[0] // 2, *self.shape[1:]] if self.holds_moments else self.shape

    @property
    def num_channels(self) -> int:
        """Of the statistics: the first axis of a sample's shape, the last of a sequence's."""
        return 1 if not self.shape else self.drawn_shape[-1 if self.kind == "sequence" else 0]

    def as_dict(self) -> dict[str, Any]:
        """For JSON and digests: without the key `encoding` where nothing was encoded, as before there was one."""
        found = asdict(self)
        if self.encoding is None:
            del found["encoding"]
        return found


@dataclass(frozen=True)
class FieldRequest:
    """A field that a stream reads. max_length: sequences and text are padded to it with a mask; longer ones are cut, or
    refused in one line that names the sample. None: the longest of the data set."""

    field: str
    max_length: int | None = None
    too_long: Literal["cut", "refuse"] = "refuse"


@cache
def stored_dtype(dtype: str) -> np.dtype:
    """Of a field's values in numpy and at rest, little-endian; NumPy has no bfloat16: its bits are uint16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype).newbyteorder("<")


def plain_fields(
    shape: Sequence[int], dtype: str, classes: Sequence[str], counts: Sequence[int], mean: Sequence[float],
    std: Sequence[float],
) -> list[Field]:  # fmt: skip
    """The fields of a data set of images or arrays alone, with or without classes: `image` (uint8) or `array`, and
    `label`. mean, std: of each channel in the model's range, [-1, 1] for images."""
    is_image = dtype == "uint8" and shape[0] in (1, 3)
    mean, std = (values if len(values) == shape[0] else [] for values in (mean, std))
    target = Field(
        name="image" if is_image else "array",
        kind="image" if is_image else "array",
        shape=list(shape),
        dtype="uint8" if dtype == "uint8" else "float32",
        member="",
        mean=[(value + 1) * 127.5 if is_image else value for value in mean],
        std=[value * 127.5 if is_image else value for value in std],
    )
    label = Field("label", "class", [], "int64", "", classes=list(classes), class_counts=list(counts))
    return [target, label] if classes else [target]


def class_field(fields: Iterable[Field]) -> Field | None:
    """The (first) class field."""
    return next((field for field in fields if field.kind == "class"), None)


def target_of(fields: Sequence[Field]) -> Field:
    """The field that is modelled by default: the first image, else the first array, and so on through TARGETS. Raises
    ValueError where none can be."""
    for kind in TARGETS:
        for found in fields:
            if found.kind == kind:
                return found
    raise ValueError("none of the fields is an image, an array, a vector or a scalar")


def is_plain(fields: Sequence[Field]) -> bool:
    """Whether a data set of version 2 holds these: an `image` or a float32 `array`, and a class `label` or none."""
    target, *others = fields
    wanted = {"image": "uint8", "array": "float32"}.get(target.kind)
    return (
        target.name == target.kind
        and target.dtype == wanted
        and target.normalisation == "none"
        and target.encoding is None
        and [(one.name, one.kind) for one in others] in ([], [("label", "class")])
    )
