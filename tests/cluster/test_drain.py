"""A pod's preStop hook on a real node: its Ray node is drained and ends; a driver of ours gets SIGTERM first, alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_S

from scoreray.cluster.drain import drivers, main

DRAIN = f"{sys.executable} -m scoreray.cluster.drain --deadline-s 120 --address"


def raylets(nodes: Any, node: int) -> list[str]:
    found = subprocess.run(["ip", "netns", "pids", nodes.names[node]], capture_output=True, text=True).stdout.split()
    files = [Path(f"/proc/{pid}/cmdline") for pid in found]
    return [file.parent.name for file in files if file.exists() and "/raylet/raylet" in file.read_text()]


def in_a_pod(nodes: Any, script: str) -> tuple[int, float, str]:
    """Runs on the second node as in a pod of its own: it sees its own processes only, and its name is its address'.

    Exit status, seconds, and what it printed.
    """
    hosts = nodes.folder / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n{nodes.addresses[1]} second\n")
    began = time.monotonic()
    inside = ["sh", "-c", f"hostname second && mount --bind {hosts} /etc/hosts && {script}"]
    done = nodes.run(1, ["unshare", "--uts", "--pid", "--fork", "--mount-proc", *inside], timeout=PATIENCE_S)
    return done.returncode, time.monotonic() - began, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_alone_gets_sigterm_and_without_one_the_node_ends(nodes: Any) -> None:
    if shutil.which("unshare") is None or shutil.which("hostname") is None:
        pytest.skip("a pod is made with unshare and hostname, which are not installed")
    nodes.start(0)
    nodes.start(1)
    head = f"{nodes.addresses[0]}:6399"
    driver = "bash -c 'exec -a /venv/bin/scoreray sleep 300' & sleep 1"
    status, _, printed = in_a_pod(nodes, f"{driver}; {DRAIN} {head}; kill -0 $! && echo goes on; true")
    assert status == 0, printed
    assert "goes on" not in printed
    assert len(raylets(nodes, 1)) == 1, "the node of a driver is needed until it has saved"

    status, took_s, printed = in_a_pod(nodes, f"{DRAIN} {head}")
    assert status == 0, printed
    assert took_s < 110, printed
    deadline = time.monotonic() + PATIENCE_S
    while raylets(nodes, 1):
        assert time.monotonic() < deadline, printed
        time.sleep(0.2)
    assert len(raylets(nodes, 0)) == 1, "another node was drained"


def test_a_driver_is_known_by_its_name(tmp_path: Path) -> None:
    named = tmp_path / "scoreray"
    named.symlink_to(shutil.which("sleep") or "/bin/sleep")
    with subprocess.Popen([str(named), "60"]) as process:
        deadline = time.monotonic() + PATIENCE_S
        while process.pid not in drivers():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()


def test_the_driver_of_a_submitted_job_is_found() -> None:
    """`submit` starts a module, not a file; a file that is only in a folder of that name is no driver."""
    command = [sys.executable, "-u", "-m", "scoreray.cluster.cli", "train", "absent.yaml"]
    found = False
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not found:
            found = process.pid in drivers()
    assert found
    with subprocess.Popen(["tail", "-f", "/dev/null", "/scoreray"], stderr=subprocess.DEVNULL) as other:
        assert other.pid not in drivers()
        other.kill()


def test_a_cluster_that_is_gone_ends_no_pod_late(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """What can't be drained is said, and the pod ends all the same."""
    from scoreray.cluster import drain

    def gone(deadline_s: float, address: str) -> None:
        assert (deadline_s, address) == (30.0, "10.0.0.1:6379")
        raise RuntimeError("no GCS there")

    monkeypatch.setattr(drain, "drivers", list)
    monkeypatch.setattr(drain, "drain_node", gone)
    assert main(["--deadline-s", "30", "--address", "ray://10.0.0.1:6379"]) == 0
    assert "not drained: no GCS there" in capfd.readouterr().err
