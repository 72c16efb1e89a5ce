"""Kills Ray Train's controller when it is stopped, or stays alive after all is committed: its run would never end.

Ray and the controller check the health of workers; nothing checks the controller's. It runs on the driver's machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable

from scoreray.trainer.monitoring.metrics import TrainingProgress

LOOK_S = 1.0
LATE = 4  # times the hang's time-out that a controller may take to notice the end of its run


class ControllerWatch:
    """One for a run; `pid` is set to each controller's. The run's handling of a dead controller does the rest."""

    def __init__(self, hang_timeout_s: float, note: Callable[[str], None]) -> None:
        self._looks, self._note = max(1, round(hang_timeout_s / LOOK_S)), note
        self._pid = self._stopped = self._finished = 0
        self._progress: TrainingProgress | None = None
        self._over = threading.Event()

    def __enter__(self) -> ControllerWatch:
        threading.Thread(target=self._keep_looking, name="controller-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @property
    def pid(self) -> int:
        """Of the controller's process; 0 while it is not known."""
        return self._pid

    @pid.setter
    def pid(self, pid: int) -> None:
        if pid != self._pid:
            self._pid, self._stopped, self._finished = pid, 0, 0

    def passing(self, watch: Callable[[TrainingProgress], None]) -> Callable[[TrainingProgress], None]:
        """`watch`, after this has seen the progress."""

        def seen(progress: TrainingProgress) -> None:
            self._progress = progress
            watch(progress)

        return seen

    def _keep_looking(self) -> None:
        while not self._over.wait(LOOK_S):
            self.look()

    def look(self) -> None:
        """Once in LOOK_S. Looks are counted, not seconds: while this process is stopped itself, nothing counts."""
        if not self._pid:
            return
        progress, state = self._progress, state_of(self._pid)
        if not state:
            return
        self._stopped = self._stopped + 1 if state == "T" else 0
        self._finished = self._finished + 1 if progress is not None and progress.committed >= progress.total else 0
        if self._stopped >= self._looks:
            self._kill(f"was stopped for {self._stopped * LOOK_S:.0f} s")
        elif self._finished >= LATE * self._looks:
            self._kill("does not notice that the run has ended")

    def _kill(self, what: str) -> None:
        self._note(f"Ray Train's controller {what}, and is ended")
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self.pid = 0


def state_of(pid: int) -> str:
    """A process's state as the kernel reports it (man 5 proc: "T" stopped by a signal); "" when it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""
