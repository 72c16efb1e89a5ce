"""Writing one shard: samples encoded into a tar by webdataset's TarWriter, with their records and sums.

The bytes depend on the samples alone: no times, owners or paths are in them.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import IO, Any

import numpy as np
import simplejpeg
from PIL import Image

from scoreray.data.errors import DataError
from scoreray.data.fields.field import Field, stored_dtype
from scoreray.data.fields.field_kinds import FieldKind
from scoreray.data.fields.record_layout import FORMATS
from scoreray.data.packing.index_records import IndexRecords, StoredMember, Values
from scoreray.data.packing.plan import PackedShard
from scoreray.data.reading.allowlist import found_format
from scoreray.data.reading.decode import decode_as_found, npy_head
from scoreray.data.reading.tars import MAX_MEMBER_BYTES

JPEG_QUALITY = 95
ENCODING = 1  # raised when the bytes that the same pack makes change
EXTENSIONS: dict[FieldKind, str] = {
    "array": "npy", "vector": "npy", "sequence": "npy", "text": "txt", "json": "json", "class": "cls", "scalar": "json",
}  # fmt: skip
USUAL_NAMES: dict[str, FieldKind] = {"image": "image", "array": "array", "text": "text"}
"""Fields whose members have an extension alone, `png` or `cls`; that of another one is `t5.npy`."""


def stored_fields(fields: Sequence[Field], image_format: str) -> list[Field]:
    """The fields with the members that a ShardWriter makes of them. Scalars are together in a member `json`; the first
    class is `cls`."""
    found, label = [], next((field.name for field in fields if field.kind == "class"), "")
    for field in fields:
        extension = image_format if field.kind == "image" else EXTENSIONS[field.kind]
        if field.dtype == "bfloat16":  # numpy, and so npy, has no such type
            extension = "raw"
        alone = USUAL_NAMES.get(field.name) == field.kind or field.kind == "scalar" or field.name == label
        member, path = extension if alone else f"{field.name}.{extension}", field.name if field.kind == "scalar" else ""
        found.append(replace(field, member=member, path=path))
    return found


class ShardWriter:
    """Writes the members of samples to `file` as they come, those of a sample side by side, in the order of the fields.

    A data set of version 2 has `<key>.<image_format>`, with a class `<key>.cls` and with a note `<key>.json`. Of other
    fields see `stored_fields`: what the index holds, classes and scalars, are members too, for other readers.

    The tar is plain USTAR, as TarWriter is given a whole number as the time: its default, the clock's as a float, makes
    tarfile put a PAX header of 1 KB before every member (26.2 MB instead of 13.9 for 6,000 images of 28 x 28). A member
    costs 20 us more than USTAR headers put together by hand: of packing from a folder of pictures of 256 x 256 nothing
    that can be measured, out of an array of 64 x 64 jpgs 16%, of 28 x 28 pngs 22% (samples of two members).
    """

    def __init__(self, file: IO[bytes], fields: Sequence[Field], image_format: str = "png") -> None:
        from webdataset import TarWriter  # imports torch, 0.9 s: where a shard is made, not for the command line

        self._file, self._format = _HashedFile(file), image_format
        self._tar = TarWriter(self._file, user="", group="", mode=0o644, mtime=0, encoder=False)
        self._position = 0
        self._fields = stored_fields(fields, image_format)
        self._of_members = [field for field in self._fields if not field.is_inline]
        self._classes, self._scalars = (
            [field for field in self._fields if field.kind == kind] for kind in ("class", "scalar")
        )
        self._records = IndexRecords(self._fields)

    def add(self, key: str, values: Values, note: bytes = b"") -> None:
        """A sample: a value of each field (`FieldValue`), -1 for no class; note: JSON about it.

        Raises DataError naming the field for a value that can't be stored; then nothing of the sample is.
        """
        members, decoded = list[tuple[str, str, bytes, int]](), values
        for field in self._of_members:
            value = values[field.name]
            kind, data, code = encode_value(value, field, self._format)
            if len(data) > MAX_MEMBER_BYTES:
                raise DataError(f"field '{field.name}': {len(data):,} bytes, the limit is {MAX_MEMBER_BYTES:,}")
            members.append((field.member, kind, data, code))
            if field.kind == "image" and (image := as_decoded(value, field)) is not value:
                decoded = {**decoded, field.name: image}
        self._records.check(decoded)
        scalars = {field.name: _plain(values[field.name]) for field in self._scalars}
        if scalars:
            note = json.dumps({**json.loads(note or b"{}"), **scalars}).encode()
        stored = {
            member: StoredMember.of(self._member(key, kind, data), data, code) for member, kind, data, code in members
        }
        for field in self._classes:
            if (label := values[field.name]) >= 0:  # type: ignore[operator]
                self._member(key, field.member, str(label).encode())
        if note:
            self._member(key, "json", note)
        self._records.add(stored, decoded)

    def finish(self, name: str, skipped: Sequence[str] = (), left_out: Mapping[str, int] | None = None) -> PackedShard:
        """Ends the tar; what is to be known of it."""
        self._file.end = end = self._position + 2 * tarfile.BLOCKSIZE
        self._tar.close()
        assert self._file.position == end, "a member's header was not one block"
        return self._records.finish(name, end, self._file.sha256.hexdigest(), skipped, left_out or {})

    def _member(self, key: str, kind: str, data: bytes) -> int:
        """Appends a member; where its data begin. One a call: of a whole sample TarWriter sorts the kinds, and in a
        data set's shards the image comes first."""
        self._tar.write({"__key__": key, kind: data})
        offset = self._position + tarfile.BLOCKSIZE
        self._position = offset + len(data) + -len(data) % tarfile.BLOCKSIZE
        return offset


