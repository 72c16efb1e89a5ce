"""What Prometheus shows of a run that hangs, dies again and again, or diverges: scraped from Ray's own exporter."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from waiting import PATIENCE_S

from scoreray.data.errors import ScorerayError
from scoreray.trainer.config import load_config
from scoreray.trainer.monitoring.metrics import CATALOGUE, TrainingProgress
from scoreray.trainer.monitoring.monitor import Monitor
from scoreray.trainer.monitoring.stopping import NonFiniteError
from scoreray.trainer.on_ray.run import fit
from scoreray.trainer.prepare import prepare_run

Settings = Callable[..., dict[str, Any]]
NAMES = {metric.name.removeprefix("scoreray_") for metric in CATALOGUE}


def scraped(run: str) -> dict[str, float]:
    """What the exporter of the session's node shows of a run now, without noise levels."""
    import ray

    url = f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}"
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as page:
        lines = page.read().decode().splitlines()
    found = [re.match(r"ray_scoreray_(\w+)\{(.*)\} (\S+)$", line) for line in lines]
    return {one[1]: float(one[3]) for one in found if one and f'run="{run}"' in one[2]}


def test_ages_and_counts_go_on_over_restarts(ray_cluster: None) -> None:
    import ray

    def shown() -> dict[str, float]:
        return {name.removeprefix("scoreray_"): value for (name, _), value in ray.get(monitor.values.remote()).items()}

    now = time.time()
    monitor = ray.remote(num_cpus=0)(Monitor).remote("restarted", now - 4000, 2)
    try:
        first = shown()
        assert 4000 <= first["last_commit_age_s"] < 4060
        assert (first["restarts"], first["skipped_steps"], first["stopped_nonfinite"]) == (0, 2, 0)
        for start in range(3):
            progress = TrainingProgress(320, 640, 0.5, 9.0, 0.0, 160, now - 4000, time.time(), skipped_steps=3 - start)
            ray.get(monitor.update.remote(progress))
            assert shown()["progress_age_s"] < 30
            ray.get(monitor.restarted.remote("rank 0 died"))
        last = shown()
        assert 4000 <= last["last_commit_age_s"] < 4060, "a restart is no commit"
        assert (last["restarts"], last["skipped_steps"], last["images_seen"]) == (3, 3, 320)
        ray.get(monitor.update.remote(TrainingProgress(480, 640, 0.5, 9.0, 0.0, 480, time.time())))
        assert shown()["last_commit_age_s"] < 60
        ray.get(monitor.stopped_nonfinite.remote())
        assert shown()["stopped_nonfinite"] == 1
    finally:
        ray.kill(monitor)


def test_before_the_first_commit_the_age_is_the_runs(ray_cluster: None) -> None:
    import ray

    monitor = ray.remote(num_cpus=0)(Monitor).remote("new")
    try:
        ray.get(monitor.restarted.remote("rank 0 died"))
        time.sleep(1.1)
        shown = ray.get(monitor.values.remote())
        assert shown["scoreray_last_commit_age_s", ""] > 1
        assert shown["scoreray_last_commit_time_s", ""] == 0
        assert shown["scoreray_progress_age_s", ""] > 1
    finally:
        ray.kill(monitor)


def test_failures_are_counted_from_the_newest_commit_on(ray_cluster: None) -> None:
    import ray

    monitor = ray.remote(num_cpus=0)(Monitor).remote("fails")
    try:
        counted = [ray.get(monitor.count_failure.remote())]
        for committed in (0, 320, 320, 640):
            ray.get(monitor.update.remote(TrainingProgress(640, 640, 0.5, 9.0, 0.0, committed)))
            counted.append(ray.get(monitor.count_failure.remote()))
        assert counted == [1, 2, 1, 2, 1]
    finally:
        ray.kill(monitor)


def test_a_loss_that_is_not_finite_is_no_bug() -> None:
    assert ScorerayError.exit_status == 1
    assert NonFiniteError("x").exit_status == 3


@pytest.mark.slow
def test_a_run_that_hangs_is_still_seen(ray_cluster: None, small_run: Settings, tmp_path: Path) -> None:
    """SIGSTOP of the worker, for longer than Ray shows a gauge that nobody sets: every series stays, ages grow."""
    sections = {"checkpoint": {"every_images": 8_000}, "scaling": {"hang_timeout_s": 300}}
    config = prepare_run(load_config(small_run("hangs", tmp_path, 10_000_000, **sections))).config
    seen: list[int] = []
    held: list[psutil.Process] = []

    def look() -> None:
        try:
            while not seen or seen[-1] < 9_000:
                time.sleep(0.2)
            (worker,) = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in str(p.cmdline())]
            worker.suspend()
            held.append(worker)
            for _ in range(40):
                time.sleep(1)
                pages.append(scraped("hangs"))
        finally:
            for worker in held:
                worker.resume()
            signal.raise_signal(signal.SIGINT)

    pages: list[dict[str, float]] = []
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        fit(config, lambda progress: seen.append(progress.images))
    watcher.join()
    hung = pages[15:]
    assert len(hung) == 25
    for page in hung:
        assert page.keys() >= NAMES - {"mfu"}, NAMES - page.keys()
    assert hung[-1]["progress_age_s"] > 20
    assert hung[-1]["last_commit_age_s"] - hung[0]["last_commit_age_s"] > 10
    assert hung[-1]["images_seen"] == hung[0]["images_seen"] >= 9_000
    assert {page["restarts"] for page in pages if page} == {0}


@pytest.mark.slow
def test_a_run_that_diverges_is_seen_before_it_ends(
    ray_cluster: None, small_run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)  # as on a cluster, which is scraped
    wild = {"optimizer": {"learning_rate": 1e18, "gradient_clip": 0}}
    config = prepare_run(load_config(small_run("diverges", tmp_path, 100_000, **wild))).config
    shown: list[float] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(1):
            shown.extend([scraped("diverges").get("stopped_nonfinite", 0.0)])

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    notes: list[str] = []
    try:
        with pytest.raises(NonFiniteError, match=r"sample \d+"):
            fit(config, note=notes.append)
    finally:
        over.set()
        watcher.join()
    assert shown.count(1.0) >= 15, "Prometheus scrapes each 15 s"


@pytest.mark.slow
def test_the_command_ends_with_one_line_and_no_bug(small_run: Settings, tmp_path: Path) -> None:
    wild = {"optimizer": {"learning_rate": 1e18, "gradient_clip": 0}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(small_run("diverges", tmp_path, 100_000, **wild)))
    command = [sys.executable, "-m", "scoreray.cluster.cli", "train", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 3, done.stderr
    assert "sample" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
