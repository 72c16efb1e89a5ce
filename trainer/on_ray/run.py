"""A run on a Ray cluster: Ray Train starts the loop on every worker, and again, from our checkpoints, when one dies.

Ray's own checkpoint bookkeeping is not used: what is committed is decided by our marker alone (`checkpoint.py`), so
a run survives the death of a worker, of Ray Train's controller and of the driver alike, by the same path.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
import yaml

from scoreray.data.errors import DataError, MachineError, StorageError, UserError
from scoreray.data.reading.manifest import Manifest
from scoreray.data.scratch import SCRATCH
from scoreray.data.storage.store import NotFound, Store, open_store
from scoreray.trainer.checkpoints.checkpoint import committed, latest
from scoreray.trainer.config import Config, differing_keys, dump_config, load_config, parse_sections
from scoreray.trainer.config.data_scale import misfit
from scoreray.trainer.loop import run_store, train, with_sigma_data
from scoreray.trainer.meta import meta_module
from scoreray.trainer.monitoring.progress import Monitor, Progress
from scoreray.trainer.monitoring.stopping import Ask, NonFiniteError
from scoreray.trainer.on_ray.controller_watch import ControllerWatch
from scoreray.trainer.on_ray.standby import imports, prestart
from scoreray.trainer.tracking import check_mlflow

CONFIG_FILE = "config.yaml"
POLL_S = 0.25
LAST_WORD_S = 30.0  # Ray exports each 10 s, Prometheus asks each 15 s (k8s/base/platform/pod-monitor.yaml)


def prepare_run(config: Config, *, fresh: bool = False) -> Config:
    """Claim the run's place before anything starts: its config is stored there, or is found there and agrees.

    `fresh`: take the first unused name of name-2, name-3, ... instead of going on. Returns the config to run.
    Raises UserError with the differing keys when another config made this run; StorageError, DataError.
    """
    manifest = check_run(config, fresh=fresh)
    if fresh:
        config = _unused_name(config)
    run = run_store(config)
    config = with_sigma_data(config, manifest, run)
    if run.put_new(CONFIG_FILE, dump_config(config).encode()):
        return config
    there = stored_config(run)
    differing = differing_keys(there, config)
    if differing and not committed(run):  # nothing was trained under it: nothing would be mixed
        run.put(CONFIG_FILE, dump_config(config).encode())
        return config
    if differing:
        raise UserError(
            f"run '{config.run.name}' exists at {run.url()} with another config; "
            "give its config, another run.name, or --fresh\n  " + "\n  ".join(differing)
        )
    return config


def check_run(config: Config, *, fresh: bool = False) -> Manifest:
    """What can be known before Ray starts: the data set is there, fits the network, is the one that the run has seen
    so far (unless it is to be a `fresh` one), and the run's place can be written.

    Returns the data set's manifest. Raises UserError, StorageError or DataError.
    """
    check_mlflow(config)
    data = open_store(config.data.url)
    data.check_reachable()
    manifest = Manifest.load(data)
    meta_module(config, manifest)
    run = run_store(config)
    run.check_writable()
    checkpoint = None if fresh else latest(run)
    if checkpoint is not None:
        checkpoint.check_data(manifest, config.data.url)
    found = misfit(config, manifest)
    if found and found.hopeless and checkpoint is None:  # a run that has begun may go on: its config can't change
        raise UserError(found.text)
    return manifest


def data_warning(config: Config) -> str:
    """A line about data of a scale that the model does not expect; "" where there is nothing to say."""
    found = misfit(config, Manifest.load(open_store(config.data.url)))
    return found.text if found else ""


def stored_config(run: Store) -> Config:
    """The config that made a run. Raises UserError where there is none, DataError where it is none."""
    name = run.url(CONFIG_FILE)
    try:
        data = run.get(CONFIG_FILE)
    except NotFound:
        raise UserError(f"{run.url()}: not a run ({CONFIG_FILE} is missing)") from None
    try:
        raw = parse_sections(data, name)
        try:
            return load_config(raw)
        except UserError:
            if (older := _stored_as_yaml_1_1(data)) is None:
                raise
            return older
    except UserError as error:
        reason = " ".join(str(error).removeprefix(f"{name}: ").split())
        raise DataError(f"{name}: not the config of a run: {reason}; mend it, or --fresh") from None


def _stored_as_yaml_1_1(data: bytes) -> Config | None:
    """A config that an earlier version stored: in YAML 1.1 a name such as 1e3 or 089 is a string without quotes."""
    with contextlib.suppress(yaml.YAMLError, ValueError, TypeError, OverflowError):  # UserError is a ValueError
        return load_config(yaml.safe_load(data))
    return None


def fit(
    config: Config,
    watch: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda line: None,
) -> int:
    """Train `config` (see `prepare_run`) on the connected Ray cluster; returns images seen.

    Blocks; `watch` is called from another thread, a few times a second, `note` with a line when workers are started
    again or a sample can't be read. Raises the error that ended the run as it was raised on the worker. The first
    KeyboardInterrupt saves, for at most `scaling.grace_s`, a second one does not; what is committed stays.
    """
    import ray

    from scoreray.trainer.on_ray.hooks import RunTrainer, cause, on_one_machine

    before = latest(run_store(config))
    if before is not None and before.images_seen >= config.duration.images:
        return before.images_seen
    known = (before.marker.time, before.marker.skipped_steps) if before is not None else (0.0, 0)
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}  # type: ignore[attr-defined]
    near = ray.remote(num_cpus=0, label_selector=here)(Monitor)  # dies with us, not before
    monitor = near.remote(config.run.name, *known)
    done = threading.Event()
    if alone := on_one_machine():
        watch = _Standby(config, watch)
    guard = ControllerWatch(config.scaling.hang_timeout_s, note)
    watcher = threading.Thread(target=_follow, args=(monitor, guard.passing(watch), note, done), daemon=True)
    with tempfile.TemporaryDirectory(prefix="train-", dir=os.environ.get(SCRATCH)) as scratch, guard:
        trainer: RunTrainer | None = None
        deaths = 0
        watcher.start()
        try:
            while trainer is None:
                trainer = _trainer(config, monitor, guard, os.path.join(scratch, str(deaths)))
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
                    ray.get(monitor.started_again.remote("Ray Train's controller died"))
                    trainer = None
        except KeyboardInterrupt:
            if trainer is None or not _stop(trainer, monitor, config, note):
                raise
        except Exception as error:
            reason = cause(error)
            if isinstance(reason, NonFiniteError) and not alone:
                _tell_nonfinite(monitor, note)
            raise reason from None
        finally:
            done.set()
            watcher.join(timeout=5)
            ray.kill(monitor)
    return _images_committed(config)


def _trainer(config: Config, monitor: Any, guard: ControllerWatch, scratch: str) -> Any:
    """Ray Train's side of a run, not started yet."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from scoreray.trainer.on_ray.hooks import MeetingConfig, RunTrainer, on_one_machine

    os.makedirs(scratch)
    (low, high), alone = config.scaling.range, on_one_machine()
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.scaling.hang_timeout_s - POLL_S - 1)
    if alone:
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # our own machine gives no notice, but takes a process
    return RunTrainer(
        _train_on_worker,
        monitor=monitor,
        guard=guard,
        run_url=run_store(config).url(),
        sizes=config.world_sizes,
        resize_every_s=config.scaling.resize_every_s,
        grace_s=config.scaling.grace_s,
        backend_config=MeetingConfig(folder=scratch if alone else ""),
        train_loop_config={"config": config.model_dump(mode="json"), "monitor": monitor},
        scaling_config=ScalingConfig(
            num_workers=low if low == high else (low, high),
            use_gpu=config.scaling.use_gpu,
            resources_per_worker={"CPU": config.scaling.cpus_per_worker, "GPU": int(config.scaling.use_gpu)},
        ),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=scratch,
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
            worker_runtime_env={"env_vars": worker_environment(config, alone=alone)},
        ),
    )


