"""What Ray Train calls on each worker: the training loop, whose progress goes to the Monitor actor."""

from __future__ import annotations

import contextlib
import logging
import os
from concurrent.futures import Future
from typing import Any

import ray
import ray.train.torch
import torch

from scoreray.data.errors import ScorerayError
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.metrics import TrainingProgress
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.on_ray.rendezvous import preempted, watch_for_preemption


def train_on_worker(settings: dict[str, Any]) -> None:
    """`settings`: the config as JSON, a handle of the Monitor, and whether the cluster is an embedded one (`alone`)."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if threads := os.environ.get("OMP_NUM_THREADS"):  # Ray sets it by the worker's CPUs, perhaps after torch's import
        torch.set_num_threads(int(threads))
    context = ray.train.get_context()
    monitor = settings["monitor"]
    reporter = _Reporter(monitor)
    try:
        config = load_config(settings["config"])  # imports parts of somebody else's, which may not be on this machine
        _train(config, reporter, settings["alone"], monitor)
    except ScorerayError as error:
        with contextlib.suppress(ray.exceptions.RayActorError):
            ray.get(monitor.failed.remote(context.get_world_rank(), error))
        raise


def _train(config: Config, reporter: _Reporter, alone: bool, monitor: Any) -> None:
    context = ray.train.get_context()
    if not alone:
        watch_for_preemption()
    device = torch.device("cpu")
    if config.scaling.use_gpu:
        device = ray.train.torch.get_device()
        torch.cuda.set_device(device)
    train(
        config,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
        watch=reporter,
        note=lambda line: monitor.note.remote(line),
        requested=reporter.requested,
    )


class _Reporter:
    """Sends progress to the monitor and keeps the requests that it answers with, without waiting for it."""

    def __init__(self, monitor: Any) -> None:
        self._monitor, self._request = monitor, LoopRequest.NOTHING

    def __call__(self, progress: TrainingProgress) -> None:
        self._monitor.update.remote(progress).future().add_done_callback(self._answered)

    def _answered(self, answer: Future[int]) -> None:
        if answer.exception() is None:
            self._request = max(self._request, LoopRequest(answer.result()))

    def requested(self) -> LoopRequest:
        """The greater of the monitor's request and this process's own; one to save is returned once."""
        request = self._request
        if request is LoopRequest.SAVE:
            self._request = LoopRequest.NOTHING
        return max(request, preempted())
