"""Carrying out a pack: makes the missing shards, keeps a record of each under `packing/`, commits with the manifest."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.moments import statistics
from scoreray.data.reading.manifest import INDEX, MANIFEST, Index, Manifest, Shard, check_limits
from scoreray.data.reading.records import chunk_digests, index_bytes, records_sha256
from scoreray.data.scratch import scratch_file, scratch_folder
from scoreray.data.sources.identity import hash_object
from scoreray.data.storage.paths import explained
from scoreray.data.storage.store import NotFound, Store, open_store
from scoreray.data.threads import map_in_threads

PLAN = "packing/plan"

Mapper = Callable[["PackPlan", Sequence[int]], Iterable["PackedShard"]]
"""Calls pack_shard(plan, number) for all numbers and returns the results in order: by threads, or on a cluster."""


@dataclass(frozen=True)
class PackedShard:
    """A finished shard: its entry of the manifest, its records, and its part of the data set's statistics."""

    shard: Shard
    sums: list[float]  # of each channel; of uint8 values, or of floats
    squares: list[float]  # of each channel
    class_counts: list[int]
    records: bytes
    skipped: list[str] = field(default_factory=list)  # samples that could not be read and were left out, and why
    kept: bool = False  # it was there, from an earlier run of the same pack
    is_grey: bool = False  # images that are counted with three channels have one
    left_out: dict[str, int] = field(default_factory=dict)  # members that are no part of a sample, by kind
    inputs: str = ""  # the plan's `inputs` of the shard when it was made


class PackPlan(Protocol):
    """What is to be packed and how; it determines the bytes of every shard. Picklable, so that shards can be made on
    other machines."""

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
        """Equal for equal plans only."""

    @property
    def origin(self) -> str:
        """Equal for all packs of one source with the same options, even after files of the source have changed: an
        unfinished pack goes on once a broken file has been fixed. "" where only an equal plan may go on."""

    def inputs(self, number: int) -> str:
        """A digest of what determines the bytes of a shard, among plans of one origin. A shard that an earlier run made
        from other inputs is made again."""

    @property
    def in_place(self) -> bool:
        """Whether the shards exist already (tars of somebody else, which are never removed)."""

    @property
    def notes(self) -> list[str]:
        """Lines that a person should read before it begins."""

    def make(self, number: int, scratch: Path) -> tuple[bytes | Path | None, PackedShard]:
        """(what to put, what it is) of a shard, a Path being one in the folder `scratch`; None for bytes that are
        there already, or for a shard without samples."""

    def check_visible(self) -> None:
        """Raises UserError, DataError or StorageError when this process does not see the source."""

    def total_samples(self, done: list[Shard]) -> int:
        """The number of samples in all, or an estimate from the shards that are done."""


def carry_out(
    plan: PackPlan,
    *,
    workers: int,
    map_shards: Mapper | None,
    progress: Callable[[int, int], None] | None,
    skip_bad: int = 0,
) -> Manifest:
    """Makes the shards that are not there yet and commits the data set; arguments as pack()'s."""
    check_limits(plan.name, plan.shape, len(plan.classes or ()), plan.num_shards)
    store = open_store(plan.url)
    make = map_shards or partial(_map_in_process, workers)
    finished = _claim(store, plan, skip_bad)
    if finished is None:
        return _commit(store, plan, make(plan, range(plan.num_shards)), skip_bad, progress)
    sizes = dict(store.list())
    if sizes.get(finished.index.name) != finished.index.bytes:  # it needs all shards' records, removed at the commit
        return _commit(store, plan, make(plan, range(plan.num_shards)), skip_bad, progress)
    lost = [shard for shard in finished.shards if sizes.get(shard.name) != shard.bytes]
    if lost:
        _make_again(store, plan, lost, make, progress)
    return finished