class _HashedFile:
    """The file under a TarWriter: what is written is hashed on its way, and dropped from `end` on: tarfile pads."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.sha256, self.position = file, hashlib.sha256(), 0
        self.end: int | None = None  # not known yet

    def write(self, data: bytes) -> None:
        if self._file.closed:  # the tar was given up: tarfile writes what it has left when it is collected
            return
        data = data if self.end is None else data[: self.end - self.position]
        self._file.write(data)
        self.sha256.update(data)
        self.position += len(data)


def encode_value(value: Any, field: Field, image_format: str) -> tuple[str, bytes, int]:
    """(extension, bytes, code of their format) of the member that holds a value; bytes of a picture are kept."""
    if field.kind == "image" and isinstance(value, bytes):
        code = found_format("", value)
        suffix = {FORMATS["png"]: "png", FORMATS["jpg"]: "jpg"}.get(code)
        stem = field.member.rpartition(".")[0]
        return (field.member if suffix is None else f"{stem}.{suffix}" if stem else suffix), value, code
    if field.kind == "image":
        return field.member, encode(value, image_format), FORMATS[image_format]
    if field.kind in ("text", "json"):
        return field.member, value.encode() if isinstance(value, str) else value, FORMATS[EXTENSIONS[field.kind]]
    if field.dtype == "bfloat16":
        return field.member, np.asarray(value, stored_dtype(field.dtype)).tobytes(), FORMATS["raw"]
    array = np.asarray(value, stored_dtype(field.dtype))
    return field.member, _npy(array), FORMATS["npy"]


def as_decoded(value: Any, field: Field) -> np.ndarray:
    """uint8 [H, W, C] of an image. Raises DataError where it is none, or of another shape than the field's."""
    try:
        array = decode_as_found(value, found_format("", value)) if isinstance(value, bytes) else value
    except DataError as error:
        raise DataError(f"field '{field.name}': {error}") from error
    if array.shape[:2] != tuple(field.shape[1:]) or array.shape[2] not in (1, field.shape[0]):
        raise DataError(
            f"field '{field.name}': {array.shape[1]} x {array.shape[0]} pixels of {array.shape[2]} channels, others "
            f"have {field.shape[2]} x {field.shape[1]} of {field.shape[0]}"
        )
    return array


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.ndarray | np.generic) else value


def encode(array: np.ndarray, image_format: str) -> bytes:
    """uint8 [H, W, C] as png, jpg or npy (as [C, H, W]); a float array as npy."""
    if image_format == "jpg":
        colorspace = "GRAY" if array.shape[2] == 1 else "RGB"
        array = np.ascontiguousarray(array)
        return simplejpeg.encode_jpeg(array, JPEG_QUALITY, colorspace, "Gray" if array.shape[2] == 1 else "444")
    if image_format == "npy":
        return _npy(array.transpose(2, 0, 1) if array.dtype == np.uint8 else array)
    out = io.BytesIO()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    image.save(out, "PNG", compress_level=6)
    return out.getvalue()


def _npy(array: np.ndarray) -> bytes:
    return npy_head(array.dtype, array.shape) + array.tobytes()
