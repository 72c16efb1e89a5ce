"""The Monitor actor: relays progress, and requests to save or stop, between the workers of a run and its driver.

It also owns the run's Prometheus gauges. Needs no torch, so that its process starts in a second.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from scoreray.trainer.monitoring.metrics import CATALOGUE, RunStatus, TrainingProgress, values
from scoreray.trainer.monitoring.stopping import LoopRequest

EXPORT_EVERY_S = 2.0  # Ray shows no gauge that was not set again within its export interval (10 s)


class Monitor:
    """A Ray actor between rank 0, Ray Train's controller and the driver; losing it loses nothing of the run.

    All gauges are set again every `EXPORT_EVERY_S`, so that they stay visible, and their ages grow, while the workers
    hang, die or wait for room. `committed_at`, `skipped_steps`: of the checkpoint that the run resumes from.
    """

    def __init__(self, run: str, committed_at: float = 0.0, skipped_steps: int = 0) -> None:
        self._run, self._status = run, RunStatus(committed_at=committed_at, skipped_steps=skipped_steps)
        self._progress: TrainingProgress | None = None
        self._shown: dict[tuple[str, str], float] = {}
        self._notes: list[str] = []
        self._request, self._committed_before = LoopRequest.NOTHING, 0
        threading.Thread(target=self._export, daemon=True).start()

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
        return self._progress, notes
