"""Whether nodes may come that are not there yet, and what is asked for and said meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from waiting import PATIENT_RAY

from scoreray.cluster.connect import room
from scoreray.cluster.connect.folder import RAYS_OWN, private_folder
from scoreray.cluster.connect.room import Autoscaler, from_status, from_v2, gpus_come, missing, wait_for_room
from scoreray.data.errors import UserError
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.run_folder import run_store

HEAD = "f" * 51 + "00000"


def status(**report: Any) -> dict[str, Any]:
    """As Ray 2.60's first autoscaler keeps it, in the parts that matter here."""
    empty = {"active_nodes": {}, "idle_nodes": None, "pending_nodes": [], "pending_launches": {}, "failed_nodes": [],
             "node_availability_summary": {"node_availabilities": {}}, "node_type_mapping": {}}  # fmt: skip
    return {"autoscaler_report": empty | report, "load_metrics_report": {}}


@pytest.mark.parametrize(
    ("status", "is_there", "num_starting"),
    [
        ({"autoscaler_report": None}, False, 0),
        (status(), False, 0),
        (status(active_nodes={f"node_{HEAD}": 1}, node_type_mapping={HEAD: f"node_{HEAD}"}), False, 0),
        (status(node_type_mapping={HEAD: "head"}), True, 0),
        (status(active_nodes={"head": 1}, pending_launches={"gpu": 3}), True, 3),
        (status(pending_nodes=[["10.0.0.7", "gpu", "uninitialized"]], node_type_mapping={HEAD: "head"}), True, 1),
        (status(node_availability_summary={"node_availabilities": {"gpu": {"is_available": False}}}), True, 0),
    ],
)
def test_an_autoscaler_knows_types_of_nodes_by_other_names_than_the_nodes_own(
    status: dict[str, Any], is_there: bool, num_starting: int
) -> None:
    found = from_status(status)
    assert (found.is_there, len(found.starting)) == (is_there, num_starting)


@pytest.mark.parametrize(
    ("version", "types", "launching", "is_there", "num_starting"),
    [("0", [f"node_{HEAD}"], 0, False, 0), ("0", ["headgroup"], 0, False, 0), ("7", [f"node_{HEAD}"], 0, False, 0),
     ("7", ["headgroup"], 0, True, 0), ("7", ["headgroup"], 2, True, 2), (None, [], 0, False, 0)],
)  # fmt: skip
def test_the_second_autoscaler_is_there_once_it_has_reported(
    version: str | None, types: list[str], launching: int, is_there: bool, num_starting: int
) -> None:
    launches = [SimpleNamespace(ray_node_type_name="gpu", count=launching)] if launching else []
    status = SimpleNamespace(
        active_nodes=[], idle_nodes=[SimpleNamespace(ray_node_type_name=name) for name in types], pending_nodes=[],
        pending_launches=launches, stats=SimpleNamespace(autoscaler_version=version),
    )  # fmt: skip
    assert (from_v2(status).is_there, len(from_v2(status).starting)) == (is_there, num_starting)


def test_missing_resources_are_counted_over_all_workers() -> None:
    worker = {"CPU": 4.0, "GPU": 1.0}
    assert missing([worker] * 2, {"CPU": 8.0, "GPU": 2.0}) == {}
    assert missing([worker] * 2, {"CPU": 16.0}) == {"GPU": 2.0}
    assert missing([worker] * 2, {}) == {"CPU": 8.0, "GPU": 2.0}
    assert missing([{"CPU": 1.0}] * 3, {"CPU": 2.99}) == {"CPU": 3.0}


def test_resources_that_no_node_will_have_are_refused_at_once(ray_cluster: None) -> None:
    assert not room.autoscaler().is_there
    wait_for_room("a worker needs", [{"CPU": 1}], "ask for less")
    refused = r"^4 workers need 8 GPU, the cluster has 0 and 40 CPU, the cluster has 4; ask for less$"
    with pytest.raises(UserError, match=refused):
        wait_for_room("4 workers need", [{"GPU": 2, "CPU": 10}] * 4, "ask for less")
    assert not gpus_come(1)


