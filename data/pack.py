"""`pack(source, url)`: images to WebDataset tar shards, their index and manifest.

The same source and arguments give the same bytes. Each shard is put when it is done, with a record of it under
`packing/`; the manifest comes last and is the commit. A pack that was killed is run again and keeps the shards that
are there; another pack at the same URL is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from scoreray.data.errors import UserError, nearest
from scoreray.data.manifest import FORMATS, INDEX, MANIFEST, RECORD, Index, Manifest, Shard, digest
from scoreray.data.sources import Source, open_source
from scoreray.data.store import NotFound, Store, open_store

PLAN = "packing/plan.json"
SHARD_BYTES = 64 << 20  # about; large enough that a shard is one good read, small enough to make in memory
JPEG_QUALITY = 95
ENCODING = 1  # raised when the bytes that the same pack makes change

# How `map` over the shards' numbers is done: map itself, by threads, or (given by the caller) on a cluster.
Mapper = Callable[[Callable[[int], "Packed"], Iterable[int]], Iterable["Packed"]]


@dataclass(frozen=True)
class Packed:
    """A finished shard: what the manifest says of it, and what its samples add to the data set's statistics."""

    shard: Shard
    sums: list[float]  # per channel; of uint8 values, or of floats
    squares: float
    class_counts: list[int]
    records: bytes


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of a shard. Picklable, so that shards can be made on other machines."""

    source: Source
    url: str
    name: str
    samples_per_shard: int
    image_format: str
    seed: int

    @property
    def num_shards(self) -> int:
        return -(-self.source.num_samples // self.samples_per_shard)

    @property
    def sha256(self) -> str:
        source = self.source
        parts = [ENCODING, source.fingerprint, source.shape, source.dtype, self.name, self.samples_per_shard,
                 self.image_format, self.seed]  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def numbers(self, shard: int) -> np.ndarray:
        """Which samples of the source are in this shard: the permutation that the seed gives, cut into shards."""
        order = _permutation(self.seed, self.source.num_samples)
        return order[shard * self.samples_per_shard : (shard + 1) * self.samples_per_shard]


@lru_cache(maxsize=1)
def _permutation(seed: int, n: int) -> np.ndarray:
    """Sorted raw Philox words: the same with every version of numpy."""
    words = np.random.Philox(key=[seed % (1 << 64), 0xDA7A]).random_raw(n)
    return np.argsort(words, kind="stable")


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
    """Packs `source` (.npz, IDX or a folder of images) at `url` and returns the manifest.

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
    opened = open_source(source, image_size)
    chosen = "npy" if opened.dtype == "float32" else image_format
    if chosen not in FORMATS:
        raise UserError(f"image_format '{image_format}': {nearest(image_format, FORMATS)}")
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UserError(f"samples_per_shard {samples_per_shard}: at least 1 is needed")
    if samples_per_shard is None:
        samples_per_shard = max(1, min(opened.num_samples, round(shard_bytes / _member_bytes(opened, chosen))))
    store = open_store(url)
    plan = Plan(opened, store.url(), name or Path(source).name.split(".")[0], samples_per_shard, chosen, seed)
    finished = _claim(store, plan)
    if finished:
        return finished
    run = map_shards or (map if workers == 1 else partial(_map_in_threads, workers))
    return _commit(store, plan, _watched(run(partial(pack_shard, plan), range(plan.num_shards)), plan, progress))


