"""What a node of a cluster reports to `scoreray doctor`, collected by a task on that node."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from scoreray.cluster.connect.open_ports import OpenPort, open_ports
from scoreray.data.errors import ScorerayError
from scoreray.trainer.config import Config

PROBE_BYTES = 8 << 20


@dataclass(frozen=True)
class RunNeeds:
    """Where a run of the config will read and write, and its workers; "", () and 0 for nothing."""

    storage: str = ""
    data: str | tuple[str, ...] = ""
    folders: tuple[str, ...] = ()
    workers: int = 0
    cpus: float = 0.0  # of a worker
    gpus: int = 0

    @classmethod
    def of(cls, config: Config | None) -> RunNeeds:
        if config is None:
            return cls()
        cache = (str(config.data.cache_dir),) if config.data.cache_dir else ()
        size = config.scaling
        return cls(config.run.storage, config.data.url, cache, size.range[0], size.cpus_per_worker, int(size.use_gpu))


@dataclass(frozen=True)
class StorageProbe:
    """By step (list, write, read, delete) of an object's life: "" or the error, and bytes a second."""

    errors: dict[str, str] = field(default_factory=dict)
    bytes_per_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeFacts:
    """What a node says of itself. shm_free: bytes of /dev/shm; storage, data_error: None where none was to be tried."""

    versions: dict[str, str]
    disks: dict[str, int]  # folder -> free bytes of its disk
    shm_free: int
    has_token: bool
    ports: list[OpenPort]
    storage: StorageProbe | None = None
    data_error: str | None = None  # "": the data set can be read


@dataclass(frozen=True)
class Clock:
    """How far a node's clock is ahead of this machine's, give or take `within_s`, half the time of a call."""

    skew_s: float
    within_s: float


@dataclass(frozen=True)
class NodeReport:
    """Of one node: its facts and clock, or the error of the call that should have brought them."""

    facts: NodeFacts | None = None
    clock: Clock | None = None
    error: str = ""


def facts_of_node(needs: RunNeeds) -> NodeFacts:
    """Run on a node: versions, disks, what listens, and the storage as that node sees it."""
    import importlib.metadata
    import platform

    import ray

    from scoreray.cluster.wheel import code_hash

    versions = {name: importlib.metadata.version(name) for name in ("ray", "torch", "deepspeed", "webdataset")}
    versions |= {"scoreray": code_hash(), "python": platform.python_version()}
    session = ""
    if ray.is_initialized():
        context = ray.get_runtime_context()
        session = os.path.join(context.get_temp_dir(), context.get_session_name())
    return NodeFacts(
        versions,
        _disks((session, *needs.folders)),
        shutil.disk_usage("/dev/shm").free,
        os.environ.get("RAY_AUTH_MODE") == "token",
        open_ports(session) if session else [],
        _probe_storage(needs.storage) if needs.storage else None,
        _data_error(needs.data) if needs.data else None,
    )


def time_of_node() -> float:
    """Run on a node, in a call of its own: the quicker it is, the better its clock can be compared."""
    return time.time()


def _disks(folders: tuple[str, ...]) -> dict[str, int]:
    """Folder -> free bytes of its disk: those given (of Ray, for logs and spilled objects) and the temporary one."""
    import tempfile
    from pathlib import Path

    found: dict[int, tuple[str, int]] = {}
    for folder in filter(None, [*folders, tempfile.gettempdir()]):
        place = Path(folder).absolute()
        while not place.exists():
            place = place.parent  # the folder will be made in it
        found.setdefault(place.stat().st_dev, (str(folder), shutil.disk_usage(place).free))
    return dict(found.values())


def _data_error(url: str | tuple[str, ...]) -> str:
    """Why the data set's manifest, or the first of tars without one, can't be read; "" where it can."""
    from scoreray.data.unpacked.tars import locate

    try:
        locate(url, patient=True)
    except ScorerayError as error:
        return str(error)
    return ""


def _probe_storage(url: str) -> StorageProbe:
    """list, write, read, delete of an object of its own under `url`."""
    import secrets

    from scoreray.data.storage.store import open_store

    probe = StorageProbe()
    key = f".doctor/{secrets.token_hex(8)}"
    content = secrets.token_bytes(1 << 20) * (PROBE_BYTES >> 20)

    def step(name: str, call: Callable[[], Any]) -> bool:
        began = time.perf_counter()
        try:
            call()
            probe.errors[name] = ""
        except ScorerayError as error:
            probe.errors[name] = str(error)
        probe.bytes_per_s[name] = PROBE_BYTES / max(time.perf_counter() - began, 1e-9)
        return not probe.errors[name]

    store = open_store(url)
    step("list", lambda: store.list(".doctor/"))
    if step("write", lambda: store.put(key, content)):
        step("read", lambda: store.get(key))
        step("delete", lambda: store.delete([key]))
    return probe
