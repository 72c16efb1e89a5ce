"""Faults between the stream and a real S3 server: no wrong byte is accepted, no sample lost, no wait without end."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import random
import shutil
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from obstore.store import S3Store

import scoreray.data.storage.hedge as hedge
import scoreray.data.storage.s3 as store_s3
import scoreray.data.storage.s3_access as s3_access
from scoreray.data.errors import DataError, StorageError
from scoreray.data.reading.batches import Batch
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.quarantine import Quarantine
from scoreray.data.reading.stream import Stream
from scoreray.data.storage import retries
from scoreray.data.storage.local_s3 import LocalS3
from scoreray.data.storage.store import open_store


def refusal(status: str, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>said the proxy</Message></Error>"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close"
    return f"{head}\r\n\r\n{body}".encode()


REFUSALS = {
    "unavailable": refusal("503 Service Unavailable", "ServiceUnavailable"),
    "slow down": refusal("503 Slow Down", "SlowDown"),
    "missing": refusal("404 Not Found", "NoSuchKey"),
    "expired 400": refusal("400 Bad Request", "ExpiredToken"),
    "expired 403": refusal("403 Forbidden", "ExpiredToken"),
}


class FaultProxy:
    """Passes one request a connection on to `upstream`; `fault()`, or `fault(request)`, says what happens to the answer
    to a GET of shards or index."""

    def __init__(self, upstream: tuple[str, int], fault: Callable[..., str]) -> None:
        self.upstream, self.fault = upstream, fault
        self.wants_request = bool(inspect.signature(fault).parameters)
        self.done: Counter[str] = Counter()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the client may have left
            request = connection.recv(65536)
            while request and b"\r\n\r\n" not in request:
                request += connection.recv(65536)
            if not request:
                return
            line = request.split(b"\r\n")[0]
            is_read = line.startswith(b"GET") and (b"/shards/" in line or b"/index.bin" in line)
            given = [request] if self.wants_request else []
            kind = self.fault(*given) if is_read else ""
            self.done[kind] += 1
            if kind in REFUSALS:
                connection.sendall(REFUSALS[kind])
                return
            head, body = self._answer(request)
            if kind == "reset":
                connection.sendall(head + body[: len(body) // 2])
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close sends RST
            elif kind == "cut":
                connection.sendall(head + body[: len(body) // 2])
            elif kind == "short":  # at a tar block, with a Content-Length that says so: nothing in HTTP shows it
                size = max(512, len(body) // 2 // 512 * 512)
                lines = [b"Content-Length: %d" % size if l.lower().startswith(b"content-length") else l
                         for l in head.split(b"\r\n")]  # fmt: skip
                connection.sendall(b"\r\n".join(lines) + body[:size])
            elif kind == "flip":
                flipped = bytearray(body)
                for at in range(len(body) % 101, len(body), 101):  # in each member: gaps are not looked at
                    flipped[at] ^= 4
                connection.sendall(head + flipped)
            elif kind == "slow":
                connection.sendall(head)
                for i in range(len(body)):
                    connection.sendall(body[i : i + 1])
                    time.sleep(0.2)
            else:
                connection.sendall(head + body)

    def _answer(self, request: bytes) -> tuple[bytes, bytes]:
        with socket.create_connection(self.upstream) as server:
            head, _, rest = request.partition(b"\r\n\r\n")
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            server.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + rest)
            answer = b"".join(iter(lambda: server.recv(1 << 20), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n", body


@pytest.fixture
def through_proxy(
    packed: tuple[str, Manifest], s3_url: str, local_s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Callable[[], str]], FaultProxy]]:
    """Puts the packed data set to S3; called with a fault, sends what comes after through a proxy that does it."""
    local, remote = open_store(packed[0]), open_store(s3_url)
    for key, _ in local.list():
        remote.put(key, local.get(key))
    proxies = []

    def start(fault: Callable[[], str]) -> FaultProxy:
        port = int(local_s3.env["AWS_ENDPOINT_URL"].rpartition(":")[2])
        proxies.append(FaultProxy(("127.0.0.1", port), fault))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxies[-1].url)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxies[-1].url)
        return proxies[-1]

    yield start
    for proxy in proxies:
        proxy.server.close()


def stream_of(url: str, **options) -> Stream:
    return Stream(url, global_batch_size=24, rank=0, world_size=1, seed=7, shuffle_block=16, cache_bytes=0, **options)


def read(url: str, num_batches: int, **options) -> list[Batch]:
    with stream_of(url, **options) as stream:
        return list(itertools.islice(stream, num_batches))


def same(expected: list[Batch], found: list[Batch]) -> bool:
    pairs = zip(expected, found, strict=True)
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.index, b.index) and torch.equal(a.position, b.position)
        for a, b in pairs
    )


FAULTS = ("unavailable", "slow down", "reset", "slow", "cut", "short", "flip", "missing", "expired 400", "expired 403")


@pytest.mark.parametrize("kind", FAULTS)
def test_with_a_fault_at_a_tenth_of_the_requests_the_batches_are_the_same(
    kind: str, packed: tuple[str, Manifest], s3_url: str, through_proxy: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tenth request: 0 wrong bytes accepted, 0 samples lost, and the consumer waits for seconds at most."""
    monkeypatch.setattr(hedge, "LEAST_S", 0.3)
    expected = read(packed[0], 21)  # an epoch
    numbers = itertools.count(1)
    proxy = through_proxy(lambda: kind if next(numbers) % 10 == 0 else "")
    with stream_of(s3_url) as stream:
        found = list(itertools.islice(stream, 21))
    assert same(expected, found)
    assert proxy.done[kind] >= 4, proxy.done
    assert stream.stats.stall_s < 60
    if kind in ("short", "flip", "missing"):
        assert stream.stats.num_rereads > 0
    if kind == "slow":
        assert stream.stats.num_hedges > 0


