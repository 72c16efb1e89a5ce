"""Which controllers of Ray Train are ended: those that are stopped, and those that stay when all is committed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator

import pytest
from waiting import PATIENCE_S

from scoreray.trainer.monitoring.controller_watch import LATE, ControllerWatch, state_of
from scoreray.trainer.monitoring.metrics import TrainingProgress


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    found = subprocess.Popen(["sleep", "600"])
    yield found
    found.kill()
    found.wait()


def looked(process: subprocess.Popen[bytes], looks: int, committed: int) -> tuple[list[str], int | None]:
    """(notes, exit status of the process) after a number of looks; a process stopped for five of them hangs."""
    notes: list[str] = []
    watch = ControllerWatch(5.0, notes.append)
    for _ in range(looks):
        watch.look(process.pid, TrainingProgress(100, 100, 1.0, 1.0, 0.0, committed))
    return notes, process.wait(PATIENCE_S) if notes else None


def test_one_that_is_stopped_is_ended_after_a_hangs_time(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert state_of(process.pid) == "T"
    assert looked(process, 4, 0) == ([], None)
    assert looked(process, 5, 0) == (["Ray Train's controller was stopped for 5 s, and is ended"], -signal.SIGKILL)
    assert state_of(process.pid) == ""


def test_one_that_stays_after_the_last_commit_is_ended_later(process: subprocess.Popen[bytes]) -> None:
    assert looked(process, 1000, 99) == ([], None)
    assert looked(process, LATE * 5 - 1, 100) == ([], None)
    notes, ended = looked(process, LATE * 5, 100)
    assert ended == -signal.SIGKILL
    assert "does not notice that the run has ended" in notes[0]


def test_one_that_is_gone_is_left_alone(process: subprocess.Popen[bytes]) -> None:
    watch, ended = ControllerWatch(1.0, pytest.fail), TrainingProgress(100, 100, 1.0, 1.0, 0.0, 100)
    process.kill()
    process.wait()
    assert not any(watch.look(process.pid, ended) for _ in range(10))
