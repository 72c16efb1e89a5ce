"""Jobs on a real Ray cluster that asks for a token: sent, followed through a broken connection, stopped, resumed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
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

import numpy as np
import pytest
from waiting import PATIENCE_S, PATIENT_RAY, wait_until

from scoreray.cluster.connect.folder import private_folder
from scoreray.cluster.wheel import PACKAGES, build_wheel
from scoreray.data.storage.local_s3 import LocalS3
from scoreray.data.storage.store import open_store

BIN = Path(sys.executable).parent
GCS: dict[int, int] = {}  # of the head that has this dashboard


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Proxy:
    """Forwards connections to a port, until they are cut."""

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
def head(local_s3: LocalS3) -> Iterator[tuple[int, str]]:
    """(port of the dashboard, token) of a Ray head on loopback, started as on a cluster; it knows the S3 server."""
    token = secrets.token_hex(32)
    gcs, dashboard, client, agent, metrics = free_ports(5)
    GCS[dashboard] = gcs
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0", "PATH": f"{BIN}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "",
        **PATIENT_RAY,
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    with private_folder() as folder:
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(HIDE_EDITABLE)
        environment["PYTHONPATH"] = str(folder / "site")
        output = (folder / "output").open("w+")
        ray = subprocess.Popen(
            [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}", f"--temp-dir={folder}",
             "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
             f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
             f"--metrics-export-port={metrics}", "--object-store-memory=80000000", "--node-ip-address=127.0.0.1"],
            env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        try:
            request = urllib.request.Request(
                f"http://127.0.0.1:{dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
            )

            def answers() -> bool:
                assert ray.poll() is None, (folder / "output").read_text()
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(request, timeout=5).read()
                    return True
                return False

            wait_until(answers, "the dashboard answers")
            yield dashboard, token
        finally:
            ray.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                ray.wait(timeout=5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ray.pid, 9)
            output.close()


HIDE_EDITABLE = """
import os, sys
if "ONLY_THE_WHEEL" in os.environ:  # as on a machine where scoreray is not installed
    sys.meta_path = [one for one in sys.meta_path if "EditableFinder" not in repr(one)]
    sys.path_hooks = [one for one in sys.path_hooks if "EditableNamespaceFinder" not in repr(one)]
"""


def command(port: int, token: str | None, *words: str) -> tuple[list[str], dict[str, str]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"OMP_NUM_THREADS": "1"}
    if token is not None:
        environment["RAY_AUTH_TOKEN"] = token
    place = ["--address", f"http://127.0.0.1:{port}"]
    return [sys.executable, "-m", "scoreray.cluster.cli", "submit", *place, *words], environment


def run(port: int, token: str | None, *words: str) -> subprocess.CompletedProcess[str]:
    line, environment = command(port, token, *words)
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


def api(port: int, token: str, path: str, method: str = "GET") -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/jobs/{path}", headers={"Authorization": f"Bearer {token}"}, method=method
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return json.load(answer)


def test_without_a_token_nothing_is_answered(head: tuple[int, str]) -> None:
    port, _ = head
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/jobs/", timeout=PATIENCE_S)
    assert refused.value.code == 401
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda token: run(port, token, "list"), (None, "x" * 64)))
    for done, fault in zip(answers, ("asks for a token", "does not take this token"), strict=True):
        assert done.returncode == 2, done.stderr
        assert f"the cluster {fault} (401); set RAY_AUTH_TOKEN" in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_the_address_that_is_given_is_the_one_that_counts(head: tuple[int, str]) -> None:
    """Ray's client prefers two variables to the address that it gets."""
    port, token = head
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}"
    both = {"RAY_API_SERVER_ADDRESS": nobody, "RAY_ADDRESS": nobody}
    line, environment = command(port, token, "list", "--json")
    own = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}", "RAY_ADDRESS": nobody}
    without = [word for word in line if word != "--address" and not word.startswith("http")]
    commands = [(line, both), (line, {"RAY_ADDRESS": nobody}), (without, own)]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda one: subprocess.run(
            one[0], env=environment | one[1], capture_output=True, text=True, timeout=PATIENCE_S
        ), commands))  # fmt: skip
    for done in answers:
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout), list)


