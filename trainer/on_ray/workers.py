"""How many workers a run has on a Ray cluster, now and when machines come or go, and by which address they are reached.

Ray Train's own elastic policy relies on a coordinator that looks at the cluster every 20 s and does not know what
others hold. These policies look at the nodes themselves, and let a run save before it grows, so nothing is redone.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from scoreray.trainer.on_ray.hooks import (
    NoopDecision,
    ResizeDecision,
    ScalingPolicy,
    draining_nodes,
    free_resources,
    resources_per_worker,
)

WAIT_S = 0.5  # between two looks for resources while there are too few
NOTE_EVERY_S = 30.0
SIOCGIFADDR = 0x8915  # Linux: an interface's IPv4 address


def on_one_machine() -> bool:
    """Whether the connected cluster is an embedded one, of this machine alone."""
    return "RAY_ADDRESS" not in os.environ and sum(bool(node["Alive"]) for node in ray.nodes()) == 1


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address; None when there is none (IPv6, or not of this host)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def workers_that_fit(free: Mapping[str, Mapping[str, float]], each: Mapping[str, float]) -> int:
    """How many workers that need `each` the nodes have room for; `free`: resources by node."""
    needs = {name: amount for name, amount in each.items() if amount > 0}
    if not needs:
        return 1 << 30
    return sum(
        int(min((resources.get(name, 0.0) + 1e-6) // amount for name, amount in needs.items()))
        for resources in free.values()
    )


class _Policy(ScalingPolicy):
    """`alone`: on a cluster of one machine there is no autoscaler: no resources are requested of it, which would start
    a process."""

    def __init__(self, scaling_config: Any, alone: bool) -> None:
        super().__init__(scaling_config)
        self._alone = alone

    def after_controller_start(self, train_run_context: Any) -> None:
        if not self._alone:
            super().after_controller_start(train_run_context)

    def _maybe_send_resource_request(self) -> None:
        if not self._alone:
            super()._maybe_send_resource_request()

    def _resize(self, num_workers: int) -> ResizeDecision:
        return ResizeDecision(num_workers, resources_per_worker(self.scaling_config))


class FixedWorkers(_Policy):
    """As many workers as the config says, whenever the cluster has them."""

    def _get_num_workers_for_resource_request(self) -> int:
        return int(self.scaling_config.num_workers)

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._maybe_send_resource_request()
        return self._resize(self.scaling_config.num_workers)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._maybe_send_resource_request()
        return NoopDecision()


class WorkersThatFit(_Policy):
    """As many workers as the live nodes have room for, of the `sizes` that the config allows (ascending).

    A group that lost a member starts again with those that are left. A group that could be larger, for `resize_every_s`
    since it started or was last looked at, saves (`monitor` requests it; it has `grace_s`) and starts again larger.
    """

    def __init__(
        self,
        scaling_config: Any,
        monitor: Any,
        alone: bool,
        sizes: Sequence[int],
        resize_every_s: float,
        grace_s: float,
    ) -> None:
        super().__init__(scaling_config, alone)
        self._sizes = sizes
        self._monitor, self._resize_every_s, self._grace_s = monitor, resize_every_s, grace_s
        self._held: dict[str, int] = {}  # workers of the group that runs or ran last, by node: their places are ours
        self._looked = self._noted = float("-inf")
        self._growing_since: float | None = None

    def _get_num_workers_for_resource_request(self) -> int:
        return int(self.scaling_config.max_workers)

    def make_decision_for_non_running_worker_group(self) -> Any:
        self._maybe_send_resource_request()
        self._growing_since = None
        count, room = self._count()
        if count == 0:
            if time.monotonic() - self._noted > NOTE_EVERY_S:
                self._noted, low = time.monotonic(), self._sizes[0]
                self._monitor.note.remote(f"waiting: the cluster has room for {room} workers, {low} are needed")
            time.sleep(WAIT_S)
            return NoopDecision()
        self._held.clear()  # whatever is left of the last group ends before the next one starts
        self._looked = time.monotonic()
        return self._resize(count)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._maybe_send_resource_request()
        self._held = {}
        for worker in worker_group_state.workers:
            self._held[worker.metadata.node_id] = self._held.get(worker.metadata.node_id, 0) + 1
        now, size = time.monotonic(), worker_group_state.num_workers
        if self._growing_since is None:
            if size >= self._sizes[-1] or now - self._looked < self._resize_every_s:
                return NoopDecision()
            self._looked = now
            if self._count()[0] <= size:
                return NoopDecision()
            self._growing_since = now
            self._monitor.request_save.remote()
            return NoopDecision()
        if not ray.get(self._monitor.has_saved.remote()) and now - self._growing_since < self._grace_s:
            return NoopDecision()
        self._growing_since = None
        count, _ = self._count()
        if count <= size:
            return NoopDecision()
        self._monitor.restarted.remote(f"there is room for {count} of them now, not {size}")
        return self._resize(count)

    def _count(self) -> tuple[int, int]:
        """The largest of our sizes that the live nodes have room for (0: none), and how many workers would fit."""
        each, free = resources_per_worker(self.scaling_config), free_resources()
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - draining_nodes()
        free = {node: resources for node, resources in free.items() if node in alive}
        for node, workers in self._held.items():
            for name, amount in each.items():
                if node in free:
                    free[node][name] = free[node].get(name, 0.0) + workers * amount
        room = workers_that_fit(free, each)
        return max((size for size in self._sizes if size <= room), default=0), room
