"""How workers find each other, and what a worker process is requested to do by signals and preemption notices."""

from __future__ import annotations

import os
import signal
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.on_ray.hooks import free_address, preemption_announced, set_rank_variables
from scoreray.trainer.on_ray.workers import interface_of


@dataclass
class RendezvousConfig(BackendConfig):
    """How workers find each other: through a file in `folder` where all share one machine, else at rank 0's address.

    A file, because torch's own store listens on every address. Between machines it must; on a cluster a network policy
    decides who reaches it (docs/resilience.md).
    """

    folder: str = ""
    timeout_s: float = 1800.0

    @property
    def backend_cls(self) -> Any:
        return _RendezvousBackend


class _RendezvousBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        if backend_config.folder:
            place = f"file://{os.path.join(backend_config.folder, uuid.uuid4().hex)}"
        else:
            address, port = free_address(worker_group)
            place = f"tcp://{f'[{address}]' if ':' in address else address}:{port}"
        worker_group.execute(_join, place, gpu, backend_config.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the processes end. Leaving the process group with a dead or hung member takes half a minute."""


def _join(place: str, gpu: bool, timeout_s: float) -> None:
    """On each worker's main thread: joins the process group, and makes SIGTERM a request to save and end."""
    import torch.distributed as dist

    set_rank_variables()
    address = ray.util.get_node_ip_address()
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := interface_of(address)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface  # else gloo looks the host's name up, which may be 127.0.0.1
    dist.init_process_group(
        "nccl" if gpu and dist.is_nccl_available() else "gloo",
        init_method=place,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout_s),
    )
    before = signal.getsignal(signal.SIGTERM)

    def save_and_end(signum: int, frame: Any) -> None:
        if _by_signal["request"] is LoopRequest.PREEMPT and callable(before):  # a second time: at once
            before(signum, frame)
        _by_signal["request"] = LoopRequest.PREEMPT

    _by_signal["request"] = LoopRequest.NOTHING
    signal.signal(signal.SIGTERM, save_and_end)


_by_signal = {"request": LoopRequest.NOTHING}  # to this worker process


def preempted() -> LoopRequest:
    """PREEMPT once this worker process got SIGTERM, or a notice that its node will be taken away."""
    return LoopRequest.PREEMPT if preemption_announced() else _by_signal["request"]
