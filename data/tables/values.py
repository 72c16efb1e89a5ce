"""Values of a column as a field's: which kind of field they make, and each as it is packed."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from PIL import Image

from scoreray.data.errors import DataError, UserError, shortened
from scoreray.data.fields.field import FIELD_DTYPES, Field, FieldDtype, FieldKind, stored_dtype
from scoreray.data.fields.limits import check_shape
from scoreray.data.reading.pictures import as_array, fit, is_grey, looks_like_a_picture, open_picture
from scoreray.data.sources.field_options import CLASS_NAMES, FieldOption
from scoreray.data.sources.field_source import FieldValue
from scoreray.data.sources.layout import checked_layout
from scoreray.data.sources.options import SourceOptions
from scoreray.data.storage.interface import NotAFile, NotFound

Values = Sequence[Any]
"""One value a row: an array [N, ...] or a list of arrays, numbers, texts, bytes, dicts; None where a row has none."""
WIDER: dict[str, FieldDtype] = {"bool": "uint8", "uint32": "int64"}
"""Types that no field has -> the one that holds every value of theirs."""


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


@dataclass(frozen=True)
class FieldColumn:
    """A field, and the columns that it is read from: one, or several that are joined. `owner`: begins messages."""

    field: Field
    asked: FieldOption
    columns: tuple[str, ...]
    owner: str
    options: SourceOptions
    file_at: Callable[[str], bytes]

    def value(self, stored: Mapping[str, Any], row: str) -> FieldValue:
        """The value of a row as it is packed. Raises DataError naming the row, field and column."""
        name = f"{self.owner}: {row}, field '{self.field.name}' ({self.asked})"
        raw = raw_value(stored, self.columns, self.asked.path, name)
        if raw is None:
            raise DataError(f"{name}: has no value")
        kind = self.field.kind
        if kind == "image":
            return self._image(raw, name)
        if kind == "text":
            return as_text(raw, name)
        if kind == "json":
            return (
                raw
                if isinstance(raw, bytes)
                else as_text(json.dumps(raw, ensure_ascii=False, default=_plain), name).encode()
            )
        if kind == "class":
            return self._class(raw, name)
        return self._numbers(raw, name)

    def _numbers(self, raw: Any, name: str) -> np.ndarray | int | float:
        found = as_numbers(raw, name)
        shape, kind = tuple(self.field.shape), self.field.kind
        if kind == "array" and _is_channels_last(found.shape, self.options, name):
            found = found.transpose(2, 0, 1)
        if kind == "sequence":
            if not found.size:  # of no tokens
                return np.zeros((0, shape[1]), stored_dtype(self.field.dtype))
            found = found[:, None] if found.ndim == 1 else found
            fits = found.ndim == 2 and found.shape[1] == shape[1]
        else:
            fits = found.shape == shape
        if not fits or dtype_of(found, name) != self.field.dtype:
            hint = f"; --kind {self.field.name}=sequence takes rows of several lengths" if kind == "vector" else ""
            raise DataError(
                f"{name}: {found.dtype} of {_shown(found.shape)}; others: {self.field.dtype} of {_shown(shape)}{hint}"
            )
        if kind == "scalar":
            return cast(float, found[()])
        return np.ascontiguousarray(_bits(found).astype(stored_dtype(self.field.dtype), copy=False))

    def _class(self, raw: Any, name: str) -> int:
        if isinstance(raw, str | bytes):
            word = as_text(raw, name)
            if word not in self._class_numbers:
                raise DataError(f"{name}: '{shortened(word)}' is not among its {len(self.field.classes)} classes")
            return self._class_numbers[word]
        number = int(raw) if is_whole(raw) else -1
        if not 0 <= number < len(self.field.classes):
            raise DataError(
                f"{name}: class {shortened(repr(raw), 40)}, and there are {len(self.field.classes)}, numbered from 0"
            )
        return number

    @cached_property
    def _class_numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.field.classes)}

    def _image(self, raw: Any, name: str) -> np.ndarray:
        size, shape = self.options.image_size, tuple(self.field.shape)
        if isinstance(raw, np.ndarray):
            image = pixels_of(raw, name)
            if size and image.shape[:2] != (size, size):
                image = np.asarray(fit(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), size))
                image = image[:, :, None] if image.ndim == 2 else image
            if (image.shape[2], *image.shape[:2]) != shape:
                raise DataError(f"{name}: pixels of {_shown(image.shape)}, the first image makes {_shown(shape)}")
            return image
        data = picture_bytes(raw, self.file_at, name)
        return as_array(open_picture(data, name), shape, size, name, to_grey=self.options.channels == 1)


def field_of(
    asked: FieldOption, about: Column, values: Values, options: SourceOptions, what: str,
    file_at: Callable[[str], bytes],
) -> Field:  # fmt: skip
    """The field that a column makes, by its first values; of a class without names, and without a member. `what` begins
    messages. Raises UserError."""
    name = asked.name
    some = [value for value in values if value is not None]
    if not some:
        raise UserError(f"{what}: has no value in the first {len(values)} rows")
    kind = asked.kind or about.kind or _kind_of(name, about, some)
    if kind == "image":
        pixels = _image_shape(some, options, file_at, what)
        return Field(name, kind, list(pixels), "uint8", "")
    if kind in ("text", "class") and not isinstance(some[0], str | bytes) and (kind == "text" or not is_whole(some[0])):
        wanted = "text is" if kind == "text" else "whole numbers from 0, or words, are"
        raise UserError(f"{what}: {shortened(repr(some[0]), 40)} can't be of kind {kind}: {wanted} needed")
    if kind in ("text", "json"):
        return Field(name, kind, [1], "uint8", "")
    if kind == "class":
        return Field(name, kind, [], "int64", "")
    arrays = [as_numbers(value, what) for value in some]
    first = next((one for one in arrays if one.size), arrays[0])
    shape = about.shape
    if kind == "sequence":
        if first.ndim not in (1, 2) or not first.size:
            raise UserError(f"{what}: values of {_shown(first.shape)} in the first rows; a sequence is [length, width]")
        shape = (1, 1 if first.ndim == 1 else first.shape[1])
    elif kind == "scalar" and first.size == 1:
        shape = ()
    shape = shape if shape is not None else first.shape
    if kind == "vector" and len(shape) != 1:
        raise UserError(f"{what}: values of {_shown(shape)}; a vector has one axis; --kind {name}=array takes any")
    if kind == "scalar" and shape:
        raise UserError(
            f"{what}: values of {_shown(shape)}; a scalar is one number; --kind {name}=vector takes several"
        )
    if kind == "array" and _is_channels_last(shape, options, what):
        shape = (shape[2], *shape[:2])
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
    size, first = options.image_size, values[0]
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
    if size is None and height != width:
        raise UserError(f"{what}: images of {height} x {width}; give --image-size to crop them to a square")
    return channels, size or height, size or width


def _is_channels_last(shape: Sequence[int], options: SourceOptions, name: str) -> bool:
    return len(shape) == 3 and checked_layout(name, shape, options.layout) == "NHWC"


def raw_value(stored: Mapping[str, Any], columns: Sequence[str], path: str, name: str) -> Any:
    """The value of a row, whose columns' values are `stored`. Those of several columns are joined: numbers become a
    vector, arrays are laid end to end along their first axis. None where one of them has none."""
    raws = [at_path(stored[column], path) for column in columns]
    if len(raws) == 1 or any(raw is None for raw in raws):
        return raws[0] if len(raws) == 1 else None
    arrays = [np.atleast_1d(as_numbers(raw, name)) for raw in raws]
    if len({(one.dtype.str, one.shape[1:]) for one in arrays}) > 1:
        differ = " and ".join(f"{one.dtype} {_shown(one.shape)}" for one in arrays)
        raise DataError(f"{name}: values of {differ} can't be joined; columns of one type and shape are needed")
    return np.concatenate(arrays)


def at_path(value: Any, path: str) -> Any:
    """The entry at a.b of nested mappings (or JSON text), None where there is none."""
    for part in path.split(".") if path else ():
        if isinstance(value, str | bytes):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return None
        value = value.get(part) if isinstance(value, dict) else None
    return value


def picture_bytes(raw: Any, file_at: Callable[[str], bytes], name: str) -> bytes:
    """The file's bytes, of a value that holds them (Hugging Face: in a struct with a path) or names the file."""
    if isinstance(raw, dict):
        raw = raw.get("bytes") or raw.get("path")
    if isinstance(raw, str):
        path = posixpath.normpath(raw)  # "./a.png" is a.png
        if raw.startswith("/") or ".." in raw.split("/") or path == ".":
            raise DataError(
                f"{name}: '{shortened(raw)}' is no path below the table's folder; bytes, or such a path, are needed"
            )
        try:
            return file_at(path)
        except (NotFound, NotAFile) as error:
            raise DataError(f"{name}: {error}") from None
    if not isinstance(raw, bytes):
        raise DataError(f"{name}: {type(raw).__name__} is no picture; its bytes or a path are needed")
    return raw


