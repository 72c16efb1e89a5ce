"""Many samples to a place: WebDataset shards with a manifest, a folder of pictures, or one npz; by one process or many.

The samples are cut into shards, each a function of the job alone. Every finished shard is put and recorded with its
SHA-256, so a job that was killed goes on with the shards that are missing and ends in the same bytes. What was asked
for lies beside the samples, with the SHA-256 of all that came of it: another request is not mixed with it, and what is
missing or damaged later is drawn again.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from scoreray.data.errors import DataError, ScorerayError, UserError
from scoreray.data.packing.commit import Packed, carry_out, pack_shard
from scoreray.data.packing.shards import ShardWriter
from scoreray.data.reading.manifest import MANIFEST, Manifest, Shard
from scoreray.data.storage.lease import Lease, LeaseRemoved, TakenOver
from scoreray.data.storage.store import NotFound, open_store
from scoreray.data.traces import span
from scoreray.sampling.guidance.steering import Guidance, Measurement
from scoreray.sampling.model.describe import is_picture
from scoreray.sampling.model.load import LoadedDenoiser, LoadedMachine, load_model
from scoreray.sampling.offline.driver import Form, choose_form, fingerprint, in_form
from scoreray.sampling.offline.generate import Request, prepare
from scoreray.sampling.offline.place import (
    OWNER,
    Digest,
    Format,
    Place,
    digest_of_file,
    files_of,
    group,
    group_name,
    refuse_strangers,
    shard_name,
    taken_over,
)
from scoreray.trainer.optim.ema import length_name
from scoreray.trainer.step import to_uint8

VERSION = 1  # raised when the bytes that the same job makes change
SHARDS, MAX_SHARD_SAMPLES, MAX_SHARD_BYTES = 64, 4096, 64 << 20

Model = LoadedDenoiser | LoadedMachine
Mapper = Callable[["Samples", Sequence[int]], Iterable[Packed]]


@dataclass(frozen=True)
class Job:
    """All that decides the samples and their bytes, in words and numbers, so that it can travel and be written down.

    asked: the URL that was asked for; a run's stands for its newest checkpoint, and `checkpoint` is which that was.
    weights: their SHA-256. request: with sampler, steps and grid filled in; its batch_size decides nothing.
    """

    asked: str
    checkpoint: str
    ema: str
    weights: str
    request: Request
    format: Format
    samples_per_shard: int
    precision: str
    compile: str
    form: Form
    version: int = VERSION

    def to_json(self, **more: Any) -> bytes:
        return (json.dumps({**self.fields(), **more}, indent=1) + "\n").encode()

    def fields(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["request"]["batch_size"]
        fields["request"]["guidance"] = asdict(self.request.guided)
        return json.loads(json.dumps(fields))

    @staticmethod
    def from_json(fields: dict[str, Any], batch_size: int) -> Job:
        request, form = dict(fields["request"]), Form(**fields["form"])
        interval = request["guidance"]["interval"]
        guidance = Guidance(**{**request["guidance"], "interval": tuple(interval) if interval else None})
        measurement = Measurement(**request["measurement"]) if request["measurement"] else None
        whole = Request(**{**request, "guidance": guidance, "measurement": measurement, "batch_size": batch_size})
        return Job(**{name: value for name, value in fields.items() if name not in ("request", "form", "finished")},
                   request=whole, form=form)  # fmt: skip


@dataclass
class Samples:
    """The plan of a job (`commit.Plan`): makes its shards. `done(n)` is called after each batch of n samples.

    lease: of the start that it is made for; where another start has taken over, no shard is put. None: not asked.
    """

    job: Job
    url: str
    model: Model
    done: Callable[[int], None] = field(default=lambda n: None)
    lease: Lease | None = None

    def __post_init__(self) -> None:
        self._draw: Callable[[int, torch.Tensor], torch.Tensor] | None = None
        self.shape = tuple(self.model.info.image_shape)
        self.dtype = "uint8" if is_picture(self.shape) else "float32"
        self.classes = list(self.model.info.classes)
        self.name = f"{self.model.info.config.run.name}-samples"
        self.notes: list[str] = []

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.job.to_json()).hexdigest()

    origin = ""  # only the same job goes on
    in_place = False

    def inputs(self, number: int) -> str:
        return ""  # nothing but the job

    @property
    def num_shards(self) -> int:
        return math.ceil(self.job.request.count / self.job.samples_per_shard)

    def total_samples(self, done: list[Shard]) -> int:
        return self.job.request.count

    def elsewhere(self, numbers: Sequence[int]) -> int:
        """Samples that are in none of these shards."""
        return self.job.request.count - sum(len(group(self.job, number)) for number in numbers)

    def check_here(self) -> None:
        """The model is loaded already."""

    def check_owner(self) -> None:
        """Raises TakenOver where the job is another start's by now."""
        if self.lease is None:
            return
        try:
            self.lease.check()
        except (TakenOver, LeaseRemoved):  # removed: the other start has finished, and cleared up
            raise taken_over(self.url) from None

    def make(self, number: int, scratch: Path) -> tuple[bytes, Packed]:
        """Members `<i>.png` (or .npy), `<i>.cls` where there are classes, and `<i>.json` with the sample's seed."""
        job, request, info = self.job, self.job.request, self.model.info
        self.check_owner()
        if self._draw is None:
            self._draw = prepare(in_form(self.model, job.form), request)
        tar, numbers = io.BytesIO(), group(job, number)
        start, end = numbers.start, numbers.stop
        writer = ShardWriter(tar, self.shape, self.dtype, "png" if self.dtype == "uint8" else "npy")
        for first in range(start, end, request.batch_size):
            last = min(first + request.batch_size, end)
            labels, seeds = request.labels(first, last, info), request.sample_seeds(first, last).tolist()
            with span("sample.batch", first=first, rows=last - first, sampler=request.sampler):
                x = self._draw(first, labels)
            arrays = to_uint8(x).permute(0, 2, 3, 1).numpy() if self.dtype == "uint8" else x.numpy()
            for i, (array, label, seed) in enumerate(zip(arrays, labels.tolist(), seeds, strict=True), first):
                note = {"sample": i, "seed": seed, "class_label": label if label >= 0 else None}
                writer.add(f"{i:08d}", array, label, json.dumps(note).encode())
            self.done(last - first)
        packed = writer.finish(shard_name(number))
        self.check_owner()
        return tar.getvalue(), packed


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
) -> tuple[Job, Model, dict[str, Digest] | None]:
    """Claims the place: (the job to carry out, its model, what is recorded of its files if it was finished before).

    A job of the same request that was begun there is gone on with: at the checkpoint that it began with, in the form
    that it took. pictures: whether the samples must be pictures whatever the format. Raises UserError naming what
    differs from another request's, DataError, StorageError.
    """
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UserError(f"--samples-per-shard {samples_per_shard}: at least 1 is needed")
    there = _read(place)
    if there is None:
        refuse_strangers(place)
    if there is not None and there["asked"] == _asked(checkpoint) and (ema is None or length_name(ema) == there["ema"]):
        model = load_model(there["checkpoint"], there["ema"])
    else:
        model = load_model(checkpoint, ema)
    request = replace(request.fitted(model.info), guidance=request.guided)
    prepare(model, request)  # finds, with the next line, what does not fit before anything is written
    request.labels(0, 1, model.info)
    shape = model.info.image_shape
    if (pictures or place.format == "png") and not is_picture(shape):
        raise UserError(f"samples of shape {list(shape)} are no pictures; give --format webdataset or an .npz")
    size = samples_per_shard or default_shard(request.count, shape)
    job = Job(
        _asked(checkpoint), model.info.url, model.info.ema, fingerprint(model), request, place.format, size,
        precision, compile_, Form(),
    )  # fmt: skip
    if there is None:
        place.store.check_writable()
        form = choose_form(model, request, precision=precision, compile_=compile_, processes=processes)
        job = replace(job, form=form)
        if place.store.put_new(place.record, job.to_json()):
            return job, model, None
        there = _read(place) or {}
    _check_same(place, there, job)
    begun = Job.from_json(there, request.batch_size)
    finished = there.get("finished")
    return begun, model, finished if isinstance(finished, dict) else None


