"""Finished shards on their way to a data set: a record of each is kept under `packing/`, the manifest is the commit."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from scoreray.data.errors import UserError
from scoreray.data.manifest import INDEX, MANIFEST, Index, Manifest, Shard
from scoreray.data.records import chunk_digests, index_bytes, records_sha256
from scoreray.data.store import NotFound, Store, open_store

PLAN = "packing/plan"

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


class Plan(Protocol):
    """All that decides what becomes of a shard. Picklable, so that shards can be made on other machines."""

    @property
    def url(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def classes(self) -> list[str] | None:
        """Names, or None for numbers as far as they go."""

    @property
    def num_shards(self) -> int: ...
    @property
    def sha256(self) -> str:
        """The same for the same plan only."""

    def make(self, number: int) -> tuple[bytes | None, Packed]:
        """(bytes to put, what they are) of a shard; None for bytes that are there already."""

    def total_samples(self, done: list[Shard]) -> int:
        """How many there are in all, or likely are."""


def carry_out(
    plan: Plan, *, workers: int, map_shards: Mapper | None, progress: Callable[[int, int], None] | None
) -> Manifest:
    """Makes the shards that are not there yet and commits the data set; arguments as pack()'s."""
    store = open_store(plan.url)
    finished = _claim(store, plan)
    if finished:
        return finished
    run = map_shards or (map if workers == 1 else partial(_map_in_threads, workers))
    return _commit(store, plan, run(partial(pack_shard, plan), range(plan.num_shards)), progress)


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
    data, packed = plan.make(number)
    if data is not None:
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
    if records_sha256(records) != shard.records_sha256:
        raise ValueError("the records of this shard are damaged")
    return Packed(shard, fields["sums"], fields["squares"], fields["class_counts"], records)


def _commit(store: Store, plan: Plan, done: Iterable[Packed], progress: Callable[[int, int], None] | None) -> Manifest:
    """The index and the manifest from the finished shards, in order; then what the packing left is removed."""
    shards: list[Shard] = []
    sums, squares, num_samples = np.zeros(1), 0.0, 0
    counts: list[int] = [0] * len(plan.classes or [])
    digests: list[bytes] = []
    index_sha256 = hashlib.sha256()
    with tempfile.NamedTemporaryFile(prefix="scoreray-index-") as index:
        for packed in done:
            shards.append(packed.shard)
            num_samples += packed.shard.num_samples
            sums, squares = sums + np.asarray(packed.sums), squares + packed.squares
            counts += [0] * (len(packed.class_counts) - len(counts))
            counts = [a + b for a, b in zip(counts, [*packed.class_counts, *[0] * len(counts)], strict=False)]
            index.write(packed.records)
            index_sha256.update(packed.records)
            digests.append(chunk_digests(packed.records))
            if progress:
                progress(num_samples, plan.total_samples(shards))
        index.write(b"".join(digests))
        index_sha256.update(b"".join(digests))
        index.flush()
        store.put(INDEX, Path(index.name))
    mean, sigma_data = statistics(sums, squares, num_samples * math.prod(plan.shape), plan.dtype)
    if sigma_data <= 0:
        raise UserError(f"{plan.name}: all samples are the same, nothing can be learned from them")
    dtype: Literal["uint8", "float32"] = "uint8" if plan.dtype == "uint8" else "float32"
    manifest = Manifest(
        version=2,
        name=plan.name,
        shape=list(plan.shape),
        dtype=dtype,
        num_samples=num_samples,
        classes=[str(c) for c in range(len(counts))] if plan.classes is None else plan.classes,
        class_counts=counts,
        mean=mean,
        sigma_data=sigma_data,
        index=Index(INDEX, index_bytes(shard.num_samples for shard in shards), index_sha256.hexdigest()),
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