def _make_again(
    store: Store, plan: PackPlan, lost: list[Shard], make: Mapper, progress: Callable[[int, int], None] | None
) -> None:
    """Shards of a finished pack that are gone or cut. Raises DataError where they become others than they were."""
    numbers = [int(Path(shard.name).stem) for shard in lost]  # `PackedShard.shard.name` of the plans that write shards
    done, total = 0, sum(shard.num_samples for shard in lost)
    for shard, packed in zip(lost, make(plan, numbers), strict=True):
        if packed.shard != shard:
            raise DataError(
                f"{store.url(shard.name)}: was gone or cut, and is not the same when it is made again (by another "
                "version of a library?); remove the data set and pack it again"
            )
        done += shard.num_samples
        if progress:
            progress(done, total)
    store.delete(f"packing/{number:06d}" for number in numbers)


def _map_in_process(workers: int, plan: PackPlan, numbers: Sequence[int]) -> Iterable[PackedShard]:
    make = partial(pack_shard, plan)
    return map(make, numbers) if workers == 1 else map_in_threads(workers, make, numbers)


def check_node(plan: PackPlan) -> None:
    """Raises UserError, DataError or StorageError when this process can't make shards of the plan: it does not see the
    source, or not the place that they go to."""
    plan.check_visible()
    store = open_store(plan.url)
    if not store.exists(PLAN) or not _is_begun(store, plan):
        raise UserError(f"{store.url()}: is not the place that the packing began at")


def _claim(store: Store, plan: PackPlan, skip_bad: int) -> Manifest | None:
    """Makes the URL this plan's. The manifest if the same pack is already finished. Raises UserError for another's."""
    if store.exists(MANIFEST):
        manifest = Manifest.load(store)
        if manifest.packing != plan.sha256:
            raise UserError(
                f"{store.url()}: holds another data set ('{manifest.name}'): of another source, or this one had other "
                "contents, options or version; give another URL, or remove what is there"
            )
        if manifest.num_left_out > skip_bad:
            raise UserError(
                f"{store.url()}: is packed, without {manifest.num_left_out} samples that can't be read; accept that "
                f"with --skip-bad {manifest.num_left_out}, or fix them and give another URL"
            )
        return manifest
    if store.put_new(PLAN, f"{plan.sha256} {plan.origin}".encode()) or _is_begun(store, plan):
        return None
    if not plan.origin or store.get(PLAN).decode().split()[1:] != [plan.origin]:
        raise UserError(
            f"{store.url()}: a pack of another source, or with other arguments, has begun here; run that one again to "
            "finish it, give another URL, or remove what is there"
        )
    store.put(PLAN, f"{plan.sha256} {plan.origin}".encode())
    names = [Path(key).name for key, _ in store.list("packing/")]
    surplus = [name for name in names if name.isdecimal() and int(name) >= plan.num_shards]
    store.delete([] if plan.in_place else [f"shards/{name}.tar" for name in surplus])
    store.delete(f"packing/{name}" for name in surplus)
    return None


def _is_begun(store: Store, plan: PackPlan) -> bool:
    """Whether the pack that has begun at the URL is this one, of the same contents."""
    return store.get(PLAN).decode().split()[:1] == [plan.sha256]


def pack_shard(plan: PackPlan, number: int) -> PackedShard:
    """Makes and puts shard `number`, or finds it finished by an earlier run (its SHA-256 is checked)."""
    store = open_store(plan.url)
    done = f"packing/{number:06d}"
    inputs = plan.inputs(number)
    try:
        packed = _from_record(store.get(done))
        if packed.inputs == inputs and (not packed.shard.num_samples or _is_whole(store, packed.shard)):
            return packed
    except (NotFound, ValueError, KeyError, TypeError):
        pass
    with explained(Path(tempfile.gettempdir())), scratch_folder() as folder:
        data, packed = plan.make(number, folder)
        if data is not None:
            store.put(packed.shard.name, data)
        elif not plan.in_place:  # all of its samples are bad by now
            store.delete([packed.shard.name])
    packed = replace(packed, inputs=inputs)
    put_record(store, number, packed)
    return packed


def _is_whole(store: Store, shard: Shard) -> bool:
    return hash_object(store, shard.name, shard.bytes) == shard.sha256


def put_record(store: Store, number: int, packed: PackedShard) -> None:
    """Records that shard `number` is finished: its bytes are stored."""
    store.put(f"packing/{number:06d}", _to_record(packed))