def _stop(trainer: Any, monitor: Any, config: Config, note: Callable[[str], None]) -> bool:
    """Save and end the workers; returns whether the run had reached its end by then."""
    import ray

    try:
        if ray.get(monitor.ask_to_stop.remote(), timeout=5):  # else nothing was trained that could be saved
            note("stopping: saving first (once more Ctrl-C: at once)")
            trainer.wait(config.scaling.grace_s)
    except (KeyboardInterrupt, ray.exceptions.RayError):
        pass
    trainer.abort()
    return _images_committed(config) >= config.duration.images


def _tell_nonfinite(monitor: Any, note: Callable[[str], None]) -> None:
    """Until Prometheus has seen why the run ends; the gauge goes with the monitor. Ctrl-C: at once."""
    import ray

    note(f"the loss is not finite: ends in {LAST_WORD_S:.0f} s, when the metrics have told (Ctrl-C: at once)")
    with contextlib.suppress(KeyboardInterrupt, ray.exceptions.RayError):
        ray.get(monitor.stopped_nonfinite.remote(), timeout=5)
        time.sleep(LAST_WORD_S)


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
        environment |= imports(deepspeed=config.engine.zero_stage not in ("auto", 0))
    return environment


def _train_on_worker(settings: dict[str, Any]) -> None:
    """What Ray Train calls on each worker."""
    import logging

    import ray.train
    import ray.train.torch

    from scoreray.trainer.on_ray.hooks import told

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if threads := os.environ.get("OMP_NUM_THREADS"):  # Ray sets it by the worker's CPUs, perhaps after torch's import
        torch.set_num_threads(int(threads))
    context = ray.train.get_context()
    monitor = settings["monitor"]
    config = Config.model_validate(settings["config"])
    reporter = _Reporter(monitor, told)
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
        asked=reporter.asked,
    )


