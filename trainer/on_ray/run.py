"""A run on a Ray cluster: Ray Train starts the loop on every worker, and again, from our checkpoints, when one dies.

Ray's own checkpoint bookkeeping is not used: its `report()` returns before a checkpoint is registered (a 2 s poll), and
its snapshot of a run, overwritten in place, can be cut by a kill. What is committed is decided by our marker alone
(`checkpoint.py`), so a run survives the death of a worker, of Ray Train's controller and of the driver by one path.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from scoreray.data.errors import MachineError
from scoreray.data.scratch import SCRATCH
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import Config
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.metrics import TrainingProgress
from scoreray.trainer.monitoring.monitor import Monitor
from scoreray.trainer.monitoring.stopping import LoopRequest, NonFiniteError
from scoreray.trainer.on_ray.controller_watch import ControllerWatch
from scoreray.trainer.on_ray.standby import import_variables, prestart
from scoreray.trainer.run_folder import run_store

POLL_S = 0.25
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
    import ray

    from scoreray.trainer.on_ray.failures import cause
    from scoreray.trainer.on_ray.hooks import RunTrainer, on_this_node
    from scoreray.trainer.on_ray.workers import on_one_machine

    before = latest(run_store(config))
    if before is not None and before.images_seen >= config.duration.images:
        return before.images_seen
    known = (before.marker.time, before.marker.skipped_steps) if before is not None else (0.0, 0)
    # On the driver's node: it then dies with the driver, and not before.
    monitor = ray.remote(num_cpus=0, label_selector=on_this_node())(Monitor).remote(config.run.name, *known)
    done = threading.Event()
    if alone := on_one_machine():
        watch = _Standby(config, watch)
    controller_watch = ControllerWatch(config.scaling.hang_timeout_s, note)
    watcher = threading.Thread(target=_follow, args=(monitor, controller_watch.passing(watch), note, done), daemon=True)
    with tempfile.TemporaryDirectory(prefix="train-", dir=os.environ.get(SCRATCH)) as scratch, controller_watch:
        trainer: RunTrainer | None = None
        deaths = 0
        watcher.start()
        try:
            while trainer is None:
                trainer = _trainer(config, monitor, controller_watch, os.path.join(scratch, str(deaths)))
                if alone:
                    prestart(config.scaling.range[1], worker_environment(config, alone=True))
                try:
                    trainer.fit()
                except ray.exceptions.RayActorError:  # the controller; its workers end with it
                    deaths += 1
                    if _images_committed(config) >= config.duration.images:
                        break
                    if 0 <= config.scaling.max_failures < deaths:
                        raise MachineError(
                            f"Ray Train's controller died {deaths} times, scaling.max_failures is "
                            f"{config.scaling.max_failures}; the same command goes on from what is committed"
                        ) from None
                    ray.get(monitor.restarted.remote("Ray Train's controller died"))
                    trainer = None
        except KeyboardInterrupt:
            if trainer is None or not _stop(trainer, monitor, config, note):
                raise
        except Exception as error:
            reason = cause(error)
            if isinstance(reason, NonFiniteError) and not alone:
                _report_nonfinite(monitor, note)
            raise reason from None
        finally:
            done.set()
            watcher.join(timeout=5)
            ray.kill(monitor)
    return _images_committed(config)


def _trainer(config: Config, monitor: Any, controller_watch: ControllerWatch, scratch: str) -> Any:
    """Ray Train's side of a run, not started yet."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from scoreray.trainer.on_ray.failures import RunFailurePolicy
    from scoreray.trainer.on_ray.hooks import RunTrainer
    from scoreray.trainer.on_ray.rendezvous import RendezvousConfig
    from scoreray.trainer.on_ray.workers import FixedWorkers, WorkersThatFit, on_one_machine

    os.makedirs(scratch)
    (low, high), alone = config.scaling.range, on_one_machine()
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.scaling.hang_timeout_s - POLL_S - 1)
    if alone:
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # our own machine gives no notice, but takes a process
    scaling = ScalingConfig(
        num_workers=low if low == high else (low, high),
        use_gpu=config.scaling.use_gpu,
        resources_per_worker={"CPU": config.scaling.cpus_per_worker, "GPU": int(config.scaling.use_gpu)},
    )
    failures = FailureConfig(max_failures=config.scaling.max_failures)
    workers: Any = FixedWorkers(scaling, alone)
    if low != high:
        every_s, grace_s = config.scaling.resize_every_s, config.scaling.grace_s
        workers = WorkersThatFit(scaling, monitor, alone, config.world_sizes, every_s, grace_s)
    # Ray Data is not used, and its callback starts a process. The cleaner calls the State API, which only a dashboard
    # serves: in vain on an embedded cluster, which needs no cleaning, as it ends with this process.
    without = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if alone else set())
    return RunTrainer(
        _train_on_worker,
        failure_policy=RunFailurePolicy(failures, monitor, run_store(config).url()),
        scaling_policy=workers,
        without=frozenset(without),
        controller_watch=controller_watch,
        backend_config=RendezvousConfig(folder=scratch if alone else ""),
        train_loop_config={"config": config.model_dump(mode="json"), "monitor": monitor},
        scaling_config=scaling,
        run_config=RunConfig(
            name=config.run.name,
            storage_path=scratch,
            failure_config=failures,
            worker_runtime_env={"env_vars": worker_environment(config, alone=alone)},
        ),
    )


