"""What watching the actors of `scoreray sample` costs: their states are asked for at a bounded rate."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from scoreray.cluster.verbs import sample_actors
from scoreray.cluster.verbs.sample_actors import MOST_ASKED, ActorState, _Watch


class Asked:
    """An actor that answers at once, and counts; its handle can't be compared cheaply, so it is not."""

    count = itertools.count()

    def __init__(self, number: int) -> None:
        self.number = str(number)
        self.state = SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._remote))

    def __eq__(self, other: object) -> bool:
        raise AssertionError("with n actors these would be n^2 comparisons")

    __hash__ = None  # type: ignore[assignment]

    def _remote(self) -> tuple[int, ActorState]:
        return next(Asked.count), ActorState(self.number, "process", 1)


@pytest.mark.parametrize("actors", [2, 16, 1024])
def test_states_are_asked_for_at_a_bounded_rate(actors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    now, shown = [0.0], list[int]()
    monkeypatch.setattr(sample_actors, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(ray, "wait", lambda refs, num_returns, timeout: (refs, []))
    monkeypatch.setattr(ray, "get", lambda ref: ref[1])
    first = next(Asked.count)
    watch = _Watch([Asked(i) for i in range(actors)], actors, 0, lambda done, total: shown.append(done), print)
    for step in range(200):  # 20 seconds
        now[0] = 0.1 * step
        watch.poll()
    asked = next(Asked.count) - first - 1
    assert asked <= min(2.5 * actors, 1.25 * MOST_ASKED) * 20
    assert asked >= 4 * actors
    assert shown[-1] == actors
