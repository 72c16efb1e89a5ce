"""How many workers a run gets, by the nodes and by the placement groups that find room, which are made up here."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

pytestmark = pytest.mark.usefixtures("ray_cluster")  # sets the environment that Ray reads when it is imported
EACH = {"CPU": 2.0}
SIZES = (1, 2, 4)


class Cluster:
    """Nodes with so many CPUs each, of which `free` (of all together) can be had; and the placement groups on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: float, **cpus: float) -> None:
        from scoreray.trainer.on_ray import workers

        self.free, self.made, self.left = free, list[float](), set[int]()
        nodes = [{"NodeID": node, "Alive": True, "Resources": {"CPU": number}} for node, number in cpus.items()]
        monkeypatch.setattr(workers.ray, "nodes", lambda: nodes)
        monkeypatch.setattr(workers.ray.util, "placement_group", self.place)
        monkeypatch.setattr(workers.ray.util, "remove_placement_group", lambda group: self.left.discard(id(group)))

    def place(self, bundles: Sequence[dict[str, float]]) -> Group:
        self.made.append(len(bundles))
        return Group(self, sum(bundle["CPU"] for bundle in bundles))


class Group:
    def __init__(self, cluster: Cluster, cpus: float) -> None:
        self._cluster, self._cpus, self._has = cluster, cpus, False
        cluster.left.add(id(self))

    def wait(self, timeout_s: float) -> bool:
        if not self._has and self._cpus <= self._cluster.free:
            self._has = True
            self._cluster.free -= self._cpus
        return self._has


def test_a_run_starts_with_the_largest_size_that_finds_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoreray.trainer.on_ray.workers import size_with_room

    cluster = Cluster(monkeypatch, 5.0, a=4.0, b=2.5)  # 3 would fit, and is no size
    assert size_with_room(SIZES, EACH, pytest.fail) == 2
    assert cluster.made == [2], "4 workers have no place on these nodes, used or not"
    cluster = Cluster(monkeypatch, 3.0, a=4.0, b=4.0)  # others use the rest
    assert size_with_room(SIZES, EACH, pytest.fail) == 1
    assert cluster.made == [4, 2, 1]
    assert not cluster.left, "placement groups were left"


def test_a_run_waits_where_the_smallest_size_finds_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoreray.trainer.on_ray.workers import size_with_room

    cluster = Cluster(monkeypatch, 0.0, a=1.0)
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        if len(notes) == 2:
            cluster.free = 9.0

    assert size_with_room(SIZES, EACH, note) == 1
    assert notes == ["waiting: the cluster has no room for 1 worker"] * 2
    assert not cluster.left


def test_a_fixed_number_is_left_to_ray_train(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoreray.trainer.on_ray.workers import size_with_room

    cluster = Cluster(monkeypatch, 0.0)
    assert size_with_room((3,), EACH, pytest.fail) == 3
    assert cluster.made == []


def test_a_run_may_grow_to_what_it_has_room_for_beside_its_own_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoreray.trainer.on_ray.workers import room_to_grow

    cluster = Cluster(monkeypatch, 1.0)
    for free, size in ((1.0, 1), (3.0, 2), (7.0, 4)):
        cluster.free, cluster.made = free, []
        with room_to_grow(SIZES, 1, EACH) as found:
            assert cluster.made == [1, 2], "an autoscaler sees all that the run could use"
            assert found == size
            assert cluster.free == 1.0
        assert not cluster.left
