"""The TrialMonitor actor: relays progress, and the request to stop, between a study's trials and its driver.

Needs no torch, so that its process starts in a second. Losing it loses nothing of the study.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any, Literal

from scoreray.trainer.monitoring.metrics import TrainingProgress

EXCHANGE_EVERY_S = 0.25


class TrialMonitor:
    """A Ray actor. A trial is at work from `begin` to `end` and sends `update`s in between; at most `concurrent` are.

    Under schedulers that pause trials more may have been started: of a population all.
    """

    def __init__(self, concurrent: int) -> None:
        self._concurrent = concurrent
        self._progress: dict[int, TrainingProgress | None] = {}
        self._stopping = False

    def begin(self, number: int) -> Literal["go", "wait", "stop"]:
        """Whether a trial may train or measure now."""
        if self._stopping:
            return "stop"
        if number not in self._progress and len(self._progress) >= self._concurrent:
            return "wait"
        self._progress[number] = None
        return "go"

    def update(self, number: int, progress: TrainingProgress | None) -> bool:
        """Where a trial is; returns whether it should commit what it has trained, and stop."""
        if progress is not None:
            self._progress[number] = progress
        return self._stopping

    def end(self, number: int) -> None:
        self._progress.pop(number, None)

    def stop(self) -> bool:
        """Request all trials to commit and stop; those that have not begun don't begin. Returns whether any has."""
        self._stopping = True
        return bool(self._progress)

    def read(self) -> dict[int, TrainingProgress | None]:
        """The newest progress of each trial at work, by number."""
        return dict(self._progress)


class MonitorLink:
    """A trial's end of it: sends progress and learns of a stop without waiting for either."""

    def __init__(self, monitor: Any, number: int) -> None:
        self._monitor, self._number = monitor, number
        self._progress: TrainingProgress | None = None
        self._reply: Any = None
        self._sent_at = 0.0
        self._stopped = False

    def watch(self, progress: TrainingProgress) -> None:
        self._progress = progress

    def stopped(self) -> bool:
        """Whether the study is being stopped; to be called once a step (a call to the actor each EXCHANGE_EVERY_S)."""
        import ray

        now = time.monotonic()
        if self._stopped or now - self._sent_at < EXCHANGE_EVERY_S:
            return self._stopped
        if self._reply is None:
            self._reply, self._sent_at = self._monitor.update.remote(self._number, self._progress), now
        elif ray.wait([self._reply], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):
                self._stopped = ray.get(self._reply)
            self._reply = None
        return self._stopped
