"""One named field of a data set's samples: its kind, shape and type, where it is stored, statistics of its values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from pydantic import ConfigDict
from pydantic import Field as Limits

from scoreray.data.fields.normalisation import Normalisation

FieldKind = Literal["image", "array", "class", "scalar", "vector", "sequence", "text", "json"]
FIELD_KINDS: tuple[FieldKind, ...] = get_args(FieldKind)
FieldDtype = Literal["uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
FIELD_DTYPES: tuple[FieldDtype, ...] = get_args(FieldDtype)
VARYING: frozenset[FieldKind] = frozenset({"sequence", "text", "json"})
"""Kinds whose values are of a length of their own; the first entry of `shape` is the longest one's."""
MAX_FIELDS = 64
NAME = r"^[a-z][a-z0-9_]{0,63}$"


@dataclass(frozen=True)
class Field:
    """One field.

    kind: image (uint8 [C, H, W]), array (any type and shape), class (a number, with names), scalar, vector ([D]),
    sequence ([L, D] of varying length L), text (UTF-8), json (kept, and not read).
    shape: of one sample: (C, H, W), (D,), () of a scalar or class; (longest L, D) of a sequence, (most bytes,) of text.
    dtype: of its values as they come out; int64 of classes, uint8 of text and json.
    member: the extension of the tar member that holds it, "png" or "t5.npy"; path: where in a json member, "a.b".
    classes, class_counts: names of a class field's classes, and samples of each.
    mean, std, low, high: of each channel, the first axis of `shape` (the last of a sequence), in the data's own units
    (0 to 255 of images); log_mean, log_std: of log1p |x| with x's sign.
    normalisation: what a run applies that does not say otherwise.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Limits(pattern=NAME)]
    kind: FieldKind
    shape: list[Annotated[int, Limits(gt=0)]]
    dtype: FieldDtype
    member: str
    path: str = ""
    classes: list[str] = field(default_factory=list)
    class_counts: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    log_mean: list[float] = field(default_factory=list)
    log_std: list[float] = field(default_factory=list)
    normalisation: Normalisation = "none"

    @property
    def is_varying(self) -> bool:
        return self.kind in VARYING


@dataclass(frozen=True)
class FieldRequest:
    """A field that a stream reads. max_length: sequences and text are padded to it with a mask; longer ones are cut, or
    refused in one line that names the sample. None: the longest of the data set."""

    field: str
    max_length: int | None = None
    too_long: Literal["cut", "refuse"] = "refuse"
