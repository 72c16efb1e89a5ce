"""Values of a column: what each says, and as a field of a known kind and shape the value that is packed."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np

from scoreray.data.errors import SHOWN, DataError, UserError, shortened
from scoreray.data.fields.field import Field, stored_dtype
from scoreray.data.fields.field_kinds import FIELD_DTYPES, FieldDtype
from scoreray.data.reading.pictures import as_array, fitted_pixels, open_picture, picture_size
from scoreray.data.sources.field_options import FieldOption
from scoreray.data.sources.field_source import FieldValue
from scoreray.data.sources.layout import channels_first, order_of
from scoreray.data.sources.options import SourceOptions
from scoreray.data.storage.interface import NotAFile, NotFound

Values = Sequence[Any]
"""One value a row: an array [N, ...] or a list of arrays, numbers, texts, bytes, dicts; None where a row has none."""
WIDER: dict[str, FieldDtype] = {"bool": "uint8", "uint32": "int64"}
"""Types that no field has -> the one that holds every value of theirs."""


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
        if kind == "array":
            found = channels_first(found[None], order_of(name, found.shape, self.options.layout))[0]
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
                f"{name}: {found.dtype} of {shape_text(found.shape)}; others: {self.field.dtype} of "
                f"{shape_text(shape)}{hint}"
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
                f"{name}: class {value_text(raw, 40)}, and there are {len(self.field.classes)}, numbered from 0"
            )
        return number

    @cached_property
    def _class_numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.field.classes)}

    def picture_size(self, stored: Mapping[str, Any], row: str) -> tuple[int, int]:
        """(width, height) of a row's picture before it is fitted. Raises DataError."""
        name = f"{self.owner}: {row}, field '{self.field.name}' ({self.asked})"
        raw = raw_value(stored, self.columns, self.asked.path, name)
        if raw is None:
            raise DataError(f"{name}: has no value")
        if isinstance(raw, np.ndarray):
            height, width, _ = pixels_of(raw, name).shape
            return width, height
        return picture_size(picture_bytes(raw, self.file_at, name), name)

    def _image(self, raw: Any, name: str) -> np.ndarray:
        fitting, shape = self.options.fitting, tuple(self.field.shape)
        if isinstance(raw, np.ndarray):
            image = fitted_pixels(pixels_of(raw, name), fitting, name)
            if (image.shape[2], *image.shape[:2]) != shape:
                raise DataError(
                    f"{name}: pixels of {shape_text(image.shape)}, the first image makes {shape_text(shape)}"
                )
            return image
        data = picture_bytes(raw, self.file_at, name)
        return as_array(open_picture(data, name), shape, fitting, name, to_grey=self.options.channels == 1)


def raw_value(stored: Mapping[str, Any], columns: Sequence[str], path: str, name: str) -> Any:
    """The value of a row, whose columns' values are `stored`. Those of several columns are joined: numbers become a
    vector, arrays are laid end to end along their first axis. None where one of them has none."""
    raws = [at_path(stored[column], path) for column in columns]
    if len(raws) == 1 or any(raw is None for raw in raws):
        return raws[0] if len(raws) == 1 else None
    arrays = [np.atleast_1d(as_numbers(raw, name)) for raw in raws]
    if len({(one.dtype.str, one.shape[1:]) for one in arrays}) > 1:
        differ = " and ".join(f"{one.dtype} {shape_text(one.shape)}" for one in arrays)
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
            f"{name}: {array.dtype} of {shape_text(array.shape)}; uint8 [H, W], [H, W, C] or [C, H, W] is needed"
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
        raise DataError(f"{name}: {value_text(raw)} is no number, nor lists of equal lengths of them")
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


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def value_text(value: Any, most: int = SHOWN) -> str:
    """A value in a message: an array by its type and shape, a number of NumPy's as Python's is written."""
    if isinstance(value, np.ndarray) and value.ndim:
        return f"an array of {value.dtype} {shape_text(value.shape)}"
    return shortened(str(value) if isinstance(value, np.ndarray | np.number) else repr(value), most)


def shape_text(shape: Sequence[int]) -> str:
    """[2, 3], for messages."""
    return f"[{', '.join(map(str, shape))}]"
