"""Jobs on a real Ray cluster that asks for a token: sent, followed through a broken connection, stopped, resumed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from scoreray.cluster.local_ray import _short_folder
from scoreray.cluster.submit import prepared
from scoreray.cluster.wheel import PACKAGES, build_wheel
from scoreray.data.errors import UserError

BIN = Path(sys.executable).parent
GCS: dict[int, int] = {}  # of the head that has this dashboard


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Proxy:
    """Hands on connections to a port, until it is cut."""

    def __init__(self, target: int) -> None:
        self.target, self.open, self.cuts = target, True, 0
        self._pairs: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if not self.open:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self.target))
                self._pairs += [client, server]
                for a, b in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(a, b), daemon=True).start()

    def _copy(self, a: socket.socket, b: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)

    def cut(self, seconds: float) -> None:
        self.open = False
        for one in self._pairs:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()
        time.sleep(seconds)
        self.open = True


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[int, str]]:
    """(port of the dashboard, token) of a Ray head on loopback, started as on a cluster."""
    token = secrets.token_hex(32)
    gcs, dashboard, client, agent, metrics = free_ports(5)
    GCS[dashboard] = gcs
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{BIN}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    with _short_folder() as folder:
        ray = subprocess.Popen(
            [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}", f"--temp-dir={folder}",
             "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
             f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
             f"--metrics-export-port={metrics}", "--object-store-memory=80000000", "--node-ip-address=127.0.0.1"],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            asked = urllib.request.Request(
                f"http://127.0.0.1:{dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
            )
            for _ in range(240):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(asked, timeout=5).read()
                    break
                time.sleep(0.5)
            yield dashboard, token
        finally:
            ray.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                ray.wait(timeout=5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ray.pid, 9)


def command(port: int, token: str | None, *words: str) -> tuple[list[str], dict[str, str]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}
    if token is not None:
        environment["RAY_AUTH_TOKEN"] = token
    place = ["--address", f"http://127.0.0.1:{port}"]
    return [sys.executable, "-m", "scoreray.cluster.command", "submit", *place, *words], environment


def run(port: int, token: str | None, *words: str) -> subprocess.CompletedProcess[str]:
    line, environment = command(port, token, *words)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)


def api(port: int, token: str, path: str, method: str = "GET") -> Any:
    asked = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/jobs/{path}", headers={"Authorization": f"Bearer {token}"}, method=method
    )
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return json.load(answer)


def test_without_a_token_nothing_is_answered(head: tuple[int, str]) -> None:
    port, _ = head
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/jobs/", timeout=10)
    assert refused.value.code == 401
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda token: run(port, token, "list"), (None, "x" * 64)))
    for done in answers:
        assert done.returncode == 2, done.stderr
        assert "does not take this token" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


@pytest.fixture(scope="module")
def config(small_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submitted")
    every = {"checkpoint": {"every_images": 800}, "log": {"every_images": 400}}
    (folder / "sent.yaml").write_text(json.dumps(small_run("sent", folder / "runs", 100_000_000, **every)))
    return folder / "sent.yaml"


def committed(config: Path) -> int:
    from scoreray.data.store import open_store
    from scoreray.trainer.checkpoint import latest

    found = latest(open_store(str(config.parent / "runs" / "sent")))
    return found.images_seen if found else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_follow_lose_the_connection_reconnect_stop_and_resume(head: tuple[int, str], config: Path) -> None:
    port, token = head
    proxy = Proxy(port)
    line, environment = command(proxy.port, token, "--env", "OMP_NUM_THREADS=1", "train", str(config))
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        deadline = time.monotonic() + 180
        while committed(config) < 800 and follower.poll() is None and time.monotonic() < deadline:
            time.sleep(0.3)
        proxy.cut(2.0)
        shown = run(port, token, "--json", "status", "scoreray-train-sent")
        again = run(port, token, "train", str(config))
        stopped = run(port, token, "stop", "scoreray-train-sent-1")
        out, err = follower.communicate(timeout=180)
    assert committed(config) >= 800, out + err
    told = json.loads(shown.stdout)
    assert (told["id"], told["status"], told["run"]) == ("scoreray-train-sent-1", "RUNNING", "sent")
    assert again.returncode == 2
    assert "goes on" in again.stderr
    assert stopped.returncode == 0, stopped.stderr
    assert follower.returncode == 130, err
    assert "stopping: saving first" in out, out
    assert err.count("connection lost") == 1, err
    assert out.count("run 'sent':") == 1, out  # each line of the job once, also those from before the cut
    before = committed(config)

    second = run(port, token, "--detach", "--json", "train", str(config))
    assert json.loads(second.stdout)["id"] == "scoreray-train-sent-2", second.stderr
    line, environment = command(port, token, "logs", "scoreray-train-sent")
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        seen = ""
        for text in follower.stdout:
            seen += text
            if "goes on from" in text or "Error" in text:
                api(port, token, "scoreray-train-sent-2/stop", "POST")
    assert f"goes on from {before:,} images" in seen, seen
    listed = api(port, token, "")
    assert {job["submission_id"]: job["status"] for job in listed if job["submission_id"]} == {
        "scoreray-train-sent-1": "STOPPED", "scoreray-train-sent-2": "STOPPED",
    }  # fmt: skip
    assert token not in json.dumps(listed)


def test_a_verb_runs_there_with_this_code_and_its_exit_status_comes_back(head: tuple[int, str]) -> None:
    port, token = head
    done = run(port, token, "--name", "look", "data", "verify", "/nowhere/at/all")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "/nowhere/at/all" in done.stdout
    about = json.dumps(api(port, token, "look-1"))
    assert "py_modules" in about
    assert token not in about


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_doctor_as_a_job_and_by_the_address(head: tuple[int, str], config: Path) -> None:
    """Both ask the node itself; the dashboard's refusal is seen; the exit status is the job's."""
    port, token = head
    sent = run(port, token, "--json", "doctor", str(config), "--json")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    (page,) = [line for line in sent.stderr.splitlines() if line.startswith("[{")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_ADDRESS": f"127.0.0.1:{GCS[port]}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    line = [sys.executable, "-m", "scoreray.cluster.command", "doctor", str(config), "--json"]
    asked = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240)
    assert asked.returncode == 0, asked.stderr
    for answer in (page, asked.stdout):
        found = {one["topic"]: one for one in json.loads(answer) if one["state"] != "problem"}
        assert {"versions", "clock", "disk", "/dev/shm", "storage", "token", "ports", "network"} <= set(found)
        assert found["ports"]["text"] == "127.0.0.1: Ray listens on loopback only"
        tokens = [one["text"] for one in json.loads(answer) if one["topic"] == "token"]
        assert any("refuses who has none (401)" in text for text in tokens), tokens
    missing = run(port, token, "doctor", str(config), "data.url=/nowhere/at/all")
    assert missing.returncode == 2, missing.stdout + missing.stderr
    assert "problem data: 127.0.0.1: can't read the data set" in missing.stdout


def test_jobs_hold_references_never_values(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-value-of-ours")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t0ken-value-of-ours")
    with prepared(["train", str(config)], ["AWS_REGION=eu-1"], ["AWS_SECRET_ACCESS_KEY=TEAM_SECRET"], None) as job:
        sent = repr((job.entrypoint, job.runtime_env, job.metadata))
        files = b"".join(path.read_bytes() for path in Path(job.runtime_env["working_dir"]).iterdir())
        assert "of-ours" not in sent
        assert b"of-ours" not in files
        assert job.entrypoint.startswith(
            'AWS_SECRET_ACCESS_KEY="$TEAM_SECRET" python -m scoreray.cluster.command train'
        )
        assert job.metadata == {"scoreray_verb": "train", "scoreray_run": "sent"}
        assert job.name == "scoreray-train-sent"


def test_a_sweep_travels_with_its_base(config: Path) -> None:
    sweep = config.parent / "sweep.yaml"
    sweep.write_text("study: {name: wide, storage: s3://b/s}\nbase: ./sent.yaml\ntrials: 3\n")
    with prepared(["tune", str(sweep)], [], [], None) as job:
        place = Path(job.runtime_env["working_dir"])
        assert job.name == "scoreray-tune-wide"
        assert job.entrypoint.endswith("tune sweep.yaml")
        sent = yaml.safe_load((place / "sweep.yaml").read_text())
        assert (place / sent.pop("base")).read_bytes() == config.read_bytes()
        assert sent == {"study": {"name": "wide", "storage": "s3://b/s"}, "trials": 3}


@pytest.mark.parametrize(
    ("words", "env", "named"),
    [
        (["train"], ["AWS_SECRET_ACCESS_KEY=abc"], "--from-env AWS_SECRET_ACCESS_KEY"),
        (["train"], ["SCORERAY_TOKENS=me:abc"], "--from-env"),
        (["train"], ["AWS_ENDPOINT_URL=http://me:word@host"], "--from-env"),
        (["sample", "s3://AKIAABCDEFGHIJKLMNOP/x"], [], "credential"),
        (["sampel"], [], "sample"),
        (["serve"], [], "not a verb"),
        (["train"], ["no-name"], "NAME=VALUE"),
    ],
)
def test_what_must_not_travel_is_refused(words: list[str], env: list[str], named: str) -> None:
    with pytest.raises(UserError, match=re.escape(named)), prepared(words, env, [], None):
        pass


def test_the_wheel_is_the_code_and_nothing_else(tmp_path: Path) -> None:
    first, second = build_wheel(tmp_path), None
    content = first.read_bytes()
    second = build_wheel(tmp_path)
    assert (first.name, content) == (second.name, second.read_bytes())
    with zipfile.ZipFile(first) as archive:
        names = set(archive.namelist())
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith("METADATA")]
    assert "Requires-Dist" not in metadata
    root = Path(__file__).parents[2]
    for package in PACKAGES:
        modules = {f"scoreray/{package}/{path.name}" for path in (root / package).glob("*.py")}
        assert modules <= names
    assert len(content) < 3_000_000
