"""Every private name of Ray that training uses: for a quicker start, alone. Without them a run does the same, later.

| hook | private names | what it saves | without it |
|---|---|---|---|
| `LeanTrainer` | `_create_default_callbacks`, `_initialize_and_run_controller`, its scaling policy's requests | processes that no run uses: Ray Data's at each start of workers; on an embedded cluster also the autoscaler's and a cleaner that needs a dashboard | they start |
| `Standby` | `PrestartWorkers` of the raylet's gRPC service, `init_grpc_channel`, `get_runtime_env_info`, Ray Train's `get_env_vars_to_propagate`; `SETUP_HOOK`, `WORKER_MODULE` | 4 s of a core's imports (torch, Ray Train) between a worker's death and the next step: from SIGKILL to there 2.6 s instead of 21 (2 workers on 2 cores at a load of 14, benchmarks/start.py) | workers start cold |

`MISSING` has those that this version of Ray lacks; one is enough to do without any of them.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.train.torch import TorchTrainer

from scoreray.trainer.monitoring.metrics import TrainingProgress

SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"  # names what a new worker process calls before any work
WORKER_MODULE = "ray.train.v2._internal.execution.worker_group.worker"  # what a worker imports first
MODULES = "SCORERAY_IMPORTS"
KEEP_S = 24 * 3600  # of waiting without work; they end with their raylet in any case

_OVERRIDDEN = ("_create_default_callbacks", "_initialize_and_run_controller")
MISSING = [name for name in _OVERRIDDEN if not hasattr(TorchTrainer, name)]
try:
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.utils import get_runtime_env_info
    from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc
    from ray.train.v2._internal import constants

    _inherited = {
        constants.RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: constants.DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE
    }
    _propagated, _Stub = constants.get_env_vars_to_propagate, node_manager_pb2_grpc.NodeManagerServiceStub
    _Request = node_manager_pb2.PrestartWorkersRequest  # type: ignore[attr-defined]
except (ImportError, AttributeError) as error:
    MISSING.append(str(error))


class LeanTrainer(TorchTrainer):
    """Ray Train without the processes that a run does not use; `alone`: on an embedded cluster, of one machine."""

    def __init__(self, *arguments: Any, alone: bool, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._alone = alone

    def _create_default_callbacks(self) -> Any:
        unused = {"DatasetsCallback", *(["PlacementGroupCleanerCallback"] if self._alone else [])}
        found = super()._create_default_callbacks()
        return [one for one in found if MISSING or type(one).__name__ not in unused]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if (policy := arguments.get("scaling_policy")) and self._alone and not MISSING:
            policy.after_controller_start = policy._maybe_send_resource_request = lambda *_: None
        return super()._initialize_and_run_controller(**arguments)


class Standby:
    """Passes progress on, and starts pre-warmed processes at once and `after_s` after each start of the workers (None:
    at the first start alone). For an embedded cluster: elsewhere the raylets are not ours."""

    def __init__(
        self,
        num_workers: int,
        environment: Mapping[str, str],
        after_s: float | None,
        watch: Callable[[TrainingProgress], None],
    ) -> None:
        self._num_workers, self._environment, self._after_s = num_workers, environment, after_s
        self._watch, self._ready_for = watch, 0.0
        self.prestart()

    def __call__(self, progress: TrainingProgress) -> None:
        begun = progress.started_at
        if self._after_s is not None and begun != self._ready_for and time.time() - begun >= self._after_s:
            self._ready_for = begun
            self.prestart()
        self._watch(progress)

    def prestart(self) -> None:
        """Has this node's raylet start the processes, and returns at once; they take what time the cores have."""
        import ray

        if MISSING or ray.get_runtime_context().runtime_env:  # Ray adds it to a worker's: it would be another text
            return
        try:
            _prestart(self._num_workers, self._environment)
        except Exception:
            logging.getLogger(__name__).debug("no pre-warmed processes", exc_info=True)


def _prestart(count: int, environment: Mapping[str, str]) -> None:
    import ray
    from google.protobuf import json_format
    from ray.runtime_env import RuntimeEnv

    context = ray.get_runtime_context()
    variables = {**_inherited, **_propagated(), **environment}
    (node,) = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
    job = bytes.fromhex(context.get_job_id())
    request = _Request(job_id=job, keep_alive_duration_secs=KEEP_S, num_workers=count)
    info = get_runtime_env_info(RuntimeEnv(env_vars=variables), is_job_runtime_env=False, serialize=True)
    json_format.Parse(info, request.runtime_env_info)
    # The raylet compares environments as text, in the form that Ray gives one that was merged with a parent's.
    text = json.dumps({"env_vars": variables}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    request.runtime_env_info.serialized_runtime_env = text
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        _Stub(channel).PrestartWorkers(request, timeout=10)


def import_variables(deepspeed: bool) -> dict[str, str]:
    """Environment variables by which a worker process imports what training needs before it is given work."""
    names = ["scoreray.trainer.on_ray.training_function", WORKER_MODULE]
    if deepspeed:
        names.append("scoreray.trainer.engine.deepspeed_import:import_deepspeed")
    return {SETUP_HOOK: f"{__name__}.warm", MODULES: ",".join(names)}


def warm() -> None:
    """Runs in each such process. What can't be imported is reported by the code that uses it."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    gc.set_threshold(50_000)  # as in `cluster/cli/__main__.py`: 0.3 s of a core
    for name in os.environ.get(MODULES, "").split(","):
        module, _, function = name.partition(":")
        with contextlib.suppress(Exception):
            found = importlib.import_module(module)
            if function:
                getattr(found, function)()
    gc.freeze()