def test_with_every_fault_at_once_the_batches_are_the_same(
    packed: tuple[str, Manifest], s3_url: str, through_proxy: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hedge, "LEAST_S", 0.3)
    chance, lock = random.Random(0), threading.Lock()

    def fault() -> str:
        with lock:
            return chance.choice([*FAULTS, *[""] * 20])

    proxy = through_proxy(fault)
    with stream_of(s3_url) as stream:
        found = list(itertools.islice(stream, 8))
    assert same(read(packed[0], 8), found)
    assert sum(proxy.done[kind] > 0 for kind in FAULTS) > 2, proxy.done
    assert stream.stats.stall_s < 60


def test_a_name_that_resolves_at_times_only_loses_nothing(
    packed: tuple[str, Manifest], s3_url: str, through_proxy: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    through_proxy(lambda: "")
    real, numbers = obstore.get_range, itertools.count(1)
    unresolved = S3Store(
        "b", aws_endpoint_url_s3="http://storage.invalid", client_options={"allow_http": True}, access_key_id="a",
        secret_access_key="b", retry_config={"max_retries": 0},
    )  # fmt: skip
    failed = []

    def read_range(bucket: S3Store, key: str, **span: int) -> Any:
        if (n := next(numbers)) < 4 or n % 10 == 0:  # not at first, then nine times of ten
            failed.append(n)
            return real(unresolved, key, **span)
        return real(bucket, key, **span)

    monkeypatch.setattr(obstore, "get_range", read_range)
    with stream_of(s3_url) as stream:
        found = list(itertools.islice(stream, 21))
    assert same(read(packed[0], 21), found)
    assert len(failed) > 5
    assert stream.stats.num_retries >= len(failed)
    assert stream.stats.stall_s < 60


def test_credentials_that_are_rotated_are_found(
    packed: tuple[str, Manifest], s3_url: str, through_proxy: Callable, local_s3: LocalS3,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They expire while a stream reads; new ones are put into ~/.aws half a second later."""
    write = lambda key, secret: (tmp_path / "credentials").write_text(  # noqa: E731
        f"[default]\naws_access_key_id={key}\naws_secret_access_key={secret}\n"
    )
    pair = local_s3.env["AWS_ACCESS_KEY_ID"], local_s3.env["AWS_SECRET_ACCESS_KEY"]
    write(*pair)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    numbers = itertools.count()

    def fault(request: bytes) -> str:
        if next(numbers) == 5:
            write("EXPIRED", "x")
            s3_access._clients.clear()
            threading.Timer(0.5, write, pair).start()
        return "expired 400" if b"Credential=EXPIRED/" in request else ""

    proxy = through_proxy(fault)
    with stream_of(s3_url) as stream:
        found = list(itertools.islice(stream, 21))
    assert same(read(packed[0], 21), found)
    assert proxy.done["expired 400"] > 0
    assert stream.stats.stall_s < 60


def in_shards(kind: str) -> Callable[[bytes], str]:
    return lambda request: kind if b"/shards/" in request.split(b"\r\n")[0] else ""


def test_a_server_that_only_trickles_is_given_up_in_bounded_time(
    s3_url: str, through_proxy: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_s3, "BODY_S", 0.5)
    monkeypatch.setattr(retries, "PATIENCE_S", 1.0)
    through_proxy(in_shards("slow"))
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"shards/00000\d.tar: the connection to http://127.* broke off"):
        read(s3_url, 5)
    assert time.monotonic() - started < 20


def test_bytes_that_stay_wrong_are_refused_by_name(s3_url: str, through_proxy: Callable) -> None:
    through_proxy(in_shards("flip"))
    with pytest.raises(DataError, match=r"s3://.*shards/00000\d.tar: sample \d+ at byte \d+: its bytes are not those"):
        read(s3_url, 5)


@pytest.mark.parametrize("kind", ["expired 400", "expired 403"])
def test_credentials_that_stay_expired_are_one_line(
    kind: str, s3_url: str, through_proxy: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "EXPIRED_S", 1.0)
    proxy = through_proxy(lambda: kind)
    started = time.monotonic()
    with pytest.raises(StorageError, match="the credentials have expired; get new ones and run the same command again"):
        read(s3_url, 5)
    assert time.monotonic() - started < 40  # far under the patience with a store that does not answer
    assert proxy.done[kind] > 1


def test_a_shard_that_stays_missing_is_one_line(s3_url: str, through_proxy: Callable) -> None:
    through_proxy(in_shards("missing"))
    with pytest.raises(DataError, match=r"s3://.*shards/00000\d.tar: no such object; the manifest lists this shard"):
        read(s3_url, 5)


def test_a_name_that_does_not_resolve_is_an_endpoint_out_of_reach(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "PATIENCE_S", 0.2)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://storage.invalid:9000")
    with pytest.raises(StorageError, match=r"the endpoint http://storage.invalid:9000 is not reachable"):
        read(s3_url, 1)


@pytest.fixture
def damaged(packed: tuple[str, Manifest], tmp_path: Path) -> str:
    """A copy with a flipped byte in each of three members of shard 1, and no shard 5."""
    url = tmp_path / "set"
    shutil.copytree(packed[0], url)
    path = url / packed[1].shards[1].name
    data = bytearray(path.read_bytes())
    for block in (1, 5, 9):  # members are in blocks of 512: header, png, header, cls
        data[512 * block + 50] ^= 255
    path.write_bytes(data)
    return str(url)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_quarantined_samples_are_named_counted_and_replaced(
    damaged: str, packed: tuple[str, Manifest], cache_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = {int(p): int(i) for b in read(packed[0], 63) for p, i in zip(b.position, b.index, strict=True)}
    found: dict[int, int] = {}
    with caplog.at_level(logging.WARNING), Stream(
        damaged, global_batch_size=24, rank=0, world_size=1, seed=7, shuffle_block=16, cache_bytes=cache_bytes,
        quarantine=Quarantine(5),
    ) as stream:  # fmt: skip
        for batch in itertools.islice(stream, 63):  # three epochs
            numbers = batch.images[:, 0, 0, 0].long() * 256 + batch.images[:, 0, 0, 1].long()
            assert torch.equal(numbers % 7, batch.labels)
            found |= {int(p): int(i) for p, i in zip(batch.position, batch.index, strict=True)}
    bad = {entry.sample for entry in stream.quarantined}
    assert len(bad) == 3
    for number, entry in enumerate(stream.quarantined):
        assert (entry.shard, entry.count, entry.offset) == ("shards/000001.tar", 1, 512 * (1 + 4 * number))
        assert entry.key == f"{entry.sample:08d}"
        assert entry.reason == "its bytes are not those of the index"
    assert sum(record.getMessage().startswith("quarantined") for record in caplog.records) == 3
    assert set(found) == set(whole)
    assert {whole[p] for p in whole if whole[p] != found[p]} == bad
    assert bad.isdisjoint(found.values())


def test_a_budget_that_is_used_up_ends_the_run(damaged: str, packed: tuple[str, Manifest]) -> None:
    with pytest.raises(DataError, match=r"more than 2 samples \(the budget\) are quarantined; the last: .*000001.tar"):
        read(damaged, 63, quarantine=Quarantine(2))
    Path(damaged, packed[1].shards[5].name).unlink()
    with pytest.raises(DataError, match=r"more than 20 samples .*000005.tar"):
        read(damaged, 63, quarantine=Quarantine(20))


def test_a_missing_shard_is_one_line_and_counts_its_samples_once(
    damaged: str, packed: tuple[str, Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    shard = packed[1].shards[5]
    Path(damaged, shard.name).unlink()
    with caplog.at_level(logging.WARNING), stream_of(damaged, quarantine=Quarantine(shard.num_samples + 3)) as stream:
        for batch in itertools.islice(stream, 63):
            assert not ((batch.index >= 320) & (batch.index < 384)).any()
    lines = [record.getMessage() for record in caplog.records]
    assert sum("000005.tar" in line for line in lines) == 1, lines
    assert any("shards/000005.tar: samples 320 to 383: there is no such shard" in line for line in lines)
    assert [entry.count for entry in stream.quarantined] == [1, 1, 1, 64]


def test_what_is_quarantined_is_a_function_of_the_positions_gone_through(damaged: str) -> None:
    """Reading ahead finds more, and a run that goes on finds what it knows: neither counts."""
    with stream_of(damaged, quarantine=Quarantine(5)) as stream:
        wanted = [stream.order.samples(b.position.numpy()) for b in itertools.islice(stream, 21)]
    where = sorted((k, s) for k, samples in enumerate(wanted) for s in (64, 65, 66) if s in samples)
    assert len(where) == 3, "an epoch has them all"
    for cut in {k for k, _ in where}:
        with stream_of(damaged, quarantine=Quarantine(5)) as first:
            list(itertools.islice(first, cut))
        assert {e.sample for e in first.quarantined} == {s for k, s in where if k < cut}
        again = Quarantine(3, first.quarantined)
        with stream_of(damaged, position=first.position, quarantine=again) as rest:
            list(itertools.islice(rest, 42))
        assert [e.sample for e in rest.quarantined] == [64, 65, 66]
