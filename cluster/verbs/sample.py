"""`scoreray sample` with its progress shown: in this process, or by actors on RAY_ADDRESS's or an embedded cluster."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.connect.room import gpus_come, wait_for_room
from scoreray.cluster.display import counted, say, waiting
from scoreray.data.reading.outputs import check_picture, write_picture
from scoreray.sampling.model.describe import describe
from scoreray.sampling.offline.files import sheet
from scoreray.sampling.offline.generate import Request
from scoreray.sampling.offline.job import begin, carry_out_job, in_this_process, read_record
from scoreray.sampling.offline.place import files_of, intact, place_of, refuse_same
from scoreray.sampling.offline.plan import SamplePlan
from scoreray.sampling.offline.record import SampleJob
from scoreray.sampling.samplers.parallel import FEW
from scoreray.trainer.engine.cpu import keep_large_tensors_on_the_heap

MOST_NAMED = 3  # of the files that are missing or damaged


@dataclass(frozen=True)
class SampleResult:
    """What a finished job left: the URL of the manifest, of the sheet beside the pictures, or of the npz."""

    job: SampleJob
    out: list[str]
    images_seen: int
    acceptance: float | None = None  # of a Metropolis sampler's proposals
    calls: int | float | None = None  # of the network for one sample

    def answer(self) -> dict[str, Any]:
        job = self.job
        counted = {"acceptance": self.acceptance, "calls": self.calls}
        return {
            "out": self.out,
            "count": job.request.count,
            "checkpoint": job.checkpoint,
            "images_seen": self.images_seen,
            "ema": job.ema,
            "format": job.format,
            "form": job.form.name,
            **{name: value for name, value in counted.items() if value is not None},
        }

    def text(self) -> str:
        job = self.job
        accepted = "" if self.acceptance is None else f", {self.acceptance:.1%} of proposals accepted"
        cost = "" if self.calls is None else f", {self.calls} {'call' if self.calls == 1 else 'calls'} a sample"
        made = f"{job.request.count:,} samples of {job.checkpoint} (EMA {job.ema}, {job.form.name}{cost}{accepted})"
        return f"{made}: {', '.join(self.out)}"


def sample_to(
    url: str,
    checkpoint: str,
    ema: str | None,
    request: Request,
    *,
    format: str = "auto",
    actors: int | None = None,
    picture: Path | None = None,
    verbose: bool = False,
    **options: Any,
) -> SampleResult:
    """Draws `request` to `url`, or what is missing of it; `options` as `job.begin` takes them.

    actors: None draws in this process, without Ray. Raises UserError, DataError, StorageError.
    """
    place = place_of(url, format)
    if (
        format == "auto"
        and place.format == "png"
        and _needs_shards(request, checkpoint, ema, options.get("raw", False))
    ):
        place = place_of(url, "webdataset")
    if picture is not None:
        check_picture(picture)
        refuse_same(place, picture, "--picture")
    keep_large_tensors_on_the_heap()
    options = {**options, "pictures": picture is not None}
    with waiting("reading the model") as now:
        job, model, recorded = begin(place, checkpoint, ema, request, processes=actors or 1, report=now, **options)
    plan = SamplePlan(job, place.shards.url(), model)
    if request.parallel and request.count > FEW:
        say(f"--parallel: of no use for {request.count:,} samples, which fill the network's calls; leave it out")
    for line in plan.conditions.warnings:
        say(line)
    out = place.store.url(place.result)
    kept = None if recorded is None else intact(place, job, recorded)
    lost = [] if kept is None else [name for name in files_of(place, job) if name not in kept]
    if lost:
        more = f" and {len(lost) - MOST_NAMED} more" if len(lost) > MOST_NAMED else ""
        say(f"{place.store.url(place.name)}: missing or damaged, and made again: {', '.join(lost[:MOST_NAMED])}{more}")
    if kept is not None and not lost:
        say(f"{out}: these samples were drawn before, and every byte is as it was")
    else:
        with contextlib.ExitStack() as stack:
            gpu = False
            if actors is not None:
                from scoreray.cluster.verbs.sample_actors import on_actors

                stack.enter_context(connected(num_cpus=actors, verbose=verbose))
                gpu = gpus_come(1)
                if not gpu:
                    wait_for_room("--actors: an actor needs", [{"CPU": 1}], "try another RAY_ADDRESS")
            compiling = "compiling the network, and " if job.form.compiled else ""
            progress = stack.enter_context(counted("sample", "samples", f"{compiling}the first batch"))
            mapper = in_this_process(progress) if actors is None else on_actors(actors, progress, say, gpu=gpu)
            carry_out_job(place, plan, mapper, kept)
    if picture is not None:
        write_picture(sheet(place), picture)
    record = read_record(place, request.batch_size)
    assert record is not None  # of the job, which has finished
    return SampleResult(job, [out], model.info.images_seen, record.acceptance, record.calls)


def _needs_shards(request: Request, checkpoint: str, ema: str | None, raw: bool) -> bool:
    """Whether a folder of pictures can't hold what is drawn: arrays, or samples with fields of their records."""
    return raw or request.conditions_from is not None or not describe(checkpoint, ema).info.is_picture
