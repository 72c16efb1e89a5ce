"""What `scoreray doctor` asks every node of a cluster, and what it makes of the answers.

One task on each node tells facts; judging is pure: facts in, findings out. Whether nodes reach each other: `reach.py`.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from scoreray.cluster.connect.listening import judge_listening, listening
from scoreray.cluster.connect.room import REPORTED_S, autoscaler
from scoreray.cluster.doctor.reach import reached
from scoreray.cluster.finding import Finding
from scoreray.data.errors import ScorerayError
from scoreray.trainer.config import Config

PROBE_BYTES = 8 << 20
CLOCK_S, DISK_BYTES, SHM_BYTES, WITHIN_S = 2.0, 20 << 30, 1 << 30, 60.0
HERE = "this machine"
SILENT = "open TCP 10002-19999 (Ray's workers) between the nodes, or look at the raylet's log there"
Facts = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """Where a run of the config will read and write, and its workers; "", () and 0 for nothing."""

    storage: str = ""
    data: str = ""
    folders: tuple[str, ...] = ()
    workers: int = 0
    cpus: float = 0.0  # of a worker
    gpus: int = 0

    @classmethod
    def of(cls, config: Config | None) -> Ask:
        if config is None:
            return cls()
        cache = (str(config.data.cache_dir),) if config.data.cache_dir else ()
        size = config.scaling
        return cls(config.run.storage, config.data.url, cache, size.range[0], size.cpus_per_worker, int(size.use_gpu))


def facts_of_node(ask: Ask) -> Facts:
    """Run on a node: versions, disks, what listens, and the storage as that node sees it."""
    import importlib.metadata
    import platform

    from ray._private import worker

    from scoreray.cluster.wheel import code_hash

    versions = {name: importlib.metadata.version(name) for name in ("ray", "torch", "deepspeed", "webdataset")}
    versions |= {"scoreray": code_hash(), "python": platform.python_version()}
    node = getattr(worker, "_global_node", None)
    session = node.get_session_dir_path() if node else ""
    found: Facts = {
        "versions": versions,
        "disks": _disks((session, *ask.folders)),
        "shm_free": shutil.disk_usage("/dev/shm").free,
        "token": os.environ.get("RAY_AUTH_MODE") == "token",
        "listening": listening(session) if session else [],
    }
    if ask.storage:
        found["storage"] = _probe_storage(ask.storage)
    if ask.data:
        found["data"] = _probe_data(ask.data)
    return found


def clock_of_node() -> Facts:
    """Run on a node."""
    return {"time": time.time()}


def _disks(folders: tuple[str, ...]) -> dict[str, int]:
    """Folder -> free bytes of its disk: those given (of Ray, for logs and spilled objects) and the temporary one."""
    import tempfile
    from pathlib import Path

    found: dict[int, tuple[str, int]] = {}
    for folder in filter(None, [*folders, tempfile.gettempdir()]):
        place = Path(folder).absolute()
        while not place.exists():
            place = place.parent  # it will be made there
        found.setdefault(place.stat().st_dev, (str(folder), shutil.disk_usage(place).free))
    return dict(found.values())


def _probe_data(url: str) -> Facts:
    """Whether the data set's manifest can be read."""
    from scoreray.data.reading.manifest import Manifest
    from scoreray.data.storage.store import open_store

    try:
        Manifest.load(open_store(url))
    except ScorerayError as error:
        return {"open": str(error)}
    return {"open": ""}


def _probe_storage(url: str) -> Facts:
    """list, write, read, delete of an object of its own under `url`: "" or the error of each, and bytes a second."""
    import secrets

    from scoreray.data.storage.store import open_store

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
    if step("write", lambda: store.put(key, content)):
        step("read", lambda: store.get(key))
        step("delete", lambda: store.delete([key]))
    return told


def ask_cluster(ask: Ask) -> list[Finding]:
    """All nodes of the cluster that this process is connected to."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    nodes = [node for node in ray.nodes() if node["Alive"]]
    names = _names(nodes)
    on = {
        name: {"scheduling_strategy": On(node["NodeID"], soft=False)} for name, node in zip(names, nodes, strict=True)
    }
    task, clock = (ray.remote(num_cpus=0, max_retries=0)(one) for one in (facts_of_node, clock_of_node))
    facts = _answers({name: task.options(**on[name]).remote(ask) for name in names})
    for name, told in facts.items():  # one by one, and after the facts: starting a worker takes seconds
        if "error" not in told:
            began = time.time()
            asked = _answers({name: clock.options(**on[name]).remote()})[name]
            ended = time.time()
            told |= asked
            if "error" not in asked:
                told |= {"skew_s": asked["time"] - (began + ended) / 2, "within_s": (ended - began) / 2}
    there = [node for name, node in zip(names, nodes, strict=True) if "error" not in facts[name]]
    resources = dict(zip(names, (node["Resources"] for node in nodes), strict=True))
    room = judge_room(resources, ask, grows=autoscaler(REPORTED_S).is_there)
    return [*judge(facts), *room, *_dashboard(), *reached(there)]


def _names(nodes: list[Any]) -> list[str]:
    """A node's address; where several have the same, with a part of its id."""
    addresses = [str(node["NodeManagerAddress"]) for node in nodes]
    return [
        address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:6]})"
        for address, node in zip(addresses, nodes, strict=True)
    ]


