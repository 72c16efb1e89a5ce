"""Decoding the fields of samples into arrays, and arrays into the tensors of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field, FieldRequest, stored_dtype
from scoreray.data.fields.record_layout import FORMAT_NAMES, FORMATS
from scoreray.data.reading.allowlist import json_value
from scoreray.data.reading.decode import decode_into, decode_rows, npy_array, raw_array
from scoreray.data.reading.manifest import Manifest

if TYPE_CHECKING:
    import torch

Members = Sequence[Sequence[bytes | None]]  # of each column of the records that is read, those of n samples


@dataclass(frozen=True)
class FieldTensors:
    """Fields of n samples by name, the first axis theirs: an image uint8 [n, C, H, W], channels last in memory; an
    array [n, ...] and a vector [n, D] of their own type; a class int64 [n], -1 for none; a scalar [n, 1]; a sequence
    [n, max_length, D] and text uint8 [n, max_length], padded with zeros. masks: bool [n, max_length] of what varies in
    length, True where there is a token or a byte; all False for a sample of length 0."""

    fields: Mapping[str, torch.Tensor]
    masks: Mapping[str, torch.Tensor]

    def not_finite(self, row: int) -> str:
        """The first value of a sample that is not finite, by field and index; "" where all are."""
        for name, values in self.fields.items():
            finite = values[row].isfinite()
            if not finite.all():
                at = tuple((~finite).nonzero()[0].tolist())
                return f"field '{name}': {float(values[row][at])} at {list(at)}"
        return ""


@dataclass(frozen=True)
class FieldArrays:
    """The same in numpy while it is filled: images [n, H, W, C], bfloat16 as uint16, lengths [n] for masks."""

    values: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray] = field(default_factory=dict)

    def part(self, start: int, end: int) -> FieldArrays:
        """Views of rows [start, end)."""
        return self._each(lambda array: array[start:end])

    def _each(self, of: Callable[[np.ndarray], np.ndarray]) -> FieldArrays:
        return FieldArrays(*({name: of(array) for name, array in each.items()} for each in (self.values, self.lengths)))

    def put(self, rows: np.ndarray, found: FieldArrays) -> None:
        """Row i of `found` becomes row rows[i]."""
        for mine, its in ((self.values, found.values), (self.lengths, found.lengths)):
            for name, array in its.items():
                mine[name][rows] = array

    def take(self, rows: np.ndarray, out: FieldArrays) -> None:
        """Row rows[i] becomes row i of `out`."""
        for mine, its in ((self.values, out.values), (self.lengths, out.lengths)):
            for name, array in its.items():
                np.take(mine[name], rows, axis=0, out=array, mode="clip")  # "raise" copies twice; none is out of range


class FieldDecoder:
    """Decodes the requested fields of a data set's samples, at next to the decoders' own cost.

    requests: None for the data set's target and its class. Raises UserError for a request that can't be met.
    """

    def __init__(self, manifest: Manifest, requests: Sequence[FieldRequest] | None = None) -> None:
        if requests is None:
            wanted = [manifest.target, *([manifest.label] if manifest.label else [])]
            requests = [FieldRequest(one.name) for one in wanted]
        self.manifest = manifest
        self._requests = {request.field: request for request in requests}
        if len(self._requests) < len(requests):
            raise UserError("fields: a field is requested twice; it comes once")
        self.fields = [manifest.find_field(request.field, "fields") for request in requests]
        for one, request in zip(self.fields, requests, strict=True):
            if one.kind == "json":
                raise UserError(
                    f"fields: '{one.name}' is json, which is kept and not read; pack what is in it as a field"
                )
            if request.max_length is not None and (request.max_length < 1 or not one.is_varying):
                raise UserError(
                    f"fields: '{one.name}': max_length {request.max_length}: 1 or more, of sequences and text alone"
                )
        members = manifest.members
        self._inline = [one for one in self.fields if one.is_inline]
        of_members = [one for one in self.fields if not one.is_inline]
        self.columns = sorted({members.index(one.member) for one in of_members})
        self._read = [(one, self.columns.index(members.index(one.member))) for one in of_members]
        self._num_members = len(members)
        self.takes_views = all(one.kind in ("array", "vector") and not one.path for one in of_members)
        self._arrays = [(one, self._shape(one), stored_dtype(one.dtype)) for one in self.fields]

    def empty(self, count: int) -> FieldArrays:
        """For `count` samples, not yet filled."""
        values = {one.name: np.empty((count, *shape), dtype) for one, shape, dtype in self._arrays}
        return FieldArrays(values, {one.name: np.zeros(count, np.int64) for one in self.fields if one.is_varying})

    @cached_property
    def bytes_per_sample(self) -> int:
        """Decoded."""
        one = self.empty(1)
        return sum(array.nbytes for array in (*one.values.values(), *one.lengths.values()))

    def decode_rows(self, records: np.ndarray, members: Members, out: FieldArrays) -> list[int]:
        """Decodes the samples of `records`, whose members of each of `columns` are given, into `out`. Returns the rows
        that are left to decode_row(): what is missing, damaged or not of the usual kind."""
        left: set[int] = set()
        formats = records["format"].reshape(len(records), self._num_members)
        for one, column in self._read:
            found, codes = members[column], formats[:, self.columns[column]]
            if one.is_varying or one.path:
                left.update(self._value_rows(one, found, codes, out))
            else:
                left.update(decode_rows(found, codes, out.values[one.name], one.kind == "image"))
        for one in self._inline:
            inline = records[self.manifest.column(one)]
            out.values[one.name][:] = inline if one.kind == "class" else inline[:, None]
        return sorted(left)

    def decode_row(
        self, record: np.ndarray, members: Sequence[bytes | None], out: FieldArrays, row: int, name: Callable[[], str]
    ) -> None:
        """Decodes one sample into a row of `out`. Raises DataError, and UserError for what is longer than a request
        takes; both begin with `name`, the sample's, and name the field."""
        formats = record["format"].reshape(-1)
        for one, column in self._read:
            data, code, values = members[column], int(formats[self.columns[column]]), out.values[one.name]
            if data is None:
                raise DataError(f"{name()}: quarantined")
            named = name if self.manifest.version == 2 else partial(_field_of, name, one)
            if not one.is_varying and code != FORMATS["json"]:
                decode_into(values[row], data, code, named, one.kind == "image")
                continue
            try:
                value = member_value(one, data, code)
                value = self._fitted(one, value) if one.is_varying else value
            except (DataError, UserError) as error:
                raise type(error)(f"{named()}: {error}") from error
            if one.is_varying:
                _put_varying(values[row], value)
                out.lengths[one.name][row] = len(value)
            else:
                values[row] = value
        for one in self._inline:
            out.values[one.name][row] = record[self.manifest.column(one)]

    def tensors(self, arrays: FieldArrays) -> FieldTensors:
        """The arrays as tensors, of the same memory."""
        import torch

        fields, masks = {}, {}
        for one in self.fields:
            array = arrays.values[one.name]
            if one.kind == "image":
                array = array.transpose(0, 3, 1, 2)  # a view: converting the bytes copies them anyway
            tensor = torch.from_numpy(array)
            fields[one.name] = tensor.view(torch.bfloat16) if one.dtype == "bfloat16" else tensor
        for name, lengths in arrays.lengths.items():
            masks[name] = torch.from_numpy(np.arange(arrays.values[name].shape[1]) < lengths[:, None])
        return FieldTensors(fields, masks)

    def _shape(self, one: Field) -> tuple[int, ...]:
        if one.kind == "image":
            return (*one.shape[1:], one.shape[0])
        if one.is_varying:
            return (self._requests[one.name].max_length or one.shape[0], *one.shape[1:])
        return (1,) if one.kind == "scalar" else tuple(one.shape)

    def _value_rows(
        self, one: Field, members: Sequence[bytes | None], codes: np.ndarray, out: FieldArrays
    ) -> Iterator[int]:
        """Decodes a column of what varies in length, or is in JSON; gives the rows that it left out."""
        values, lengths = out.values[one.name], out.lengths.get(one.name)
        rows: Iterable[int] = range(len(members))
        if one.kind == "text" and lengths is not None and (codes == FORMATS["txt"]).all():
            rows = put_texts(members, min(one.shape[0], values.shape[1]), values, lengths)
        for row in rows:
            try:
                if (member := members[row]) is None:
                    raise DataError("quarantined")
                value = member_value(one, member, int(codes[row]))
                value = value if lengths is None else self._fitted(one, value)
            except (DataError, UserError):
                yield row
                continue
            if lengths is None:
                values[row] = value
            else:
                _put_varying(values[row], value)
                lengths[row] = len(value)

    def _fitted(self, one: Field, value: np.ndarray) -> np.ndarray:
        """`value`, cut where it is longer than was requested and may be."""
        request, unit = self._requests[one.name], "bytes" if one.kind == "text" else "tokens"
        most = request.max_length or one.shape[0]
        if len(value) > one.shape[0]:
            raise DataError(f"has {len(value)} {unit}, the manifest says {one.shape[0]} at most")
        if len(value) <= most:
            return value
        if request.too_long == "refuse":
            raise UserError(
                f"has {len(value)} {unit}, max_length is {most}; {one.shape[0]} takes the longest of the data set, and "
                "too_long: cut takes the first ones"
            )
        if one.kind == "text":  # not within a character
            return np.frombuffer(value[:most].tobytes().decode(errors="ignore").encode(), np.uint8)
        return value[:most]


