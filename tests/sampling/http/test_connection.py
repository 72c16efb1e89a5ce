"""The listener's connections: what is slow or idle is closed, what is no HTTP is refused in JSON, long answers stay."""

from __future__ import annotations

import asyncio
import importlib
import json
import random
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import yaml
from waiting import PATIENCE_S

from scoreray.cluster.connect.local_ray import QUIET_AND_LOCAL
from scoreray.sampling.http.connection import ConnectionTimeouts, JsonRefusals, TimedHttpProtocol, in_serves_proxy
from scoreray.sampling.service.config import ERRORS

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
QUICK = ConnectionTimeouts(idle_s=0.2, header_s=0.2, rest_s=0.2, stall_s=0.2)
LONG = 64 << 20  # bytes: more than the kernel holds for a client that reads nothing


class Server:
    """uvicorn with our connections, each in `self.made`."""

    def __init__(self) -> None:
        self.go_on, self.left = threading.Event(), threading.Event()
        settings: Any = {"interface": "asgi3", "lifespan": "off", "log_level": "critical"}
        self._server = uvicorn.Server(uvicorn.Config(self.app, http=TimedHttpProtocol, port=0, **settings))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.address = self._server.servers[0].sockets[0].getsockname()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/waits":
            await asyncio.to_thread(self.go_on.wait, 60)
        long = scope["path"] == "/long"
        body = b"x" * LONG if long else b"hello"
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        if long:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.left.set()

    def connect(self, data: bytes = b"") -> socket.socket:
        made = socket.create_connection(self.address, timeout=PATIENCE_S)
        made.sendall(data)
        return made

    @property
    def num_connections(self) -> int:
        return len(self._server.server_state.connections)

    def close(self) -> None:
        self.go_on.set()
        self._server.should_exit = True
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(TimedHttpProtocol, "timeouts", QUICK)
    server = Server()
    yield server
    server.close()


def until_closed(connection: socket.socket, trickle: bytes = b"") -> bytes:
    """What comes until the other side closes; meanwhile `trickle` is sent again and again."""
    answer = b""
    while True:
        if trickle and not select.select([connection], [], [], 0.01)[0]:
            connection.sendall(trickle)
            continue
        try:
            data = connection.recv(1 << 16)
        except ConnectionResetError:
            return answer
        if not data:
            return answer
        answer += data