def test_a_service_that_has_no_room_is_refused_before_it_starts(
    scoreray: Any, ray_cluster: None, small_run: Any, tmp_path: Path
) -> None:
    config = load_config(small_run("served", tmp_path, 16))
    train(config)
    refused = scoreray("serve", run_store(config).url(), "--port", "0", "--gpus-per-replica", "1")
    assert refused.returncode == 2, refused.stderr
    assert "--replicas: 1 of them need 1 GPU, the cluster has 0; give fewer, less to each" in refused.stderr
    assert "Traceback" not in refused.stderr


class Clock:
    """A clock that advances each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize(
    ("starting", "comes_after", "expected"),
    [
        (0, 5, True),
        (0, 10_000, False),
        (10_000, 300, True),
        (300, 10_000, False),
        (10, 20, True),
        (10_000, 10_000, False),
    ],
)
def test_cpus_are_fallen_back_to_only_when_no_node_is_started_for_a_gpu(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, starting: int, comes_after: int, expected: bool
) -> None:
    """A node that is being started may take long; one that can't be would never come, nor does what is
    of another job, whether it comes up or never does. `starting`: how many polls report one."""
    said: list[str] = []
    polls, states = itertools.count(), itertools.count()

    @contextlib.contextmanager
    def requested(bundles: Any) -> Iterator[Any]:
        assert list(bundles) == [{"GPU": 1, "CPU": 2}]
        yield lambda: next(polls) >= comes_after

    def state(within_s: float = 0.0) -> Autoscaler:
        return Autoscaler(frozenset({"head"}), frozenset({"cpu 0", "a-node cpu"} if next(states) < starting else ()))

    monkeypatch.setattr(room, "autoscaler", state)
    monkeypatch.setattr(room, "_requested", requested)
    monkeypatch.setattr(room, "time", Clock())
    monkeypatch.setattr(room, "say", said.append)
    assert gpus_come(2) is expected
    assert ["going on with CPUs" in line for line in said] == [False] + [True] * (not expected)


FAKE = {
    "cluster_name": "fake", "max_workers": 3, "upscaling_speed": 1.0, "idle_timeout_minutes": 1, "auth": {},
    "docker": {},
    "initialization_commands": [], "setup_commands": [], "head_setup_commands": [], "worker_setup_commands": [],
    "head_start_ray_commands": [], "worker_start_ray_commands": [], "file_mounts": {}, "cluster_synced_files": [],
    "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 2, "object_store_memory": 80_000_000}, "node_config": {}, "min_workers": 0,
                "max_workers": 2},
    },
}  # fmt: skip


@pytest.fixture
def from_zero() -> Iterator[dict[str, str]]:
    """Variables for a cluster of cluster/aws.yaml's shape: a head for drivers only, and Ray's autoscaler, whose nodes
    are processes of this machine."""

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | token
    environment |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", **PATIENT_RAY,
                    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # fmt: skip
    with private_folder() as folder:
        provider = {"type": "fake_multinode", "disable_node_updaters": True, "gcs_address": f"127.0.0.1:{port}"}
        (folder / "autoscaling.json").write_text(json.dumps({**FAKE, "provider": provider}))
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
                   "--num-cpus=0", "--node-ip-address=127.0.0.1", "--include-dashboard=false",
                   f"--temp-dir={folder / RAYS_OWN}", "--object-store-memory=80000000",
                   f"--autoscaling-config={folder / 'autoscaling.json'}"]  # fmt: skip
        quiet = subprocess.DEVNULL
        head = subprocess.Popen(command, env=environment, stdout=quiet, stderr=quiet, start_new_session=True)
        log = folder / RAYS_OWN / "session_latest" / "logs" / "monitor.log"
        try:
            while not log.exists() or "Autoscaler status" not in log.read_text():
                assert head.poll() is None
                time.sleep(0.5)
            yield environment | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            os.killpg(head.pid, 9)
            head.wait()


@pytest.mark.slow
def test_a_cluster_that_scales_from_zero_trains(from_zero: dict[str, str], small_run: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(small_run("zero", tmp_path, 64)))
    call = [sys.executable, "-m", "scoreray.cluster.cli", "train", str(config)]
    done = subprocess.run(call, env=from_zero, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (
        "scaling.workers: 1 worker needs 1 CPU, the cluster has 0: waiting for nodes of its autoscaler" in done.stderr
    )
    assert "trained to 64 images" in done.stdout
