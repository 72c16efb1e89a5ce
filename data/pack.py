"""`pack(source, url)`: images to WebDataset tar shards, their index and manifest.

The same source and arguments give the same bytes. Each shard is put when it is done; the manifest comes last and is
the commit. A pack that was killed is run again and keeps the shards that are there; another pack at the same URL is
refused. Existing WebDataset tars are indexed where they lie.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from scoreray.data.errors import UserError, nearest
from scoreray.data.index_tars import plan_tars, tars_at
from scoreray.data.manifest import FORMATS, RECORD, Manifest, Shard, digest
from scoreray.data.packing import Mapper, Packed, carry_out
from scoreray.data.records import records_sha256
from scoreray.data.sources import Source, open_source
from scoreray.data.store import open_store

SHARD_BYTES = 64 << 20  # about; large enough that a shard is one good read, small enough to make in memory
JPEG_QUALITY = 95
ENCODING = 1  # raised when the bytes that the same pack makes change


def pack(
    source: str | Path,
    url: str | Path,
    *,
    name: str | None = None,
    samples_per_shard: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    image_size: int | None = None,
    image_format: str = "png",
    seed: int = 0,
    workers: int = 1,
    map_shards: Mapper | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Packs `source` (.npz, IDX or a folder of images) at `url`, or indexes the WebDataset tars that lie there (then
    `source` and `url` are the same, an S3 URL or a folder), and returns the manifest.

    Args:
      samples_per_shard: None aims at `shard_bytes` by encoding a few samples first.
      image_size: resize the shorter side to it and crop the centre.
      image_format: png, jpg (lossy) or npy; arrays of floats are always npy.
      seed: of the permutation in which samples are packed.
      workers: threads that make shards; each holds one in memory.
      map_shards: does `map(function, shard numbers)`, in order, in another way (on a cluster) than by `workers`.
      progress: called with (samples done, samples in all) after each shard.

    Raises UserError for a source or URL that can't be used, DataError for an image that can't be read, StorageError.
    """
    if workers < 1:
        raise UserError(f"workers {workers}: at least 1 is needed")
    how: dict[str, Any] = {"workers": workers, "map_shards": map_shards, "progress": progress}
    if tars_at(source):
        if image_size is not None or samples_per_shard is not None:
            raise UserError(f"{source}: tars are indexed as they are; image_size and samples_per_shard can't be given")
        return carry_out(plan_tars(source, url, name), **how)
    opened = open_source(source, image_size)
    chosen = "npy" if opened.dtype == "float32" else image_format
    if chosen not in FORMATS:
        raise UserError(f"image_format '{image_format}': {nearest(image_format, FORMATS)}")
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UserError(f"samples_per_shard {samples_per_shard}: at least 1 is needed")
    if samples_per_shard is None:
        samples_per_shard = max(1, min(opened.num_samples, round(shard_bytes / _member_bytes(opened, chosen))))
    name = name or Path(source).name.split(".")[0]
    plan = ImagesPlan(open_store(url).url(), name, opened, samples_per_shard, chosen, seed)
    return carry_out(plan, **how)


@dataclass(frozen=True)
class ImagesPlan:
    """A packing.Plan that writes shards of a source's samples."""

    url: str
    name: str
    source: Source
    samples_per_shard: int
    image_format: str
    seed: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes

    @property
    def num_shards(self) -> int:
        return -(-self.source.num_samples // self.samples_per_shard)

    @property
    def sha256(self) -> str:
        parts = [ENCODING, self.source.fingerprint, self.shape, self.dtype, self.name, self.samples_per_shard,
                 self.image_format, self.seed]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def total_samples(self, done: list[Shard]) -> int:
        return self.source.num_samples

    def numbers(self, shard: int) -> np.ndarray:
        """Which samples of the source are in this shard: the permutation that the seed gives, cut into shards."""
        order = _permutation(self.seed, self.source.num_samples)
        return order[shard * self.samples_per_shard : (shard + 1) * self.samples_per_shard]

    def make(self, number: int) -> tuple[bytes | None, Packed]:
        return make_shard(self, number)


@lru_cache(maxsize=1)
def _permutation(seed: int, n: int) -> np.ndarray:
    """Sorted raw Philox words: the same with every version of numpy."""
    words = np.random.Philox(key=[seed % (1 << 64), 0xDA7A]).random_raw(n)
    return np.argsort(words, kind="stable")


def make_shard(plan: ImagesPlan, number: int) -> tuple[bytes | None, Packed]:
    """The bytes of a shard, and what is to be known of it. Members: `<number>.png` and, with labels, `<number>.cls`."""
    source = plan.source
    numbers = plan.numbers(number)
    tar = io.BytesIO()
    records = np.zeros(len(numbers), RECORD)
    sums = np.zeros(source.shape[0] if source.dtype == "uint8" else math.prod(source.shape), np.float64)
    squares = 0.0
    class_counts = np.zeros(len(source.classes), np.int64)
    for i, sample in enumerate(numbers):
        array = source.read(int(sample))
        data = encode(array, plan.image_format)
        key = f"{number * plan.samples_per_shard + i:08d}"
        offset = _add(tar, f"{key}.{plan.image_format}", data)
        label = -1
        if source.labels is not None:
            label = int(source.labels[sample])
            class_counts[label] += 1
            _add(tar, f"{key}.cls", str(label).encode())
        records[i] = (offset, len(data), label, FORMATS[plan.image_format], digest(data))
        # Sums of bytes are exact in float64, so statistics do not depend on how the samples are put into shards.
        values = array.astype(np.float64)
        sums += values.sum((0, 1)) if source.dtype == "uint8" else values.ravel()
        squares += float(np.square(values).sum())
    tar.write(bytes(2 * tarfile.BLOCKSIZE))
    data = tar.getvalue()
    shard = Shard(
        f"shards/{number:06d}.tar",
        len(numbers),
        len(data),
        hashlib.sha256(data).hexdigest(),
        records_sha256(records.tobytes()),
    )
    return data, Packed(shard, sums.tolist(), squares, class_counts.tolist(), records.tobytes())


def _add(tar: io.BytesIO, name: str, data: bytes) -> int:
    """Appends a member in plain USTAR, with nothing in it that depends on when or by whom; where its data begin."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    tar.write(header.tobuf(tarfile.USTAR_FORMAT))
    offset = tar.tell()
    tar.write(data)
    tar.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset


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


def _member_bytes(source: Source, image_format: str) -> float:
    """Bytes of a sample in a tar, from a few of them."""
    numbers = np.linspace(0, source.num_samples - 1, min(16, source.num_samples)).astype(int)
    sizes = [len(encode(source.read(int(i)), image_format)) for i in numbers]
    return float(np.mean(sizes)) + 256 + 512 + (1024 if source.labels is not None else 0)
