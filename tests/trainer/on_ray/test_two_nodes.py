"""A run on two Ray nodes with addresses of their own (network namespaces), one of which dies and comes back."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from waiting import PATIENCE_S

from scoreray.data.packing.pack import pack
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_folder import run_store

TOTAL = 400_000  # more than is trained: the run is stopped when all was seen


@pytest.mark.slow
def test_a_run_over_two_nodes_outlives_one_of_them(nodes: Any, tmp_path: Path, start_train: Any) -> None:
    """Two workers, a node each; one node loses power: the other goes on alone; it comes back: two again. SIGINT saves.
    The losses are those of one process without Ray."""
    images = np.random.default_rng(0).integers(0, 256, (600, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "p.npz", images=images)
    pack(str(tmp_path / "p.npz"), str(tmp_path / "data"))
    settings = {
        "run": {"name": "two", "storage": str(tmp_path / "runs")},
        "data": {"url": str(tmp_path / "data"), "global_batch_size": 32},
        "network": {"kind": "unet", "model_channels": 16, "channel_mult": [1], "num_blocks": 1},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "scaling": {"workers": [1, 2], "resize_every_s": 2},
        "duration": {"images": TOTAL},
        "checkpoint": {"every_images": 1600},
        "log": {"every_images": 1600},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    nodes.start(0)
    nodes.start(1)
    environment = {**nodes.environment, "RAY_ADDRESS": f"{nodes.addresses[0]}:6399"}
    driver = start_train(file, ["ip", "netns", "exec", nodes.names[0]], environment)
    try:
        driver.wait_for("images.*loss")
        processes = nodes.run(1, ["sh", "-c", "for p in $(ip netns pids " + nodes.names[1] + "); do tr '\\0' ' ' </proc/$p/cmdline; done"])  # fmt: skip  # noqa: E501
        assert "RayTrainWorker" in processes.stdout, "no worker ran on the second node"
        nodes.kill(1)
        driver.wait_for("workers are started again")
        before = latest(run_store(load_config(settings)))
        deadline = time.monotonic() + PATIENCE_S
        while True:  # it trains on, on one node
            newest = latest(run_store(load_config(settings)))
            if newest is not None and newest.marker.world_size == 1:
                break
            assert time.monotonic() < deadline, driver.lines
            time.sleep(0.2)
        assert before is None or newest.images_seen >= before.images_seen
        nodes.start(1)
        driver.wait_for("there is room for 2")
        while newest is None or newest.marker.world_size != 2:
            assert time.monotonic() < deadline + 60, driver.lines
            time.sleep(0.2)
            newest = latest(run_store(load_config(settings)))
    finally:
        driver.process.send_signal(signal.SIGINT)
        try:
            driver.process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            driver.process.kill()
    assert driver.process.returncode == 130, driver.lines
    records = read_metrics(run_store(load_config(settings)))[:3]
    alone = load_config({**settings, "run": {"name": "one", "storage": str(tmp_path / "runs")}}, [
        "scaling.workers=1", f"duration.images={records[-1].images}"])  # fmt: skip
    train(alone)
    for one, two in zip(read_metrics(run_store(alone)), records, strict=False):
        if one.images == two.images:  # a save on the way has a record of its own
            assert two.loss == pytest.approx(one.loss, rel=1e-5)
