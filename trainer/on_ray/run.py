"""A run on a Ray cluster: Ray Train starts the loop on every worker, and again, from our checkpoints, when one dies.

Ray's own checkpoint bookkeeping is not used: its `report()` returns before a checkpoint is registered (a 2 s poll), and
its snapshot of a run, overwritten in place, can be cut by a kill. What is committed is decided by our marker alone
(`checkpoint.py`), so a run survives the death of a worker, of Ray Train's controller and of the driver by one path.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from itertools import count
from typing import Any

from scoreray.data import own_code
from scoreray.data.errors import MachineError, ScorerayError
from scoreray.data.scratch import SCRATCH
from scoreray.data.threads import in_daemon_thread
from scoreray.trainer.checkpoints.checkpoint import Checkpoint, latest
from scoreray.trainer.checkpoints.duration import has_ended
from scoreray.trainer.config import Config
from scoreray.trainer.monitoring.metrics import TrainingProgress
from scoreray.trainer.monitoring.monitor import Monitor
from scoreray.trainer.monitoring.stopping import NonFiniteError
from scoreray.trainer.run_folder import run_store

POLL_S = 0.25
INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
CHECKS_PER_S = 512  # of workers, by Ray Train's controller: at most, as one check of each is some ms of its process
END_S = 10.0  # in which Ray Train ends after its workers have been
SCRAPED_S = 30.0  # Ray exports each 10 s, Prometheus scrapes each 15 s (k8s/base/platform/pod-monitor.yaml)


def fit(
    config: Config,
    watch: Callable[[TrainingProgress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda line: None,
) -> int:
    """Train `config` (see `prepare_run`) on the connected Ray cluster; returns images seen.

    Blocks; `watch` is called from another thread, a few times a second, `note` with a line when workers are started
    again or a sample can't be read. Raises the error that ended the run as it was raised on the worker. The first
    KeyboardInterrupt saves, for at most `scaling.grace_s`, a second one does not; what is committed stays.
    """
    from scoreray.trainer.on_ray.hooks import MISSING, Standby
    from scoreray.trainer.on_ray.workers import on_one_machine

    before = latest(run_store(config))
    if before is not None and has_ended(config, before):
        return before.images_seen
    monitor, done, alone = _start_monitor(config, before), threading.Event(), on_one_machine()
    # The controller and the workers inherit these.
    os.environ[INTERVAL] = str(check_interval_s(config.world_sizes[-1]))
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.scaling.hang_timeout_s - POLL_S - 1)
    if alone:
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # our own machine gives no notice, but takes a process
        scaling, environment = config.scaling, worker_environment(config, alone=True)
        watch = Standby(scaling.range[1], environment, scaling.standby_after_s, watch)
    if MISSING:
        note(f"this version of Ray lacks {', '.join(MISSING)}: workers start more slowly")
    watcher = threading.Thread(target=_follow, args=(monitor, watch, note, done), daemon=True)
    with tempfile.TemporaryDirectory(prefix="train-", dir=os.environ.get(SCRATCH)) as scratch:
        watcher.start()
        try:
            _train(config, monitor, scratch, alone, note)
        except NonFiniteError:
            if not alone:
                _report_nonfinite(monitor, note)
            raise
        finally:
            done.set()
            watcher.join(timeout=5)
            monitor.close.remote()
    return _images_committed(config)


def check_interval_s(num_workers: int) -> float:
    """Between two checks of every worker by Ray Train's controller: what the environment says (Ray's default is 2), or
    longer, so that there are no more than CHECKS_PER_S."""
    return max(float(os.environ.get(INTERVAL, 2)), num_workers / CHECKS_PER_S)


def _start_monitor(config: Config, before: Checkpoint | None) -> Any:
    """On the node of this process and of Ray Train's controller: the cluster's other nodes may die before it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    known = (before.marker.time, before.marker.skipped_steps) if before is not None else (0.0, 0)
    local = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = ray.remote(num_cpus=0, lifetime="detached", scheduling_strategy=local)(Monitor)
    return monitor.remote(config.run.name, *known, config.scaling.hang_timeout_s)


