"""Writing one shard: samples encoded into a tar by webdataset's TarWriter, with their records and channel sums.

The bytes depend on the samples alone: no times, owners or paths are in them.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from typing import IO

import numpy as np
import simplejpeg
from PIL import Image

from scoreray.data.packing.commit import PackedShard
from scoreray.data.packing.moments import ChannelMoments
from scoreray.data.reading.manifest import FORMATS, RECORD, Shard, digest
from scoreray.data.reading.records import records_sha256

JPEG_QUALITY = 95
ENCODING = 1  # raised when the bytes that the same pack makes change


class ShardWriter:
    """Writes members `<key>.<format>`, with a label `<key>.cls` and with a note `<key>.json` to `file` as they come.

    shape: (C, H, W) of images with `dtype` uint8, else the arrays'.

    The tar is plain USTAR, as TarWriter is given a whole number as the time: its default, the clock's as a float, makes
    tarfile put a PAX header of 1 KB before every member (26.2 MB instead of 13.9 for 6,000 images of 28 x 28). A member
    costs 20 us more than USTAR headers put together by hand: of packing from a folder of pictures of 256 x 256 nothing
    that can be measured, out of an array of 64 x 64 jpgs 16%, of 28 x 28 pngs 22% (samples of two members).
    """

    def __init__(self, file: IO[bytes], shape: tuple[int, ...], dtype: str, image_format: str) -> None:
        from webdataset import TarWriter  # imports torch, 0.9 s: where a shard is made, not for the command line

        self._file, self._format = _HashedFile(file), image_format
        self._tar = TarWriter(self._file, user="", group="", mode=0o644, mtime=0, encoder=False)
        self._position = 0
        self._records: list[tuple[int, int, int, int, int]] = []
        self._moments = ChannelMoments(shape, dtype)
        self._class_counts: list[int] = []

    def add(self, key: str, array: np.ndarray, label: int, note: bytes = b"") -> None:
        """A sample, uint8 [H, W, C] or a float32 array; label -1 for none; note: JSON about it."""
        data = encode(array, self._format)
        offset = self._member(key, self._format, data)
        if label >= 0:
            self._member(key, "cls", str(label).encode())
            self._class_counts += [0] * (label + 1 - len(self._class_counts))
            self._class_counts[label] += 1
        if note:
            self._member(key, "json", note)
        self._records.append((offset, len(data), label, FORMATS[self._format], digest(data)))
        self._moments.add(array)

    def finish(self, name: str, skipped: list[str] | None = None) -> PackedShard:
        """Ends the tar; what is to be known of it."""
        self._file.end = end = self._position + 2 * tarfile.BLOCKSIZE
        self._tar.close()
        assert self._file.position == end, "a member's header was not one block"
        array = np.zeros(len(self._records), RECORD)
        array[:] = self._records
        records = array.tobytes()
        shard = Shard(name, len(self._records), end, self._file.sha256.hexdigest(), records_sha256(records))
        sums, squares = self._moments.sums.tolist(), self._moments.squares.tolist()
        return PackedShard(shard, sums, squares, self._class_counts, records, skipped or [])

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


def encode(array: np.ndarray, image_format: str) -> bytes:
    """uint8 [H, W, C] as png, jpg or npy (as [C, H, W]); a float array as npy."""
    if image_format == "jpg":
        colorspace = "GRAY" if array.shape[2] == 1 else "RGB"
        array = np.ascontiguousarray(array)
        return simplejpeg.encode_jpeg(array, JPEG_QUALITY, colorspace, "Gray" if array.shape[2] == 1 else "444")
    out = io.BytesIO()
    if image_format == "png":
        image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
        image.save(out, "PNG", compress_level=6)
    else:
        plain = array.transpose(2, 0, 1) if array.dtype == np.uint8 else array
        np.lib.format.write_array(out, np.ascontiguousarray(plain), (1, 0), allow_pickle=False)
    return out.getvalue()
