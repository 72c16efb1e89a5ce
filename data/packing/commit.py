"""Carrying out a pack: makes the missing shards, keeps a record of each under `packing/`, commits with the manifest."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import is_plain, target_of
from scoreray.data.fields.record_layout import index_bytes, record_of
from scoreray.data.packing.moments import FieldMoments, statistics, with_statistics
from scoreray.data.packing.plan import PackedShard, PackPlan, get_record, put_record
from scoreray.data.reading.manifest import INDEX, MANIFEST, Index, Manifest, Shard, check_limits
from scoreray.data.reading.records import chunk_digests
from scoreray.data.scratch import scratch_file, scratch_folder
from scoreray.data.sources.identity import hash_object
from scoreray.data.storage.paths import explained
from scoreray.data.storage.store import NotFound, Store, open_store
from scoreray.data.threads import map_in_threads

PLAN = "packing/plan"
IN_PLACE = "in-place"  # a word of the plan where the shards are somebody's tars, and not of its making

Mapper = Callable[[PackPlan, Sequence[int]], Iterable[PackedShard]]
"""Calls pack_shard(plan, number) for all numbers and returns the results in order: by threads, or on a cluster."""


class NoSamples(DataError):
    """None of the samples can be read, or, in a bucket, there are none."""


def carry_out(
    plan: PackPlan,
    *,
    workers: int,
    map_shards: Mapper | None,
    progress: Callable[[int, int], None] | None,
    skip_bad: int = 0,
) -> Manifest:
    """Makes the shards that are not there yet and commits the data set; arguments as pack()'s."""
    check_limits(plan.name, plan.fields, plan.num_shards)
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
                f"{store.url()}: holds another data set ('{manifest.name}'): of another source, or this one or an "
                "encoder had other contents, options or version; give another URL, or remove what is there"
            )
        if manifest.num_left_out > skip_bad:
            raise UserError(
                f"{store.url()}: is packed, without {manifest.num_left_out} samples that can't be read; accept that "
                f"with --skip-bad {manifest.num_left_out}, or fix them and give another URL"
            )
        return manifest
    begun = f"{plan.sha256} {plan.origin}{f' {IN_PLACE}' if plan.in_place else ''}".encode()
    if store.put_new(PLAN, begun) or _is_begun(store, plan):
        return None
    if not plan.origin or store.get(PLAN).decode().split()[1:2] != [plan.origin]:
        raise UserError(
            f"{store.url()}: a pack of another source, or with other arguments, has begun here, or its encoder has "
            "changed since; run that one again to finish it, give another URL, or remove what is there"
        )
    store.put(PLAN, begun)
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
    if (packed := finished_shard(plan, number)) is not None:
        return packed
    inputs = plan.inputs(number)  # as they are before they are read
    with explained(Path(tempfile.gettempdir())), scratch_folder() as folder:
        data, packed = plan.make(number, folder)
        return store_shard(plan, number, data, replace(packed, inputs=inputs))


def finished_shard(plan: PackPlan, number: int) -> PackedShard | None:
    """What an earlier run recorded of a shard whose inputs and bytes are still the same."""
    store = open_store(plan.url)
    try:
        packed = get_record(store, number, record_of(plan.fields))
        same = packed.inputs == plan.inputs(number) and (not packed.shard.num_samples or _is_whole(store, packed.shard))
    except (NotFound, ValueError, KeyError, TypeError):
        return None
    return packed if same else None


def store_shard(plan: PackPlan, number: int, data: bytes | Path | None, packed: PackedShard) -> PackedShard:
    """Puts a shard that was made, then the record that it is finished; `data` as `PackPlan.make` gives it."""
    store = open_store(plan.url)
    if data is not None:
        store.put(packed.shard.name, data)
    elif not plan.in_place:  # all of its samples are bad by now
        store.delete([packed.shard.name])
    put_record(store, number, packed)
    return packed


def _is_whole(store: Store, shard: Shard) -> bool:
    return hash_object(store, shard.name, shard.bytes) == shard.sha256


def _commit(
    store: Store,
    plan: PackPlan,
    done: Iterable[PackedShard],
    skip_bad: int,
    progress: Callable[[int, int], None] | None,
) -> Manifest:
    """The index and the manifest from the finished shards, in order; then what the packing left is removed."""
    shards, digests, num_samples, num_skipped = list[Shard](), list[bytes](), 0, 0
    totals, record = [FieldMoments() for _ in plan.fields], record_of(plan.fields)
    index_sha256 = hashlib.sha256()
    with scratch_file() as (index, path):
        for packed in done:
            num_skipped += len(packed.skipped)
            if num_skipped > skip_bad:
                last = packed.skipped[-1]
                raise DataError(f"{num_skipped} samples can't be read, --skip-bad is {skip_bad}; the last: {last}")
            if packed.shard.num_samples:
                shards.append(packed.shard)
                for total, part in zip(totals, packed.moments, strict=True):
                    total += part
            num_samples += packed.shard.num_samples
            index.write(packed.records)
            index_sha256.update(packed.records)
            digests.append(chunk_digests(packed.records, record))
            if progress:
                progress(num_samples + num_skipped, plan.total_samples(shards))
        index.write(b"".join(digests))
        index_sha256.update(b"".join(digests))
        index.flush()
        if not shards:
            raise NoSamples(f"{plan.name}: none of its samples can be read")
        store.put(INDEX, path)
    index_entry = Index(INDEX, index_bytes((shard.num_samples for shard in shards), record), index_sha256.hexdigest())
    manifest = Manifest(
        **_described(plan, totals, num_samples),
        name=plan.name,
        num_samples=num_samples,
        index=index_entry,
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


def _described(plan: PackPlan, totals: Sequence[FieldMoments], num_samples: int) -> dict[str, Any]:
    """What a manifest of version 2 or 3 says of the samples. Raises UserError for a target without any variety."""
    fields = list(plan.fields)
    if not is_plain(fields):
        fields = [with_statistics(field, total) for field, total in zip(fields, totals, strict=True)]
        target = target_of(fields)
        if max(target.std) == 0 and len(set(target.mean)) == 1:
            raise UserError(_NO_VARIETY.format(f"{plan.name}: field '{target.name}'"))
        return {"version": 3, "fields": fields}
    target, total = fields[0], totals[0]
    shape, sums, squares = list(target.shape), total.sums, total.squares
    if target.kind == "image" and total.is_grey:
        shape[0], sums, squares = 1, sums[:1], squares[:1]
    mean, std, sigma_data = statistics(sums, squares, num_samples * math.prod(shape), target.dtype)
    if sigma_data <= 0:
        raise UserError(_NO_VARIETY.format(plan.name))
    label = [with_statistics(*one) for one in zip(fields[1:], totals[1:], strict=True)]
    classes, counts = (label[0].classes, label[0].class_counts) if label else ([], [])
    if not any(counts) and label and not fields[1].classes:  # tars that have no class
        classes, counts = [], []
    return {
        "version": 2, "shape": shape, "dtype": target.dtype, "classes": classes, "class_counts": counts, "mean": mean,
        "std": std, "sigma_data": sigma_data,
    }  # fmt: skip


_NO_VARIETY = "{}: all samples are the same, nothing can be learned from them"