def _train(config: Config, monitor: Any, scratch: str, alone: bool, note: Callable[[str], None]) -> None:
    """Until the run ends: Ray Train, started again with another number of workers or after its controller has died."""
    import ray
    from ray.train import ControllerError

    from scoreray.trainer.on_ray.failures import NOT_STARTED, Resized
    from scoreray.trainer.on_ray.workers import size_with_room

    deaths = 0
    for attempt in count():
        size = size_with_room(config.world_sizes, _resources(config), note)
        trainer = _trainer(config, size, monitor, os.path.join(scratch, str(attempt)), alone)
        # Where `fit` is called on the main thread Ray Train handles SIGINT, and would end the workers before they save.
        fitting = in_daemon_thread(trainer.fit, "ray-train")
        try:
            _wait(config, monitor, fitting, size)
            return
        except KeyboardInterrupt:
            if not _stop(config, monitor, fitting, note):
                raise
            return
        except ControllerError as error:
            failure = error.controller_failure
            if not isinstance(failure, Resized) and not type(failure).__name__.startswith(NOT_STARTED):
                raise failure from None
            reason = str(failure).partition(". ")[0]
        except ray.exceptions.RayActorError:  # the controller; its workers end with it
            deaths += 1
            if has_ended(config, latest(run_store(config))):
                return
            if 0 <= config.scaling.max_failures < deaths:
                raise MachineError(
                    f"Ray Train's controller died {deaths} times, scaling.max_failures is "
                    f"{config.scaling.max_failures}; the same command goes on from what is committed"
                ) from None
            reason = "Ray Train's controller died"
        ray.get([monitor.release.remote(), monitor.end.remote(None), monitor.restarted.remote(reason)])


def _resources(config: Config) -> dict[str, float]:
    """Of each worker."""
    resources = {"CPU": config.scaling.cpus_per_worker, "GPU": float(config.scaling.use_gpu)}
    return {name: amount for name, amount in resources.items() if amount}


