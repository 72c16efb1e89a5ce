"""What `scoreray doctor` asks every node of a cluster, and what it makes of the answers.

One task on each node tells facts; one actor on each joins an all-reduce over gloo, as training does. Judging is pure:
facts in, findings out.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

from scoreray.cluster.doctor import Finding
from scoreray.data.errors import ScorerayError

PROBE_BYTES = 8 << 20
REDUCE_BYTES = 32 << 20
CLOCK_S, DISK_BYTES, SHM_BYTES, WITHIN_S = 2.0, 20 << 30, 1 << 30, 60.0
Facts = dict[str, Any]


def facts_of_node(storage: str, write: bool) -> Facts:
    """Run on a node: versions, time, disks, and the storage as that node sees it."""
    import importlib.metadata
    import platform
    import tempfile

    from scoreray.cluster.wheel import code_hash

    versions = {name: importlib.metadata.version(name) for name in ("ray", "torch", "deepspeed", "webdataset")}
    versions |= {"scoreray": code_hash(), "python": platform.python_version()}
    found: Facts = {
        "versions": versions,
        "disk_free": shutil.disk_usage(tempfile.gettempdir()).free,
        "shm_free": shutil.disk_usage("/dev/shm").free,
        "token": os.environ.get("RAY_AUTH_MODE") == "token",
    }
    if storage:
        found["storage"] = _probe_storage(storage, write)
    return found | {"time": time.time()}  # last: the answer leaves now


def _probe_storage(url: str, write: bool) -> Facts:
    """list, write, read, delete of an object of its own under `url`: "" or the error of each, and bytes a second."""
    import secrets

    from scoreray.data.store import open_store

    told: Facts = {}
    key = f".doctor/{secrets.token_hex(8)}"
    content = secrets.token_bytes(1 << 20) * (PROBE_BYTES >> 20)

    def step(name: str, call: Callable[[], Any]) -> bool:
        began = time.perf_counter()
        try:
            call()
            told[name] = ""
        except ScorerayError as error:
            told[name] = str(error)
        told[f"{name}_bytes_per_s"] = PROBE_BYTES / max(time.perf_counter() - began, 1e-9)
        return not told[name]

    store = open_store(url)
    step("list", lambda: store.list(".doctor/"))
    if write and step("write", lambda: store.put(key, content)):
        step("read", lambda: store.get(key))
        step("delete", lambda: store.delete([key]))
    return told


class Reducer:
    """Run on a node, one on each: joins the others over gloo."""

    def address(self) -> tuple[str, int]:
        import socket

        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def reduce(self, meet: tuple[str, int], rank: int, size: int, within_s: float) -> Facts:
        """Bytes a second of an all-reduce, or the error."""
        import datetime

        import torch
        import torch.distributed as dist

        try:
            dist.init_process_group(
                "gloo", init_method=f"tcp://{meet[0]}:{meet[1]}", rank=rank, world_size=size,
                timeout=datetime.timedelta(seconds=within_s),
            )  # fmt: skip
            values, taken = torch.ones(REDUCE_BYTES // 4), []
            for _ in range(4):
                began = time.perf_counter()
                dist.all_reduce(values)
                taken.append(time.perf_counter() - began)
            dist.destroy_process_group()
        except Exception as error:
            return {"error": str(error).splitlines()[0]}
        return {"error": "", "bytes_per_s": REDUCE_BYTES / statistics.median(taken[1:])}


def ask_cluster(storage: str = "", *, write: bool = True) -> list[Finding]:
    """All nodes of the cluster that this process is connected to."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    nodes = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0)(facts_of_node)
    facts: dict[str, Facts] = {}
    for node in nodes:
        name, began = node["NodeManagerAddress"], time.time()
        try:
            where = On(node["NodeID"], soft=False)
            first = task.options(scheduling_strategy=where)
            ray.get(first.remote("", False), timeout=WITHIN_S)  # starts a worker: its time is not the clock's
            began = time.time()
            told = ray.get(first.remote("", False), timeout=WITHIN_S)
            ended = time.time()
            told |= {"skew_s": told["time"] - (began + ended) / 2, "within_s": (ended - began) / 2}
            if storage:
                told["storage"] = ray.get(first.remote(storage, write), timeout=WITHIN_S)["storage"]
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        facts[name if name not in facts else f"{name} ({node['NodeID'][:6]})"] = told
    return [*judge(facts), *_reduced(nodes)]


def _reduced(nodes: list[Any]) -> list[Finding]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    if len(nodes) < 2:
        return [Finding("network", "note", "one node: nothing to reach")]
    make = ray.remote(num_cpus=0)(Reducer)
    actors = [make.options(scheduling_strategy=On(node["NodeID"], soft=False)).remote() for node in nodes]
    names = [node["NodeManagerAddress"] for node in nodes]
    found: list[Finding] = []
    try:
        for i in range(len(actors)):  # each node with the next: who can't be reached is known by name
            j = (i + 1) % len(actors)
            if len(actors) == 2 and i == 1:
                break
            found.append(judge_pair(names[i], names[j], _pair(actors[i], actors[j])))
    finally:
        for actor in actors:
            ray.kill(actor)
    return found