def _map_in_threads(workers: int, make: Callable[[int], Packed], numbers: Iterable[int]) -> Iterator[Packed]:
    """`map` by `workers` threads, a few ahead only: a mistake shows at once, and finished shards do not pile up."""
    ahead: deque[Future[Packed]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for number in numbers:
                ahead.append(pool.submit(make, number))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _watched(done: Iterable[Packed], plan: Plan, progress: Callable[[int, int], None] | None) -> Iterator[Packed]:
    num_samples = 0
    for packed in done:
        num_samples += packed.shard.num_samples
        if progress:
            progress(num_samples, plan.source.num_samples)
        yield packed


def _claim(store: Store, plan: Plan) -> Manifest | None:
    """Makes the URL this plan's. The manifest if the same pack is already finished. Raises UserError for another's."""
    if store.exists(MANIFEST):
        manifest = Manifest.load(store)
        if manifest.packing == plan.sha256:
            return manifest
        raise UserError(f"{store.url()}: holds another data set ('{manifest.name}'); give another URL or remove it")
    if not store.put_new(PLAN, plan.sha256.encode()) and store.get(PLAN) != plan.sha256.encode():
        raise UserError(
            f"{store.url()}: a pack of another source, or with other arguments, has begun here; run that one again to "
            "finish it, give another URL, or remove what is there"
        )
    return None


def pack_shard(plan: Plan, number: int) -> Packed:
    """Makes and puts shard `number`, or finds it finished by an earlier run (its SHA-256 is checked)."""
    store = open_store(plan.url)
    done = f"packing/{number:06d}"
    try:
        packed = _from_record(store.get(done))
        if hashlib.sha256(store.get(packed.shard.name)).hexdigest() == packed.shard.sha256:
            return packed
    except (NotFound, ValueError, KeyError, TypeError):
        pass
    data, packed = make_shard(plan, number)
    store.put(packed.shard.name, data)
    store.put(done, _to_record(packed))
    return packed


def _to_record(packed: Packed) -> bytes:
    """A line of JSON, then the records."""
    described = {"shard": [getattr(packed.shard, name) for name in Shard.__slots__], "sums": packed.sums,
                 "squares": packed.squares, "class_counts": packed.class_counts}  # fmt: skip
    return json.dumps(described).encode() + b"\n" + packed.records


def _from_record(data: bytes) -> Packed:
    described, _, records = data.partition(b"\n")
    fields = json.loads(described)
    shard = Shard(*fields["shard"])
    if hashlib.sha256(records).hexdigest() != shard.records_sha256:
        raise ValueError("the records of this shard are damaged")
    return Packed(shard, fields["sums"], fields["squares"], fields["class_counts"], records)


def make_shard(plan: Plan, number: int) -> tuple[bytes, Packed]:
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
        hashlib.sha256(records.tobytes()).hexdigest(),
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


def _commit(store: Store, plan: Plan, done: Iterable[Packed]) -> Manifest:
    """The index and the manifest from the finished shards, in order; then what the packing left is removed."""
    source = plan.source
    shards, sums, squares = [], np.zeros(1), 0.0
    class_counts = np.zeros(len(source.classes), np.int64)
    index_sha256 = hashlib.sha256()
    with tempfile.NamedTemporaryFile(prefix="scoreray-index-") as index:
        for packed in done:
            shards.append(packed.shard)
            sums, squares = sums + np.asarray(packed.sums), squares + packed.squares
            class_counts += np.asarray(packed.class_counts, np.int64)
            index.write(packed.records)
            index_sha256.update(packed.records)
        index.flush()
        store.put(INDEX, Path(index.name))
    num_values = source.num_samples * math.prod(source.shape)
    mean, sigma_data = statistics(sums, squares, num_values, source.dtype)
    if sigma_data <= 0:
        raise UserError(f"{source.path}: all samples are the same, nothing can be learned from them")
    manifest = Manifest(
        version=1,
        name=plan.name,
        shape=list(source.shape),
        dtype="uint8" if source.dtype == "uint8" else "float32",
        num_samples=source.num_samples,
        classes=source.classes,
        class_counts=class_counts.tolist(),
        mean=mean,
        sigma_data=sigma_data,
        index=Index(INDEX, source.num_samples * RECORD.itemsize, index_sha256.hexdigest()),
        shards=shards,
        packing=plan.sha256,
    )
    store.put(MANIFEST, manifest.to_json().encode())
    store.delete([PLAN, *(f"packing/{i:06d}" for i in range(len(shards)))])
    return manifest


def statistics(sums: np.ndarray, squares: float, num_values: int, dtype: str) -> tuple[list[float], float]:
    """(mean per channel, standard deviation of all values) in the range that the model sees."""
    mean = sums / (num_values / len(sums))
    deviation = math.sqrt(max(0.0, squares / num_values - (sums.sum() / num_values) ** 2))
    if dtype == "uint8":
        return (mean / 127.5 - 1).tolist(), deviation / 127.5
    return mean.tolist(), deviation
