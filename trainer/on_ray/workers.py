"""How many workers a run has on a Ray cluster, now and when machines come or go, and by which address they are reached.

Ray Train runs as many workers as it is given; this decides the number, and looks for room by placement groups. Ray's
own elastic `ScalingConfig` would take sizes that don't divide the batch, resizes without letting the run save, and
after a node's death goes by counts that are up to 20 s old.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise, takewhile

import ray

from scoreray.data.units import counted_noun

PLACED_S = 2.0  # in which Ray places a group that there is room for, also on a busy machine
SEEN_S = 6.0  # in which Ray's autoscaler sees one that there is no room for
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


def size_with_room(sizes: Sequence[int], each: Mapping[str, float], note: Callable[[str], None]) -> int:
    """The largest of `sizes` (ascending) that there is room for now, at `each` a worker; waits for the first."""
    if len(sizes) == 1:  # Ray Train waits itself
        return sizes[0]
    room = workers_that_fit({node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}, each)
    for size in reversed(sizes):
        if size <= room and _placed([each] * size, PLACED_S):
            return size
    while not _placed([each] * sizes[0], NOTE_EVERY_S):
        note(f"waiting: the cluster has no room for {counted_noun(sizes[0], 'worker')}")
    return sizes[0]


def _placed(bundles: list[Mapping[str, float]], timeout_s: float) -> bool:
    """Whether there is room for these bundles within this time."""
    group = ray.util.placement_group(bundles)
    try:
        return bool(group.wait(timeout_s))
    finally:
        ray.util.remove_placement_group(group)


@contextmanager
def room_to_grow(sizes: Sequence[int], size: int, each: Mapping[str, float]) -> Iterator[int]:
    """The largest of `sizes` that there is room for beside `size` running workers; it is kept while this is entered.

    Looked for so long that an autoscaler, which looks each 5 s, sees what is missing and can start nodes for it.
    """
    larger = [one for one in sizes if one >= size]
    groups = [(after, ray.util.placement_group([each] * (after - before))) for before, after in pairwise(larger)]
    try:
        yield max([size, *(after for after, _ in takewhile(lambda entry: entry[1].wait(SEEN_S), groups))])
    finally:
        for _, group in groups:
            ray.util.remove_placement_group(group)
