"""What we change of Ray Train: errors that are final, a group that meets without a listener, an abort from Python.

These hooks are not public in Ray 2.60; they are all here, and tests of real runs hold them.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

from scoreray.data.errors import DataError, ScorerayError, StorageError, Unanswered, UserError
from scoreray.trainer.engine import NonFiniteError

FINAL_ERRORS = (UserError, DataError, NonFiniteError, StorageError)  # starting again would only meet them again


def cause(error: BaseException) -> BaseException:
    """The error of ours inside what Ray Train raises, else Ray's error itself."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [getattr(failure, "_base_exc", failure) for failure in failures.values()]
    ours = [one for one in causes if isinstance(one, ScorerayError)]
    return next(iter([one for one in ours if is_final(one)] + ours), error)


def is_final(error: BaseException) -> bool:
    """Whether starting the workers again would only meet this error again; a store that did not answer may yet."""
    return isinstance(error, FINAL_ERRORS) and not isinstance(error, Unanswered)


def on_one_machine() -> bool:
    """Whether the connected cluster is an embedded one, of this machine alone."""
    return "RAY_ADDRESS" not in os.environ and sum(bool(node["Alive"]) for node in ray.nodes()) == 1


class RunFailurePolicy(DefaultFailurePolicy):
    """Retries as Ray Train does, but never after an error that is final; tells `monitor` why it starts again."""

    def __init__(self, failure_config: Any, monitor: Any) -> None:
        super().__init__(failure_config)
        self._monitor = monitor

    def make_decision(self, training_failed_error: Any) -> Any:
        reason = cause(training_failed_error)
        if is_final(reason):
            return FailureDecision.RAISE
        decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            line = str(reason).strip().splitlines()[-1:] or [type(reason).__name__]
            self._monitor.note.remote(f"workers are started again: {line[0].strip()}")
        return decision


@dataclass
class OneMachineConfig(TorchConfig):
    """Workers of one machine meet through a file in `folder`: torch's own store would listen on every address."""

    folder: str = ""

    @property
    def backend_cls(self) -> Any:
        return _OneMachineBackend


class _OneMachineBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_set_torch_distributed_env_vars)
        gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        meeting = os.path.join(backend_config.folder, uuid.uuid4().hex)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _setup_torch_process_group,
                    backend="nccl" if gpu and torch.distributed.is_nccl_available() else "gloo",
                    world_rank=rank,
                    world_size=len(worker_group),
                    init_method=f"file://{meeting}",
                    timeout_s=backend_config.timeout_s,
                )
                for rank in range(len(worker_group))
            ]
        )


class RunTrainer(TorchTrainer):
    """TorchTrainer with our failure policy, and with Ctrl-C left to Python: whoever catches it calls `abort`."""

    def __init__(self, *arguments: Any, monitor: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._monitor = monitor
        self._controller: Any = None

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        policy = RunFailurePolicy(self.run_config.failure_config, self._monitor)
        return super()._initialize_and_run_controller(**{**arguments, "failure_policy": policy})

    def _create_default_callbacks(self) -> Any:
        # The cleaner asks the State API, which only a dashboard serves: in vain on an embedded cluster, which needs
        # no cleaning, as it ends with this process.
        callbacks = super()._create_default_callbacks()
        if not on_one_machine():
            return callbacks
        return [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """End the workers."""
        if self._controller is not None:
            with contextlib.suppress(Exception):  # the actor exits in this call: its death is the good answer
                ray.get(self._controller.abort.remote(), timeout=10)
