"""How `index.bin` describes one sample: the layout of its record, and the codes of its members' formats."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from scoreray.data.fields.field import Field, is_plain, stored_dtype

# Of a member, as the record's `format` says it. A picture is one of any other kind, or a png or jpg that is more than
# its pixels: turned by EXIF, with transparency, a palette, CMYK. It is read as `pictures.open_picture` says.
# raw: an array's values alone, in C order and little-endian; its shape and type are the field's.
FORMATS = {"png": 1, "jpg": 2, "npy": 3, "picture": 4, "raw": 5, "txt": 6, "json": 7}
WRITTEN_FORMATS = ("png", "jpg", "npy")
FORMAT_NAMES = {code: name for name, code in FORMATS.items()}

# One sample in index.bin, little-endian: where its member's bytes are in the shard, its class (-1: none), its format,
# and the first 8 bytes of the member's SHA-256, so that a ranged read can be verified.
RECORD = np.dtype(
    {
        "names": ["offset", "size", "label", "format", "digest"],
        "formats": ["<u8", "<u4", "<i4", "u1", "<u8"],
        "offsets": [0, 8, 12, 16, 24],
        "itemsize": 32,
    }
)

CHUNK = 128  # records that are verified together
DIGEST_BYTES = 32  # of a chunk's SHA-256


def record_dtype(fields: Sequence[Field]) -> np.dtype:
    """One sample in the index.bin of a data set of version 3, without padding: `offset`, `size`, `format` and `digest`
    of each of `members_of(fields)`, as columns [M], then the values of classes (int32) and scalars (their own type) in
    a column `column_of(field)` each. `RECORD` is that of version 2."""
    count = len(members_of(fields))
    columns: list[tuple[str, object] | tuple[str, object, tuple[int]]] = [
        ("offset", "<u8", (count,)), ("size", "<u4", (count,)), ("format", "u1", (count,)), ("digest", "<u8", (count,)),
    ]  # fmt: skip
    inline = [field for field in fields if field.is_inline]
    return np.dtype(
        [*columns, *((column_of(f), "<i4" if f.kind == "class" else stored_dtype(f.dtype)) for f in inline)]
    )


def members_of(fields: Sequence[Field]) -> list[str]:
    """The extensions of the tar members that a record points to, in the order of its columns."""
    return list(dict.fromkeys(field.member for field in fields if not field.is_inline))


def column_of(field: Field) -> str:
    """The column of a record that holds an inline field's value. A prefix keeps it apart from `offset` or `size`."""
    return f"value:{field.name}"


def record_of(fields: Sequence[Field]) -> np.dtype:
    """The type of a record of a data set that is packed with these fields, of version 2 or 3."""
    return RECORD if is_plain(fields) else record_dtype(fields)


def index_bytes(counts: Iterable[int], record: np.dtype = RECORD) -> int:
    """Size of the index of shards of so many samples."""
    return sum(count * record.itemsize + -(-count // CHUNK) * DIGEST_BYTES for count in counts)


def digest(data: bytes) -> int:
    """A member's digest as its record holds it."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