class _Reporter:
    """Sends progress to the monitor and keeps what it answers, without waiting for it."""

    def __init__(self, monitor: Any, told: Callable[[], Ask]) -> None:
        self._monitor, self._told, self._ask = monitor, told, Ask.NOTHING

    def __call__(self, progress: Progress) -> None:
        self._monitor.update.remote(progress).future().add_done_callback(self._hear)

    def _hear(self, answer: Future[int]) -> None:
        if answer.exception() is None:
            self._ask = max(self._ask, Ask(answer.result()))

    def asked(self) -> Ask:
        """The greater of what the monitor asks and what this process was told; to save, once."""
        ask = self._ask
        if ask is Ask.SAVE:
            self._ask = Ask.NOTHING
        return max(ask, self._told())


class _Standby:
    """Passes progress on, and has processes wait for the next start `scaling.standby_after_s` after each start."""

    def __init__(self, config: Config, watch: Callable[[Progress], None]) -> None:
        self._config, self._watch, self._ready_for = config, watch, 0.0

    def __call__(self, progress: Progress) -> None:
        after_s, begun = self._config.scaling.standby_after_s, progress.started_at
        if after_s is not None and begun != self._ready_for and time.time() - begun >= after_s:
            self._ready_for = begun
            prestart(self._config.scaling.range[1], worker_environment(self._config, alone=True))
        self._watch(progress)


def _follow(
    monitor: Any, watch: Callable[[Progress], None], note: Callable[[str], None], done: threading.Event
) -> None:
    import ray

    shown = None
    while not done.wait(POLL_S):
        try:
            progress, notes = ray.get(monitor.read.remote(), timeout=10)
        except Exception:  # the cluster is going away, or is too busy to say; the run itself tells
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


def _unused_name(config: Config) -> Config:
    base = re.sub(r"-\d+$", "", config.run.name)
    for number in range(1, 10_000):
        name = base if number == 1 else f"{base}-{number}"
        section = config.run.model_copy(update={"name": name})
        candidate = config.model_copy(update={"run": section})
        if not run_store(candidate).exists(CONFIG_FILE) or not committed(run_store(candidate)):
            return candidate
    raise StorageError(f"{config.run.storage}: no unused name like '{base}-N' is left")