CLUSTER = """
import json, sys
from scoreray.cluster.submit.jobs import JobMetadata, Submission, _reference
from scoreray.cluster.submit.jobs_api import JobsClient

def tried(call):
    try:
        return [0, str(call())]
    except Exception as error:
        return [error.exit_status, str(error)]

def job(name, writes, entrypoint="sleep 120"):
    return Submission(entrypoint, {}, JobMetadata("train", "r", writes), name)

cluster, notes = JobsClient(sys.argv[1]), []
jobs, calls = cluster.jobs, []

def blind():  # once: as if both had looked before either submitted
    calls.append(0)
    return [] if len(calls) == 1 else jobs()

found = {"gone": tried(lambda: cluster.follow("scoreray-train-gone-1", print, notes.append))}
found["first"] = tried(lambda: cluster.submit(job("one", "s3://b/r")))
found["other name"] = tried(lambda: cluster.submit(job("two", "s3://b/r")))
found["other run"] = tried(lambda: cluster.submit(job("two", "s3://b/else")))
cluster.jobs = blind
found["at once"] = tried(lambda: cluster.submit(job("three", "s3://b/r")))
calls.clear()
found["same number"] = tried(lambda: cluster.submit(job("one", "s3://b/r")))
cluster.jobs = jobs
cluster.submit(job("lacking", "", _reference(("MINE", "NOT_THERE")) + "; exec echo went on"))
out = []
found["lacking"] = [cluster.follow("lacking-1", out.append, notes.append), "".join(out)]
found["left"] = sorted([one.submission_id for one in jobs() if one.status in ("PENDING", "RUNNING")])
for name in found["left"]:
    cluster.stop(name)
cluster.client._headers = {"Authorization": "Bearer " + "x" * 64}
found["refused"] = tried(lambda: cluster.follow("one-1", print, notes.append))
print(json.dumps(found | {"notes": notes}))
"""


@pytest.mark.slow
def test_a_second_job_of_one_run_is_refused_and_following_a_job_that_is_gone_ends(head: tuple[int, str]) -> None:
    """The later of two submissions is refused, or stopped; following ends where there is nothing to follow."""
    port, token = head
    _, environment = command(port, token)
    line = [sys.executable, "-c", CLUSTER, f"http://127.0.0.1:{port}"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gone"][0] == 3
    assert "has no such job" in found["gone"][1]
    assert found["refused"][0] == 2
    assert "does not take this token" in found["refused"][1]
    assert found["notes"] == []
    assert found["first"] == [0, "one-1"]
    assert found["other name"][0] == 2
    assert "job 'one-1' of this run is running" in found["other name"][1]
    assert found["other run"] == [0, "two-1"]
    assert found["at once"] == [2, "job 'one-1' of this run was submitted just before: 'three-1' was stopped"]
    assert "job 'one-1': was submitted by another client" in found["same number"][1]
    assert found["lacking"][0] == 2
    lines = found["lacking"][1].splitlines()  # Ray's own line on the entrypoint may come before or after
    assert lines.count("scoreray: --from-env MINE=NOT_THERE: the node that runs the job has no variable NOT_THERE") == 1
    assert "went on" not in lines
    assert {"one-1", "two-1"} <= set(found["left"])


def test_ctrl_c_before_anything_was_submitted_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        line, environment = command(silent.getsockname()[1], "x" * 64, "data", "verify", "/nowhere")
        with subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True) as waiting:
            silent.settimeout(60)
            connection, _ = silent.accept()
            waiting.send_signal(signal.SIGINT)
            _, err = waiting.communicate(timeout=PATIENCE_S)
            connection.close()
    assert waiting.returncode == 130
    assert err == "stopped; nothing was submitted\n"


