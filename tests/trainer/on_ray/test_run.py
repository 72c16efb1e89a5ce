"""A run on Ray: killed, it goes on and ends bitwise where an uninterrupted one does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from waiting import PATIENCE_S

from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.pack import pack
from scoreray.trainer.checkpoints.checkpoint import committed, latest
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.on_ray import run as on_ray_run
from scoreray.trainer.on_ray.run import fit
from scoreray.trainer.prepare import prepare_run
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_folder import run_store, stored_config

BATCH, TOTAL = 32, 1600


@pytest.fixture(scope="module")
def data_url(local_s3: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """600 small labelled pictures, so that a run sees them a little more than twice."""
    rng = np.random.default_rng(0)
    source = tmp_path_factory.mktemp("source") / "pictures.npz"
    images = rng.integers(0, 256, (600, 8, 8), dtype=np.uint8)
    np.savez(source, images=images, labels=rng.integers(0, 3, 600, dtype=np.uint8))
    url = f"s3://scoreray-tests/{os.getpid()}-run-data"
    pack(str(source), url, name="pictures", samples_per_shard=100)
    return url


def settings(data_url: str, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "run": {"name": name, "storage": f"s3://scoreray-tests/{os.getpid()}-runs"},
        "data": {"url": data_url, "global_batch_size": BATCH},
        "network": {"kind": "unet", "model_channels": 16, "channel_mult": [1], "num_blocks": 1, "dropout": 0.1},
        "engine": {"zero_stage": 2, "precision": "fp32"},
        "scaling": {"workers": 2},
        "duration": {"images": TOTAL},
        "checkpoint": {"every_images": 160, "keep": 2},
        "log": {"every_images": 160},
        **changes,
    }


def outcome(config: Config) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    """Every tensor of the newest checkpoint, and the losses of all records."""
    checkpoint = latest(run_store(config))
    assert checkpoint is not None
    assert checkpoint.images_seen == TOTAL
    state = {f"{key}/{n}": t for key in ("master", *checkpoint.marker.state_keys) for n, t in
             checkpoint.full_state(key).items()}  # fmt: skip
    return state, [(record.images, record.loss) for record in read_metrics(run_store(config))]


@pytest.fixture(scope="module")
def watched() -> list[Any]:
    return []


@pytest.fixture(scope="module")
def uninterrupted(
    ray_cluster: None, data_url: str, new_listeners: Any, watched: list[Any]
) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    config = prepare_run(load_config(settings(data_url, "uninterrupted"))).config
    with new_listeners() as listeners:
        assert fit(config, lambda progress: None) == TOTAL
    watched.append(listeners)
    return outcome(config)


def assert_same(config: Config, uninterrupted: tuple[dict[str, torch.Tensor], list[tuple[int, float]]]) -> None:
    state, losses = outcome(config)
    assert losses == uninterrupted[1]
    assert state.keys() == uninterrupted[0].keys()
    for name, tensor in uninterrupted[0].items():
        assert torch.equal(state[name], tensor), name


def training_workers(root: psutil.Process) -> list[psutil.Process]:
    return [process for process in root.children(recursive=True) if "RayTrainWorker" in " ".join(process.cmdline())]


def test_a_run_commits_and_keeps_the_newest_checkpoints(uninterrupted: Any, data_url: str) -> None:
    run = run_store(load_config(settings(data_url, "uninterrupted")))
    assert [int(folder.split("/")[1].split("-")[0]) for folder in committed(run)] == [1440, 1600]
    assert [images for images, _ in uninterrupted[1]] == [160 * i for i in range(1, 11)]
    assert stored_config(run) == load_config(settings(data_url, "uninterrupted"))


def test_everything_listens_on_loopback_only(uninterrupted: Any, watched: list[Any]) -> None:
    """Ray, its workers, the process group and the S3 server, while a run trained."""
    watched[0].check()


@pytest.mark.slow
def test_a_worker_that_gets_sigterm_then_one_that_hangs_then_one_that_is_killed(
    uninterrupted: Any, data_url: str
) -> None:
    """SIGTERM: saved at once, no step redone. SIGSTOP: found within the time-out, and ended. SIGKILL. Each time Ray
    Train starts the workers again at the right image, and the end is bitwise that of an uninterrupted run."""
    scaling = {"workers": 2, "hang_timeout_s": 8}
    config = prepare_run(load_config(settings(data_url, "worker-killed", scaling=scaling))).config
    plan = [(350, signal.SIGTERM), (750, signal.SIGSTOP), (1150, signal.SIGKILL)]
    sent: list[tuple[psutil.Process, float]] = []
    notes: list[tuple[str, float]] = []
    seen: list[int] = []

    def meddle(progress: Any) -> None:
        seen.append(progress.images)
        if len(notes) == len(sent) < len(plan) and progress.images > plan[len(sent)][0]:
            victim = training_workers(psutil.Process())[-1]
            os.kill(victim.pid, plan[len(sent)][1])
            sent.append((victim, time.monotonic()))

    assert fit(config, meddle, lambda line: notes.append((line, time.monotonic()))) == TOTAL
    assert len(sent) == len(notes) == 3, notes
    (preempted, _), (hung, found_at), (died, _) = notes
    saved_at = int(re.search(r"all was saved at ([\d,]+) images", preempted)[1].replace(",", ""))  # type: ignore[index]
    assert min(images for images in seen[seen.index(max(i for i in seen if i <= saved_at)) + 1 :]) > saved_at
    assert "hung" in hung
    assert found_at - sent[1][1] < 8 + 4
    assert "died" in died
    assert not any(victim.is_running() for victim, _ in sent)
    state, losses = outcome(config)
    for name, tensor in uninterrupted[0].items():
        assert torch.equal(state[name], tensor), name
    assert [pair for pair in losses if pair[0] > 800] == [pair for pair in uninterrupted[1] if pair[0] > 800]


def test_a_killed_driver_resumes_by_the_same_command(
    uninterrupted: Any, data_url: str, scoreray: Any, tmp_path: Path
) -> None:
    """SIGKILL to `scoreray train` and all of its processes' parent: nothing stays behind, the same command goes on.

    Storage stands still from the first checkpoint on: the workers live for seconds after the driver, and on a quick
    machine they would commit the end of the run.
    """
    storage = [process for process in psutil.Process().children(recursive=True) if process.name().startswith("weed")]
    assert storage
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings(data_url, "driver-killed")))
    config = load_config(file)
    command = [sys.executable, "-m", "scoreray.cluster.cli", "train", str(file)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family: list[psutil.Process] = []
    deadline = time.monotonic() + PATIENCE_S
    while latest(run_store(config)) is None:
        assert time.monotonic() < deadline, "no checkpoint"
        assert driver.poll() is None, "the run ended before it could be killed"
        family = psutil.Process(driver.pid).children(recursive=True)
        time.sleep(0.1)
    try:
        for process in storage:
            process.suspend()
        driver.kill()
        driver.wait()
        _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    finally:
        for process in storage:
            process.resume()
    assert not alive, f"left behind: {[process.cmdline() for process in alive]}"

    done = scoreray("train", str(file))  # in this session's Ray: it starts in a second instead of ten
    assert done.returncode == 0, done.stderr
    assert "goes on from" in done.stderr
    assert_same(config, uninterrupted)


@pytest.mark.slow
def test_one_process_without_ray_trains_the_same(uninterrupted: Any, data_url: str) -> None:
    """One rank, no Ray, no DeepSpeed: the same samples and noise, so the same loss to rounding of the reduction."""
    changes = {"engine": {"zero_stage": 0, "precision": "fp32"}, "scaling": {"workers": 1}}
    settings_without_dropout = settings(data_url, "alone", **changes)
    config = prepare_run(load_config(settings_without_dropout, ["duration.images=320", "network.dropout=0"])).config
    train(config)
    two = prepare_run(load_config(settings(data_url, "two"), ["duration.images=320", "network.dropout=0"])).config
    fit(two)
    alone, together = (read_metrics(run_store(c)) for c in (config, two))
    for one, other in zip(alone, together, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)


def test_a_finished_run_is_not_trained_again(
    uninterrupted: Any, data_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(settings(data_url, "uninterrupted"))
    monkeypatch.setattr(on_ray_run, "_start_monitor", lambda *_: pytest.fail("something was started"))
    assert fit(prepare_run(config).config) == TOTAL


def test_another_config_is_refused_by_key(uninterrupted: Any, data_url: str) -> None:
    other = load_config(settings(data_url, "uninterrupted"), ["optimizer.learning_rate=0.5", "ema.stds=[0.2]"])
    with pytest.raises(
        UserError, match=r"(?s)ema\.stds.*optimizer\.learning_rate: 0.0002 in the run, 0.5 in this config"
    ):
        prepare_run(other)
    fresh = prepare_run(other, fresh=True).config
    assert fresh.run.name == "uninterrupted-2"
    # A name under which nothing was trained is still free, and its config may be replaced.
    again = load_config(settings(data_url, "uninterrupted"), ["optimizer.learning_rate=0.25"])
    claimed = prepare_run(again, fresh=True).config
    assert claimed.run.name == "uninterrupted-2"
    assert stored_config(run_store(claimed)) == claimed


def test_what_does_not_change_the_result_may_change(uninterrupted: Any, data_url: str) -> None:
    same = load_config(
        settings(data_url, "uninterrupted"), ["scaling.workers=1", "engine.zero_stage=0", "log.every_images=640"]
    )
    assert prepare_run(same).config == same


@pytest.mark.slow
def test_damaged_data_ends_the_run_with_its_name(ray_cluster: None, data_url: str, tmp_path: Path) -> None:
    """A flipped byte in a shard is no reason to try again: one error that names the shard, within seconds."""
    from scoreray.data.storage.store import open_store

    store, copy = open_store(data_url), open_store(tmp_path / "damaged")
    for key, _ in store.list():
        data = bytearray(store.get(key))
        if key.endswith(".tar"):
            data[560] ^= 0xFF
        copy.put(key, bytes(data))
    config = prepare_run(load_config(settings(copy.url(), "damaged", scaling={"workers": 1}))).config
    with pytest.raises(DataError, match=r"\.tar"):
        fit(config)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_a_driver_that_gets_ctrl_c_or_sigterm_saves_first(
    ray_cluster: None, data_url: str, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C or SIGTERM between two checkpoints: what was trained is committed, nothing is left running, status 130."""
    file = tmp_path / "config.yaml"
    changes = {"duration": {"images": 1_000_000}, "checkpoint": {"every_images": 900_000}, "engine": {"zero_stage": 0}}
    file.write_text(yaml.safe_dump(settings(data_url, f"stopped-{number.name}", **changes)))
    command = [sys.executable, "-m", "scoreray.cluster.cli", "train", str(file)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    killer = threading.Timer(200, driver.kill)
    killer.start()
    assert driver.stderr is not None
    lines = []
    for line in driver.stderr:
        lines.append(line)
        if re.match(r"train [\d,]+/", line):
            break
    shown = int(re.match(r"train ([\d,]+)/", lines[-1])[1].replace(",", ""))  # type: ignore[index]
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(number)
    lines += driver.stderr.readlines()
    driver.wait()
    killer.cancel()
    assert driver.returncode == 130, lines
    assert "Traceback" not in "".join(lines)
    assert "saving first" in "".join(lines)
    assert "goes on" in lines[-1]
    checkpoint = latest(run_store(load_config(file)))
    assert checkpoint is not None
    assert shown <= checkpoint.images_seen < 900_000
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not alive