def _stop(trainer: Any, monitor: Any, config: Config, note: Callable[[str], None]) -> bool:
    """Save and end the workers; returns whether the run had reached its end by then."""
    import ray

    try:
        if ray.get(monitor.request_stop.remote(), timeout=5):  # else nothing was trained that could be saved
            note("stopping: saving first (once more Ctrl-C: at once)")
            trainer.wait(config.scaling.grace_s)
    except (KeyboardInterrupt, ray.exceptions.RayError):
        pass
    trainer.abort()
    return _images_committed(config) >= config.duration.images


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
        # Large tensors from the heap instead of fresh mappings: page faults cost a third of a small step on a CPU.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        "MALLOC_TOP_PAD_": str(64 << 20),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while others work make a busy machine crawl
    }
    if not config.scaling.use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    if alone:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
        environment |= import_variables(deepspeed=config.engine.zero_stage not in ("auto", 0))
    return environment


def _train_on_worker(settings: dict[str, Any]) -> None:
    """What Ray Train calls on each worker."""
    import logging

    import ray.train
    import ray.train.torch

    from scoreray.trainer.on_ray.rendezvous import preempted

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if threads := os.environ.get("OMP_NUM_THREADS"):  # Ray sets it by the worker's CPUs, perhaps after torch's import
        torch.set_num_threads(int(threads))
    context = ray.train.get_context()
    monitor = settings["monitor"]
    config = Config.model_validate(settings["config"])
    reporter = _Reporter(monitor, preempted)
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

    def __init__(self, monitor: Any, preempted: Callable[[], LoopRequest]) -> None:
        self._monitor, self._preempted, self._request = monitor, preempted, LoopRequest.NOTHING

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
        return max(request, self._preempted())


class _Standby:
    """Passes progress on, and starts pre-warmed processes `scaling.standby_after_s` after each start of the workers."""

    def __init__(self, config: Config, watch: Callable[[TrainingProgress], None]) -> None:
        self._config, self._watch, self._ready_for = config, watch, 0.0

    def __call__(self, progress: TrainingProgress) -> None:
        after_s, begun = self._config.scaling.standby_after_s, progress.started_at
        if after_s is not None and begun != self._ready_for and time.time() - begun >= after_s:
            self._ready_for = begun
            prestart(self._config.scaling.range[1], worker_environment(self._config, alone=True))
        self._watch(progress)


def _follow(
    monitor: Any, watch: Callable[[TrainingProgress], None], note: Callable[[str], None], done: threading.Event
) -> None:
    import ray

    shown = None
    while not done.wait(POLL_S):
        try:
            progress, notes = ray.get(monitor.read.remote(), timeout=10)
        except Exception:  # the cluster is going away, or is too busy to answer; `fit` raises the run's own error
            time.sleep(1)
            continue
        for line in notes:
            note(line)
        if progress is not None and progress != shown:
            watch(progress)
            shown = progress


def _images_committed(config: Config) -> int:
    checkpoint = latest(run_store(config))
    return checkpoint.images_seen if checkpoint else 0
