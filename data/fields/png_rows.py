"""Many pngs of one size in a few calls: what a picture costs besides its pixels is more than these, where it is small.

Each picture's zlib stream is inflated by libdeflate, at half of zlib's time or less. What comes out are filtered lines
(PNG specification, section 9), and so a number of pictures, put one below the other, are the lines of a taller one:
libspng undoes the filters of all of them in one call. A line of zeros between two keeps each from the one above, as a
picture's first line is filtered against zeros (section 9.2).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable

import numpy as np

try:
    import pyspng
except ImportError:  # no wheel for this platform: Pillow decodes the same, at a third of the speed
    pyspng = None
try:
    import deflate
except ImportError:  # pyspng alone then
    deflate = None  # type: ignore[assignment]

Members = Iterable[tuple[int, bytes | None]]  # (row, member), None for one that is quarantined

STACK_BYTES = 64 << 10  # of pictures that are put together: what stays in the second cache
MOST_BYTES = 4 << 20  # of a picture that is decoded so: there are three copies of it at a time
SIGNATURE, END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xae\x42\x60\x82"


def header(height: int, width: int, num_channels: int) -> bytes:
    """The bytes of a png before its next chunk: 8 bits, grey (1 channel) or RGB (3), not interlaced."""
    fields = struct.pack(">4sIIBBBBB", b"IHDR", width, height, 8, 0 if num_channels == 1 else 2, 0, 0, 0)
    return SIGNATURE + (13).to_bytes(4) + fields + zlib.crc32(fields).to_bytes(4)


def png_rows(members: Members, out: np.ndarray) -> list[int]:
    """Decodes members into their rows of `out`, uint8 [n, H, W, 1 or 3]. Returns the rows that it left out: what is
    missing, damaged, or of another kind or size. With libdeflate or without, pixels and rows are those of pyspng."""
    if pyspng is None:
        return [row for row, _ in members]
    height, width, num_channels = out.shape[1:]
    size = height * (1 + width * num_channels)
    head = header(height, width, num_channels)
    inflate = deflate.zlib_decompress if deflate is not None and size <= MOST_BYTES else _not_inflated
    at_once = max(1, STACK_BYTES // size)
    found: list[tuple[int, bytes]] = []  # those of `pictures`
    pictures: list[bytes | bytearray] = []
    others: list[tuple[int, bytes]] = []
    left: list[int] = []
    for row, member in members:
        if member is None or not member.startswith(head):
            left.append(row)
            continue
        try:
            # Nearly always one chunk, and IEND. Its CRC is not compared, by libspng neither: the stream has a checksum.
            usual = member[33:41] == (len(member) - 57).to_bytes(4) + b"IDAT"
            lines = inflate(member[41:-16] if usual else _joined(member), size)
        except Exception:  # a decoder of untrusted bytes may raise anything
            lines = b""
        if len(lines) != size:
            others.append((row, member))
            continue
        found.append((row, member))
        pictures.append(lines)
        if len(pictures) == at_once:
            others += _unfilter(found, pictures, out)
            found, pictures = [], []
    others += _unfilter(found, pictures, out)
    for row, member in others:
        try:
            out[row] = pyspng.c.spng_decode_image_bytes(member, _kind(num_channels))
        except Exception:
            left.append(row)
    return sorted(left)


def _kind(num_channels: int) -> object:
    return pyspng.c.SPNG_FMT_G8 if num_channels == 1 else pyspng.c.SPNG_FMT_RGB8


def _joined(member: bytes) -> bytes:
    """The zlib stream of a png whose pixels, in several chunks, follow its header; b"" where a CRC is wrong."""
    at, parts = 33, []
    while member[at + 4 : at + 8] == b"IDAT":
        end = at + 8 + int.from_bytes(member[at : at + 4])
        if deflate.crc32(member[at + 4 : end]) != int.from_bytes(member[end : end + 4]):
            return b""
        parts.append(member[at + 8 : end])
        at = end + 4
    return b"".join(parts)


def _unfilter(
    members: list[tuple[int, bytes]], pictures: list[bytes | bytearray], out: np.ndarray
) -> list[tuple[int, bytes]]:
    """The members' filtered lines into their rows of `out`. Returns the members where a line has no such filter."""
    if not pictures:
        return []
    height, width, num_channels = out.shape[1:]
    between = bytes(1 + width * num_channels)
    stored = deflate.zlib_compress(between.join([*pictures, b""]), 0)
    head = header(len(pictures) * (height + 1), width, num_channels)
    crc = deflate.crc32(stored, zlib.crc32(b"IDAT")).to_bytes(4)
    tall = b"".join([head, len(stored).to_bytes(4), b"IDAT", stored, crc, END])
    try:
        lines = pyspng.c.spng_decode_image_bytes(tall, _kind(num_channels))
    except Exception:
        return members
    out[[row for row, _ in members]] = lines.reshape(len(pictures), height + 1, width, num_channels)[:, :height]
    return []


def _not_inflated(stream: bytes, size: int) -> bytes:
    return b""
