"""Kills Ray Train's controller when it is stopped, or stays alive after all is committed: its run would never end.

Ray and the controller check the health of workers; nothing checks the controller's. It runs on the same machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

from scoreray.trainer.monitoring.metrics import TrainingProgress

LOOK_S = 1.0
LATE = 4  # times the hang's time-out that a controller may take to notice the end of its run


class ControllerWatch:
    """One for a run, which calls `look` once in LOOK_S; its handling of a dead controller does the rest."""

    def __init__(self, hang_timeout_s: float, note: Callable[[str], None]) -> None:
        self._looks, self._note = max(1, round(hang_timeout_s / LOOK_S)), note
        self._pid = self._stopped = self._finished = 0

    def look(self, pid: int, progress: TrainingProgress | None) -> bool:
        """Returns whether this process, the newest controller's, lives. Looks are counted, not seconds: while this
        process is stopped itself, nothing counts."""
        if pid != self._pid:
            self._pid, self._stopped, self._finished = pid, 0, 0
        state = state_of(pid)
        if state in ("", "Z"):
            return False
        self._stopped = self._stopped + 1 if state == "T" else 0
        self._finished = self._finished + 1 if progress and progress.committed >= progress.total else 0
        if self._stopped >= self._looks:
            self._kill(f"was stopped for {self._stopped * LOOK_S:.0f} s")
        elif self._finished >= LATE * self._looks:
            self._kill("does not notice that the run has ended")
        return True

    def _kill(self, what: str) -> None:
        self._note(f"Ray Train's controller {what}, and is ended")
        self._stopped = self._finished = 0
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)


def state_of(pid: int) -> str:
    """A process's state as the kernel reports it (man 5 proc: "T" stopped by a signal, "Z" dead); "" if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""