def put_texts(members: Sequence[bytes | None], most: int, values: np.ndarray, lengths: np.ndarray) -> Iterable[int]:
    """Texts of at most `most` bytes into rows of `values`, all at once: 0.7 us a text, not 5. Returns the rows of the
    others, and all rows where one is no UTF-8."""
    texts = [member if member is not None and len(member) <= most else b"" for member in members]
    try:
        b"\0".join(texts).decode()  # an end that is cut stays wrong before a zero
    except UnicodeDecodeError:
        return range(len(members))
    padded = b"".join([text.ljust(values.shape[1], b"\0") for text in texts])
    values[:] = np.frombuffer(padded, np.uint8).reshape(values.shape)
    lengths[:] = [len(text) for text in texts]
    return [row for row, member in enumerate(members) if member is None or len(member) > most]


def _put_varying(out: np.ndarray, value: np.ndarray) -> None:
    out[: len(value)] = value
    out[len(value) :] = 0


def member_value(one: Field, data: bytes, code: int, others: str = "the manifest says") -> np.ndarray:
    """The value of a sequence or text, [L, ...] of its own length, or of what a path in JSON leads to, in the field's
    shape. bfloat16 as uint16. `others`: where the field's type and shape come from, for messages. Raises DataError,
    without a name."""
    dtype = stored_dtype(one.dtype)
    if one.kind == "text":
        if code == FORMATS["json"]:
            text = json_value(data, one.path)
            if not isinstance(text, str):
                raise DataError(f"'{one.path}' of the JSON is {type(text).__name__}, no text")
            data = text.encode(errors="surrogatepass")
        try:
            data.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"is no UTF-8: {error}") from None
        return np.frombuffer(data, np.uint8)
    if code == FORMATS["json"]:
        found = _numbers(json_value(data, one.path), one)
    elif code == FORMATS["raw"]:
        width = dtype.itemsize * one.shape[-1]
        found = raw_array(data, np.empty((len(data) // width, *one.shape[1:]), dtype))
    elif code == FORMATS["npy"]:
        try:
            found = npy_array(data)
        except ValueError as error:  # numpy's of a header
            raise DataError(f"can't be decoded: {' '.join(str(error).split())}") from error
    else:
        raise DataError(f"is a {FORMAT_NAMES.get(code, code)}, no {one.kind}")
    expected = tuple(one.shape[1:] if one.is_varying else one.shape)
    if found.dtype != dtype or found.shape[one.is_varying :] != expected or found.ndim != len(one.shape):
        raise DataError(f"holds {found.dtype} {found.shape}, {others} {one.dtype} {tuple(one.shape)}")
    return found


def _numbers(value: Any, one: Field) -> np.ndarray:
    """A list of numbers, or of lists of as many, in the field's type; 0.5 is no integer, and true no number."""
    dtype = stored_dtype(one.dtype)
    if one.is_varying and value == []:
        return np.zeros((0, *one.shape[1:]), dtype)
    try:
        found = np.asarray(value)
    except ValueError:
        found = np.zeros(0, object)
    if found.dtype.kind not in ("iu" if dtype.kind in "iu" else "iuf"):
        raise DataError(f"'{one.path}' of the JSON is no list of {one.dtype} numbers")
    with np.errstate(over="ignore"):
        numbers = found.astype(dtype)
    if dtype.kind in "iu" and (numbers != found).any():
        raise DataError(f"'{one.path}' of the JSON holds a number that is no {one.dtype}")
    return numbers


def _field_of(name: Callable[[], str], one: Field) -> str:
    return f"{name()}: field '{one.name}'"