@pytest.fixture(scope="module")
def config(small_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submitted")
    every = {"checkpoint": {"every_images": 800}, "log": {"every_images": 400}}
    (folder / "sent.yaml").write_text(json.dumps(small_run("sent", folder / "runs", 100_000_000, **every)))
    return folder / "sent.yaml"


def committed(config: Path) -> int:
    from scoreray.data.storage.store import open_store
    from scoreray.trainer.checkpoints.checkpoint import latest

    found = latest(open_store(str(config.parent / "runs" / "sent")))
    return found.images_seen if found else 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_follow_lose_the_connection_reconnect_stop_and_resume(head: tuple[int, str], config: Path) -> None:
    port, token = head
    proxy = Proxy(port)
    line, environment = command(proxy.port, token, "--env", "OMP_NUM_THREADS=1", "train", str(config))
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        deadline = time.monotonic() + PATIENCE_S
        while committed(config) < 800 and follower.poll() is None and time.monotonic() < deadline:
            time.sleep(0.3)
        proxy.cut(2.0)
        shown = run(port, token, "--json", "status", "scoreray-train-sent")
        again = run(port, token, "train", str(config))
        renamed = run(port, token, "--name", "other", "train", str(config))
        stopped = run(port, token, "stop", "scoreray-train-sent-1")
        out, err = follower.communicate(timeout=PATIENCE_S)
    assert committed(config) >= 800, out + err
    found = json.loads(shown.stdout)
    assert (found["id"], found["status"], found["run"]) == ("scoreray-train-sent-1", "RUNNING", "sent")
    assert again.returncode == renamed.returncode == 2
    for refused in (again, renamed):
        assert "job 'scoreray-train-sent-1' of this run is running" in refused.stderr
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
    ours = [
        job for job in listed if (job["submission_id"] or "").startswith("scoreray-train-sent")
    ]  # others' are there
    assert {job["submission_id"]: job["status"] for job in ours} == {
        "scoreray-train-sent-1": "STOPPED", "scoreray-train-sent-2": "STOPPED",
    }  # fmt: skip
    assert token not in json.dumps(listed)


def test_a_verb_runs_on_the_cluster_with_this_code_and_returns_its_exit_status(head: tuple[int, str]) -> None:
    port, token = head
    done = run(port, token, "--name", "look", "--from-env", "MINE=PATH", "data", "verify", "/nowhere/at/all")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "/nowhere/at/all" in done.stdout
    about = json.dumps(api(port, token, "look-1"))
    assert "py_modules" in about
    assert token not in about


WHEEL_JOB = """
import dataclasses, shlex, sys
from scoreray.cluster.submit.jobs import prepared
from scoreray.cluster.submit.jobs_api import JobsClient
with prepared(["data", "verify", "/x"], ["ONLY_THE_WHEEL=1"], [], "files", lambda arguments: {}) as job:
    cluster = JobsClient(sys.argv[1])
    name = cluster.submit(dataclasses.replace(job, entrypoint="python -c " + shlex.quote(sys.argv[2])))
sys.exit(cluster.follow(name, print, print))
"""
"""A job of our own making in the environment of a submitted verb."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pack_and_train_run_from_the_wheel_alone(head: tuple[int, str], small_run: Any, tmp_path: Path) -> None:
    """Where no scoreray is installed: every module of the job, and of its workers, is the wheel's."""
    port, token = head
    only = ("--env", "ONLY_THE_WHEEL=1", "--env", "OMP_NUM_THREADS=1")
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8))
    packed = run(port, token, *only, "data", "pack", str(tmp_path / "x.npz"), str(tmp_path / "data"), "--workers", "2")
    assert packed.returncode == 0, packed.stdout + packed.stderr
    assert f"packed 64 samples in 1 shard at {tmp_path}/data" in packed.stdout
    settings = small_run("sent", tmp_path / "runs", 64, data={"url": str(tmp_path / "data"), "global_batch_size": 16})
    (tmp_path / "sent.yaml").write_text(json.dumps(settings))
    trained = run(port, token, *only, "train", str(tmp_path / "sent.yaml"))
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "trained to 64 images" in trained.stdout

    look = "import scoreray.data.packing.pack as a, scoreray.trainer.on_ray.run as b; print(a.__file__, b.__file__)"
    _, environment = command(port, token)
    line = [sys.executable, "-c", WHEEL_JOB, f"http://127.0.0.1:{port}", look]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    files = [word for word in done.stdout.split() if word.endswith(".py")]
    assert len(files) == 2, done.stdout
    assert all("/runtime_resources/py_modules_files/" in file for file in files), files


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_encoding_from_s3_to_s3_has_the_bytes_of_one_without_a_cluster(
    head: tuple[int, str], small_set: str, tiny_vae: str, s3_url: str, tmp_path: Path
) -> None:
    """From the wheel alone; the record names where the encoder is, so both name it in S3."""
    port, token = head
    for name, folder in {"pictures": small_set, "vae": tiny_vae}.items():
        for file in (one for one in Path(folder).rglob("*") if one.is_file()):
            open_store(f"{s3_url}/{name}").put(file.relative_to(folder).as_posix(), file)
    encoder = ["--encoder", f"diffusers={s3_url}/vae", "--field", "image", "--to", "latent"]
    sizes = ["--batch-size", "4", "--samples-per-shard", "16", "--device", "cpu"]
    sent = ["--env", "ONLY_THE_WHEEL=1", "data", "encode", f"{s3_url}/pictures", f"{s3_url}/latents", *encoder, *sizes]
    done = run(port, token, *sent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"encoded 64 samples in 4 shards at {s3_url}/latents" in done.stdout
    line = [sys.executable, "-m", "scoreray.cluster.cli", "data", "encode", small_set, str(tmp_path / "here")]
    subprocess.run([*line, *encoder, *sizes, "--actors", "0"], check=True, timeout=PATIENCE_S)
    store = open_store(f"{s3_url}/latents")
    whole = {one.relative_to(tmp_path / "here").as_posix(): one for one in (tmp_path / "here").rglob("*.*")}
    assert {key: store.get(key) for key, _ in store.list()} == {key: one.read_bytes() for key, one in whole.items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_doctor_as_a_job_and_by_the_address(head: tuple[int, str], config: Path) -> None:
    """Both query the node itself; the dashboard's refusal is seen; the exit status is the job's."""
    port, token = head
    sent = run(port, token, "--json", "doctor", str(config), "--json")
    assert sent.returncode == 0, sent.stdout + sent.stderr
    (page,) = [line for line in sent.stderr.splitlines() if line.startswith("[{")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_ADDRESS": f"127.0.0.1:{GCS[port]}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    line = [sys.executable, "-m", "scoreray.cluster.cli", "doctor", str(config), "--json"]
    directly = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert directly.returncode == 0, directly.stderr
    for answer in (page, directly.stdout):
        found = {one["topic"]: one for one in json.loads(answer) if one["state"] != "problem"}
        assert {"versions", "clock", "disk", "/dev/shm", "storage", "token", "ports", "network"} <= set(found)
        assert found["ports"]["text"] == "127.0.0.1: Ray listens on loopback only"
        tokens = [one["text"] for one in json.loads(answer) if one["topic"] == "token"]
        assert any("refuses calls without one (401)" in text for text in tokens), tokens
    missing = run(port, token, "doctor", str(config), "data.url=/nowhere/at/all")
    assert missing.returncode == 2, missing.stdout + missing.stderr
    assert "problem data: 127.0.0.1: can't read the data set" in missing.stdout


def test_the_wheel_is_the_code_and_nothing_else(tmp_path: Path) -> None:
    first, second = build_wheel(tmp_path), None
    content = first.read_bytes()
    second = build_wheel(tmp_path)
    assert (first.name, content) == (second.name, second.read_bytes())
    with zipfile.ZipFile(first) as archive:
        names = set(archive.namelist())
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith("METADATA")]
    assert "Requires-Dist" not in metadata
    root = Path(__file__).parents[3]
    modules = {f"scoreray/{path.relative_to(root)}" for name in PACKAGES for path in (root / name).rglob("*.py")}
    modules = {name.replace("scoreray/cluster/package/", "scoreray/") for name in modules}
    assert modules == {name for name in names if name.endswith(".py")}
    assert {name.count("/") for name in modules} == {1, 2, 3}  # the package itself, and sub-packages too
    assert len(content) < 3_000_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_own_code_reaches_jobs_and_the_workers_of_a_cluster_and_what_lacks_there_is_named(
    head: tuple[int, str], tmp_path: Path
) -> None:
    """The example's package is nowhere on the cluster: it comes with a job, and by `runtime_env` to the workers of a
    command that joins the cluster. A module that is on the driver's machine alone is one line with the worker's."""
    port, token = head
    example = Path(__file__).parents[3] / "examples" / "own-network"
    packages = ["--with", str(example / "ringnet")]
    data, storage = str(tmp_path / "rings"), f"run.storage={tmp_path / 'runs'}"
    packed = run(port, token, "data", "pack", "ringnet.data:Rings", data, "--option", "count=64", *packages)
    assert packed.returncode == 0, packed.stdout + packed.stderr
    settings = [f"data.url={data}", storage, "duration.images=32", "network.width=8", "data.global_batch_size=16"]
    trained = run(port, token, "train", str(example / "config.yaml"), *settings, *packages)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "trained to 32 images" in trained.stdout

    _, environment = command(port, token)
    environment["RAY_ADDRESS"] = f"127.0.0.1:{GCS[port]}"
    line = [sys.executable, "-m", "scoreray.cluster.cli"]

    def here(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*line, *words], env={**environment, **more}, capture_output=True, text=True, timeout=400
        )  # fmt: skip

    joined = here("train", str(example / "config.yaml"), *settings, "duration.images=64", *packages)
    assert joined.returncode == 0, joined.stdout + joined.stderr
    measured = here("evaluate", str(tmp_path / "runs" / "rings"), "--reference", data, "--metrics",
                    "ringnet.measures:radius_error", "--count", "32", "--workers", "1", *packages)  # fmt: skip
    assert measured.returncode == 0, measured.stdout + measured.stderr
    assert "ringnet.measures:radius_error" in measured.stdout

    only_here = {
        "PYTHONPATH": str(example)
    }  # found by its name on this machine, which the cluster's workers do not have
    lacking = here(
        "train", str(example / "config.yaml"), *settings, "run.name=lacking", "--with", "ringnet", **only_here
    )
    assert lacking.returncode == 2, lacking.stdout + lacking.stderr
    (reason,) = [one for one in lacking.stderr.splitlines() if "can't be imported on" in one]
    assert "No module named 'ringnet'; looked in" in reason
    again = ["evaluate", str(tmp_path / "runs" / "rings"), "--reference", data, "--metrics", "fid", "--count", "32"]
    lacking = here(*again, "--workers", "1", "--with", "ringnet", **only_here)
    assert lacking.returncode == 2, lacking.stdout + lacking.stderr
    assert "Traceback" not in lacking.stderr
    assert "No module named 'ringnet'" in lacking.stderr