def refusal(answer: bytes) -> tuple[int, str]:
    """(status, code) of an answer whose body is our JSON."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, page = int(head.split()[1]), json.loads(body)
    assert b"content-type: application/json" in head.lower()
    assert set(page) == {"code", "message", "request_id"}
    assert ERRORS[page["code"]][0] == status
    return status, page["code"]


@pytest.mark.parametrize(
    ("first", "trickle"),
    [(b"", b""), (b"", b"\r\n"), (GET, b""), (GET, b"\r\n")],
    ids=["nothing", "empty lines", "answered", "answered, empty lines"],
)
def test_an_idle_connection_is_closed(server: Server, first: bytes, trickle: bytes) -> None:
    with server.connect(first) as connection:
        assert until_closed(connection, trickle).startswith(b"HTTP/1.1 200 " if first else b"")


@pytest.mark.parametrize("trickle", [b"", b"a"], ids=["stops", "trickles"])
@pytest.mark.parametrize("before", [b"", GET], ids=["first", "second"])
def test_a_header_that_does_not_end_is_refused(server: Server, before: bytes, trickle: bytes) -> None:
    with server.connect(before + b"GET / HTTP/1.1\r\nHost: ") as connection:
        answer = until_closed(connection, trickle)
    assert refusal(answer[answer.rindex(b"HTTP/1.1 ") :]) == (408, "too_slow")


@pytest.mark.parametrize("trickle", [b"", b"a"], ids=["stops", "trickles"])
def test_after_an_answer_the_rest_of_a_body_has_its_time_only(server: Server, trickle: bytes) -> None:
    post = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n"
    with server.connect(post) as connection:
        assert b"hello" in until_closed(connection, trickle)


def test_a_connection_is_kept_for_the_next_request(server: Server) -> None:
    with server.connect() as connection:
        for request in (GET, POST + b"012345678", GET + GET, POST[:-4] + b"\r\n\r\n" + b"876543210"):
            connection.sendall(request)
            answer = b""
            while answer.count(b"hello") < request.count(b"HTTP/1.1"):
                answer += connection.recv(1 << 16)
            assert b"connection: close" not in answer


def test_a_request_that_is_answered_slowly_is_answered(server: Server) -> None:
    with server.connect(b"GET /waits HTTP/1.1\r\nHost: x\r\n\r\n") as slow, server.connect() as idle:
        until_closed(idle)  # so long is longer than any limit of a connection that is not being answered
        server.go_on.set()
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_reads_nothing_is_cut_off(server: Server) -> None:
    with server.connect(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
        assert server.left.wait(PATIENCE_S)
        assert len(until_closed(connection)) < LONG


def test_garbage_gets_json(server: Server) -> None:
    """What no server of HTTP/1.1 takes, by hand and at random: a refusal, or the answer of a request that it is."""
    first_lines = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM", b"\x00" * 64, b"hello",
        b"SSH-2.0-x", b"GET / HTTP/9.9", b"GET /\xff HTTP/1.1", b"GET  / HTTP/1.1", b"get / http/1.1",
        b"GET http:// HTTP/1.1",
        b"OPTIONS * HTTP/1.1", b"CONNECT x:1 HTTP/1.1", b"CONNECT / HTTP/1.1", b"GET ?x HTTP/1.1", b"GET",
    ]  # fmt: skip
    headers = [
        b"Host: x\x00y", b"no colon", b" folded: x", b"Content-Length: -1", b"Content-Length: 1\r\nContent-Length: 2",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3", b": x", b"Transfer-Encoding: chunked\r\n\r\nzz",
    ]  # fmt: skip
    strange = [line + b"\r\n\r\n" for line in first_lines]
    strange += [b"POST / HTTP/1.1\r\n" + header + b"\r\n\r\n" for header in headers]
    numbers = random.Random(0)
    for _ in range(150):
        whole = bytearray(numbers.choice([GET, POST + b"012345678"]))
        for _ in range(numbers.randint(1, 4)):
            whole[numbers.randrange(len(whole))] = numbers.randrange(256)
        strange.append(bytes(whole))
    refused, connections = 0, [(data, server.connect(data)) for data in strange]
    for data, connection in connections:
        with connection:
            answer = until_closed(connection)
        if not answer.startswith(b"HTTP/1.1 200 "):
            assert refusal(answer)[1] in ("bad_request", "too_slow"), data
            refused += 1
    assert refused > len(strange) / 3


def test_garbage_after_a_request_does_not_disturb_its_answer(server: Server) -> None:
    with server.connect(b"GET /waits HTTP/1.1\r\nHost: x\r\n\r\n\x00\x01\x02") as connection:
        server.go_on.set()
        answer = until_closed(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"hello")


def test_a_header_without_end_is_not_kept_in_memory(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedHttpProtocol, "timeouts", ConnectionTimeouts())
    with server.connect(b"GET / HTTP/1.1\r\nHost: ") as connection:
        assert refusal(until_closed(connection, b"a" * 4096)) == (400, "bad_request")


def test_a_websocket_is_answered_as_any_request(server: Server) -> None:
    upgrade = b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    with server.connect(GET[:-2] + upgrade) as connection:
        assert until_closed(connection).startswith(b"HTTP/1.1 200 ")


def test_every_connection_is_closed(server: Server) -> None:
    connections = [server.connect(data) for data in (b"", b"GET", GET, POST, b"\x00") for _ in range(40)]
    for connection in connections:
        until_closed(connection)
        connection.close()
    deadline = time.monotonic() + PATIENCE_S
    while server.num_connections:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("status", "media", "code"),
    [(404, b"text/plain", "no_path"), (500, b"text/plain; charset=utf-8", "unavailable"), (503, b"", "unavailable"),
     (408, b"text/plain", "timed_out"), (418, b"text/html", "bad_request"), (200, b"text/plain", ""),
     (422, b"application/json", "")],
)  # fmt: skip
def test_what_serves_proxy_refuses_in_text_is_json(status: int, media: bytes, code: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [[b"content-type", media], [b"x-request-id", b"mine"]]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await send({"type": "http.response.body", "body": b"second"})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(JsonRefusals(app)({"type": "http"}, None, send))
    body = b"".join(message.get("body", b"") for message in sent)
    if not code:
        assert (sent[0]["status"], body) == (status, b"firstsecond")
        return
    headers = dict(sent[0]["headers"])
    page = json.loads(body)
    assert (page["code"], page["request_id"], sent[0]["status"]) == (code, "mine", ERRORS[code][0])
    assert headers[b"content-type"] == b"application/json"
    assert int(headers[b"content-length"]) == len(body)
    assert (b"retry-after" in headers) == (sent[0]["status"] == 503)


def test_the_variable_by_which_serve_finds_it_names_it() -> None:
    root = Path(__file__).parents[3]
    manifest = yaml.safe_load((root / "k8s" / "base" / "service" / "service.yaml").read_text())
    head = manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    for named in (QUIET_AND_LOCAL, {one["name"]: one.get("value") for one in head}):
        module, _, name = named["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
        assert getattr(importlib.import_module(module), name) is in_serves_proxy


def test_serves_listener_takes_our_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvicorn.config.HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    assert [one.cls for one in in_serves_proxy()] == [JsonRefusals]
    config = uvicorn.Config(lambda: None, http="auto")
    config.load()
    assert config.http_protocol_class is TimedHttpProtocol
