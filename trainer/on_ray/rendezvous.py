"""How workers find each other, and what a worker process is requested to do by signals and preemption notices."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.train.backend import Backend, BackendConfig

from scoreray.trainer.monitoring.monitor import WorkerGroup
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.on_ray.workers import interface_of

NOTICE_POLL_S = 2.0  # between two looks for a preemption notice
NOTICES_PER_S = 128  # looks of all workers, which one actor of Ray Train's answers


@dataclass
class RendezvousConfig(BackendConfig):
    """How workers find each other: through a file in `folder` where all share one machine, else at rank 0's address.

    A file, because torch's own store listens on every address, and so does Ray's torch backend. Between machines it
    must; on a cluster a network policy decides who reaches it (docs/resilience.md). `backend`: of torch's process
    group. The controller reports the workers to `monitor` before they meet, so that they can be ended while they wait.
    """

    monitor: Any
    backend: str = "gloo"
    folder: str = ""
    timeout_s: float = 1800.0

    @property
    def backend_cls(self) -> Any:
        return _RendezvousBackend


class _RendezvousBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        workers, groups = zip(*worker_group.execute(_identify), strict=True)
        group = WorkerGroup(ray.get_runtime_context().current_actor, os.getpid(), workers, groups[0])
        with contextlib.suppress(ray.exceptions.RayActorError):  # a run goes on without its monitor
            if ending := ray.get(backend_config.monitor.started.remote(group)):
                raise ending
        if backend_config.folder:
            place = f"file://{os.path.join(backend_config.folder, uuid.uuid4().hex)}"
        else:
            place = f"tcp://{worker_group.execute_single(0, _free_address)}"
        worker_group.execute(_join, place, backend_config.backend, backend_config.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the processes end. Leaving the process group with a dead or hung member takes half a minute."""


def _identify() -> tuple[Any, Any]:
    """On each worker: a handle of its actor, and its placement group."""
    return ray.get_runtime_context().current_actor, ray.util.get_current_placement_group()


def _free_address() -> str:
    """On a worker: "address:port" of its machine, of a port that nothing uses."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _join(place: str, backend: str, timeout_s: float) -> None:
    """On each worker's main thread: joins the process group, and makes SIGTERM a request to save and end."""
    import torch.distributed as dist

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    os.environ |= {  # as torch's launcher sets them; DeepSpeed reads them
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    address = ray.util.get_node_ip_address()
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := interface_of(address)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface  # else gloo looks the host's name up, which may be 127.0.0.1
    if backend == "nccl" and not dist.is_nccl_available():
        backend = "gloo"
    dist.init_process_group(
        backend, init_method=place, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    before = signal.getsignal(signal.SIGTERM)

    def save_and_end(signum: int, frame: Any) -> None:
        if _of_process["request"] is LoopRequest.PREEMPT and callable(before):  # a second time: at once
            before(signum, frame)
        _of_process["request"] = LoopRequest.PREEMPT

    _of_process["request"] = LoopRequest.NOTHING
    signal.signal(signal.SIGTERM, save_and_end)


_of_process = {"request": LoopRequest.NOTHING}  # what this worker process is requested to do


def preempted() -> LoopRequest:
    """PREEMPT once this worker process got SIGTERM, or a notice that a node of the group will be taken away."""
    return _of_process["request"]


def watch_for_preemption() -> None:
    """On each worker: makes Ray's notice that a node will be taken away a request to save and end (Ray 2.58 and later).

    In a thread, as `get_preemption_info` waits until all ranks call it.
    """

    pause_s = max(NOTICE_POLL_S, ray.train.get_context().get_world_size() / NOTICES_PER_S)

    def look() -> None:
        with contextlib.suppress(Exception):  # the group is ending
            while ray.train.get_preemption_info() is None:
                time.sleep(pause_s)
            _of_process["request"] = LoopRequest.PREEMPT

    if hasattr(ray.train, "get_preemption_info"):
        threading.Thread(target=look, name="preemption-notices", daemon=True).start()
