"""Every private name of Ray that training uses, and why; tests of real runs hold them to Ray 2.60.

| what | why the public interface does not do |
|---|---|
| `DefaultFailurePolicy`, health check errors | Ray retries after any error; bad bytes would only come again |
| `ScalingPolicy` and its decisions | Ray's elastic policy looks every 20 s, and resizes without letting the run save |
| overrides of `DataParallelTrainer` | it takes no policies, and its SIGINT handler aborts workers before they save |
| `get_address_and_port`, torch's variables | Ray's torch backend listens on all addresses (`rendezvous.py`) |
| `get_train_context` | the only place where a worker sees that its node will be taken away |
| `ray._private.state` | draining nodes, and free resources by node |
| `RAY_NODE_ID_KEY` | the label by which an actor is placed on the driver's own node |
| `PrestartWorkers` of the raylet | saves 4 s of imports in each worker that starts again (`standby.py`) |

Ray Train's controller imports this module and would wait for torch's import, so only functions that run on workers
import torch.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError as WorkerHealthCheckFailedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError as WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy as DefaultFailurePolicy
from ray.train.v2._internal.execution.failure_handling import FailureDecision as FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision as NoopDecision
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision as ResizeDecision
from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy as ScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from scoreray.trainer.on_ray.controller_watch import ControllerWatch

SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"  # names what a new worker process calls before any work
WORKER_MODULE = "ray.train.v2._internal.execution.worker_group.worker"  # what a worker imports first


class RunTrainer(DataParallelTrainer):
    """Ray Train with policies of ours, and with Ctrl-C left to Python: the driver catches it and calls `abort`.

    without: default callbacks to leave out, by class name.
    """

    def __init__(
        self,
        *arguments: Any,
        failure_policy: Any,
        scaling_policy: Any,
        without: frozenset[str],
        controller_watch: ControllerWatch,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self._policies = {"failure_policy": failure_policy, "scaling_policy": scaling_policy}
        self._without, self._controller_watch = without, controller_watch
        self._controller: Any = None

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        return super()._initialize_and_run_controller(**{**arguments, **self._policies})

    def _create_default_callbacks(self) -> Any:
        return [one for one in super()._create_default_callbacks() if type(one).__name__ not in self._without]

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller
        self._controller_watch.begin(controller)

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
            with contextlib.suppress(Exception):  # the actor exits in this call, so its death is the expected result
                ray.get(self._controller.abort.remote(), timeout=10)


def resources_per_worker(scaling_config: Any) -> dict[str, float]:
    """With Ray's defaults filled in."""
    return dict(scaling_config._resources_per_worker_not_none)


def draining_nodes() -> set[str]:
    """Ids of the nodes that will be taken away."""
    return set(ray._private.state.state.get_draining_nodes())


def free_resources() -> dict[str, dict[str, float]]:
    """Resources that are not in use, by node id."""
    found = ray._private.state.state.available_resources_per_node()
    return {node: dict(resources) for node, resources in found.items()}


def on_this_node() -> dict[str, str]:
    """A label selector of the node that this process runs on."""
    return {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}  # type: ignore[attr-defined]


def preemption_announced() -> bool:
    """On a worker: whether Ray has announced that a node of the group will be taken away."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def free_address(worker_group: Any) -> tuple[str, int]:
    """Address and an unused port of rank 0's machine."""
    from ray.train._internal.utils import get_address_and_port

    address, port = worker_group.execute_single(0, get_address_and_port)
    return address, port


def set_rank_variables() -> None:
    """On a worker: RANK, WORLD_SIZE, LOCAL_RANK, ... as torch's launcher sets them."""
    from ray.train.torch.config import _set_torch_distributed_env_vars

    _set_torch_distributed_env_vars()


def prestart_workers(count: int, environment: Mapping[str, str], keep_s: int) -> None:
    """Has this node's raylet start `count` processes that Ray Train's workers with this environment will be given.

    Returns at once. The processes end with their raylet, or unused after `keep_s`. Raises where Ray can't.
    """
    from google.protobuf import json_format
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.utils import get_runtime_env_info
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc
    from ray.runtime_env import RuntimeEnv
    from ray.train.v2._internal.constants import (
        DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
        RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR,
        get_env_vars_to_propagate,
    )

    context = ray.get_runtime_context()
    inherited = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE}
    variables = {**inherited, **get_env_vars_to_propagate(), **environment}
    (node,) = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
    request = node_manager_pb2.PrestartWorkersRequest(
        job_id=bytes.fromhex(context.get_job_id()), keep_alive_duration_secs=keep_s, num_workers=count
    )
    info = get_runtime_env_info(RuntimeEnv(env_vars=variables), is_job_runtime_env=False, serialize=True)
    json_format.Parse(info, request.runtime_env_info)
    # The raylet compares environments as text, in the form that Ray gives one that was merged with a parent's.
    text = json.dumps({"env_vars": variables}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    request.runtime_env_info.serialized_runtime_env = text
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10)