def _pair(a: Any, b: Any) -> list[Facts]:
    import ray

    try:
        meet = ray.get(a.address.remote(), timeout=WITHIN_S)
        return ray.get([one.reduce.remote(meet, rank, 2, 20.0) for rank, one in enumerate((a, b))], timeout=WITHIN_S)
    except Exception as error:
        return [{"error": f"{type(error).__name__}: {error}".splitlines()[0]}]


def judge_pair(first: str, second: str, told: list[Facts]) -> Finding:
    """What an all-reduce between two nodes says."""
    errors = [one["error"] for one in told if one["error"]]
    if errors:
        text = (
            f"{first} and {second} can't join an all-reduce ({errors[0][:160]}); open TCP 32768-60999 between the "
            "nodes, and set GLOO_SOCKET_IFNAME where a node has several addresses"
        )
        return Finding("network", "problem", text, {"nodes": [first, second]})
    speed = min(one["bytes_per_s"] for one in told)
    text = f"{first} and {second}: all-reduce of {REDUCE_BYTES >> 20} MiB at {speed / 1e6:,.0f} MB/s (gloo)"
    return Finding("network", "good", text, {"nodes": [first, second], "bytes_per_s": speed})


def judge(facts: dict[str, Facts]) -> list[Finding]:
    """Findings from the facts of each node (by address); what differs is told by node and name."""
    found = [
        Finding("node", "problem", f"{node}: does not answer ({told['error'][:200]})", {"node": node})
        for node, told in facts.items()
        if "error" in told
    ]
    told_by = {node: told for node, told in facts.items() if "error" not in told}
    if not told_by:
        return found
    found += _versions(told_by) + _clocks(told_by)
    for node, told in told_by.items():
        for what, free, least, mend in (
            ("disk", told["disk_free"], DISK_BYTES, "free its temporary folder, or set data.cache_dir elsewhere"),
            ("/dev/shm", told["shm_free"], SHM_BYTES, "enlarge it (Kubernetes: an emptyDir with medium Memory)"),
        ):
            text, about = f"{node}: {free / 2**30:,.1f} GiB free", {"node": node, "free_bytes": free}
            low = free < least
            text += f", {least / 2**30:,.0f} GiB are wanted; {mend}" if low else ""
            found.append(Finding(what, "problem" if free < least / 20 else "note" if low else "good", text, about))
        if not told["token"]:
            text = f"{node}: Ray asks for no token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on every node"
            found.append(Finding("token", "problem", text, {"node": node}))
        found += _storage(node, told.get("storage") or {})
    if all(told["token"] for told in told_by.values()):
        found.append(Finding("token", "good", "every node asks for it"))
    return found


def _versions(told_by: dict[str, Facts]) -> list[Finding]:
    found = []
    for name in next(iter(told_by.values()))["versions"]:
        given = {node: told["versions"].get(name) for node, told in told_by.items()}
        usual = statistics.mode(given.values())
        for node, version in given.items():
            if version != usual:
                text = f"{node}: {name} {version}, the others have {usual}; install the same there"
                found.append(Finding("versions", "problem", text, {"node": node, "name": name, "version": version}))
    return found or [Finding("versions", "good", f"the same on {len(told_by)} node(s)")]


def _clocks(told_by: dict[str, Facts]) -> list[Finding]:
    found = []
    for node, told in told_by.items():
        skew, unsure = told["skew_s"], told["within_s"]
        if abs(skew) - unsure > CLOCK_S:
            text = f"{node}: its clock is {skew:+.1f} s from this machine's; S3 refuses 900 s, set up NTP"
            found.append(Finding("clock", "problem", text, {"node": node, "skew_s": skew}))
    return found or [Finding("clock", "good", f"within {CLOCK_S:g} s on {len(told_by)} node(s)")]


def _storage(node: str, told: Facts) -> list[Finding]:
    found = []
    for step in ("list", "write", "read", "delete"):
        if told.get(step):
            text = f"{node}: can't {step} there: {told[step]}; give its role that right"
            found.append(Finding("storage", "problem", text, {"node": node, "step": step}))
    if told and not found:
        speeds: Facts = {step: told[f"{step}_bytes_per_s"] for step in ("write", "read") if step in told}
        text = ", ".join(f"{step} {speed / 1e6:,.0f} MB/s" for step, speed in speeds.items()) or "can be listed"
        found.append(Finding("storage", "good", f"{node}: {text}", {"node": node, **speeds}))
    return found