def _to_record(packed: PackedShard) -> bytes:
    """A line of JSON, then the records."""
    described = {"shard": [getattr(packed.shard, name) for name in Shard.__slots__], "sums": packed.sums,
                 "squares": packed.squares, "class_counts": packed.class_counts, "skipped": packed.skipped,
                 "is_grey": packed.is_grey, "left_out": packed.left_out, "inputs": packed.inputs}  # fmt: skip
    return json.dumps(described).encode() + b"\n" + packed.records


def _from_record(data: bytes) -> PackedShard:
    described, _, records = data.partition(b"\n")
    fields = json.loads(described)
    shard = Shard(*fields["shard"])
    if records_sha256(records) != shard.records_sha256:
        raise ValueError("the records of this shard are damaged")
    names = ("sums", "squares", "class_counts", "skipped", "is_grey", "left_out", "inputs")
    return PackedShard(shard=shard, records=records, kept=True, **{name: fields[name] for name in names})


def _commit(
    store: Store,
    plan: PackPlan,
    done: Iterable[PackedShard],
    skip_bad: int,
    progress: Callable[[int, int], None] | None,
) -> Manifest:
    """The index and the manifest from the finished shards, in order; then what the packing left is removed."""
    shards: list[Shard] = []
    sums, squares = np.zeros(plan.shape[0]), np.zeros(plan.shape[0])
    num_samples, num_skipped, shape = 0, 0, list(plan.shape)
    is_grey = True
    counts: list[int] = [0] * len(plan.classes or [])
    digests: list[bytes] = []
    index_sha256 = hashlib.sha256()
    with scratch_file() as (index, path):
        for packed in done:
            num_skipped += len(packed.skipped)
            if num_skipped > skip_bad:
                last = packed.skipped[-1]
                raise DataError(f"{num_skipped} samples can't be read, --skip-bad is {skip_bad}; the last: {last}")
            if packed.shard.num_samples:
                shards.append(packed.shard)
                is_grey = is_grey and packed.is_grey
            num_samples += packed.shard.num_samples
            sums, squares = sums + np.asarray(packed.sums), squares + np.asarray(packed.squares)
            counts += [0] * (len(packed.class_counts) - len(counts))
            counts = [a + b for a, b in zip(counts, [*packed.class_counts, *[0] * len(counts)], strict=False)]
            index.write(packed.records)
            index_sha256.update(packed.records)
            digests.append(chunk_digests(packed.records))
            if progress:
                progress(num_samples + num_skipped, plan.total_samples(shards))
        index.write(b"".join(digests))
        index_sha256.update(b"".join(digests))
        index.flush()
        if not shards:
            raise DataError(f"{plan.name}: none of its samples can be read")
        store.put(INDEX, path)
    if is_grey:
        shape[0], sums, squares = 1, sums[:1], squares[:1]
    mean, std, sigma_data = statistics(sums, squares, num_samples * math.prod(shape), plan.dtype)
    if sigma_data <= 0:
        raise UserError(f"{plan.name}: all samples are the same, nothing can be learned from them")
    dtype: Literal["uint8", "float32"] = "uint8" if plan.dtype == "uint8" else "float32"
    manifest = Manifest(
        version=2,
        name=plan.name,
        shape=shape,
        dtype=dtype,
        num_samples=num_samples,
        classes=[str(c) for c in range(len(counts))] if plan.classes is None else plan.classes,
        class_counts=counts,
        mean=mean,
        std=std,
        sigma_data=sigma_data,
        index=Index(INDEX, index_bytes(shard.num_samples for shard in shards), index_sha256.hexdigest()),
        shards=shards,
        num_left_out=num_skipped,
        packing=plan.sha256,
    )
    if store.exists(PLAN) and not _is_begun(store, plan):
        raise UserError(
            f"{store.url()}: another start of this pack, of a source that has changed since, has taken over; that one "
            "finishes it"
        )
    store.put(MANIFEST, manifest.to_json().encode())
    store.delete([PLAN, *(f"packing/{i:06d}" for i in range(plan.num_shards))])
    return manifest
