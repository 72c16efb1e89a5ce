"""How many workers a run gets, decided from free resources by node, which are made up here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import pytest

if TYPE_CHECKING:
    from scoreray.trainer.on_ray.workers import WorkersThatFit

pytestmark = pytest.mark.usefixtures("ray_cluster")  # sets the environment that Ray reads when it is imported
SCALING: dict[str, Any] = {"resources_per_worker": {"CPU": 2}}


class Cluster:
    """Nodes a and b, with so many free CPUs each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **cpus: float) -> None:
        from scoreray.trainer.on_ray import workers

        self.cpus, self.draining, self.saved = cpus, set[str](), False
        monkeypatch.setattr(workers, "free_resources", lambda: {node: {"CPU": n} for node, n in self.cpus.items()})
        monkeypatch.setattr(workers, "draining_nodes", lambda: self.draining)
        monkeypatch.setattr(workers.ray, "nodes", lambda: [{"NodeID": node, "Alive": True} for node in self.cpus])
        monkeypatch.setattr(workers.ray, "get", lambda reply: self.saved)
        monkeypatch.setattr(workers, "WAIT_S", 0.0)


def group(**held: int) -> MagicMock:
    """A worker group with so many members on each node."""
    members = [MagicMock(metadata=MagicMock(node_id=node)) for node, count in held.items() for _ in range(count)]
    return MagicMock(workers=members, num_workers=len(members))


def policy(monitor: MagicMock) -> WorkersThatFit:
    from ray.train import ScalingConfig

    from scoreray.trainer.on_ray.workers import WorkersThatFit

    config = ScalingConfig(num_workers=(1, 4), **SCALING)
    return WorkersThatFit(config, monitor, True, sizes=(1, 2, 4), resize_every_s=0.0, grace_s=30.0)


def test_a_run_starts_with_the_largest_size_that_fits_and_waits_where_none_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monitor = MagicMock()
    cluster, elastic = Cluster(monkeypatch, a=4.0, b=2.5), policy(monitor)
    assert elastic.make_decision_for_non_running_worker_group().num_workers == 2  # 3 would fit, and is no size
    cluster.draining = {"a"}
    assert elastic.make_decision_for_non_running_worker_group().num_workers == 1
    cluster.cpus = {"a": 0.0, "b": 1.0}
    assert not hasattr(elastic.make_decision_for_non_running_worker_group(), "num_workers")
    elastic.make_decision_for_non_running_worker_group()
    monitor.note.remote.assert_called_once_with("waiting: the cluster has room for 0 workers, 1 are needed")


def test_a_run_grows_only_after_it_has_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own places count as free: they are when the group starts again."""
    monitor = MagicMock()
    cluster, elastic = Cluster(monkeypatch, a=0.0, b=0.0), policy(monitor)
    running = group(a=2)
    assert not hasattr(elastic.make_decision_for_running_worker_group(running, None), "num_workers")
    monitor.request_save.remote.assert_not_called()
    cluster.cpus["b"] = 4.0
    assert not hasattr(elastic.make_decision_for_running_worker_group(running, None), "num_workers")
    monitor.request_save.remote.assert_called_once()
    assert not hasattr(elastic.make_decision_for_running_worker_group(running, None), "num_workers")
    cluster.saved = True
    decision = elastic.make_decision_for_running_worker_group(running, None)
    assert (decision.num_workers, decision.resources_per_worker) == (4, {"CPU": 2})
    monitor.restarted.remote.assert_called_once_with("there is room for 4 of them now, not 2")


def test_a_fixed_number_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import ScalingConfig

    from scoreray.trainer.on_ray.workers import FixedWorkers

    fixed = FixedWorkers(ScalingConfig(num_workers=3, **SCALING), True)
    assert fixed.make_decision_for_non_running_worker_group().num_workers == 3
    assert not hasattr(fixed.make_decision_for_running_worker_group(group(a=3), None), "num_workers")
