"""Writing one shard: samples encoded into a plain USTAR tar, with their records and channel sums.

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
    """

    def __init__(self, file: IO[bytes], shape: tuple[int, ...], dtype: str, image_format: str) -> None:
        self._file, self._format = file, image_format
        self._sha256, self._position = hashlib.sha256(), 0
        self._records: list[tuple[int, int, int, int, int]] = []
        self._moments = ChannelMoments(shape, dtype)
        self._class_counts: list[int] = []

    def add(self, key: str, array: np.ndarray, label: int, note: bytes = b"") -> None:
        """A sample, uint8 [H, W, C] or a float32 array; label -1 for none; note: JSON about it."""
        data = encode(array, self._format)
        offset = self._member(f"{key}.{self._format}", data)
        if label >= 0:
            self._member(f"{key}.cls", str(label).encode())
            self._class_counts += [0] * (label + 1 - len(self._class_counts))
            self._class_counts[label] += 1
        if note:
            self._member(f"{key}.json", note)
        self._records.append((offset, len(data), label, FORMATS[self._format], digest(data)))
        self._moments.add(array)

    def finish(self, name: str, skipped: list[str] | None = None) -> PackedShard:
        """Ends the tar; what is to be known of it."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        array = np.zeros(len(self._records), RECORD)
        array[:] = self._records
        records = array.tobytes()
        shard = Shard(name, len(self._records), self._position, self._sha256.hexdigest(), records_sha256(records))
        sums, squares = self._moments.sums.tolist(), self._moments.squares.tolist()
        return PackedShard(shard, sums, squares, self._class_counts, records, skipped or [])

    def _member(self, name: str, data: bytes) -> int:
        """Appends a member in plain USTAR; where its data begin."""
        header = tarfile.TarInfo(name)
        header.size = len(data)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._position
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._position += len(data)


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
