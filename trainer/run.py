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
from typing import Any

import torch

from scoreray.data.errors import DataError, ScorerayError, StorageError, UserError
from scoreray.data.manifest import Manifest
from scoreray.data.store import NotFound, Store, open_store
from scoreray.trainer.checkpoint import latest
from scoreray.trainer.config import Config, differing_keys, dump_config, load_config
from scoreray.trainer.engine import NonFiniteError
from scoreray.trainer.loop import Progress, run_store
from scoreray.trainer.step import build_training_module

CONFIG_FILE = "config.yaml"
FINAL_ERRORS = (UserError, DataError, NonFiniteError)  # starting again would only meet them again
POLL_S = 0.25


def prepare_run(config: Config, *, fresh: bool = False) -> Config:
    """Claim the run's place before anything starts: its config is stored there, or is found there and agrees.

    `fresh`: take the first unused name of name-2, name-3, ... instead of going on. Returns the config to run.
    Raises UserError with the differing keys when another config made this run; StorageError, DataError.
    """
    check_run(config)
    if fresh:
        config = _unused_name(config)
    run = run_store(config)
    if run.put_new(CONFIG_FILE, dump_config(config).encode()):
        return config
    there = stored_config(run)
    differing = differing_keys(there, config)
    if differing:
        raise UserError(
            f"run '{config.run.name}' exists at {run.url()} with another config; "
            "give its config, another run.name, or --fresh\n  " + "\n  ".join(differing)
        )
    return config


def check_run(config: Config) -> None:
    """What can be known before Ray starts: the data set is there, fits the network, and the run's place can be written.

    Raises UserError, StorageError or DataError.
    """
    data = open_store(config.data.url)
    data.check_reachable()
    manifest = Manifest.load(data)
    with torch.device("meta"):
        build_training_module(config, manifest)
    run_store(config).check_writable()


def stored_config(run: Store) -> Config:
    """The config that made a run."""
    try:
        text = run.get(CONFIG_FILE).decode()
    except NotFound:
        raise UserError(f"{run.url()}: not a run ({CONFIG_FILE} is missing)") from None
    import yaml

    return load_config(yaml.safe_load(text))


def fit(config: Config, watch: Callable[[Progress], None] = lambda progress: None) -> int:
    """Train `config` (see `prepare_run`) on the connected Ray cluster; returns images seen.

    Blocks; `watch` is called from another thread, a few times a second. Raises the error that ended the run as it
    was raised on the worker. KeyboardInterrupt ends the workers and leaves the newest committed checkpoint.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    images_seen = _images_committed(config)
    if images_seen >= config.duration.images:
        return images_seen
    monitor = ray.remote(num_cpus=0)(_Monitor).remote()
    low, high = config.scaling.range
    done = threading.Event()
    watcher = threading.Thread(target=_follow, args=(monitor, watch, done), daemon=True)
    with tempfile.TemporaryDirectory(prefix="scoreray-train-") as scratch:
        trainer = _trainer_class()(
            _train_on_worker,
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
                worker_runtime_env={"env_vars": worker_environment(config)},
            ),
        )
        watcher.start()
        try:
            trainer.fit()
        except KeyboardInterrupt:
            trainer.abort()
            raise
        except Exception as error:
            raise _cause(error) from None
        finally:
            done.set()
            watcher.join(timeout=5)
            ray.kill(monitor)
    return _images_committed(config)


def worker_environment(config: Config) -> dict[str, str]:
    """Environment variables that a training worker must have from its start."""
    environment = {
        # Large tensors from the heap instead of fresh mappings: page faults cost a third of a small step on a CPU.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
        "MALLOC_TOP_PAD_": str(64 << 20),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not config.scaling.use_gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _train_on_worker(settings: dict[str, Any]) -> None:
    """What Ray Train calls on each worker."""
    import logging

    import ray.train
    import ray.train.torch
    import torch

    from scoreray.trainer.loop import train

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    context = ray.train.get_context()
    monitor = settings["monitor"]
    config = Config.model_validate(settings["config"])
    device = ray.train.torch.get_device() if config.scaling.use_gpu else torch.device("cpu")
    train(
        config,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=device,
        watch=lambda progress: monitor.update.remote(progress),
    )


class _Monitor:
    """A Ray actor between rank 0 and the person who watches; losing it loses nothing."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def update(self, progress: Progress) -> None:
        self._progress = progress

    def read(self) -> Progress | None:
        return self._progress


def _follow(monitor: Any, watch: Callable[[Progress], None], done: threading.Event) -> None:
    import ray

    shown = None
    while not done.wait(POLL_S):
        try:
            progress = ray.get(monitor.read.remote(), timeout=10)
        except Exception:  # the cluster is going away, or is too busy to say; the run itself tells
            time.sleep(1)
            continue
        if progress is not None and progress != shown:
            watch(progress)
            shown = progress


def _trainer_class() -> Any:
    """TorchTrainer that does not start again after an error that is final, and that can be aborted from Python."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision

    class FinalErrors(DefaultFailurePolicy):
        def make_decision(self, training_failed_error: Any) -> Any:
            if isinstance(_cause(training_failed_error), FINAL_ERRORS):
                return FailureDecision.RAISE
            return super().make_decision(training_failed_error)

    class RunTrainer(TorchTrainer):
        _controller: Any = None

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            policy = FinalErrors(self.run_config.failure_config)
            return super()._initialize_and_run_controller(**{**arguments, "failure_policy": policy})

        def _create_default_callbacks(self) -> Any:
            # The cleaner asks the State API, which only a dashboard serves: in vain on an embedded cluster, which needs
            # no cleaning, as it ends with this process.
            callbacks = super()._create_default_callbacks()
            if "RAY_ADDRESS" in os.environ:
                return callbacks
            return [callback for callback in callbacks if type(callback).__name__ != "PlacementGroupCleanerCallback"]

        def _register_sigint_handler(self, controller: Any) -> None:
            self._controller = controller  # Ctrl-C stays Python's own: `fit` then calls `abort`

        def abort(self) -> None:
            import ray

            if self._controller is not None:
                with contextlib.suppress(Exception):  # the actor exits in this call: its death is the good answer
                    ray.get(self._controller.abort.remote(), timeout=10)

    return RunTrainer


def _cause(error: BaseException) -> BaseException:
    """The error of ours inside what Ray Train raises, else Ray's error itself."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [getattr(failure, "_base_exc", failure) for failure in failures.values()]
    ours = [cause for cause in causes if isinstance(cause, ScorerayError)]
    final = [cause for cause in ours if isinstance(cause, FINAL_ERRORS)]
    return (final or ours or [error])[0]


def _images_committed(config: Config) -> int:
    checkpoint = latest(run_store(config))
    return checkpoint.images_seen if checkpoint else 0


def _unused_name(config: Config) -> Config:
    base = re.sub(r"-\d+$", "", config.run.name)
    for number in range(1, 10_000):
        name = base if number == 1 else f"{base}-{number}"
        section = config.run.model_copy(update={"name": name})
        candidate = config.model_copy(update={"run": section})
        if not run_store(candidate).exists(CONFIG_FILE):
            return candidate
    raise StorageError(f"{config.run.storage}: no unused name like '{base}-N' is left")
