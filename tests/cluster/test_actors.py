"""Calls on Ray: in order, no further ahead than allowed, started again by Ray, one line where that is of no use."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from scoreray.cluster import actors as module
from scoreray.cluster.actors import AHEAD, LEAST_AHEAD, Retries, actors, completed, in_order
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


def test_results_are_in_order_and_no_call_is_far_ahead(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray  # not above: an embedded Ray keeps to loopback only where it is imported after its environment is set

    monkeypatch.setattr(module, "LEAST_AHEAD", 0)
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
    assert len(begun) == AHEAD * 2 + 2  # those that ended while the first one had not, and for each call its next one
    assert list(results) == list(range(1, 20))
    assert sorted(number for number, _ in completed([call, call], range(5), ONCE)) == list(range(5))


class CountedRef:
    """An ObjectRef whose result is there when the test says so, and which counts how often it is looked at."""

    looks = 0

    def __init__(self, value: int) -> None:
        self.result: Future[int] = Future()
        self.value = value

    def future(self) -> Future[int]:
        CountedRef.looks += 1
        return self.result


def _begun(calls: int, items: int, slow: int | None) -> tuple[int, int]:
    """(items begun when all but `slow` have ended, looks at their refs), of so many calls at once."""
    CountedRef.looks = 0
    refs: list[CountedRef] = []
    held: list[CountedRef] = []

    def call(value: int) -> CountedRef:
        refs.append(CountedRef(value))
        return refs[-1]

    def end_what_runs() -> None:
        if not refs and held and not ended_all:  # nothing more was begun
            ended_all.append(CountedRef.looks)
            held[0].result.set_result(held[0].value)
        for ref in refs[:]:
            refs.remove(ref)
            if ref.value == slow:
                held.append(ref)
            else:
                ref.result.set_result(ref.value)

    ended_all: list[int] = []
    found = []
    for value in in_order([call] * calls, range(items), ONCE, poll_s=0.0, poll=end_what_runs):
        found.append(value)
    assert found == list(range(items))
    return (ended_all or [items])[0], CountedRef.looks


@pytest.mark.parametrize("calls", [2, 32, 512])
def test_a_result_costs_the_driver_as_much_with_many_calls_under_way(calls: int) -> None:
    _, looks = _begun(calls, 2048, slow=None)
    assert looks == 2048  # ray.wait would look at every call that is under way, for each result


@pytest.mark.parametrize(("calls", "ahead"), [(2, LEAST_AHEAD), (16, LEAST_AHEAD), (256, AHEAD * 256)])
def test_while_one_item_takes_long_the_others_are_made(calls: int, ahead: int) -> None:
    """As many as an actor among `calls` makes while one is started again, and no more: results wait in memory."""
    assert _begun(calls, 4096, slow=0)[0] == ahead


def test_an_actor_is_started_again_as_often_as_allowed(ray_cluster: None, tmp_path: Path) -> None:
    with actors(Killed, 1, tmp_path, retries=ONCE, num_cpus=0) as (actor,):
        assert list(in_order([actor.call.remote], [0, 1], ONCE)) == [0, 10]
    with (
        actors(Killed, 1, tmp_path, retries=ONCE, num_cpus=0) as (actor,),
        pytest.raises(StorageError, match=r"^part 3: its process died 2 times \(The actor died.*\); give fewer$"),
    ):
        list(in_order([actor.call.remote], [3], ONCE))


class Logged:
    """Notes what it begins; the first time that it is given 3, its process ends."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def call(self, value: int) -> int:
        with self._log.open("a") as log:
            log.write(f"{value}\n")
        if value == 3 and self._log.read_text().split().count("3") == 1:
            time.sleep(0.2)  # in which the result before is sent
            os.kill(os.getpid(), signal.SIGKILL)
        return value


def test_of_a_killed_actor_one_item_is_begun_twice(ray_cluster: None, tmp_path: Path) -> None:
    with actors(Logged, 2, tmp_path / "log", retries=ONCE, num_cpus=0) as pair:
        assert list(in_order([one.call.remote for one in pair] * 2, range(12), ONCE)) == list(range(12))
    begun = Counter(map(int, (tmp_path / "log").read_text().split()))
    assert begun == {value: 1 + (value == 3) for value in range(12)}  # not what was in its queue


def test_what_a_call_raises_arrives_as_it_was(ray_cluster: None) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def wrong(number: int) -> None:
        raise DataError("one line") if number else ValueError("a bug")

    with pytest.raises(DataError, match=r"^one line$"):
        list(completed([wrong.remote], [1], ONCE))
    with pytest.raises(ValueError, match="ray::wrong"):  # a bug keeps the remote traceback
        list(completed([wrong.remote], [0], ONCE))
