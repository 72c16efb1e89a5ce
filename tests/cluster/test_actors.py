"""Calls on Ray: in order, no further ahead than allowed, started again by Ray, one line where that is of no use."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from scoreray.cluster.actors import AHEAD, Retries, actors, completed, in_order
from scoreray.data.errors import DataError, StorageError

ONCE = Retries(1, "part {}", "give fewer")


class Killed:
    """An actor whose process ends in the first call with a value, as many times as the value says."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def call(self, value: int) -> int:
        mark = self._folder / f"{value}"
        deaths = len(mark.read_text()) if mark.exists() else 0
        if deaths < value:
            mark.write_text("x" * (deaths + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return 10 * value


def test_results_are_in_order_and_no_call_is_far_ahead(ray_cluster: None, tmp_path: Path) -> None:
    import ray  # not above: an embedded Ray keeps to loopback only where it is imported after its environment is set

    begun: list[int] = []
    full = tmp_path / "full"

    @ray.remote(num_cpus=0)
    def wait(number: int) -> int:
        while number == 0 and not full.exists():
            time.sleep(0.01)
        time.sleep(0.5 if number == 0 else 0.0)  # in which one call too many would begin
        return number

    def call(number: int) -> Any:
        begun.append(number)
        if len(begun) == AHEAD * 2:
            full.touch()
        return wait.remote(number)

    results = in_order([call, call], range(20), ONCE)
    assert next(results) == 0
    assert len(begun) == AHEAD * 2  # those that ended while the first one had not
    assert list(results) == list(range(1, 20))
    assert sorted(number for number, _ in completed([call, call], range(5), ONCE)) == list(range(5))


def test_an_actor_is_started_again_as_often_as_allowed(ray_cluster: None, tmp_path: Path) -> None:
    with actors(Killed, 1, tmp_path, retries=ONCE, num_cpus=0) as (actor,):
        assert list(in_order([actor.call.remote], [0, 1], ONCE)) == [0, 10]
    with (
        actors(Killed, 1, tmp_path, retries=ONCE, num_cpus=0) as (actor,),
        pytest.raises(StorageError, match=r"^part 3: its process died 2 times \(The actor died.*\); give fewer$"),
    ):
        list(in_order([actor.call.remote], [3], ONCE))


def test_what_a_call_raises_arrives_as_it_was(ray_cluster: None) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def wrong(number: int) -> None:
        raise DataError("one line") if number else ValueError("a bug")

    with pytest.raises(DataError, match=r"^one line$"):
        list(completed([wrong.remote], [1], ONCE))
    with pytest.raises(ValueError, match="ray::wrong"):  # a bug keeps the remote traceback
        list(completed([wrong.remote], [0], ONCE))
