"""Processes that wait with everything imported: workers that start, or start again, take them and import nothing.

A worker's imports (torch, Ray Train) take 4 s of a core, more than all else between a death and the next step. Ray's
raylet can be asked for processes of a given environment that no task has yet; Ray's Python interface does not show that
call, so it is made here. For an embedded cluster only: elsewhere the raylets are not ours.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
from collections.abc import Mapping

HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"  # what Ray calls in a new process before it is given any work
MODULES = "SCORERAY_IMPORTS"
KEEP_S = 24 * 3600  # of waiting without work; they end with their raylet in any case


def imports(deepspeed: bool) -> dict[str, str]:
    """Environment variables by which a worker process imports what training needs before it is given work."""
    names = ["scoreray.trainer.on_ray.run", "scoreray.trainer.on_ray.hooks", "ray.train.torch"]
    names += ["ray.train.v2._internal.execution.worker_group.worker", *(["deepspeed"] if deepspeed else [])]
    return {HOOK: f"{__name__}.warm", MODULES: ",".join(names)}


def warm() -> None:
    """Runs in each such process. What can't be imported is told where it is used."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for name in os.environ.get(MODULES, "").split(","):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def prestart(count: int, environment: Mapping[str, str]) -> bool:
    """Asks for `count` processes for Ray Train's workers with this environment, and returns at once; they take what
    time the cores have. False where that is not possible: workers then start as they would without.
    """
    import ray

    try:
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
        if context.runtime_env:  # Ray adds it to a worker's, and only equal environments share processes
            return False
        inherited = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE}
        variables = {**inherited, **get_env_vars_to_propagate(), **environment}
        (node,) = [node for node in ray.nodes() if node["NodeID"] == context.get_node_id()]
        request = node_manager_pb2.PrestartWorkersRequest(
            job_id=bytes.fromhex(context.get_job_id()), keep_alive_duration_secs=KEEP_S, num_workers=count
        )
        info = get_runtime_env_info(RuntimeEnv(env_vars=variables), is_job_runtime_env=False, serialize=True)
        json_format.Parse(info, request.runtime_env_info)
        # Environments are compared as text, in the form that Ray gives one that was merged with a parent's.
        text = json.dumps({"env_vars": variables}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        request.runtime_env_info.serialized_runtime_env = text
        with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10)
        return True
    except Exception:
        logging.getLogger(__name__).debug("no processes in waiting", exc_info=True)
        return False
