"""A data source of somebody else's, `package.module:Name`, as `data pack` reads it: samples by number

Its class is a frozen dataclass or a pydantic model with `fields`, `__len__` and `__getitem__(number)`; its keys are the
options of the command. What a sample is must be a function of its number alone, as any process may make any shard.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from scoreray.data.buckets.sizes import Bucket, Size
from scoreray.data.errors import DataError, UserError, nearest
from scoreray.data.fields.field import Field, stored_dtype
from scoreray.data.own_code import code_hash, line_of
from scoreray.data.own_code.part import OwnPart, config_class, own_part
from scoreray.data.reading.pictures import as_array, fitted_pixels, open_picture, picture_size
from scoreray.data.sources.field_source import NO_PICTURE, FieldValue, Sample, as_sizes, in_size, only_picture

_BYTES = {"text": str, "json": bytes}
NEEDS = ("fields", "__len__", "__getitem__")


@dataclass(frozen=True)
class OwnSource:
    """A `FieldSource`. Pickled, the part is its name and options: another process imports the code itself. bucket: that
    its pictures are fitted to, which may then be of any size; None packs them as they are."""

    part: OwnPart
    bucket: Bucket | None = None
    runs = None
    notes: Sequence[str] = ()

    @property
    def path(self) -> str:
        return self.part.kind

    @property
    def num_samples(self) -> int:
        return len(self.part.config)

    @property
    def fields(self) -> list[Field]:
        fields = list(self.part.config.fields)
        return fields if self.bucket is None else in_size(fields, self.bucket)

    @property
    def fingerprint(self) -> str:
        """Of its name, options and code, which determine what its samples are."""
        parts = [self.part.dump("json"), code_hash(self.path), self.num_samples, [one.as_dict() for one in self.fields]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def left_out(self) -> Mapping[str, int]:
        return {}

    def inputs(self, numbers: Sequence[int]) -> str:
        return self.fingerprint

    def check_visible(self) -> None:
        """It is, once it is unpickled."""

    def check_readable(self, skip_bad: int) -> None:
        """Known when they are read."""

    def read_all(self, numbers: Iterable[int]) -> Iterator[Sample | DataError]:
        fields = self.fields
        picture = None if self.bucket is None else only_picture(fields, self.path)
        for number in numbers:
            try:
                values = self.part.config[number]
                problem = next(filter(None, (_problem(one, values) for one in fields)), "")
                if picture is not None and not problem:
                    values = {**values, picture.name: self._fitted(values[picture.name], picture, number)}
                yield DataError(f"{self.path}: sample {number}: {problem}") if problem else values
            except DataError as error:
                yield error
            except Exception as error:  # the code is somebody else's
                yield DataError(f"{self.path}: sample {number}: {line_of(error)}")

    def _fitted(self, value: FieldValue, field: Field, number: int) -> np.ndarray:
        assert self.bucket is not None
        name, fitting = f"{self.path}: sample {number}", self.bucket.fitting
        if isinstance(value, bytes):
            return as_array(open_picture(value, name), tuple(field.shape), fitting, name)
        return fitted_pixels(np.asarray(value), fitting, name)

    def picture_sizes(self) -> np.ndarray:
        """Each sample is made once to see it."""
        field = only_picture(self.fields, self.path)

        def size(values: Sample | DataError) -> Size:
            try:
                value = NO_PICTURE if isinstance(values, DataError) else values[field.name]
                if isinstance(value, bytes):
                    return picture_size(value, self.path)
                return value if isinstance(value, tuple) else (np.shape(value)[1], np.shape(value)[0])
            except (DataError, IndexError):
                return NO_PICTURE

        return as_sizes(map(size, replace(self, bucket=None).read_all(range(self.num_samples))))

    def in_bucket(self, bucket: Bucket) -> OwnSource:
        return replace(self, bucket=bucket)


def _problem(one: Field, values: Mapping[str, Any]) -> str:
    """What keeps a value from being packed as its field ("" for nothing). NumPy would convert it in silence: 0.5
    becomes 0 in uint8, and a NaN makes a NaN of the mean of all samples."""
    if one.name not in values:
        return f"has no '{one.name}'"
    value = values[one.name]
    if one.kind in _BYTES:
        right = isinstance(value, _BYTES[one.kind])
        return "" if right else f"'{one.name}' is {value!r:.40}; a {one.kind} is {_BYTES[one.kind].__name__}"
    if one.kind == "image" and isinstance(value, bytes | tuple):  # or its size alone
        return ""
    array, stored = np.asarray(value), stored_dtype(one.dtype)
    if one.kind in ("array", "vector") and array.shape != tuple(one.shape):
        return f"'{one.name}' has the shape {list(array.shape)}, its Field says {list(one.shape)}"
    if array.dtype.kind not in "biuf" or (
        not np.can_cast(array.dtype, stored, "same_kind") and not np.array_equal(array.astype(stored), array)
    ):
        return f"'{one.name}' is {array.dtype} with values that {stored.name} can't hold: {value!r:.40}"
    if one.kind == "image" and array.ndim != 3:
        return f"'{one.name}' has the shape {list(array.shape)}; a picture is uint8 [height, width, channels]"
    if one.kind == "class" and one.classes and not -1 <= int(array) < len(one.classes):
        return f"'{one.name}' is {int(array)}; its Field has classes 0 to {len(one.classes) - 1}, and -1 means none"
    return ""


def open_own_source(kind: str, options: Mapping[str, Any]) -> OwnSource:
    """The source of this name with its options. Raises UserError."""
    found = config_class(kind)
    lacks = [name for name in NEEDS if not hasattr(found, name)]
    if lacks:
        raise UserError(f"{kind}: is no data source: it has no {lacks[0]}; {', '.join(NEEDS)} are needed")
    try:
        source = OwnSource(own_part({**options, "kind": kind}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"][1:])
        known = inspect.signature(found).parameters
        reason = first["msg"] if key.partition(".")[0] in known else f"unknown; {nearest(key, known)}"
        raise UserError(f"{kind}: --option {key}: {reason}" if key else f"{kind}: {reason}") from None
    if not all(isinstance(one, Field) for one in source.fields) or not source.fields:
        raise UserError(f"{kind}: `fields` must be a list of one or more scoreray.data.fields.field.Field")
    if source.num_samples < 1:
        raise UserError(f"{kind}: holds no samples")
    return source
