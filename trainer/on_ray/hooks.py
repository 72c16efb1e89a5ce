"""What we change of Ray Train: which errors are final, how workers meet, how many there are, how they are told to save.

These hooks are not public in Ray 2.60; they are all here, and tests of real runs hold them. Ray Train's controller
imports this file, and would wait for torch: only what runs on workers imports it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from scoreray.data.errors import DataError, ScorerayError, StorageError, Unanswered, UserError
from scoreray.data.storage.store import open_store
from scoreray.trainer.monitoring.stopping import Ask, Moved, NonFiniteError
from scoreray.trainer.on_ray.controller_watch import ControllerWatch
from scoreray.trainer.on_ray.workers import FixedWorkers, WorkersThatFit, interface_of

MARKER = "/COMMITTED.json"  # of a checkpoint, whose folder's name begins with the images seen
FINAL_ERRORS = (UserError, DataError, NonFiniteError, StorageError)  # starting again would only meet them again


def cause(error: BaseException) -> BaseException:
    """The error of ours inside what Ray Train raises, else Ray's error itself."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [getattr(failure, "_base_exc", failure) for failure in failures.values()]
    ours = [one for one in causes if isinstance(one, ScorerayError)]
    lost = [one for one in causes if isinstance(one, (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError))]
    return next(iter([one for one in ours if is_final(one)] + ours + lost), error)


def is_final(error: BaseException) -> bool:
    """Whether starting the workers again would only meet this error again; a store that did not answer may yet."""
    return isinstance(error, FINAL_ERRORS) and not isinstance(error, Unanswered)


def on_one_machine() -> bool:
    """Whether the connected cluster is an embedded one, of this machine alone."""
    return "RAY_ADDRESS" not in os.environ and sum(bool(node["Alive"]) for node in ray.nodes()) == 1


def reason_of(error: BaseException, training_failed_error: Any = None) -> str:
    """One line of why workers are started again."""
    failures = getattr(training_failed_error, "worker_failures", None) or {}
    ranks = [rank for rank, failure in failures.items() if getattr(failure, "_base_exc", failure) is error]
    who = f"rank {ranks[0]}" if ranks else "a worker"
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return f"{who} hung (no answer for scaling.hang_timeout_s) and was ended"
    if isinstance(error, WorkerHealthCheckFailedError):
        return f"{who} died"
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class RunFailurePolicy(DefaultFailurePolicy):
    """Retries as Ray Train does, but never after an error that is final; tells `monitor` why it starts again.

    `max_failures` counts failures without a commit in between, so that a long run is not ended by its length.
    Workers that were told to move have not failed.
    """

    def __init__(self, failure_config: Any, monitor: Any, run_url: str) -> None:
        super().__init__(failure_config)
        self._monitor, self._run_url, self._newest = monitor, run_url, ""

    def make_decision(self, training_failed_error: Any) -> Any:
        reason = cause(training_failed_error)
        if is_final(reason):
            return FailureDecision.RAISE
        if isinstance(reason, Moved):
            decision = FailureDecision.RETRY
        else:
            with contextlib.suppress(ScorerayError):
                newest = max(
                    (key for key, _ in open_store(self._run_url).list("checkpoints/") if key.endswith(MARKER)),
                    default="",
                )
                if newest > self._newest:
                    self._newest, self._worker_group_failures = newest, 0
            decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            self._monitor.started_again.remote(reason_of(reason, training_failed_error))
        return decision


@dataclass
class MeetingConfig(BackendConfig):
    """How workers find each other: through a file in `folder` where all share one machine, else at rank 0's address.

    A file, because torch's own store listens on every address. Between machines it must; there a network policy
    decides who reaches it (docs/resilience.md).
    """

    folder: str = ""
    timeout_s: float = 1800.0

    @property
    def backend_cls(self) -> Any:
        return _Meeting


class _Meeting(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        gpu = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        if backend_config.folder:
            place = f"file://{os.path.join(backend_config.folder, uuid.uuid4().hex)}"
        else:
            from ray.train._internal.utils import get_address_and_port

            address, port = worker_group.execute_single(0, get_address_and_port)
            place = f"tcp://{f'[{address}]' if ':' in address else address}:{port}"
        worker_group.execute(_meet, place, gpu, backend_config.timeout_s)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the processes end. Asking a group with a dead or hung member to part takes half a minute."""


def _meet(place: str, gpu: bool, timeout_s: float) -> None:
    """On each worker's main thread: the process group, and what SIGTERM means from now on."""
    import torch.distributed as dist
    from ray.train.torch.config import _set_torch_distributed_env_vars

    _set_torch_distributed_env_vars()
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
        if _told["ask"] is Ask.MOVE and callable(before):  # a second time: at once
            before(signum, frame)
        _told["ask"] = Ask.MOVE

    _told["ask"] = Ask.NOTHING
    signal.signal(signal.SIGTERM, save_and_end)


_told = {"ask": Ask.NOTHING}  # this worker process, by a signal


def told() -> Ask:
    """What this worker process was told by a signal or by a notice that its node will be taken away."""
    from ray.train.v2._internal.execution.context import get_train_context

    if get_train_context().preemption_context.preemption_info is not None:
        return Ask.MOVE
    return _told["ask"]


class RunTrainer(DataParallelTrainer):
    """Ray Train with our policies, and with Ctrl-C left to Python: whoever catches it calls `abort`.

    `run_url`: the run's store, to see what was committed. `sizes`, `resize_every_s`, `grace_s`: see `WorkersThatFit`.
    """

    def __init__(
        self,
        *arguments: Any,
        monitor: Any,
        guard: ControllerWatch,
        run_url: str,
        sizes: Sequence[int],
        resize_every_s: float,
        grace_s: float,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self._monitor, self._guard, self._run_url = monitor, guard, run_url
        self._elastic = (sizes, resize_every_s, grace_s)
        self._controller: Any = None

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        failures = RunFailurePolicy(self.run_config.failure_config, self._monitor, self._run_url)
        alone, config = on_one_machine(), self.scaling_config
        workers: Any
        if config.elasticity_enabled:
            workers = WorkersThatFit(config, self._monitor, alone, *self._elastic)
        else:
            workers = FixedWorkers(config, alone)
        changed = {"failure_policy": failures, "scaling_policy": workers}
        return super()._initialize_and_run_controller(**{**arguments, **changed})

    def _create_default_callbacks(self) -> Any:
        # Ray Data is not used, and its callback starts a process. The cleaner asks the State API, which only a
        # dashboard serves: in vain on an embedded cluster, which needs no cleaning, as it ends with this process.
        without = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if on_one_machine() else set())
        return [one for one in super()._create_default_callbacks() if type(one).__name__ not in without]

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller
        self._guard.begin(controller)

    def wait(self, timeout_s: float) -> None:
        """Until the run has ended, at most so long."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                ray.get(self._controller.get_result.remote(), timeout=max(0.1, deadline - time.monotonic()))
                return
            except ValueError:  # it has not
                time.sleep(0.1)

    def abort(self) -> None:
        """End the workers."""
        if self._controller is not None:
            with contextlib.suppress(Exception):  # the actor exits in this call: its death is the good answer
                ray.get(self._controller.abort.remote(), timeout=10)