def _asked(url: str) -> str:
    return open_store(url).url()


def _read(place: Place) -> dict[str, Any] | None:
    """What was asked for at this place before."""
    where = place.store.url(place.record)
    try:
        fields = json.loads(place.store.get(place.record))
        Job.from_json(fields, 1)
    except NotFound:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: is not what a request for samples left ({error}); give another --out") from None
    return fields


def _check_same(place: Place, there: dict[str, Any], job: Job) -> None:
    """Raises UserError naming every field in which the request at the place differs from `job`."""
    ours = job.fields()
    differing = []
    for name, now in ours.items():
        before: Any = there.get(name)
        if name == "request":
            differing += [f"{key} {before[key]!r}, not {now[key]!r}" for key in now if before.get(key) != now[key]]
        elif name != "form" and before != now:
            differing.append(f"{name} {before!r}, not {now!r}")
    if differing:
        raise UserError(
            f"{place.store.url(place.record)}: here are samples of another request ({'; '.join(differing)}); "
            "give another --out, or remove what is there"
        )


def default_shard(count: int, shape: Sequence[int]) -> int:
    """Samples in a shard: some SHARDS shards in all, small enough to be made in memory; a function of the job alone."""
    most = max(16, min(MAX_SHARD_SAMPLES, MAX_SHARD_BYTES // (4 * math.prod(shape))))
    return min(most, 64 * math.ceil(count / SHARDS / 64))


def carry_out_job(place: Place, samples: Samples, map_shards: Mapper, kept: dict[str, Digest] | None = None) -> str:
    """Makes the shards that are missing and puts them into their form; the URL of what came of it.

    map_shards: calls `commit.pack_shard(samples, number)` for each number, in order, here or on a cluster.
    kept: of a job that was finished before, those of its files that are as they were (`place.intact`); the
    others are made again. Raises TakenOver where another start of the job has begun meanwhile.
    """
    store, job = place.store, samples.job
    lease = samples.lease = Lease.take(place.shards, OWNER, "job")
    try:
        make = _data_set if place.format == "webdataset" else _files
        files = make(place, samples, map_shards, kept)
        samples.check_owner()
    except ScorerayError:
        newest = lease.holder()
        if newest == lease.token:
            raise
        if not newest:
            place.clear()  # the other start was done before our last shard came
        raise taken_over(store.url(place.name)) from None
    store.put(place.record, job.to_json(finished={name: files[name] for name in files_of(place, job)}))
    place.clear()
    return store.url(place.result)


def _data_set(place: Place, samples: Samples, map_shards: Mapper, kept: dict[str, Digest] | None) -> dict[str, Digest]:
    from scoreray.sampling.offline.files import take_back

    if kept is not None:
        take_back(place, samples, kept)
    carry_out(samples, workers=1, map_shards=lambda plan, numbers: map_shards(samples, numbers), progress=None)
    manifest = Manifest.load(place.store)
    index = manifest.index
    digests = {shard.name: {"bytes": shard.bytes, "sha256": shard.sha256} for shard in manifest.shards}
    digests[index.name] = {"bytes": index.bytes, "sha256": index.sha256}
    return {**digests, MANIFEST: digest_of_file(place.store, MANIFEST)}


def _files(place: Place, samples: Samples, map_shards: Mapper, kept: dict[str, Digest] | None) -> dict[str, Digest]:
    from scoreray.sampling.offline.files import write_npz, write_pictures

    kept, numbers = kept or {}, range(samples.num_shards)
    if place.format == "npz":
        made = list(map_shards(samples, numbers))
        samples.check_owner()
        return write_npz(place, samples, made)
    missing = [number for number in numbers if group_name(group(samples.job, number)) not in kept]
    made = list(map_shards(samples, missing))
    samples.check_owner()
    return {**kept, **write_pictures(place, samples, missing, made)}


def here(progress: Callable[[int, int], None] | None = None) -> Mapper:
    """Shards made by this process, one after another; progress(samples done, in all) after every batch."""

    def run(samples: Samples, numbers: Sequence[int]) -> Iterator[Packed]:
        total, done = samples.job.request.count, samples.elsewhere(numbers)

        def tell(n: int) -> None:
            nonlocal done
            done += n
            if progress:
                progress(done, total)

        samples.done = tell
        for number in numbers:
            packed = pack_shard(samples, number)
            if packed.kept:
                tell(packed.shard.num_samples)
            yield packed

    return run
