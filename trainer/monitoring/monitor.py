"""The Monitor actor: relays progress, and requests to save or stop, between the workers of a run and its driver.

It also owns the run's Prometheus gauges, ends a controller that hangs, and removes the placement group of one that
died. Needs no torch, so that its process starts in a second.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scoreray.trainer.monitoring.controller_watch import LOOK_S, ControllerWatch
from scoreray.trainer.monitoring.metrics import CATALOGUE, RunStatus, TrainingProgress, values
from scoreray.trainer.monitoring.stopping import LoopRequest

EXPORT_EVERY_S = 2.0  # Ray shows no gauge that was not set again within its export interval (10 s)
ABANDONED_S = 60.0  # without a driver that reads, and without a controller: nobody will end this actor


@dataclass(frozen=True)
class WorkerGroup:
    """Workers that Ray Train's controller has started: handles of Ray's, by which they can be ended."""

    controller: Any
    controller_pid: int
    workers: tuple[Any, ...]
    placement_group: Any


@dataclass(frozen=True)
class GroupState:
    """What decides whether workers that failed are started again.

    starts: of workers, so far. ending: what the run, or this start of it, is to end with. errors: by rank, as the ranks
    raised them. training: whether steps have been reported since the start.
    """

    starts: int = 0
    ending: Exception | None = None
    errors: Mapping[int, Exception] = field(default_factory=dict)
    training: bool = False


class Monitor:
    """A Ray actor between rank 0, Ray Train's controller and the driver; losing it loses nothing of the run.

    It is detached, because it has to outlive them: a placement group that Ray Train's controller made stays for as long
    as the Ray job, also when the controller has been killed (seen in Ray 2.57 to 2.60). It ends by `close`, or by
    itself when the controller is dead and no driver has read for `ABANDONED_S`.

    All gauges are set again every `EXPORT_EVERY_S`, so that they stay visible, and their ages grow, while the workers
    hang, die or wait for room. `committed_at`, `skipped_steps`: of the checkpoint that the run resumes from.
    """

    def __init__(
        self, run: str, committed_at: float = 0.0, skipped_steps: int = 0, hang_timeout_s: float = 30.0
    ) -> None:
        self._run, self._status = run, RunStatus(committed_at=committed_at, skipped_steps=skipped_steps)
        self._progress: TrainingProgress | None = None
        self._shown: dict[tuple[str, str], float] = {}
        self._notes: list[str] = []
        self._request, self._committed_before = LoopRequest.NOTHING, 0
        self._group: WorkerGroup | None = None
        self._starts, self._failures, self._failed_at = 0, 0, -1
        self._ending: Exception | None = None
        self._errors: dict[int, Exception] = {}
        self._read_at = time.monotonic()
        self._controller_watch = ControllerWatch(hang_timeout_s, self.note)
        threading.Thread(target=self._export, daemon=True).start()
        threading.Thread(target=self._keep_looking, daemon=True).start()

    def _export(self) -> None:
        from ray.util.metrics import Gauge

        gauges: dict[str, Any] = {
            metric.name: Gauge(metric.name, f"{metric.meaning} ({metric.unit})", tag_keys=("run", *metric.labels))
            for metric in CATALOGUE
        }
        labels = {metric.name: metric.labels for metric in CATALOGUE}
        while True:
            for (name, label), value in self.values().items():
                tags = dict.fromkeys(labels[name], label)
                gauges[name].set(value, tags={"run": self._run, **tags})
            time.sleep(EXPORT_EVERY_S)

    def _keep_looking(self) -> None:
        """A controller may hang, and a run that was killed leaves its placement group, and this actor."""
        import ray

        while self._group or time.monotonic() - self._read_at < ABANDONED_S:
            time.sleep(LOOK_S)
            group = self._group
            if group and not self._controller_watch.look(group.controller_pid, self._progress):
                self._release(group)
        ray.kill(ray.get_runtime_context().current_actor)

    def values(self) -> dict[tuple[str, str], float]:
        """(metric, value of its label or "") -> value, now; what a restart can't know yet keeps its last value."""
        self._shown |= values(self._status)
        return dict(self._shown)

    def note(self, line: str) -> None:
        """A line for the person who watches."""
        self._status.reported_at = time.monotonic()
        self._notes.append(line)

    def restarted(self, reason: str) -> None:
        """The workers are started again. A request to stop is still to be met, one to save has been lost with them."""
        self._status.restarts += 1
        self.note(f"workers are started again: {reason}")
        self._progress = None
        self._request = LoopRequest.STOP if self._request is LoopRequest.STOP else LoopRequest.NOTHING

    def stopped_nonfinite(self) -> None:
        """The run ends because its loss was not finite."""
        self._status.stopped_nonfinite = True

    def update(self, progress: TrainingProgress) -> int:
        """Rank 0 reports its progress; returns the `LoopRequest` to it. Counts that a restart sets back do not fall."""
        status, request = self._status, self._request
        self._progress = status.progress = progress
        status.reported_at = time.monotonic()
        status.committed_at = max(status.committed_at, progress.committed_at)
        status.skipped_steps = max(status.skipped_steps, progress.skipped_steps)
        if request is LoopRequest.SAVE:
            self._request = LoopRequest.NOTHING
        return int(request)

    def request_save(self) -> None:
        self._request = max(self._request, LoopRequest.SAVE)
        self._committed_before = self._progress.committed if self._progress else 0

    def has_saved(self) -> bool:
        """Whether a checkpoint was committed since `request_save`."""
        return self._progress is not None and self._progress.committed > self._committed_before

    def request_stop(self) -> bool:
        """Returns whether the workers train just now, so that there is something to wait for."""
        self._request = LoopRequest.STOP
        return self._progress is not None

    def read(self) -> tuple[TrainingProgress | None, list[str]]:
        """The newest progress of this start of the workers, and the notes since the last call."""
        notes, self._notes = self._notes, []
        self._read_at = time.monotonic()
        return self._progress, notes

    def started(self, group: WorkerGroup) -> Exception | None:
        """Workers have been started, and do not train yet. Returns what they are to end with, if they are."""
        self._group, self._starts = group, self._starts + 1
        self._errors.clear()
        return self._ending

    def failed(self, rank: int, error: Exception) -> None:
        """A rank is about to raise `error`: Ray Train would wrap it in a class of its own."""
        self._errors[rank] = error

    def group_state(self) -> GroupState:
        return GroupState(self._starts, self._ending, dict(self._errors), self._progress is not None)

    def count_failure(self) -> int:
        """Workers have failed; returns how often they have without a commit in between, with this time."""
        committed = self._status.progress.committed if self._status.progress else 0
        self._failures = self._failures + 1 if committed <= self._failed_at else 1
        self._failed_at = max(self._failed_at, committed)
        return self._failures

    def end(self, ending: Exception | None) -> WorkerGroup | None:
        """What the next failure or start of workers ends Ray Train with (None: with nothing); returns the newest."""
        self._ending = ending
        return self._group

    def release(self) -> None:
        """The controller is dead: removes the placement group that it made."""
        if self._group is not None:
            self._release(self._group)

    def _release(self, group: WorkerGroup) -> None:
        from ray.util import remove_placement_group

        with contextlib.suppress(Exception):  # it has been removed
            remove_placement_group(group.placement_group)
        if self._group is group:
            self._group = None

    def close(self) -> None:
        """The run has ended. Where it was to end before its workers started, they may still start, to end then."""
        import ray

        pending = self._group is None and self._ending is not None
        self.release()
        if not pending:
            ray.actor.exit_actor()
