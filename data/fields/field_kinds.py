"""Which kinds of fields there are, and the types that their values can have."""

from __future__ import annotations

from typing import Literal, get_args

FieldKind = Literal["image", "array", "class", "scalar", "vector", "sequence", "text", "json"]
FIELD_KINDS: tuple[FieldKind, ...] = get_args(FieldKind)
FieldDtype = Literal["uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
FIELD_DTYPES: tuple[FieldDtype, ...] = get_args(FieldDtype)
