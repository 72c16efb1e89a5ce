"""A sample job from claiming its place to its record: shards with a manifest, a folder of pictures, or one npz.

The samples are cut into shards, each a function of the job alone (`plan.py`), made by one process or many. Every
finished shard is stored and recorded with its SHA-256, so a job that was killed goes on with the shards that are
missing and ends in the same bytes. What was asked for is stored beside the samples, with the SHA-256 of all files that
came of it (`record.py`): another request is not mixed with it, and what is missing or damaged later is drawn again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from scoreray.data.errors import DataError, ScorerayError, UserError
from scoreray.data.own_code import code_hashes
from scoreray.data.packing.commit import carry_out, pack_shard
from scoreray.data.packing.plan import PackedShard
from scoreray.data.reading.manifest import MANIFEST, Manifest
from scoreray.data.storage.lease import Lease
from scoreray.data.storage.store import NotFound, open_store
from scoreray.sampling.model.load import SampledModel, load_to_sample
from scoreray.sampling.offline.conditions import sha256_of
from scoreray.sampling.offline.driver import Form, choose_form, fingerprint
from scoreray.sampling.offline.files import take_back, write_npz, write_pictures
from scoreray.sampling.offline.generate import Request, SampleConditions, prepare
from scoreray.sampling.offline.place import (
    OWNER,
    Place,
    digest_of_file,
    files_of,
    give_way,
    group_name,
    refuse_strangers,
)
from scoreray.sampling.offline.plan import Mapper, SamplePlan
from scoreray.sampling.offline.record import Digests, FileDigest, SampleJob, SampleRecord
from scoreray.sampling.offline.starts import SourceStarts
from scoreray.sampling.samplers.sample import calls_each
from scoreray.trainer.optim.ema import length_name

SHARDS, MAX_SHARD_SAMPLES, MAX_SHARD_BYTES = 64, 4096, 64 << 20


def begin(
    place: Place,
    checkpoint: str,
    ema: str | None,
    request: Request,
    *,
    precision: str = "auto",
    compile_: str = "auto",
    samples_per_shard: int | None = None,
    processes: int = 1,
    pictures: bool = False,
    raw: bool = False,
    report: Callable[[str], None] = lambda what: None,
) -> tuple[SampleJob, SampledModel, Digests | None]:
    """Claims the place: (the job to carry out, its model, the digests of its files if it was finished before).

    A job of the same request that was begun there is gone on with: at the checkpoint that it began with, in the form
    that it took. pictures: whether the samples must be pictures whatever the format. raw: latents are not decoded.
    report: is called with what takes long, once it begins.
    Raises UserError naming what
    differs from another request's, DataError, StorageError.
    """
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {samples_per_shard}: at least 1 is needed")
    before = read_record(place, request.batch_size)
    if before is None:
        refuse_strangers(place)
    begun = None if before is None else before.job
    if begun is not None and begun.asked == _asked(checkpoint) and (ema is None or length_name(ema) == begun.ema):
        model = load_to_sample(begun.checkpoint, begun.ema, check=request.fitted)
    else:
        model = load_to_sample(checkpoint, ema, check=request.fitted)
    if raw:
        model.info = model.info.as_latents()
    request = replace(request.fitted(model.info), guidance=request.guided)
    model.info = model.info.at_size(request.size)
    prepare(model, request)  # finds, with the next line, what does not fit before anything is written
    conditions = SampleConditions(request, model.info)
    try:
        model.info.check_decodes()
    except UserError as error:
        raise UserError(f"{error}; --raw draws the latents as they are") from None
    shape = model.info.sample_shape
    if place.format == "png" and not model.info.is_picture:
        raise UserError(f"samples of shape {list(shape)} are no pictures; give --format webdataset or an .npz")
    if pictures and len(shape) < 2:
        raise UserError(f"--picture: samples of shape {list(shape)} have no grid to be shown on; leave it out")
    size = samples_per_shard or default_shard(request.count, shape)
    job = SampleJob(
        _asked(checkpoint), model.info.url, model.info.ema, fingerprint(model), request, place.format, size,
        precision, compile_, Form(), conditions_sha256=sha256_of(conditions.fixed),
        source_sha256=SourceStarts.sha256(model.info, request.source), raw=raw, own_code=code_hashes(request.sampler),
    )  # fmt: skip
    if before is None:
        place.store.check_writable()
        form = choose_form(model, request, precision=precision, compile_=compile_, processes=processes, report=report)
        job = replace(job, form=form)
        if place.store.put_new(place.record, job.to_json()):
            return job, model, None
        before = read_record(place, request.batch_size) or SampleRecord(job)  # another start was quicker
    if differences := before.job.differences(job):
        raise UserError(
            f"{place.store.url(place.record)}: samples of another request are there ({'; '.join(differences)}); "
            "give another --out, or remove what is there"
        )
    return before.job, model, before.finished


def _asked(url: str) -> str:
    return open_store(url).url()


def read_record(place: Place, batch_size: int) -> SampleRecord | None:
    """What was asked for at this place before. Raises DataError."""
    try:
        return SampleRecord.from_json(place.store.get(place.record), batch_size)
    except NotFound:
        return None
    except (ValueError, TypeError, KeyError) as error:
        where = place.store.url(place.record)
        raise DataError(f"{where}: is not what a request for samples left ({error}); give another --out") from None


def default_shard(count: int, shape: Sequence[int]) -> int:
    """Samples in a shard: some SHARDS shards in all, small enough to be made in memory; a function of the job alone."""
    most = max(16, min(MAX_SHARD_SAMPLES, MAX_SHARD_BYTES // (4 * math.prod(shape))))
    return min(most, 64 * math.ceil(count / SHARDS / 64))


def carry_out_job(place: Place, plan: SamplePlan, map_shards: Mapper, kept: Digests | None = None) -> str:
    """Makes the shards that are missing and brings them into the job's format; the URL of the result.

    map_shards: calls `pack_shard(plan, number)` for each number, in order, in this process or on a cluster.
    kept: of a job that was finished before, those of its files that are as they were (`place.intact`); the others are
    made again. Raises TakenOver where another start of the job has begun meanwhile.
    """
    store, job = place.store, plan.job
    lease = plan.lease = Lease.take(place.shards, OWNER, "job")
    before, counts = read_record(place, job.request.batch_size), Counter[str]()

    def counting(plan: SamplePlan, numbers: Sequence[int]) -> Iterator[PackedShard]:
        for packed in map_shards(plan, numbers):
            counts.update(packed.counts)
            yield packed

    try:
        make = _data_set if place.format == "webdataset" else _files
        files = make(place, plan, counting, kept)
        plan.check_owner()
    except ScorerayError:
        give_way(lease, place)
        raise
    acceptance = None if before is None else before.acceptance  # of all shards, where only some are made again
    if acceptance is None and counts["proposed"]:
        acceptance = round(counts["accepted"] / counts["proposed"], 6)
    calls = None if before is None else before.calls
    if calls is None and counts["calls"]:
        calls = calls_each(counts["calls"], counts["samples"])
    record = SampleRecord(job, {name: files[name] for name in files_of(place, job)}, acceptance, calls)
    store.put(place.record, record.to_json())
    place.clear()
    return store.url(place.result)


def _data_set(place: Place, plan: SamplePlan, map_shards: Mapper, kept: Digests | None) -> Digests:
    if kept is not None:
        take_back(place, plan, kept)
    carry_out(plan, workers=1, map_shards=lambda _, numbers: map_shards(plan, numbers), progress=None)
    manifest = Manifest.load(place.store)
    index = manifest.index
    digests = {shard.name: FileDigest(shard.bytes, shard.sha256) for shard in manifest.shards}
    digests[index.name] = FileDigest(index.bytes, index.sha256)
    return {**digests, MANIFEST: digest_of_file(place.store, MANIFEST)}


def _files(place: Place, plan: SamplePlan, map_shards: Mapper, kept: Digests | None) -> Digests:
    kept, numbers = kept or {}, range(plan.num_shards)
    if place.format == "npz":
        made = list(map_shards(plan, numbers))
        plan.check_owner()
        return write_npz(place, plan, made)
    missing = [number for number in numbers if group_name(plan.job.shard_samples(number)) not in kept]
    made = list(map_shards(plan, missing))
    plan.check_owner()
    return {**kept, **write_pictures(place, plan, missing, made)}


def in_this_process(progress: Callable[[int, int], None] | None = None) -> Mapper:
    """Shards made one after another; progress(samples done, in all) after every batch."""

    def run(plan: SamplePlan, numbers: Sequence[int]) -> Iterator[PackedShard]:
        total, done = plan.job.request.count, plan.num_outside(numbers)

        def count(n: int) -> None:
            nonlocal done
            done += n
            if progress:
                progress(done, total)

        plan.done = count
        for number in numbers:
            packed = pack_shard(plan, number)
            if packed.kept:
                count(packed.shard.num_samples)
            yield packed

    return run