def is_whole(value: Any) -> bool:
    """Whether a value is one whole number from 0, of any type of numbers."""
    array = np.asarray(value)
    return array.shape == () and array.dtype.kind in "biuf" and bool(array >= 0) and float(array).is_integer()


def is_pixels(shape: Sequence[int]) -> bool:
    """Whether a uint8 array of this shape is a picture: [H, W], [H, W, C] or [C, H, W] with C 1 or 3."""
    return len(shape) == 2 or (len(shape) == 3 and (shape[0] in (1, 3) or shape[2] in (1, 3)))


def pixels_of(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 [H, W, C] of a picture's array."""
    if array.dtype != np.uint8 or not is_pixels(array.shape):
        raise DataError(
            f"{name}: {array.dtype} of {_shown(array.shape)}; uint8 [H, W], [H, W, C] or [C, H, W] is needed"
        )
    if array.ndim == 2:
        return array[:, :, None]
    return array if array.shape[2] in (1, 3) else array.transpose(1, 2, 0)


def as_text(raw: Any, name: str) -> str:
    try:
        text = raw.decode() if isinstance(raw, bytes) else str(raw)
        text.encode()  # JSON's "\ud800" alone is half a character
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        raise DataError(
            f"{name}: is not UTF-8, at {'byte' if isinstance(raw, bytes) else 'character'} {start}"
        ) from None
    return text


def as_numbers(raw: Any, name: str) -> np.ndarray:
    """An array of a number, or of nested lists of them. Raises DataError."""
    try:
        found = np.asarray(raw)
    except ValueError:  # rows of several lengths
        found = np.asarray(None)
    if found.dtype.kind not in "biuf" and not _is_bfloat16(found.dtype):
        said = shortened(" ".join(repr(raw).split()))  # of an array in several lines
        raise DataError(f"{name}: {said} is no number, nor lists of equal lengths of them")
    return found


def dtype_of(array: np.ndarray, name: str) -> FieldDtype:
    """The field's type of an array's, which holds each of its values exactly. Raises UserError."""
    dtype = "bfloat16" if _is_bfloat16(array.dtype) else str(array.dtype.newbyteorder("="))
    dtype = WIDER.get(dtype, dtype)
    if dtype not in FIELD_DTYPES:
        raise UserError(f"{name}: values are {dtype}; accepted: {', '.join(FIELD_DTYPES)}")
    return cast(FieldDtype, dtype)


def _is_bfloat16(dtype: np.dtype) -> bool:
    """ml_dtypes' type, which other programs see as 2 bytes without a meaning: so np.save writes it."""
    return dtype.kind == "V" and dtype.itemsize == 2


def _bits(array: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 of the same bits."""
    return array.view(np.uint16) if _is_bfloat16(array.dtype) else array


def _are_numbers(values: list[Any]) -> bool:
    while isinstance(values, list) and values:
        values = values[0]
    return isinstance(values, int | float)


def _is_json(data: bytes) -> bool:
    return data[:1] in (b"{", b"[")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _shown(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
