"""Whether the nodes of a cluster reach each other, in a ring: by TCP both ways, then by an all-reduce."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from scoreray.cluster.finding import Finding, error_line

REDUCE_BYTES = 32 << 20
REACH_S, REDUCE_S, WITHIN_S, FREE_GPU_S = 5.0, 20.0, 60.0, 20.0


@dataclass(frozen=True)
class Reduced:
    """What came of an all-reduce on one node."""

    bytes_per_s: float = 0.0
    error: str = ""


class Prober:
    """An actor on a node: has a port of its own that others dial, dials theirs, and joins them in an all-reduce."""

    def listen(self) -> tuple[str, int, int]:
        """This node's address, a port at which it listens from now on, and a free one for torch's store."""
        import os
        import socket

        import ray

        from scoreray.trainer.on_ray.workers import interface_of

        address = ray.util.get_node_ip_address()
        if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := interface_of(address)):
            os.environ["GLOO_SOCKET_IFNAME"] = interface  # as training's workers do
        self._listener = socket.create_server(("", 0), backlog=64)
        with socket.socket() as probe:
            probe.bind(("", 0))
            free = int(probe.getsockname()[1])
        return address, int(self._listener.getsockname()[1]), free

    def dial(self, address: str, ports: dict[str, int]) -> dict[str, str]:
        """What each port is -> "" or the error of a connection to it."""
        import socket

        errors = {}
        for what, port in ports.items():
            try:
                socket.create_connection((address, port), timeout=REACH_S).close()
                errors[what] = ""
            except OSError as error:
                errors[what] = error.strerror or str(error)
        return errors

    def reduce(self, store: tuple[str, int], rank: int, size: int, within_s: float, backend: str = "gloo") -> Reduced:
        """An all-reduce with `size` - 1 others, who find each other through torch's store at (address, port)."""
        import datetime

        import torch
        import torch.distributed as dist

        device = torch.device("cuda" if backend == "nccl" else "cpu")
        try:
            dist.init_process_group(
                backend, init_method=f"tcp://{store[0]}:{store[1]}", rank=rank, world_size=size,
                timeout=datetime.timedelta(seconds=within_s),
            )  # fmt: skip
            values, taken = torch.ones(REDUCE_BYTES // 4, device=device), []
            for _ in range(4):
                began = time.perf_counter()
                dist.all_reduce(values)
                float(values[0])  # until the device is done
                taken.append(time.perf_counter() - began)
            dist.destroy_process_group()
        except Exception as error:
            return Reduced(error=str(error).splitlines()[0])
        return Reduced(REDUCE_BYTES / statistics.median(taken[1:]))


def reached(nodes: list[Any]) -> list[Finding]:
    """Findings about each node (of `ray.nodes()`) and its neighbour in a ring; pairs that share no node at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    if len(nodes) < 2:
        return [Finding("network", "note", "one node: nothing to reach")]
    found: list[Finding] = []
    backends = ["gloo"] + (["nccl"] if sum(node["Resources"].get("GPU", 0) > 0 for node in nodes) > 1 else [])
    for backend in backends:
        needs: dict[str, Any] = {"num_cpus": 0} | ({"num_gpus": 1} if backend == "nccl" else {})
        some = nodes if backend == "gloo" else [node for node in nodes if node["Resources"].get("GPU", 0) > 0]
        make = ray.remote(**needs)(Prober)
        actors = [make.options(scheduling_strategy=On(node["NodeID"], soft=False)).remote() for node in some]
        try:
            for pairs in rounds(len(some)):
                pairs_now = [_Pair(some[i], some[j], actors[i], actors[j], backend) for i, j in pairs]
                for step in (_Pair.listen, _Pair.dial, _Pair.reduce):
                    for pair in pairs_now:
                        step(pair)
                found += [one for pair in pairs_now for one in pair.findings()]
        finally:
            for actor in actors:
                ray.kill(actor)
    return found


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """The edges of a ring of `count` nodes, in rounds in which each node occurs at most once."""
    edges = [(i, (i + 1) % count) for i in range(count if count > 2 else count - 1)]
    made = [edges[0::2], edges[1::2]]
    if count > 2 and count % 2:
        made.append([made[0].pop()])
    return [one for one in made if one]


class _Pair:
    """Two nodes. A step begins its calls without waiting, the next one waits for them: a round's pairs run together."""

    def __init__(self, first: Any, second: Any, a: Any, b: Any, backend: str) -> None:
        self.nodes, self.actors, self.backend = (first, second), (a, b), backend
        self.names = [str(node["NodeManagerAddress"]) for node in self.nodes]
        self.error = ""
        self._calls: list[Any] = []
        self._store = ("", 0)
        self._blocked: list[Finding] = []

    def _results(self, within_s: float) -> list[Any]:
        import ray

        try:
            return list(ray.get(self._calls, timeout=within_s))
        except Exception as error:
            self.error = error_line(error)
            return []

    def listen(self) -> None:
        self._calls = [actor.listen.remote() for actor in self.actors]

    def dial(self) -> None:
        listening = self._results(FREE_GPU_S if self.backend == "nccl" else WITHIN_S)
        if self.error:
            return
        self._store, self._calls = (listening[0][0], listening[0][2]), []
        for (address, port, _), node, other in zip(listening, self.nodes, reversed(self.actors), strict=True):
            ports = {"raylet": node["NodeManagerPort"], "object manager": node["ObjectManagerPort"], "worker": port}
            self._calls.append(other.dial.remote(address, ports))

    def reduce(self) -> None:
        if self.error:
            return
        dialled = self._results(WITHIN_S)
        for name, other, errors in zip(self.names, reversed(self.names), dialled, strict=False):
            self._blocked += judge_dialled(name, other, errors)
        if self.error or self._blocked:
            return
        self._calls = [actor.reduce.remote(self._store, rank, 2, REDUCE_S, self.backend)
                       for rank, actor in enumerate(self.actors)]  # fmt: skip

    def findings(self) -> list[Finding]:
        reduced = [] if self.error or self._blocked else self._results(WITHIN_S)
        if self._blocked:
            return self._blocked
        if self.error and self.backend == "nccl":
            text = f"{self.names[0]} and {self.names[1]}: NCCL was not tried, a GPU of each must be free for it"
            return [Finding("network", "note", text, {"nodes": self.names})]
        first, second = self.names
        return [judge_pair(first, second, reduced or [Reduced(error=self.error)], self.backend)]


def judge_dialled(node: str, dialler: str, errors: dict[str, str]) -> list[Finding]:
    """A problem of `node` for each of its ports that `dialler` could not reach."""
    fix = {
        "raylet": "open --node-manager-port",
        "object manager": "open --object-manager-port",
        "worker": "open TCP 32768-60999 (gloo and NCCL take any of these)",
    }
    return [
        Finding(
            "network", "problem",
            f"{node}: its {what}'s port can't be reached from {dialler} ({error}); {fix[what]} between the nodes",
            {"node": node, "from": dialler, "port_of": what},
        )
        for what, error in errors.items() if error
    ]  # fmt: skip


def judge_pair(first: str, second: str, results: list[Reduced], backend: str = "gloo") -> Finding:
    """What an all-reduce between two nodes says."""
    errors = [one.error for one in results if one.error]
    if errors:
        text = (
            f"{first} and {second} can't join an all-reduce over {backend} ({errors[0][:160]}); open TCP 32768-60999 "
            f"between the nodes, and set {backend.upper()}_SOCKET_IFNAME where a node has several addresses"
        )
        return Finding("network", "problem", text, {"nodes": [first, second], "backend": backend})
    speed = min(one.bytes_per_s for one in results)
    text = f"{first} and {second}: all-reduce of {REDUCE_BYTES >> 20} MiB at {speed / 1e6:,.0f} MB/s ({backend})"
    facts = {"nodes": [first, second], "backend": backend, "bytes_per_s": speed}
    return Finding("network", "good", text, facts)
