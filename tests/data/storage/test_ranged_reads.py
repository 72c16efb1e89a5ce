"""Ranged reads of S3 through obstore: slices, boto3's credentials and certificates, and boto3 where it is not plain."""

from __future__ import annotations

import contextlib
import os
import queue
import random
import re
import socket
import socketserver
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import trustme
from waiting import PATIENCE_S

import scoreray.data.storage.s3 as s3
import scoreray.data.storage.s3_access as s3_access
from scoreray.data.errors import StorageError
from scoreray.data.storage import clouds, retries
from scoreray.data.storage.local_s3 import LocalS3
from scoreray.data.storage.stats import ReadStats, counting
from scoreray.data.storage.store import NotFound, open_store

ODD = "odd name/ä+b=c&d~e#f?g*h%41✓.tar"


def test_ranges_are_slices(s3_url: str, local_s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    store, data = open_store(s3_url), bytes(range(256)) * 40
    store.put(ODD, data)
    monkeypatch.setattr(s3, "client", None)  # boto3 makes no request
    for start, end in [(0, 1), (5, 900), (10_000, 20_000), (10_240, 10_300), (20_000, 20_001), (0, 10_240)]:
        assert store.get(ODD, start, end) == data[start:end]
    with pytest.raises(NotFound, match="no such object"):
        store.get("none", 0, 5)
    with pytest.raises(StorageError, match="bucket 'scoreray-none' does not exist"):
        open_store("s3://scoreray-none").get("key", 0, 5)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"credentials refused \(SignatureDoesNotMatch\)"):
        store.get(ODD, 0, 5)


def test_a_connection_that_the_server_closed_is_made_again(answering: Callable[..., str]) -> None:
    answering(GOOD)
    stats = ReadStats()
    counting.set(stats)
    for _ in range(20):
        assert open_store("s3://bucket").get("key", 0, 10) == b"0123456789"
        time.sleep(0.02)
    counting.set(None)
    assert stats.num_retries <= 10  # of a request that crosses the server's close


