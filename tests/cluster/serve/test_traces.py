"""Spans arrive at a real OTLP receiver where one is named; where none is, nothing is imported; one that is away costs
nothing else."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_S

from scoreray.cluster.verbs.sample import sample_to
from scoreray.data import traces
from scoreray.sampling.http.app import make_app
from scoreray.sampling.offline.generate import Request
from scoreray.sampling.service.config import ServeConfig
from scoreray.sampling.service.replica import Replica
from scoreray.sampling.service.service import LocalBackend, Service
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"  # the example of W3C's Trace Context
Spans = Callable[[], list[Any]]


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    """A receiver of OTLP over HTTP; what it has got once this process has sent what waits."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                names = {one.key: one.value.string_value for one in resource.resource.attributes}
                assert names["service.name"] == "scoreray"
                got.extend(one for scope in resource.scope_spans for one in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(traces, "_made", [])
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def sent() -> list[Any]:
        traces.flush()
        return got

    yield sent
    if traces._made:
        traces._made[0].shutdown()
    server.shutdown()
    server.server_close()


def facts(one: Any) -> dict[str, Any]:
    return {
        pair.key.removeprefix("scoreray."): getattr(pair.value, pair.value.WhichOneof("value"))
        for pair in one.attributes
    }


async def post(service: Service, body: Any, headers: dict[str, str]) -> tuple[int, bytes]:
    """A request through the ASGI application: status and body."""
    got, ended = {"status": 0, "body": b""}, asyncio.Event()
    waiting = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop()
        await ended.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        got["status"] = message.get("status", got["status"])
        got["body"] += message.get("body", b"")

    given = {"host": "localhost", "content-type": "application/json", **headers}
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": "/v1/samples",
        "raw_path": b"/v1/samples", "query_string": b"", "scheme": "http", "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await make_app(service)(scope, receive, send)
    ended.set()
    return got["status"], got["body"]


def test_a_run_its_samples_and_its_service_are_seen(spans: Spans, small_run: Any, tmp_path: Path) -> None:
    settings = small_run("traced", tmp_path, 64, checkpoint={"every_images": 32})
    train(load_config(settings))
    by_name: dict[str, list[Any]] = {}
    for one in spans():
        by_name.setdefault(one.name, []).append(one)
    assert set(by_name) == {"train.start", "data.open", "train.commit"}
    (start,), (opened,) = by_name["train.start"], by_name["data.open"]
    assert opened.parent_span_id == start.span_id
    assert facts(start) == {"run": "traced", "rank": 0, "world_size": 1}
    assert [facts(one)["images"] for one in by_name["train.commit"]] == [32, 64]
    assert all(one.end_time_unix_nano > one.start_time_unix_nano for ones in by_name.values() for one in ones)

    seen = len(spans())
    train(load_config(settings, ["duration.images=96"]))
    again = {one.name: one for one in spans()[seen:]}
    assert again["train.restore"].parent_span_id == again["train.start"].span_id
    assert facts(again["train.restore"])["images"] == 64

    seen = len(spans())
    sample_to(str(tmp_path / "drawn"), str(tmp_path / "traced"), None, Request(count=6, batch_size=4, steps=2))
    assert [facts(one)["rows"] for one in spans()[seen:] if one.name == "sample.batch"] == [4, 2]

    seen = len(spans())
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    answers = asyncio.run(_serve(str(tmp_path / "traced"), headers))
    assert [status for status, _ in answers] == [200, 422, 200]
    *_, one, two, three = [span for span in spans()[seen:] if span.name == "serve.request"]
    assert (one.trace_id.hex(), one.parent_span_id.hex()) == (TRACE, PARENT)
    assert facts(one)["request_id"] == "mine"
    assert facts(one)["conditions"] == "label"
    assert [facts(span)["code"] for span in (one, two, three)] == ["ok", facts(two)["code"], "ok"]
    assert two.status.code == 2
    for whole in (one, three):
        queue, steps = sorted(
            (span for span in spans()[seen:] if span.parent_span_id == whole.span_id), key=lambda span: span.name
        )
        assert (queue.name, steps.name) == ("serve.queue", "serve.steps")
        assert whole.start_time_unix_nano <= queue.start_time_unix_nano <= queue.end_time_unix_nano
        assert queue.end_time_unix_nano <= steps.start_time_unix_nano + 1000
        assert steps.end_time_unix_nano <= whole.end_time_unix_nano + 1000


async def _serve(url: str, headers: dict[str, str]) -> list[tuple[int, bytes]]:
    serving = ServeConfig((("traced", url),), compile="off", precision="fp32")
    replica = Replica(serving)
    service = Service(serving, LocalBackend(replica))
    await service.start()
    try:
        bodies = {"count": 1, "steps": 2}, {"count": -1}, {"count": 1, "steps": 2, "stream": True}
        return [await post(service, body, headers) for body in bodies]
    finally:
        await service.stop()
        await replica.close()


def test_without_an_endpoint_nothing_is_imported() -> None:
    code = (
        "import sys\n"
        "from scoreray.data import traces\n"
        "with traces.span('x', a=1) as none: assert none is None\n"
        "traces.finished('y', 1.0); traces.flush()\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
        "assert not traces._made"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


def test_a_package_that_is_missing_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(traces, "_made", [])
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with traces.span("x"):
                pass
    (record,) = caplog.records
    assert "pip install 'opentelemetry-sdk" in record.getMessage()


def test_a_receiver_that_is_away_changes_no_run(
    spans: Spans, monkeypatch: pytest.MonkeyPatch, small_run: Any, tmp_path: Path
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        assert train(load_config(small_run("alone", tmp_path, 32))) == 32
        assert not spans()
