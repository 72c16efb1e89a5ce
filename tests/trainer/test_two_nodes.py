"""A run on two Ray nodes with addresses of their own (network namespaces), one of which dies and comes back."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from scoreray.data.pack import pack
from scoreray.trainer.checkpoint import latest
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import read_metrics, run_store, train

TOTAL = 400_000  # more than is trained: the run is stopped when all was seen
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "2000",
}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Nodes:
    """Two namespaces joined by a cable, a Ray node in each; node 0 is the head, and where the driver runs."""

    def __init__(self, folder: Path) -> None:
        tag = f"{os.getpid() % 10_000}"
        self.names = [f"sr{tag}a", f"sr{tag}b"]
        self.addresses = [f"10.{77 + os.getpid() % 100}.0.{i + 1}" for i in range(2)]
        self._folder = folder
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            **QUICK_HEALTH_CHECKS,
            "RAY_raylet_start_wait_time_s": "120",
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def connect(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        a, b = (f"v{name}" for name in self.names)
        ip("link", "add", a, "netns", self.names[0], "type", "veth", "peer", "name", b, "netns", self.names[1])
        for name, link, address in zip(self.names, (a, b), self.addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")

    def start(self, node: int) -> None:
        head = f"{self.addresses[0]}:6399"
        where = ["--head", "--port=6399", "--include-dashboard=false"] if node == 0 else [f"--address={head}"]
        command = [*RAY, "start", *where, f"--node-ip-address={self.addresses[node]}", "--num-cpus=1"]
        if node == 0:
            command.append(f"--temp-dir={self._folder}/ray")
        self.run(node, [*command, "--object-store-memory=100000000"], timeout=120, check=True)

    def run(self, node: int, command: list[str], **options: object) -> subprocess.CompletedProcess:
        within = ["ip", "netns", "exec", self.names[node], *command]
        return subprocess.run(within, env=self.environment, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]

    def kill(self, node: int) -> None:
        """Every process of the node, as when its machine loses power."""
        pids = subprocess.run(["ip", "netns", "pids", self.names[node]], capture_output=True, text=True)
        for pid in pids.stdout.split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        for node, name in enumerate(self.names):
            self.kill(node)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    folder = Path(tempfile.mkdtemp(prefix="sr2-", dir="/tmp"))
    found = Nodes(folder)
    try:
        found.connect()
    except (OSError, subprocess.CalledProcessError) as error:
        found.close()
        shutil.rmtree(folder)
        reason = getattr(error, "stderr", "") or error
        pytest.skip(f"two nodes need network namespaces (root, CAP_SYS_ADMIN, iproute2): {reason}")
    try:
        found.start(0)
        found.start(1)
        yield found
    finally:
        found.close()
        shutil.rmtree(folder, ignore_errors=True)


class Driver:
    """`scoreray train` on node 0, its lines as they come."""

    def __init__(self, nodes: Nodes, file: Path) -> None:
        environment = {**nodes.environment, "RAY_ADDRESS": f"{nodes.addresses[0]}:6399"}
        command = [sys.executable, "-m", "scoreray.cluster.cli", "train", str(file)]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", nodes.names[0], *command], env=environment, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._started = time.monotonic()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            print(f"{time.monotonic() - self._started:6.1f}", line.rstrip())

    def wait_for(self, *words: str, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while not any(all(word in line for word in words) for line in self.lines):
            assert time.monotonic() < deadline, (words, self.lines)
            assert self.process.poll() is None, (words, self.lines)
            time.sleep(0.2)


@pytest.mark.slow
def test_a_run_over_two_nodes_outlives_one_of_them(nodes: Nodes, tmp_path: Path) -> None:
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
    driver = Driver(nodes, file)
    try:
        driver.wait_for("images", "loss")
        there = nodes.run(1, ["sh", "-c", "for p in $(ip netns pids " + nodes.names[1] + "); do tr '\\0' ' ' </proc/$p/cmdline; done"])  # fmt: skip  # noqa: E501
        assert "RayTrainWorker" in there.stdout, "no worker ran on the second node"
        nodes.kill(1)
        driver.wait_for("workers are started again")
        before = latest(run_store(load_config(settings)))
        deadline = time.monotonic() + 60
        while True:  # it trains on, on one node
            newest = latest(run_store(load_config(settings)))
            if newest is not None and newest.marker["world_size"] == 1:
                break
            assert time.monotonic() < deadline, driver.lines
            time.sleep(0.2)
        assert before is None or newest.images_seen >= before.images_seen
        nodes.start(1)
        driver.wait_for("there is room for 2")
        while newest is None or newest.marker["world_size"] != 2:
            assert time.monotonic() < deadline + 60, driver.lines
            time.sleep(0.2)
            newest = latest(run_store(load_config(settings)))
    finally:
        driver.process.send_signal(signal.SIGINT)
        try:
            driver.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            driver.process.kill()
    assert driver.process.returncode == 130, driver.lines
    records = read_metrics(run_store(load_config(settings)))[:3]
    alone = load_config({**settings, "run": {"name": "one", "storage": str(tmp_path / "runs")}}, [
        "scaling.workers=1", f"duration.images={records[-1]['images']}"])  # fmt: skip
    train(alone)
    for one, two in zip(read_metrics(run_store(alone)), records, strict=False):
        if one["images"] == two["images"]:  # a save on the way has a record of its own
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