def test_a_session_token_goes_with_the_request(answering: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    answering(GOOD, seen.append)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-session/token==")
    assert open_store("s3://bucket").get("key", 0, 10) == b"0123456789"
    assert re.search(rb"(?i)x-amz-security-token: a-session/token==\r\n", seen[0])
    assert re.search(rb"(?i)authorization: AWS4-HMAC-SHA256 Credential=a/", seen[0])


def test_a_server_that_does_not_know_ranges_is_left_to_boto3(answering: Callable[..., str]) -> None:
    answering(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nServer: x\r\n\r\n0123456789")
    assert open_store("s3://bucket").get("key", 3, 7) == b"3456"


def test_a_proxy_is_used(answering: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    proxy = answering(GOOD, seen.append)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://storage.example")
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert open_store("s3://bucket").get("key", 0, 10) == b"0123456789"
    assert seen[0].startswith(b"GET http://storage.example/bucket/key ")


def test_a_fork_reads_through_boto3(s3_url: str, local_s3: LocalS3) -> None:
    """In a fork of a process that has used obstore its calls never return."""
    store = open_store(s3_url)
    store.put("key", b"0123456789")
    assert store.get("key", 2, 5) == b"234"
    child = os.fork()
    if child == 0:
        os._exit(0 if store.get("key", 2, 5) == b"234" and not clouds.usable_here() else 1)
    deadline = time.monotonic() + PATIENCE_S
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert done == (child, 0)


def test_tls_with_a_certificate_authority_of_ones_own(
    s3_url: str, local_s3: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = random.Random(0).randbytes(3 << 20)
    open_store(s3_url).put("key", data)
    monkeypatch.setattr(s3, "client", None)  # boto3 makes no request
    authority = trustme.CA()
    with relay(local_s3.env["AWS_ENDPOINT_URL"], authority.issue_cert("localhost")) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"https://localhost:{port}")
        authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
        monkeypatch.setattr(s3_access, "_clients", {})
        monkeypatch.setattr(retries, "PATIENCE_S", 0.1)
        with pytest.raises(StorageError, match="no trusted TLS connection"):
            open_store(s3_url).get("key", 0, 5)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "authority.pem"))
        monkeypatch.setattr(s3_access, "_clients", {})
        for start, end in [(0, 1), (7, 100_000), (100_000, 3 << 20), (0, 1 << 23)]:
            assert open_store(s3_url).get("key", start, end) == data[start:end]
        with pytest.raises(NotFound):
            open_store(s3_url).get("none", 0, 5)


@contextlib.contextmanager
def relay(endpoint: str, certificate: trustme.LeafCert) -> Iterator[int]:
    """TLS on the port that it yields; behind it the plain server at `endpoint`."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    upstream = urlsplit(endpoint)

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), socket.create_connection((upstream.hostname, upstream.port)) as behind:
                client = context.wrap_socket(self.request, server_side=True)
                threading.Thread(target=pass_on, args=(behind, client), daemon=True).start()
                pass_on(client, behind)

    with serving(Relay) as port:
        yield port


def pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError, ValueError):
        while data := source.recv(1 << 16):
            target.sendall(data)


@contextlib.contextmanager
def serving(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


GOOD = (
    b"HTTP/1.1 206 Partial Content\r\nContent-Length: 10\r\nContent-Range: bytes 0-9/20\r\nServer: x\r\n\r\n0123456789"
)


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """answering(answer, saw): S3's endpoint becomes a server that gives each connection this answer, then closes."""
    with contextlib.ExitStack() as servers:

        def start(answer: bytes, saw: Callable[[bytes], object] = lambda request: None) -> str:
            class Fixed(socketserver.BaseRequestHandler):
                def handle(self) -> None:
                    saw(self.request.recv(1 << 16))
                    self.request.sendall(answer)

            url = f"http://127.0.0.1:{servers.enter_context(serving(Fixed))}"
            for name, value in [("ENDPOINT_URL_S3", url), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")]:
                monkeypatch.setenv(f"AWS_{name}", value)
            return url

        yield start


def test_mutated_answers_are_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a server sends, the caller gets at most the requested bytes or a one-line error."""
    rng, answers, sent = random.Random(0), queue.SimpleQueue[bytes](), 0

    class Strange(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                while self.request.recv(1 << 16):
                    self.request.sendall(answers.get(timeout=1))
                    if rng.random() < 0.9:
                        return

    with serving(Strange) as port:
        monkeypatch.setattr(clouds, "READ_S", 0.06)
        monkeypatch.setattr(retries, "PATIENCE_S", 0.0)
        for name, value in [
            ("ENDPOINT_URL_S3", f"http://127.0.0.1:{port}"),
            ("ACCESS_KEY_ID", "a"),
            ("SECRET_ACCESS_KEY", "b"),
        ]:
            monkeypatch.setenv(f"AWS_{name}", value)
        outcomes, many_lines, at = Counter[str](), False, {"Bucket": "bucket", "Key": "key"}
        while sent < 200:
            answers.put(mutated(GOOD, rng))
            sent += 1
            try:
                found = s3._retried("s3://bucket/key", lambda: s3._read_range(at, 0, 10))
                assert found is None or len(found) <= 10
                outcomes["left to boto3" if found is None else "bytes"] += 1
            except StorageError as error:
                outcomes[type(error).__name__] += 1
                many_lines |= "\n" in str(error)
            while not answers.empty():
                answers.get()
    assert not many_lines
    assert outcomes["bytes"] > 10, outcomes
    assert outcomes["Unanswered"] > 10, outcomes
    assert len(outcomes) >= 3, outcomes


def mutated(answer: bytes, rng: random.Random) -> bytes:
    data = bytearray(answer)
    for _ in range(rng.randint(0, 3)):
        i = rng.randrange(len(data) or 1)
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[i] = rng.randrange(256)
        elif kind == 1:
            del data[i:]
        elif kind == 2:
            data[i:i] = rng.choice([b"\r\n", b"\r\n\r\n", b"Transfer-Encoding: chunked\r\n", b"9" * 30, b"\0", b":"])
        elif kind == 3:
            data = bytearray(data.replace(b"206", rng.choice([b"200", b"404", b"416", b"503", b"100", b"999"])))
        else:
            del data[i : i + rng.randint(1, 20)]
    return bytes(data) or b"\r"
