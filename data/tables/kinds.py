"""Which field a column makes: by what its file says of it, its name and its first values."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field
from scoreray.data.fields.field_kinds import FieldKind
from scoreray.data.fields.limits import check_shape
from scoreray.data.reading.pictures import is_grey, looks_like_a_picture, open_picture
from scoreray.data.sources.field_options import CLASS_NAMES, FieldOption
from scoreray.data.sources.layout import order_of, turned
from scoreray.data.sources.options import SourceOptions
from scoreray.data.tables.values import (
    Values,
    as_numbers,
    as_text,
    dtype_of,
    is_pixels,
    is_whole,
    picture_bytes,
    pixels_of,
    shape_text,
    value_text,
)


@dataclass(frozen=True)
class Column:
    """What is known of a column before its values are read.

    shape: that its type gives every value, else None.  kind: where the type or the file's own metadata say it.
    classes: their names.  refused: why it can't be a field.
    """

    shape: tuple[int, ...] | None = None
    kind: FieldKind | None = None
    classes: tuple[str, ...] = ()
    refused: str = ""


def alike(values: Values) -> list[Any]:
    """The values of the most frequent sort (text, bytes, a dict, numbers, other lists), without None. What a field is
    follows from them: a broken sample among the first ones decides nothing, and is named or left out when it is read.
    """
    some = [value for value in values if value is not None]
    sorts = [_sort_of(value) for value in some]
    most = max(sorts, key=Counter(sorts).__getitem__, default=None)
    return [value for value, sort in zip(some, sorts, strict=True) if sort is most]


def _sort_of(value: Any) -> type:
    if not isinstance(value, str | bytes | dict):
        with contextlib.suppress(DataError):
            return type(as_numbers(value, ""))
    return type(value)


def field_of(
    asked: FieldOption, about: Column, values: Values, options: SourceOptions, what: str,
    file_at: Callable[[str], bytes],
) -> Field:  # fmt: skip
    """The field that a column makes, by its first values; of a class without names, and without a member. `what` begins
    messages. Raises UserError."""
    name = asked.name
    some = alike(values)
    if not some:
        raise UserError(f"{what}: has no value in the first {len(values)} rows")
    kind = asked.kind or about.kind or _kind_of(name, about, some)
    if kind == "image":
        pixels = _image_shape(some, options, file_at, what)
        return Field(name, kind, list(pixels), "uint8", "")
    if kind in ("text", "class") and not isinstance(some[0], str | bytes) and (kind == "text" or not is_whole(some[0])):
        wanted = "text is" if kind == "text" else "whole numbers from 0, or words, are"
        raise UserError(f"{what}: {value_text(some[0], 40)} can't be of kind {kind}: {wanted} needed")
    if kind in ("text", "json"):
        return Field(name, kind, [1], "uint8", "")
    if kind == "class":
        return Field(name, kind, [], "int64", "")
    try:
        arrays = [as_numbers(some[0], what)]
    except DataError as error:  # of the first value: the column is of another kind
        raise UserError(str(error)) from error
    arrays += [as_numbers(value, what) for value in some[1:]]
    first = next((one for one in arrays if one.size), arrays[0])
    shape = about.shape
    if kind == "sequence":
        if first.ndim not in (1, 2) or not first.size:
            raise UserError(
                f"{what}: values of {shape_text(first.shape)} in the first rows; a sequence is [length, width]"
            )
        shape = (1, 1 if first.ndim == 1 else first.shape[1])
    elif kind == "scalar" and first.size == 1:
        shape = ()
    shape = shape if shape is not None else first.shape
    if kind == "vector" and len(shape) != 1:
        raise UserError(f"{what}: values of {shape_text(shape)}; a vector has one axis; --kind {name}=array takes any")
    if kind == "scalar" and shape:
        raise UserError(
            f"{what}: values of {shape_text(shape)}; a scalar is one number; --kind {name}=vector takes several"
        )
    if kind == "array":
        shape = turned(shape, order_of(what, shape, options.layout))
    if shape:
        check_shape(what, shape)
    return Field(name, kind, list(shape), dtype_of(first, what), "")


def _kind_of(name: str, about: Column, values: Values) -> FieldKind:
    first = values[0]
    if isinstance(first, bytes) or (isinstance(first, dict) and {"bytes", "path"} & first.keys()):
        data = first.get("bytes") if isinstance(first, dict) else first
        if data is None or looks_like_a_picture(data[:64]):
            return "image"
        as_text(data, f"{name}: bytes that are no picture")
        return "json" if _is_json(data) else "text"
    if isinstance(first, str):
        return "text"
    if isinstance(first, dict) or (isinstance(first, list) and not _are_numbers(first)):
        return "json"
    arrays = [as_numbers(value, name) for value in values]
    rank = max(one.ndim for one in arrays)
    if rank == 0:
        return "class" if name in CLASS_NAMES and arrays[0].dtype.kind in "iu" else "scalar"
    if about.shape is None and rank <= 2:
        return "sequence" if rank == 2 or len({len(one) for one in arrays}) > 1 else "vector"
    if arrays[0].dtype == np.uint8 and is_pixels(arrays[0].shape):
        return "image"
    return "vector" if rank == 1 else "array"


def _image_shape(
    values: Values, options: SourceOptions, file_at: Callable[[str], bytes], what: str
) -> tuple[int, int, int]:
    """(C, H, W): grey only where all of the first are; the size of the first, unless the options give one."""
    fitting, first = options.fitting, values[0]
    if isinstance(first, np.ndarray):
        height, width, channels = pixels_of(first, what).shape
    else:
        pictures, problems = list[Image.Image](), list[DataError]()
        for value in values:
            try:
                pictures.append(open_picture(picture_bytes(value, file_at, what), what))
            except DataError as error:  # it stops the pack when the sample is made, or is left out
                problems.append(error)
        if not pictures:
            raise problems[0]
        (width, height), channels = pictures[0].size, 1 if all(map(is_grey, pictures)) else 3
        channels = options.channels or channels
    if fitting is None and height != width:
        raise UserError(f"{what}: images of {height} x {width}; give --image-size to crop them to a square")
    return (channels, fitting.height, fitting.width) if fitting else (channels, height, width)


def _are_numbers(values: list[Any]) -> bool:
    while isinstance(values, list) and values:
        values = values[0]
    return isinstance(values, int | float)


def _is_json(data: bytes) -> bool:
    return data[:1] in (b"{", b"[")
