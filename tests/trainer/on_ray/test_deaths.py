"""What ends a run's parts beside its workers: the controller's death, a second Ctrl-C, a node that is taken away."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from waiting import PATIENCE_S

from scoreray.data.packing.pack import pack
from scoreray.trainer.checkpoints.checkpoint import committed, latest
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.on_ray.run import fit
from scoreray.trainer.prepare import prepare_run
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_folder import run_store

pytestmark = pytest.mark.slow
BATCH, TOTAL = 32, 3200


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "p.npz", images=np.random.default_rng(0).integers(0, 256, (600, 8, 8), dtype=np.uint8))
    pack(str(folder / "p.npz"), str(folder / "packed"), samples_per_shard=100)
    return str(folder / "packed")


def settings(data_url: str, storage: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "run": {"name": name, "storage": str(storage)},
        "data": {"url": data_url, "global_batch_size": BATCH},
        "network": {"kind": "unet", "model_channels": 16, "channel_mult": [1], "num_blocks": 1},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "scaling": {"workers": 2},
        "duration": {"images": TOTAL},
        "checkpoint": {"every_images": 320, "keep": 2},
        "log": {"every_images": 160},
        **changes,
    }


def processes(root: psutil.Process, name: str) -> list[psutil.Process]:
    found = []
    for process in root.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_killed_controller_is_replaced(ray_cluster: None, data_url: str, tmp_path: Path) -> None:
    """SIGKILL to Ray Train's controller: the driver starts another, its workers are new ones, and one line
    says so. They take all that is free, so what the dead one held has been given back. The losses are those of one
    process without Ray."""
    scaling = {"workers": 2, "cpus_per_worker": free_cpus() / 2}
    config = prepare_run(load_config(settings(data_url, tmp_path, "killed", scaling=scaling))).config
    orphans: list[psutil.Process] = []
    notes: list[str] = []

    def meddle(progress: Any) -> None:
        if not orphans and progress.images > 1000:
            orphans.extend(processes(psutil.Process(), "RayTrainWorker"))
            (controller,) = processes(psutil.Process(), "TrainController")
            controller.kill()

    assert fit(config, meddle, notes.append) == TOTAL
    assert len(orphans) == 2
    assert len(notes) == 1
    assert "controller died" in notes[0]
    assert not psutil.wait_procs(orphans, timeout=PATIENCE_S)[1], "workers of a dead controller are left"
    alone = prepare_run(load_config(settings(data_url, tmp_path, "alone", scaling={"workers": 1}))).config
    train(alone)
    pairs = zip(read_metrics(run_store(config)), read_metrics(run_store(alone)), strict=True)
    assert all(one.loss == pytest.approx(other.loss, rel=1e-5) for one, other in pairs)
    assert held() == []


def free_cpus() -> float:
    """Of the session's cluster, once nothing of earlier tests ends any more. Fewer than it has where Ray has lost a
    core of a worker that a test killed (seen once: by the raylet's own state no lease, bundle or process held it)."""
    import ray

    deadline = time.monotonic() + 10
    while (free := ray.available_resources().get("CPU", 0.0)) < ray.cluster_resources()["CPU"]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert free >= 2
    return free


def held() -> list[dict[str, Any]]:
    """Placement groups of the session's cluster that hold resources."""
    import ray

    return [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


def test_without_rays_private_names_a_killed_worker_is_replaced_too(
    ray_cluster: None, data_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL to a worker of a run on Ray's public interface alone: it goes on from its newest commit, to the losses of
    one process without Ray."""
    from scoreray.trainer.on_ray import hooks

    monkeypatch.setattr(hooks, "MISSING", ["what it is made to lack"])
    config = prepare_run(load_config(settings(data_url, tmp_path, "public"))).config
    killed: list[psutil.Process] = []
    notes: list[str] = []

    def meddle(progress: Any) -> None:
        if not killed and progress.images > 1000:
            killed.append(processes(psutil.Process(), "RayTrainWorker")[-1])
            killed[0].kill()

    assert fit(config, meddle, notes.append) == TOTAL
    assert notes[0] == "this version of Ray lacks what it is made to lack: workers start more slowly"
    assert [re.sub(r"\d", "N", line) for line in notes[1:]] == ["workers are started again: rank N died"]
    alone = prepare_run(load_config(settings(data_url, tmp_path, "alone", scaling={"workers": 1}))).config
    train(alone)
    pairs = zip(read_metrics(run_store(config)), read_metrics(run_store(alone)), strict=True)
    assert all(one.loss == pytest.approx(other.loss, rel=1e-5) for one, other in pairs)


def test_a_run_ends_with_its_caller(ray_cluster: None, data_url: str, tmp_path: Path) -> None:
    """An actor that called `fit` is killed while the cluster lives on: workers and their placement group go too."""
    import ray

    class Trial:  # pickled by value: Ray's workers can't import this module
        def train(self, config: Any) -> None:
            from scoreray.trainer.on_ray.run import fit

            fit(config)

    config = prepare_run(load_config(settings(data_url, tmp_path, "run", duration={"images": 10_000_000}))).config
    trial = ray.remote(num_cpus=0)(Trial).remote()
    trial.train.remote(config)
    deadline = time.monotonic() + PATIENCE_S
    while latest(run_store(config)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    workers = processes(psutil.Process(), "RayTrainWorker")
    assert len(workers) == 2
    assert len(held()) == 1
    ray.kill(trial)
    assert not psutil.wait_procs(workers, timeout=PATIENCE_S)[1]
    while held():
        assert time.monotonic() < deadline, held()
        time.sleep(0.2)


@pytest.mark.parametrize("at_images", [1000, TOTAL - 320])  # in the middle of the run, and near its end
def test_a_stopped_controller_is_ended(ray_cluster: None, data_url: str, tmp_path: Path, at_images: int) -> None:
    """SIGSTOP to Ray Train's controller: after scaling.hang_timeout_s it is killed, and the run ends as without."""
    scaling = {"workers": 1, "hang_timeout_s": 3}
    config = prepare_run(load_config(settings(data_url, tmp_path, "stopped", scaling=scaling))).config
    stopped: list[psutil.Process] = []
    notes: list[str] = []

    def meddle(progress: Any) -> None:
        if not stopped and progress.images > at_images:
            stopped.extend(processes(psutil.Process(), "TrainController"))
            stopped[0].suspend()

    assert fit(config, meddle, notes.append) == TOTAL
    assert notes[0] == "Ray Train's controller was stopped for 3 s, and is ended"
    assert not psutil.wait_procs(stopped, timeout=PATIENCE_S)[1]
    alone = prepare_run(load_config(settings(data_url, tmp_path, "alone", scaling={"workers": 1}))).config
    train(alone)
    pairs = zip(read_metrics(run_store(config)), read_metrics(run_store(alone)), strict=True)
    assert all(one.loss == pytest.approx(other.loss, rel=1e-5) for one, other in pairs)


def ready(root: psutil.Process) -> set[int]:
    """Processes of Ray that have no work and have torch in memory."""
    found = set()
    for process in processes(root, "ray::IDLE"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text():
                found.add(process.pid)
    return found


def test_after_a_death_workers_start_in_processes_that_stood_by(
    ray_cluster: None, data_url: str, tmp_path: Path
) -> None:
    changes = {"scaling": {"workers": 2, "standby_after_s": 0}, "duration": {"images": 1_000_000}}
    config = prepare_run(load_config(settings(data_url, tmp_path, "standby", **changes))).config
    stood_by: set[int] = set()
    seen: list[set[int]] = []

    def meddle(progress: Any) -> None:
        family = psutil.Process()
        workers = processes(family, "RayTrainWorker")
        if not stood_by and progress.committed and len(workers) == 2 and len(found := ready(family)) >= 2:
            stood_by.update(found)
            seen.append({worker.pid for worker in workers})
            workers[-1].kill()
        elif len(seen) == 1 and len(workers) == 2 and seen[0].isdisjoint(worker.pid for worker in workers):
            seen.append({worker.pid for worker in workers})
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(config, meddle)
    assert seen[1] <= stood_by


def test_a_second_ctrl_c_ends_at_once(data_url: str, tmp_path: Path, start_train: Any) -> None:
    """A worker is held (SIGSTOP), so saving would take the ten minutes of grace that it has; the second Ctrl-C does not
    wait for it, and leaves no process and no half-written checkpoint that counts."""
    file = tmp_path / "config.yaml"
    changes = {
        "duration": {"images": 10_000_000},
        "checkpoint": {"every_images": 9_000_000},
        "scaling": {"workers": 2, "grace_s": 600, "hang_timeout_s": 900},
    }
    file.write_text(yaml.safe_dump(settings(data_url, tmp_path, "run", **changes)))
    driver = start_train(file)
    try:
        driver.wait_for(r"train [\d,]+/")
        family = psutil.Process(driver.process.pid).children(recursive=True)
        processes(psutil.Process(driver.process.pid), "RayTrainWorker")[-1].suspend()
        driver.process.send_signal(signal.SIGINT)
        driver.wait_for("saving first")
        time.sleep(1)
        assert driver.process.poll() is None  # it waits
        driver.process.send_signal(signal.SIGINT)
    finally:
        status = driver.end()
    assert status == 130, driver.lines
    assert "Traceback" not in "\n".join(driver.lines)
    assert committed(run_store(load_config(file))) == []
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not alive, f"left behind: {[process.cmdline() for process in alive]}"


DRAIN = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
gcs = GcsClient(address=sys.argv[1])
(node,) = [n for n in gcs.get_all_node_info(timeout=10).values() if n.node_manager_address == sys.argv[2]]
reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
accepted, why = gcs.drain_node(node.node_id.hex(), reason, "spot", int((time.time() + 120) * 1000))
assert accepted, why
"""


@pytest.fixture
def drained(nodes: Any, data_url: str, tmp_path: Path, start_train: Any) -> Iterator[tuple[Any, Any, Path]]:
    """A run on two nodes, a worker each, that has begun to train."""
    nodes.start(0)
    nodes.start(1)
    file = tmp_path / "config.yaml"
    changes = {
        "scaling": {"workers": [1, 2], "resize_every_s": 600},
        "duration": {"images": 10_000_000},
        "checkpoint": {"every_images": 9_000_000},
    }
    file.write_text(yaml.safe_dump(settings(data_url, tmp_path, "run", **changes)))
    environment = {**nodes.environment, "RAY_ADDRESS": f"{nodes.addresses[0]}:6399"}
    driver = start_train(file, ["ip", "netns", "exec", nodes.names[0]], environment)
    try:
        driver.wait_for(r"train [\d,]+/")
        yield nodes, driver, file
    finally:
        driver.process.kill()


def test_a_node_that_is_drained_is_left_with_everything_saved(drained: tuple[Any, Any, Path]) -> None:
    """Ray's notice of preemption (as autoscalers and `ray drain-node` give it): no checkpoint was due for millions of
    images, yet all was saved at once, and the run goes on from there on the other node."""
    nodes, driver, file = drained
    head = f"{nodes.addresses[0]}:6399"
    done = nodes.run(0, [sys.executable, "-c", DRAIN, head, nodes.addresses[1]], timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    saved = driver.wait_for(r"all was saved at ([\d,]+) images")
    saved_at = int(saved[1].replace(",", ""))
    run = run_store(load_config(file))
    first = latest(run)
    assert first is not None
    assert (first.images_seen, first.marker.world_size) == (saved_at, 2)
    deadline = time.monotonic() + PATIENCE_S
    while True:  # on one node, from there
        shown = [re.search(r"train ([\d,]+)/", line) for line in list(driver.lines)]
        if any(int(found[1].replace(",", "")) > saved_at for found in shown if found):
            break
        assert time.monotonic() < deadline, driver.lines
        time.sleep(0.2)
    driver.process.send_signal(signal.SIGINT)
    assert driver.end() == 130, driver.lines
    last = latest(run)
    assert last is not None
    assert last.images_seen > saved_at
    assert last.marker.world_size == 1
