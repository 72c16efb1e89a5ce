"""A run of a tiny network on a local Ray cluster of several nodes, measured from outside; for `scale.py`.

    python benchmarks/cluster_run.py FOLDER WORKERS DATA STORAGE METRICS_PORT

A process of its own for each number of workers. It trains as `scoreray train` does on a cluster that RAY_ADDRESS
names, kills the last worker, and stops the run, as a person does; FOLDER/moments.json has what was counted at each
moment: seconds, CPU seconds by kind of process, S3 requests, and messages to the Monitor actor by method.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from scoreray.cluster.connect.local_ray import set_environment
from scoreray.cluster.connect.start import patience

CPUS_PER_NODE = 8  # slots of a Ray node: as many workers as a node has GPUs
COMMITS, STEPS = 4, 40  # that are measured
IMAGES_PER_WORKER = 2
STEPS_PER_COMMIT = 10
PATIENT = {  # on a busy machine
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}
CHECKED = ("RayTrainWorker", "TrainController", "SynchronizationActor", "raylet", "gcs_server", "Monitor")


def main() -> None:
    folder, workers, data, storage = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    for name, seconds in PATIENT.items():
        os.environ.setdefault(name, seconds)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background command begins with it ignored
    set_environment()
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(shutdown_at_exit=True)
    with patience(600):
        for _ in range(-(-workers // CPUS_PER_NODE)):
            cluster.add_node(num_cpus=CPUS_PER_NODE, include_dashboard=False)
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        moments = Run(folder, workers, data, storage).measured()
    finally:
        ray.shutdown()
        cluster.shutdown()
    if "stop" not in moments:
        sys.exit(f"ended after {', '.join(moments)}")
    (folder / "moments.json").write_text(json.dumps(moments))


class Run:
    """Moments by name. What its watch sees decides when a worker is killed and when the run is stopped."""

    def __init__(self, folder: Path, workers: int, data: str, storage: str) -> None:
        from simulated_ranks import requests_at

        self._requests_at, self._port = requests_at, int(sys.argv[5])
        self._workers, self._data, self._storage = workers, data, storage
        self._moments: dict[str, Any] = {}
        self._monitor: Any = None
        self._killed_at = 0.0

    def note(self, name: str, progress: Any = None) -> None:
        import ray

        if name in self._moments:
            return
        messages = ray.get(self._monitor.messages.remote()) if self._monitor is not None else {}
        self._moments[name] = {
            "clock": time.time(),
            "cpu": cpu_seconds(),
            "requests": self._requests_at(self._port),
            "messages": messages,
            "images": progress.images if progress else 0,
            "committed": progress.committed if progress else 0,
        }

    def measured(self) -> dict[str, Any]:
        from scoreray.trainer.config import load_config
        from scoreray.trainer.on_ray import run
        from scoreray.trainer.prepare import prepare_run

        batch = IMAGES_PER_WORKER * self._workers
        config = load_config({
            "run": {"name": f"workers-{self._workers}", "storage": self._storage},
            "data": {"url": self._data, "global_batch_size": batch, "num_lanes": batch},
            "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
            "engine": {"precision": "fp32", "zero_stage": 0},
            "scaling": {"workers": self._workers, "grace_s": 120, "hang_timeout_s": 600},
            "duration": {"images": 1_000_000_000},
            "checkpoint": {"every_images": STEPS_PER_COMMIT * batch, "ahead_images": 0},
            "log": {"every_images": STEPS_PER_COMMIT * batch},
        })  # fmt: skip
        start = run._start_monitor
        counting = counting_monitor()

        def started(*arguments: Any) -> Any:
            run.Monitor = counting  # type: ignore[misc]
            self._monitor = start(*arguments)
            return self._monitor

        run._start_monitor = started
        prepared = prepare_run(config)
        self.note("command")
        with contextlib.suppress(KeyboardInterrupt):
            run.fit(prepared.config, self.watch, lambda line: print(line, file=sys.stderr))
        self._monitor = None
        self.note("stopped")
        return self._moments

    def watch(self, progress: Any) -> None:
        """Called by the driver with each new progress, in a thread; a fault here ends the run instead of the thread."""
        try:
            self._watch(progress)
        except Exception:
            traceback.print_exc()
            os.kill(os.getpid(), signal.SIGINT)
            raise

    def _watch(self, progress: Any) -> None:
        self.note("first step", progress)
        interval = STEPS_PER_COMMIT * IMAGES_PER_WORKER * self._workers
        first = self._moments.get("training")
        if first is None:
            if progress.committed:  # of the first commit a sweep is a part
                self.note("training", progress)
        elif "trained" not in self._moments:
            if progress.committed >= first["committed"] + COMMITS * interval:
                self.note("trained", progress)
                self._killed_at = time.time()
                self.note("kill", progress)
                os.kill(last_worker(), signal.SIGKILL)
        elif progress.started_at > self._killed_at and "restarted" not in self._moments:
            self.note("restarted", progress)
        elif "restarted" in self._moments and progress.committed > self._moments["restarted"]["committed"] and (
            "stop" not in self._moments
        ):  # fmt: skip
            self.note("stop", progress)
            os.kill(os.getpid(), signal.SIGINT)


def counting_monitor() -> type:
    """The Monitor, which counts the messages that it gets, by method."""
    from scoreray.trainer.monitoring.monitor import Monitor

    class CountingMonitor(Monitor):
        def messages(self) -> dict[str, int]:
            return dict(self.__dict__.setdefault("_messages", Counter()))

    def counted(name: str) -> Any:
        def method(self: Any, *arguments: Any) -> Any:
            self.__dict__.setdefault("_messages", Counter())[name] += 1
            return getattr(super(CountingMonitor, self), name)(*arguments)

        return method

    for name, value in list(vars(Monitor).items()):
        if callable(value) and not name.startswith("_") and name not in ("values", "note"):
            setattr(CountingMonitor, name, counted(name))
    return CountingMonitor


def last_worker() -> int:
    import psutil

    return max(p.pid for p in psutil.Process().children(recursive=True) if kind_of(p) == "RayTrainWorker")


def kind_of(process: Any) -> str:
    import psutil

    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return "gone"
    return next((kind for kind in CHECKED if kind in line), "other")


def cpu_seconds() -> dict[str, dict[str, float]]:
    """Of each process of this cluster, by its kind and number."""
    import psutil

    found: dict[str, dict[str, float]] = {"driver": {}}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
            kind = "driver" if process.pid == os.getpid() else kind_of(process)
            found.setdefault(kind, {})[str(process.pid)] = times.user + times.system
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    main()
