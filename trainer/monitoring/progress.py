"""What a run tells while it goes on, and the actor through which it is told and asked. Needs no torch."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field

from scoreray.trainer.monitoring.metrics import Gauges, values
from scoreray.trainer.monitoring.stopping import Ask

TELL_EVERY_S = 2.0  # Ray shows no gauge that was not set again within its export interval (10 s)


@dataclass(frozen=True)
class Record:
    """What was measured since the record before; one line of the run's metrics."""

    images: int
    loss: float
    learning_rate: float
    gradient_norm: float
    images_per_s: float
    data_stall: float
    """share of the wall time that the step waited for data"""
    sigma_losses: list[float | None] = field(default_factory=list)
    """mean loss by noise level, between the `SIGMA_EDGES`; None where no sample fell"""
    quarantined: int = 0
    """samples that could not be read, in the whole run so far"""
    skipped_steps: int = 0
    """steps without an update because loss or gradient was not finite, in the whole run so far"""
    mfu: float | None = None
    """FLOPs of training over what the workers' devices do in matrix products of the same precision (`flops.py`)"""
    time: float = 0.0
    """Unix time, s"""


@dataclass(frozen=True)
class Progress:
    """Where a run is, for a person who watches: sent often, kept nowhere."""

    images: int
    total: int
    loss: float
    images_per_s: float
    data_stall: float
    committed: int
    committed_at: float = 0.0
    """Unix time of the last commit, s, of an earlier start too; 0 before the first"""
    started_at: float = 0.0
    mfu: float = math.nan
    record: Record | None = None
    """the newest one"""
    skipped_steps: int = 0
    """steps without an update because loss or gradient was not finite, in the whole run so far"""


class Monitor:
    """A Ray actor between rank 0, Ray Train's controller and the person who watches; losing it loses nothing.

    It owns the run's gauges and sets all of them again and again, so that they are there and their ages grow
    when the workers hang, die or wait for room. `committed_at`, `skipped_steps`: of the checkpoint it goes on from.
    """

    def __init__(self, run: str, committed_at: float = 0.0, skipped_steps: int = 0) -> None:
        self._gauges, self._restarts, self._stopped_nonfinite = Gauges(run), 0, False
        self._began, self._heard_at = time.time(), time.monotonic()
        self._committed_at, self._skipped_steps = committed_at, skipped_steps
        self._progress: Progress | None = None
        self._shown: dict[tuple[str, str], float] = {}
        self._notes: list[str] = []
        self._ask, self._committed_before = Ask.NOTHING, 0
        threading.Thread(target=self._keep_telling, daemon=True).start()

    def _keep_telling(self) -> None:
        while True:
            self._gauges.set(self.told())
            time.sleep(TELL_EVERY_S)

    def told(self) -> dict[tuple[str, str], float]:
        """(metric, sigma bucket or "") -> value, now. A count that a restart sets back does not fall."""
        now = time.time()
        mine = {
            "last_commit_time_s": self._committed_at,
            "last_commit_age_s": max(0.0, now - (self._committed_at or self._began)),
            "progress_age_s": time.monotonic() - self._heard_at,
            "restarts": self._restarts,
            "skipped_steps": self._skipped_steps,
            "stopped_nonfinite": self._stopped_nonfinite,
        }
        return self._shown | {(f"scoreray_{name}", ""): float(value) for name, value in mine.items()}

    def note(self, line: str) -> None:
        self._heard_at = time.monotonic()
        self._notes.append(line)

    def started_again(self, reason: str) -> None:
        self._restarts += 1
        self.note(f"workers are started again: {reason}")
        self._progress = None
        self._ask = Ask.STOP if self._ask is Ask.STOP else Ask.NOTHING

    def stopped_nonfinite(self) -> None:
        """The run ends because its loss was not finite."""
        self._stopped_nonfinite = True

    def update(self, progress: Progress) -> int:
        """Rank 0 tells where it is; the answer is what it is asked to do."""
        self._progress, ask, self._heard_at = progress, self._ask, time.monotonic()
        self._committed_at = max(self._committed_at, progress.committed_at)
        self._skipped_steps = max(self._skipped_steps, progress.skipped_steps)
        self._shown = self._shown | values(progress)
        if ask is Ask.SAVE:
            self._ask = Ask.NOTHING
        return int(ask)

    def ask_to_save(self) -> None:
        self._ask = max(self._ask, Ask.SAVE)
        self._committed_before = self._progress.committed if self._progress else 0

    def has_saved(self) -> bool:
        """Whether anything was committed since it was asked for."""
        return self._progress is not None and self._progress.committed > self._committed_before

    def ask_to_stop(self) -> bool:
        """Returns whether the workers train just now, so that there is something to wait for."""
        self._ask = Ask.STOP
        return self._progress is not None

    def read(self) -> tuple[Progress | None, list[str]]:
        """The newest progress, and the notes since the last call."""
        notes, self._notes = self._notes, []
        return self._progress, notes
