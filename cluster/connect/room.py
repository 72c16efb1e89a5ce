"""Whether a cluster has the resources that a command needs, and waiting for its autoscaler to bring them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scoreray.cluster.display import say
from scoreray.cluster.hooks import AUTOSCALER, KEY_VALUE, hook
from scoreray.data.errors import UserError

POLL_S, SAY_EVERY_S = 1.0, 60.0
REPORTED_S = 10.0  # a head that has just started may not have looked at its cluster yet
DECIDED_S = 30.0  # an autoscaler that can bring a node starts one within a few of its 5 s rounds
STARTS_S = 1200.0  # a node that is longer about it, or that takes others' places at that, may never come
STATUS = b"__autoscaling_status"  # in Ray's key-value store: what `ray status` prints
UNCHANGEABLE = re.compile(r"node_[0-9a-f]{56}")  # Ray's name for the type of a node where nothing adds nodes

Bundle = Mapping[str, float]


@dataclass(frozen=True)
class Autoscaler:
    """The state of the connected cluster's autoscaler."""

    types: frozenset[str]
    starting: frozenset[str]  # names of nodes, or of launches that are no nodes yet

    @property
    def is_there(self) -> bool:
        """Every cluster has one that reports; where nothing adds nodes, each node is a type of its own to it."""
        return any(not UNCHANGEABLE.fullmatch(name) for name in self.types)


def autoscaler(within_s: float = 0.0) -> Autoscaler:
    """Of the connected cluster; none where none has reported within `within_s`, or where its state can't be read."""
    end = time.monotonic() + within_s
    while "RAY_ADDRESS" in os.environ:
        with contextlib.suppress(Exception):
            if (key_value := hook(KEY_VALUE)) and (status := key_value(STATUS)):
                return from_status(json.loads(status))
            if (status_v2 := hook(AUTOSCALER)) and (found := from_v2(status_v2(_gcs_address()))).types:
                return found
        if time.monotonic() >= end:
            break
        time.sleep(POLL_S)
    return Autoscaler(frozenset(), frozenset())


def from_status(status: Mapping[str, Any]) -> Autoscaler:
    """Of version 1, which keeps JSON under STATUS."""
    report = status.get("autoscaler_report") or {}
    available = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    mapped = (report.get("node_type_mapping") or {}).values()
    launches = report.get("pending_launches") or {}
    types = {*(report.get("active_nodes") or {}), *launches, *available, *mapped}
    nodes = (" ".join(map(str, node[:2])) for node in report.get("pending_nodes") or ())
    return Autoscaler(frozenset(types), frozenset([*nodes, *_launching(launches.items())]))


def from_v2(status: Any) -> Autoscaler:
    """Of version 2, which reports to the GCS (`ray.autoscaler.v2.schema.ClusterStatus`)."""
    if status.stats.autoscaler_version in (None, "0"):  # it never has
        return Autoscaler(frozenset(), frozenset())
    nodes = [*status.active_nodes, *status.idle_nodes, *status.pending_nodes, *status.pending_launches]
    launching = _launching((launch.ray_node_type_name, launch.count) for launch in status.pending_launches)
    starting = frozenset([*(node.instance_id for node in status.pending_nodes), *launching])
    return Autoscaler(frozenset(node.ray_node_type_name for node in nodes), starting)


def _launching(counts: Iterable[tuple[str, int]]) -> list[str]:
    return [f"{node_type} {number}" for node_type, count in counts for number in range(count)]


def _gcs_address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


def missing(bundles: Sequence[Bundle], room: Mapping[str, float]) -> dict[str, float]:
    """Of which resources the cluster has fewer, in all, than `bundles` need: name -> how much they need."""
    needs: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            needs[name] = needs.get(name, 0.0) + amount
    return {name: amount for name, amount in needs.items() if amount > room.get(name, 0.0) + 1e-9}


def wait_for_room(what: str, bundles: Sequence[Bundle], otherwise: str) -> None:
    """Until the cluster has `bundles`, each on one node. Raises UserError at once where no autoscaler will add nodes.

    what: "scaling.workers: 4 workers need"; otherwise: what a person can do.
    """
    import ray

    room = ray.cluster_resources()
    if not (lacking := missing(bundles, room)):
        return
    parts = [f"{amount:g} {name}, the cluster has {room.get(name, 0.0):g}" for name, amount in lacking.items()]
    lack = f"{what} {' and '.join(parts)}"
    if not autoscaler(REPORTED_S).is_there:
        raise UserError(f"{lack}; {otherwise}")
    say(f"{lack}: waiting for nodes of its autoscaler")
    with _requested(bundles) as came:
        while not came():
            pass


def gpus_come(cpus: float) -> bool:
    """Whether the cluster has GPUs, or its autoscaler brings one on request, which is waited for."""
    import ray

    if ray.cluster_resources().get("GPU", 0):
        return True
    if not autoscaler(REPORTED_S).is_there:
        return False
    say("the cluster has no GPU up: requesting one from its autoscaler")
    last = time.monotonic()  # that a node was starting, or this began
    seen: dict[str, float] = {}
    with _requested([{"GPU": 1, "CPU": cpus}]) as came:
        while not came():
            now = time.monotonic()
            ages_s = [now - seen.setdefault(name, now) for name in autoscaler().starting]
            if min(ages_s, default=STARTS_S) < STARTS_S:
                last = now
            elif now - last > DECIDED_S:
                say(f"no node has been starting for {DECIDED_S:.0f} s: going on with CPUs")
                return False
    return True


@contextlib.contextmanager
def _requested(bundles: Sequence[Bundle]) -> Iterator[Any]:
    """Requests `bundles` from the autoscaler; yields a function that waits a moment and returns whether they are there.

    The request is a pending placement group: an autoscaler starts nodes for it, and it is gone with this process,
    however that ends. A line is printed now and then while it is pending.
    """
    from ray.util import placement_group, remove_placement_group

    group = placement_group([{name: amount for name, amount in one.items() if amount} for one in bundles])
    began = said = time.monotonic()

    def came() -> bool:
        nonlocal said
        if group.wait(POLL_S):
            return True
        if time.monotonic() - said >= SAY_EVERY_S:
            said = time.monotonic()
            say(f"still waiting for nodes, {said - began:,.0f} s now ({len(autoscaler().starting)} are starting)")
        return False

    try:
        yield came
    finally:
        remove_placement_group(group)
