"""`scoreray train` from a checked config to a trained run, with its progress shown."""

from __future__ import annotations

import math
import os
import shlex
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.connect.room import wait_for_room
from scoreray.cluster.display import TrainLine, say
from scoreray.cluster.verbs.beside_run import beside
from scoreray.data.errors import UserError
from scoreray.data.own_code import with_words
from scoreray.data.reading.quarantine import Entries, Unreadable
from scoreray.data.units import counted_noun
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.checkpoints.duration import has_ended
from scoreray.trainer.config import Config
from scoreray.trainer.monitoring.metrics import TrainingRecord
from scoreray.trainer.on_ray.run import fit
from scoreray.trainer.prepare import PreparedRun
from scoreray.trainer.quarantined import FOLDER, read_quarantined
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_folder import run_store
from scoreray.trainer.tracking.follow import tracked

MOST_NAMED = 10  # samples that could not be read, in the last lines of a run; the others are in its folder


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left."""

    run: str
    checkpoint: str
    images_seen: int
    loss: float | None
    seconds: float
    quarantined: list[Unreadable] = field(default_factory=list)
    records: list[TrainingRecord] = field(default_factory=list)

    def answer(self) -> dict[str, Any]:
        """All but the records, which are in the run's folder."""
        found = asdict(replace(self, records=[]))
        del found["records"]
        return found

    def text(self) -> str:
        loss = "" if self.loss is None else f", loss {self.loss:.4f}"
        return (
            f"trained to {self.images_seen:,} images{loss} in {self.seconds:,.0f} s; checkpoint {self.checkpoint}\n"
            f"{self._unreadable()}"
            f"next: {shlex.join(['scoreray', 'sample', self.run, *with_words(), '--count', '64', '--out', 'samples'])}"
        )

    def _unreadable(self) -> str:
        if not self.quarantined:
            return ""
        lines = [f"  {entry.text()}\n" for entry in self.quarantined[:MOST_NAMED]]
        if len(self.quarantined) > MOST_NAMED:
            lines.append(f"  and {len(self.quarantined) - MOST_NAMED} more: {self.run}/{FOLDER}/\n")
        return f"could not read {Entries(self.quarantined).num_samples:,} samples:\n" + "".join(lines)


def train_to_end(prepared: PreparedRun, *, verbose: bool = False, then: float = 0.0) -> TrainResult:
    """Run what `prepare_run` returned until its last image, on RAY_ADDRESS's cluster or on this machine.

    then: images whose training takes as long as what the command does afterwards, for the time left.
    """
    config, before = prepared.config, prepared.newest
    run = run_store(config)
    started = time.monotonic()
    if before is not None and has_ended(config, before):
        say(f"run '{config.run.name}' has already seen its {before.images_seen:,} images (--fresh starts another)")
        with tracked(config, say):  # what could not be sent before
            pass
    else:
        if before is not None:
            say(f"run '{config.run.name}' goes on from {before.images_seen:,} images ({before.url})")
        low, high = config.scaling.range
        check_machine(config)
        warn_of_data(prepared)
        with connected(num_cpus=_slots(config), verbose=verbose):
            _wait_for_room(config)
            workers = counted_noun(low, "worker") if low == high else f"{low} to {high} workers"
            say(f"run '{config.run.name}': {workers}, ZeRO {config.engine.zero_stage}, to {run.url()}")
            with beside(config, say), tracked(config, say), TrainLine(config.duration.images or 0, then) as line:
                fit(config, line, say)
    checkpoint = latest(run)
    if checkpoint is None:
        raise UserError(f"{run.url()}: training ended without a checkpoint")
    records = read_metrics(run, checkpoint)
    loss = records[-1].loss if records else None
    return TrainResult(run.url(), checkpoint.url, checkpoint.images_seen, loss, time.monotonic() - started,
                       read_quarantined(run, checkpoint), records)  # fmt: skip


def _slots(config: Config) -> int:
    """CPU slots of an embedded cluster: enough for the workers that were asked for, also on a smaller machine."""
    return max(os.cpu_count() or 1, math.ceil(config.scaling.range[1] * config.scaling.cpus_per_worker))


def check_machine(config: Config) -> None:
    """Without RAY_ADDRESS the run is this machine's: what it lacks is found before Ray starts. Raises UserError."""
    if os.environ.get("RAY_ADDRESS"):
        return
    import torch

    workers, gpus = config.scaling.range[0], torch.cuda.device_count()
    if config.scaling.use_gpu and workers > gpus:
        raise UserError(
            f"scaling.workers: {workers} workers with scaling.use_gpu need {workers} GPUs, this machine has {gpus}; "
            + (f"scaling.workers={gpus} is what it has room for, " if gpus else "")
            + "scaling.use_gpu=false trains on its CPUs, RAY_ADDRESS connects to a cluster"
        )
    _warn_of_crowding(config)


def warn_of_data(prepared: PreparedRun) -> None:
    """Says so where the data do not have the scale that the model expects, or no manifest."""
    if prepared.warning:
        say(f"warning: {prepared.warning}")
    for note in prepared.notes:
        say(note)


def _warn_of_crowding(config: Config) -> None:
    """Fewer cores than configured are no mistake: a laptop may try what a cluster will run. It is worth a line."""
    workers, cores = config.scaling.range[1], os.cpu_count() or 1
    wanted = workers * config.scaling.cpus_per_worker
    if wanted > cores:
        say(f"scaling.workers: {workers} workers want {wanted:g} cores and share this machine's {cores}")


def _wait_for_room(config: Config) -> None:
    """Else Ray Train would wait for ever for workers that no machine has room for. Raises UserError."""
    low, use_gpu = config.scaling.range[0], config.scaling.use_gpu
    bundle = {"CPU": config.scaling.cpus_per_worker} | ({"GPU": 1.0} if use_gpu else {})
    otherwise = "ask for fewer, or connect to a larger cluster with RAY_ADDRESS"
    if use_gpu:
        otherwise = f"ask for fewer, scaling.use_gpu=false trains on its CPUs, {otherwise.partition(', ')[2]}"
    wait_for_room(f"scaling.workers: {counted_noun(low, 'worker')} need{'s' * (low == 1)}", [bundle] * low, otherwise)
