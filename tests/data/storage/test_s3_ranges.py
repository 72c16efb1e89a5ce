"""Ranged GETs of our own: signed as botocore signs, over kept connections, left to boto3 where not plain."""

from __future__ import annotations

import contextlib
import datetime
import queue
import random
import socket
import socketserver
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import botocore.exceptions
import botocore.session
import pytest
import trustme
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

import scoreray.data.storage.s3_ranges as s3_ranges
from scoreray.data.errors import StorageError
from scoreray.data.storage.local_s3 import LocalS3
from scoreray.data.storage.s3 import _body
from scoreray.data.storage.s3_ranges import Ranges
from scoreray.data.storage.store import NotFound, open_store


@pytest.mark.parametrize("token", [None, "a-session/token=="])
@pytest.mark.parametrize("key", ["shards/000000.tar", "odd name/ä+b=c&d~e.tar"])
def test_the_signature_is_botocores(token: str | None, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
    if token:
        monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    session = botocore.session.get_session()
    client = session.create_client("s3", region_name="eu-north-1", endpoint_url="https://storage.example:9000")
    ranges = Ranges(client, session)
    path = s3_ranges.quote(f"/bucket/{key}", safe="/-_.~")
    headers = ranges._signed(path, "bytes=5-99")

    now = datetime.datetime.strptime(headers["x-amz-date"], "%Y%m%dT%H%M%SZ")
    monkeypatch.setattr("botocore.auth.get_current_datetime", lambda *_, **__: now)
    request = AWSRequest("GET", f"https://storage.example:9000{path}", headers={"range": "bytes=5-99"})
    request.context["payload_signing_enabled"] = True
    credentials = Credentials("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", token)
    S3SigV4Auth(credentials, "s3", "eu-north-1").add_auth(request)
    assert headers["authorization"] == request.headers["Authorization"]


def test_ranges_are_slices_over_one_connection(s3_url: str, local_s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    store, data = open_store(s3_url), bytes(range(256)) * 40
    store.put("odd name/ä+b=c&d~e", data)
    monkeypatch.setattr("scoreray.data.storage.s3.client", None)  # boto3 is not asked
    made = []
    connect = Ranges._connect
    monkeypatch.setattr(Ranges, "_connect", lambda self: made.append(1) or connect(self))
    for start, end in [(0, 1), (5, 900), (10_000, 20_000), (10_240, 10_300), (0, 10_240)]:
        assert store.get("odd name/ä+b=c&d~e", start, end) == data[start:end]
    assert len(made) <= 1
    with pytest.raises(NotFound, match="no such object"):
        store.get("none", 0, 5)
    with pytest.raises(StorageError, match="bucket 'scoreray-none' does not exist"):
        open_store("s3://scoreray-none").get("key", 0, 5)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"credentials refused \(SignatureDoesNotMatch\)"):
        store.get("odd name/ä+b=c&d~e", 0, 5)


def test_a_connection_that_the_server_closed_is_made_anew(s3_url: str, local_s3: LocalS3) -> None:
    from scoreray.data.storage.s3 import _ranges

    store = open_store(s3_url)
    store.put("key", b"0123456789")
    assert store.get("key", 2, 5) == b"234"
    for connection in _ranges()._idle:
        connection.sock.shutdown(2)
    assert store.get("key", 2, 5) == b"234"


def test_a_proxy_is_left_to_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    session = botocore.session.get_session()
    client = session.create_client("s3", region_name="eu-north-1", endpoint_url="http://storage.example")
    monkeypatch.delenv("no_proxy", raising=False)
    assert Ranges(client, session).usable
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    assert not Ranges(client, session).usable


def test_tls_with_a_certificate_authority_of_ones_own(
    s3_url: str, local_s3: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = random.Random(0).randbytes(3 << 20)
    open_store(s3_url).put("key", data)
    monkeypatch.setattr("scoreray.data.storage.s3.client", None)  # boto3 is not asked
    authority = trustme.CA()
    with relay(local_s3.env["AWS_ENDPOINT_URL"], authority.issue_cert("localhost")) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"https://localhost:{port}")
        authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
        monkeypatch.setattr("scoreray.data.storage.s3._clients", {})
        monkeypatch.setattr("scoreray.data.storage.s3.PATIENCE_S", 0.1)
        with pytest.raises(StorageError, match="no trusted TLS connection"):
            open_store(s3_url).get("key", 0, 5)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "authority.pem"))
        monkeypatch.setattr("scoreray.data.storage.s3._clients", {})
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


GOOD = b"HTTP/1.1 206 Partial Content\r\nContent-Length: 10\r\nServer: x\r\n\r\n0123456789"


def test_mutated_answers_are_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a server sends, the caller gets bytes of the right number or an error of the network or of S3."""
    rng, answers, sent = random.Random(0), queue.SimpleQueue[bytes](), 0

    class Strange(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                while self.request.recv(1 << 16):
                    self.request.sendall(answers.get())
                    if rng.random() < 0.9:
                        return

    with serving(Strange) as port:
        monkeypatch.setattr(s3_ranges, "PIECE_S", 0.06)
        monkeypatch.setattr(s3_ranges, "BEGIN_S", 0.06)
        for name, value in [
            ("ENDPOINT_URL_S3", f"http://127.0.0.1:{port}"),
            ("ACCESS_KEY_ID", "a"),
            ("SECRET_ACCESS_KEY", "b"),
        ]:
            monkeypatch.setenv(f"AWS_{name}", value)
        session = botocore.session.get_session()
        ranges = Ranges(session.create_client("s3", region_name="us-east-1"), session)
        outcomes = Counter[str]()
        while sent < 200:
            answers.put(mutated(GOOD, rng))
            sent += 1
            try:
                found = ranges.get("bucket", "key", 0, 10, _body)
                assert found is None or len(found) <= 10
                outcomes["none" if found is None else "bytes"] += 1
            except (ConnectionError, TimeoutError, botocore.exceptions.ClientError) as error:
                outcomes[type(error).__name__] += 1
            while not answers.empty():
                answers.get()
    assert outcomes["bytes"] > 10, outcomes
    assert outcomes["ConnectionError"] > 10, outcomes
    assert len(outcomes) >= 4, outcomes


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