def _trainer(config: Config, size: int, monitor: Any, scratch: str, alone: bool) -> Any:
    """Ray Train's side of a run, not started yet."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from scoreray.trainer.on_ray.failures import RestartPolicy
    from scoreray.trainer.on_ray.hooks import LeanTrainer
    from scoreray.trainer.on_ray.rendezvous import RendezvousConfig
    from scoreray.trainer.on_ray.training_function import train_on_worker

    os.makedirs(scratch)
    elastic, use_gpu = len(config.world_sizes) > 1 and not alone, config.scaling.use_gpu
    return LeanTrainer(
        train_on_worker,
        alone=alone,
        torch_config=RendezvousConfig(monitor, "nccl" if use_gpu else "gloo", scratch if alone else ""),
        train_loop_config={"config": config.model_dump(mode="json"), "monitor": monitor, "alone": alone},
        scaling_config=ScalingConfig(num_workers=size, use_gpu=use_gpu, resources_per_worker=_resources(config)),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=scratch,
            # How often is the policy's decision. With a number that may be smaller, workers that can't be started are
            # a reason to look for room again.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=0 if elastic else -1),
            callbacks=[RestartPolicy(monitor, config.scaling.max_failures, elastic)],
            worker_runtime_env={"env_vars": worker_environment(config, alone=alone)},
        ),
    )


def _wait(config: Config, monitor: Any, fitting: Future[Any], size: int) -> None:
    """Until Ray Train returns; raises what it raised, or `Resized` where there is room for more workers.

    Looked for every `scaling.resize_every_s`, and kept until the run has saved. Not in an actor, as a sweep's trial is:
    it may be killed without a word, and what it keeps would stay.
    """
    import ray

    from scoreray.trainer.on_ray.failures import Resized
    from scoreray.trainer.on_ray.workers import room_to_grow

    fixed = size == config.world_sizes[-1] or ray.get_runtime_context().get_actor_id() is not None
    while not _ended(fitting, math.inf if fixed else config.scaling.resize_every_s):
        state = ray.get(monitor.group_state.remote())
        if not state.training:  # room would be taken from its own workers, which are about to start
            continue
        with room_to_grow(config.world_sizes, size, _resources(config)) as larger:
            if larger == size or not _saved(config, monitor, fitting, state.starts):
                continue
        _end(monitor, fitting, Resized(f"there is room for {larger} of them now, not {size}"))
        break
    fitting.result()


def _saved(config: Config, monitor: Any, fitting: Future[Any], starts: int) -> bool:
    """Has the run save, for at most `scaling.grace_s`. False where it has ended or failed meanwhile."""
    import ray

    monitor.request_save.remote()
    deadline = time.monotonic() + config.scaling.grace_s
    while not ray.get(monitor.has_saved.remote()) and time.monotonic() < deadline:
        if _ended(fitting, POLL_S) or ray.get(monitor.group_state.remote()).starts != starts:
            return False
    return not fitting.done()


def _ended(fitting: Future[Any], timeout_s: float) -> bool:
    """Whether Ray Train returns within that time. In short waits: a signal that another thread gets ends none."""
    deadline = time.monotonic() + timeout_s
    while not fitting.done() and time.monotonic() < deadline:
        wait([fitting], POLL_S)
    return fitting.done()


def _end(monitor: Any, fitting: Future[Any], ending: Exception) -> None:
    """Ends the workers, and with them Ray Train, whose controller then meets `ending` (see `RestartPolicy`)."""
    import ray

    group = ray.get(monitor.end.remote(ending))
    for worker in group.workers if group else ():
        ray.kill(worker)
    if group and not _ended(fitting, END_S):  # the controller hangs
        ray.kill(group.controller)


def _stop(config: Config, monitor: Any, fitting: Future[Any], note: Callable[[str], None]) -> bool:
    """Save and end the workers; returns whether the run had reached its end by then."""
    import ray

    try:
        if ray.get(monitor.request_stop.remote(), timeout=5):  # else nothing was trained that could be saved
            note("stopping: saving first (once more Ctrl-C: at once)")
            _ended(fitting, config.scaling.grace_s)
    except (KeyboardInterrupt, ray.exceptions.RayError):
        pass
    if not fitting.done():
        _end(monitor, fitting, ScorerayError("stopped"))
    return has_ended(config, latest(run_store(config)))


def _report_nonfinite(monitor: Any, note: Callable[[str], None]) -> None:
    """Waits until Prometheus has scraped why the run ends: the gauge ends with the monitor. Ctrl-C: at once."""
    import ray

    note(f"the loss is not finite: ends in {SCRAPED_S:.0f} s, when the metrics have been scraped (Ctrl-C: at once)")
    with contextlib.suppress(KeyboardInterrupt, ray.exceptions.RayError):
        ray.get(monitor.stopped_nonfinite.remote(), timeout=5)
        time.sleep(SCRAPED_S)


def worker_environment(config: Config, *, alone: bool = False) -> dict[str, str]:
    """Environment variables that a training worker must have from its start; `alone`: on an embedded cluster."""
    environment = {
        # Connections between two workers when they first send each other something: else each has one to every other,
        # whose addresses all read from one store.
        "TORCH_GLOO_LAZY_INIT": "1",
        # Large tensors from the heap instead of fresh mappings: page faults cost a third of a small step on a CPU.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        "MALLOC_TOP_PAD_": str(64 << 20),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while others work make a busy machine crawl
        **own_code.environment(),
    }
    if not config.scaling.use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    if alone:
        from scoreray.trainer.on_ray.hooks import import_variables

        environment["GLOO_SOCKET_IFNAME"] = "lo"
        environment |= import_variables(deepspeed=config.engine.zero_stage not in ("auto", 0))
    return environment


def _follow(
    monitor: Any, watch: Callable[[TrainingProgress], None], note: Callable[[str], None], done: threading.Event
) -> None:
    import ray

    shown, ended = None, False
    while not ended:
        ended = done.wait(POLL_S)  # what came last is read after that
        try:
            progress, notes = ray.get(monitor.read.remote(), timeout=10)
        except Exception:  # the cluster is going away, or is too busy to answer; `fit` raises the run's own error
            done.wait(1)
            continue
        for line in notes:
            note(line)
        if progress is not None and not progress.same_as(shown) and not ended:
            watch(progress)
            shown = progress


def _images_committed(config: Config) -> int:
    checkpoint = latest(run_store(config))
    return checkpoint.images_seen if checkpoint else 0