def _answers(asked: dict[str, Any]) -> dict[str, Facts]:
    """What each node answers within a minute, else {"error"}."""
    import ray

    told, end = {}, time.monotonic() + WITHIN_S
    for name, answer in asked.items():
        try:
            told[name] = ray.get(answer, timeout=max(1.0, end - time.monotonic()))
        except Exception as error:
            told[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return told


def _dashboard() -> list[Finding]:
    """Whether the dashboard, through which jobs come, refuses whoever has no token."""
    import urllib.error
    import urllib.request

    from ray._private import worker

    url = getattr(worker._global_node, "webui_url", None)
    if not url:
        return []
    try:
        urllib.request.urlopen(f"http://{url}/api/jobs/", timeout=10).close()
    except urllib.error.HTTPError as refused:
        if refused.code in (401, 403):
            return [Finding("token", "good", f"the dashboard at {url} refuses who has none ({refused.code})")]
        return []
    except OSError as error:
        return [Finding("token", "note", f"the dashboard at {url} does not answer from here ({error})")]
    text = f"the dashboard at {url} takes jobs without a token; set RAY_AUTH_MODE=token on the head"
    return [Finding("token", "problem", text, {"dashboard": url})]


def judge(facts: dict[str, Facts]) -> list[Finding]:
    """Findings from the facts of each node (by address); what differs is told by node and name."""
    found = [
        Finding("node", "problem", f"{node}: does not answer ({told['error'][:200]}); {SILENT}", {"node": node})
        for node, told in facts.items()
        if "error" in told
    ]
    told_by = {node: told for node, told in facts.items() if "error" not in told}
    if not told_by:
        return found
    found += _versions(told_by) + _clocks(told_by)
    for node, told in told_by.items():
        found += _disk_findings(node, told)
        found.append(judge_listening(node, told["listening"], told["token"]))
        if not told["token"]:
            text = f"{node}: Ray asks for no token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on every node"
            found.append(Finding("token", "problem", text, {"node": node}))
        found += _storage(node, told.get("storage") or {})
        if (told.get("data") or {}).get("open"):
            text = f"{node}: can't read the data set: {told['data']['open']}; give its role the right to get and list"
            found.append(Finding("data", "problem", text, {"node": node}))
    if all(told["token"] for told in told_by.values()):
        found.append(Finding("token", "good", "every node asks for it"))
    return found


def judge_room(resources: dict[str, dict[str, float]], ask: Ask, *, grows: bool = False) -> list[Finding]:
    """Whether the run's least number of workers fits the nodes (of `ray.nodes()`), when nothing else is there.

    grows: an autoscaler adds nodes; else a run that does not fit is refused, or would wait for good.
    """
    from scoreray.trainer.on_ray.workers import workers_that_fit

    kinds = {
        node: next((key.partition(":")[2] for key in there if key.startswith("accelerator_type:")), "GPUs")
        for node, there in resources.items()
        if there.get("GPU", 0) > 0
    }
    gpus = ", ".join(f"{node} {resources[node]['GPU']:g} x {kind}" for node, kind in kinds.items()) or "no GPUs"
    found = [Finding("GPUs", "note" if len(set(kinds.values())) > 1 else "good", gpus, {"kinds": kinds})]
    if ask.workers:
        fit = workers_that_fit(resources, {"CPU": ask.cpus, "GPU": ask.gpus})
        each = f"{ask.cpus:g} CPUs" + (" and a GPU" if ask.gpus else "")
        text = f"room for {min(fit, ask.workers)} of {ask.workers} workers of {each}"
        state: Literal["good", "note", "problem"] = "good"
        if fit < ask.workers:
            state = "note" if grows else "problem"
            text += "; the run waits for its autoscaler's nodes" if grows else "; add nodes or lower scaling.workers"
        found.append(Finding("room", state, text, {"fit": fit}))
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


def _disk_findings(node: str, told: Facts) -> list[Finding]:
    found = []
    shm = "enlarge it (Kubernetes: an emptyDir with medium Memory)"
    disks = [("disk", folder, free, DISK_BYTES, "free it, or have that folder elsewhere")
             for folder, free in told["disks"].items()]  # fmt: skip
    for what, folder, free, least, mend in [*disks, ("/dev/shm", "/dev/shm", told["shm_free"], SHM_BYTES, shm)]:
        text = f"{node}: {free / 2**30:,.1f} GiB free" + (f" for {folder}" if what == "disk" else "")
        low = free < least
        text += f", {least / 2**30:,.0f} GiB are wanted; {mend}" if low else ""
        about = {"node": node, "folder": folder, "free_bytes": free}
        found.append(Finding(what, "problem" if free < least / 20 else "note" if low else "good", text, about))
    return found


def _clocks(told_by: dict[str, Facts]) -> list[Finding]:
    """Who differs from most clocks, this machine's among them: alone against many it is the one that is wrong."""
    clocks = {HERE: (0.0, 0.0)} | {node: (told["skew_s"], told["within_s"]) for node, told in told_by.items()}
    usual = statistics.median_low(skew for skew, _ in clocks.values())
    if len(told_by) < 2 or abs(usual) <= CLOCK_S:
        usual = 0.0
    found = []
    for node, (skew, unsure) in clocks.items():
        if abs(skew - usual) - unsure > CLOCK_S:
            text = f"{node}: its clock is {skew - usual:+.1f} s from the others'; S3 refuses 900 s, set up NTP"
            found.append(Finding("clock", "problem", text, {"node": node, "skew_s": skew - usual}))
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
