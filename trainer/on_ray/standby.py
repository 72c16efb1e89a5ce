"""Pre-warmed worker processes: a restart skips 4 s of imports.

A worker's imports (torch, Ray Train) take 4 s of a core, more than all else between a death and the next step. Ray's
raylet can start processes of a given environment before any task has been assigned to them (`prestart_workers`). For an
embedded cluster only: elsewhere the raylets are not ours.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Mapping

MODULES = "SCORERAY_IMPORTS"
KEEP_S = 24 * 3600  # of waiting without work; they end with their raylet in any case


def import_variables(deepspeed: bool) -> dict[str, str]:
    """Environment variables by which a worker process imports what training needs before it is given work."""
    from scoreray.trainer.on_ray.hooks import SETUP_HOOK, WORKER_MODULE

    names = ["scoreray.trainer.on_ray.run", "scoreray.trainer.on_ray.rendezvous", "ray.train.torch", WORKER_MODULE]
    return {SETUP_HOOK: f"{__name__}.warm", MODULES: ",".join([*names, *(["deepspeed"] if deepspeed else [])])}


def warm() -> None:
    """Runs in each such process. What can't be imported is reported by the code that uses it."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for name in os.environ.get(MODULES, "").split(","):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def prestart(count: int, environment: Mapping[str, str]) -> bool:
    """Starts `count` processes for Ray Train's workers with this environment, and returns at once; they take what time
    the cores have. False where that is not possible: workers then start as they would without.
    """
    import ray

    from scoreray.trainer.on_ray.hooks import prestart_workers

    if ray.get_runtime_context().runtime_env:  # Ray adds it to a worker's, and only equal environments share processes
        return False
    try:
        prestart_workers(count, environment, KEEP_S)
        return True
    except Exception:
        logging.getLogger(__name__).debug("no pre-warmed processes", exc_info=True)
        return False
