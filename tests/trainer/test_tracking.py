"""Records in a real MLflow, and in W&B's files: each once over kills and servers that are away, never in the way."""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from waiting import PATIENCE_S

from scoreray.data.errors import UserError
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.prepare import check_run
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_folder import run_store
from scoreray.trainer.tracking import follow, mlflow, wandb
from scoreray.trainer.tracking.follow import tracked

Settings = Callable[..., dict[str, Any]]

pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take long to import MLflow and to make its database."""
    monkeypatch.setattr(follow, "LAST_S", 90.0)
    monkeypatch.setattr(follow, "STOPPED_S", 90.0)


def config(small_run: Settings, storage: Path, mlflow: str | None, *overrides: str) -> Config:
    sections: dict[str, Any] = {"checkpoint": {"every_images": 96}, "log": {"every_images": 32, "mlflow": mlflow}}
    return load_config(small_run("run", storage, 320, **sections), overrides)


def plotted(uri: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """(step, value) of all points, by MLflow run and name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("scoreray")
    assert experiment is not None
    return {
        run.info.run_id: {
            name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        for run in client.search_runs([experiment.experiment_id])
    }


def assert_each_record_once(c: Config, uri: str) -> str:
    """In one MLflow run, whose id is returned."""
    ((run_id, points),) = plotted(uri).items()
    records = read_metrics(run_store(c))
    assert sorted(points["train/loss"]) == [(r.images, pytest.approx(r.loss)) for r in records]
    assert sorted(step for step, _ in points["train/gradient_norm"]) == [r.images for r in records]
    assert {"sigma_loss/0.316-1", "train/images_per_s"} <= set(points)
    return run_id


def stop_after(images: int) -> Any:
    calls = iter(range(16, 10_000, 16))
    return lambda: LoopRequest.STOP if next(calls) >= images else LoopRequest.NOTHING


def interrupted(c: Config) -> None:
    train(c, requested=stop_after(112))
    raise KeyboardInterrupt


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(small_run: Settings, tmp_path: Path) -> None:
    """Stopped, then refused by a server that is away, then resumed: one warning, every record once in one run."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    notes: list[str] = []
    c = config(small_run, tmp_path, uri)
    with pytest.raises(KeyboardInterrupt), tracked(c, notes.append):
        interrupted(c)
    assert not notes
    (first,) = plotted(uri)
    assert MlflowClient(uri).get_run(first).info.status == "KILLED"

    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        away = config(small_run, tmp_path, f"http://127.0.0.1:{taken.getsockname()[1]}")
        with tracked(away, notes.append):
            train(away, requested=stop_after(96))
    assert len(notes) == 1
    assert "training goes on" in notes[0]
    assert read_metrics(run_store(c))[-1].images == 208

    for _ in range(2):  # the second time there is nothing left to do
        with tracked(c, notes.append):
            train(c)
        assert len(notes) == 1
        assert assert_each_record_once(c, uri) == first
    run = MlflowClient(uri).get_run(first)
    assert run.info.status == "FINISHED"
    assert run.data.params["data.global_batch_size"] == "16"
    assert run.data.tags["scoreray.run"] == run_store(c).url()
    assert json.loads(run_store(c).get(mlflow.KEY)) == {"uri": uri, "run_id": first}


def test_what_is_missing_or_out_of_place_is_refused_before_the_run(
    small_run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for uri in ("./mlruns", "file:///tmp/mlruns", "mlflow.example", "https://"):
        with pytest.raises(UserError, match=r"log\.mlflow: .* is not accepted; it should be https://HOST"):
            config(small_run, tmp_path, uri)
    with pytest.raises(UserError, match=r"log\.mlflow: .*MLFLOW_TRACKING_USERNAME") as refused:
        config(small_run, tmp_path, "https://me:hunter2@mlflow.example")
    assert "hunter2" not in str(refused.value)
    wanted = config(small_run, tmp_path, "https://mlflow.example")
    check_run(wanted)  # whether it answers is not checked: it may later
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"^log\.mlflow \(null for none\): needs mlflow.*pip install 'mlflow-skinny"):
        check_run(wanted)
    check_run(config(small_run, tmp_path, None))


SERVER = """
import base64, os, sys, time
port, database, user, password = sys.argv[1:]
os.environ |= {"_MLFLOW_SERVER_FILE_STORE": database, "_MLFLOW_SERVER_ARTIFACT_ROOT": "/nowhere"}
from mlflow.server import app
from werkzeug.serving import make_server
right = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
def guarded(environ, start):
    if environ.get("HTTP_AUTHORIZATION") != right:
        start("401 Unauthorized", [])
        return [b"who are you"]
    return app(environ, start)
make_server("127.0.0.1", int(port), guarded, threaded=True).serve_forever()
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """start() -> process: MLflow's own server, always at start.uri, that wants a password."""
    started: list[subprocess.Popen[bytes]] = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    database = f"sqlite:///{tmp_path}/server.db"

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SERVER, str(port), database, "me", "hunter2"]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert started[-1].poll() is None, "MLflow's server ended"
            assert time.monotonic() < deadline, "MLflow's server did not answer within 60 s"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return started[-1]
            except OSError:
                time.sleep(0.1)

    start.uri = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_server_that_dies_and_hangs_costs_one_line_and_comes_to_have_everything(
    small_run: Settings, tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password comes from the environment, and stands in no file of the run and in no line."""
    monkeypatch.setattr(follow, "POLL_S", 0.2)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-one")
    notes: list[str] = []
    c = config(small_run, tmp_path, server.uri)
    process = server()
    with tracked(c, notes.append):
        train(c, requested=stop_after(96))
    assert len(notes) == 1
    assert "401" in notes[0]
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    with tracked(c, notes.append):
        train(c, requested=stop_after(96))
        deadline = time.monotonic() + PATIENCE_S
        while not run_store(c).exists(mlflow.KEY) or not any(plotted(server.uri).values()):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.kill()
        process.wait()
        train(c, requested=stop_after(64))
        while len(notes) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server()
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes connections and never answers
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
        monkeypatch.setattr(follow, "LAST_S", 1.0)
        hung = config(small_run, tmp_path, f"http://127.0.0.1:{deaf.getsockname()[1]}")
        started = time.monotonic()
        with tracked(hung, lambda line: None):
            train(hung)
        assert time.monotonic() - started < 120
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setattr(follow, "LAST_S", 90.0)
    with tracked(c, notes.append):
        train(c)
    assert len(notes) == 2
    assert_each_record_once(c, server.uri)
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert not any(secret in file.read_bytes() for file in files for secret in (b"hunter2", b"wrong-one"))
    assert not any("hunter2" in line or "wrong-one" in line for line in notes)


def in_wandb(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, values) of all points in a run's file: a log of LevelDB's format after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    data, at, found, parts = file.read_bytes(), 7, [], b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts, at = parts + data[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, parts = Record.FromString(parts), b""
            if record.WhichOneof("record_type") == "history":
                items = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                found.append((record.history.step.num, {name: json.loads(text) for name, text in items.items()}))
    return found


@pytest.mark.slow
def test_wandb_offline_has_each_record_once_over_restarts(
    small_run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each start writes a folder of the same run; what the one before wrote is not in it."""
    pytest.importorskip("wandb").teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    notes: list[str] = []
    c = config(small_run, tmp_path, None, "log.wandb=team/project")
    with pytest.raises(KeyboardInterrupt), tracked(c, notes.append):
        interrupted(c)
    with tracked(c, notes.append):
        train(c)
    assert not notes
    stored = json.loads(run_store(c).get(wandb.KEY))
    assert (stored["project"], stored["offline_images"]) == ("team/project", 320)
    folders = sorted((tmp_path / "wandb").glob(f"offline-run-*-{stored['run_id']}"))  # their names begin with the time
    points = [in_wandb(folder) for folder in folders]
    assert [points[0][-1][0], points[1][-1][0]] == [112, 320]
    records = read_metrics(run_store(c))
    assert [(step, values["train/loss"]) for part in points for step, values in part] == [
        (one.images, pytest.approx(one.loss)) for one in records
    ]
    assert points[0][0][1]["_timestamp"] == pytest.approx(records[0].time)


class StandInForWandb(BaseHTTPRequestHandler):
    """What the package asks of a server to make a run, find how far it has come, and send it history."""

    history: ClassVar[list[dict[str, Any]]]
    runs: ClassVar[list[str]]

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/graphql"):
            self._answer({"data": self._graphql(json.loads(data))})
            return
        if self.path.endswith("/file_stream"):
            data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
            sent = (json.loads(data).get("files") or {}).get("wandb-history.jsonl")
            if sent is not None:
                assert sent["offset"] == len(self.history)
                self.history.extend(json.loads(line) for line in sent["content"])
        self._answer({})

    def _answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _graphql(self, body: dict[str, Any]) -> Any:
        query, given = body["query"], body.get("variables") or {}
        project = {"id": "p", "name": "project", "entity": {"id": "e", "name": "team"}}
        bucket = {"id": "b", "name": given.get("name"), "project": project, "config": "{}"}
        bucket["historyLineCount"] = len(self.history)
        if "viewer" in query:
            return {"viewer": {"id": "u", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if "upsertBucket" in query:
            new = given["name"] not in self.runs
            self.runs.extend([given["name"]] * new)
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if "RunResumeStatus" in query:
            tail = json.dumps([json.dumps(one) for one in self.history[-1:]])
            lines = {"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "historyTail": tail}
            known = {**bucket, **lines, "summaryMetrics": "{}", "wandbConfig": '{"t": 1}', "tags": []}
            return {"model": {**project, "bucket": known if given["name"] in self.runs else None}}
        if "createRunFiles" in query:
            url = f"http://127.0.0.1:{self.server.server_port}/"  # type: ignore[attr-defined]
            files = [{"name": name, "uploadUrl": url + name} for name in given["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}


@pytest.mark.slow
def test_wandb_has_each_record_once_over_restarts_and_servers_that_are_away(
    small_run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the package itself: stopped, then without a server, which costs a line, then resumed in the same run."""
    package = pytest.importorskip("wandb")
    with pytest.raises(UserError, match=r"log\.wandb: 'a/b/c' is not accepted; it should be a project, or entity/"):
        config(small_run, tmp_path, None, "log.wandb=a/b/c")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    StandInForWandb.history, StandInForWandb.runs = [], []
    notes: list[str] = []
    c = config(small_run, tmp_path, None, "log.wandb=team/project")
    with ThreadingHTTPServer(("127.0.0.1", 0), StandInForWandb) as server, socket.socket() as taken:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        package.teardown()  # a process reads its settings once
        with pytest.raises(KeyboardInterrupt), tracked(c, notes.append):
            interrupted(c)
        assert not notes
        assert [one["_step"] for one in StandInForWandb.history] == [one.images for one in read_metrics(run_store(c))]

        taken.bind(("127.0.0.1", 0))  # and not listening: connections are refused
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        package.teardown()
        with monkeypatch.context() as impatient, tracked(c, notes.append):
            impatient.setattr(wandb, "OPEN_S", 1.0)
            train(c, requested=stop_after(96))
        (line,) = notes
        assert line.startswith("log.wandb: team/project: ")
        assert "training goes on" in line

        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        package.teardown()  # a process reads its settings once
        with tracked(c, notes.append):
            train(c)
        server.shutdown()
    assert len(notes) == 1
    assert len(StandInForWandb.runs) == 1
    assert [(one["_step"], one["train/loss"]) for one in StandInForWandb.history] == [
        (record.images, pytest.approx(record.loss)) for record in read_metrics(run_store(c))
    ]
