"""What a run tells while it goes on, and the actor through which it is told and asked. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from scoreray.trainer.metrics import Gauges
from scoreray.trainer.stopping import Ask


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
    """Unix time of the last commit of this start, s; 0 before it"""
    started_at: float = 0.0
    mfu: float = math.nan
    record: Record | None = None
    """the newest one"""


class Monitor:
    """A Ray actor between rank 0, Ray Train's controller and the person who watches; losing it loses nothing."""

    def __init__(self, run: str) -> None:
        self._gauges, self._restarts = Gauges(run), 0
        self._gauges.set({("scoreray_restarts", ""): 0.0})
        self._progress: Progress | None = None
        self._notes: list[str] = []
        self._ask, self._committed_before = Ask.NOTHING, 0

    def note(self, line: str) -> None:
        self._notes.append(line)

    def started_again(self, reason: str) -> None:
        self._restarts += 1
        self._gauges.set({("scoreray_restarts", ""): float(self._restarts)})
        self._notes.append(f"workers are started again: {reason}")
        self._progress = None
        self._ask = Ask.STOP if self._ask is Ask.STOP else Ask.NOTHING

    def update(self, progress: Progress) -> int:
        """Rank 0 tells where it is; the answer is what it is asked to do."""
        self._progress, ask = progress, self._ask
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
