"""Further requests for a straggler: the first good answer counts, and most requests are not asked twice."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from waiting import PATIENCE_S, wait_until

import scoreray.data.storage.hedge as module
from scoreray.data.errors import StorageError
from scoreray.data.storage.hedge import HedgedGet
from scoreray.data.storage.stats import ReadStats
from scoreray.data.storage.store import open_store


class Server:
    """Answers call k by behaviours[k], the last one from then on."""

    slow_s = 1.0

    def __init__(self, *behaviours: str) -> None:
        self.behaviours, self.calls, self.lock = list(behaviours), 0, threading.Lock()
        self.released = threading.Event()  # ends the wait of the slow ones

    def __call__(self, key: str, start: int, end: int) -> bytes:
        with self.lock:
            behaviour = self.behaviours[min(self.calls, len(self.behaviours) - 1)]
            self.calls += 1
        if behaviour.startswith("slow"):
            self.released.wait(self.slow_s)
        if behaviour.endswith("fails"):
            raise StorageError("no answer")
        return b"answer"


def reading(get: HedgedGet) -> tuple[threading.Thread, list[StorageError]]:
    """A thread that reads, and where its error is once it has ended."""
    errors: list[StorageError] = []

    def read() -> None:
        try:
            get("key", 0, 6)
        except StorageError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    return reader, errors


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_S", 0.05)


@pytest.mark.parametrize("num_slow", [1, 2])
def test_stragglers_are_overtaken_by_a_further_request(num_slow: int) -> None:
    stats = ReadStats()
    server = Server(*["slow"] * num_slow, "quick")
    server.slow_s = PATIENCE_S
    get, started = HedgedGet(server, stats), time.monotonic()
    assert get("key", 0, 6) == b"answer"
    assert time.monotonic() - started < PATIENCE_S / 2
    server.released.set()
    assert stats.num_hedges == num_slow


def test_no_more_than_four_requests_are_made() -> None:
    server = Server("slow")
    server.slow_s = 4.0  # the fourth begins after 7 waits, 1.4 s
    assert HedgedGet(server, ReadStats())("key", 0, 6) == b"answer"
    assert server.calls == module.MOST_REQUESTS


def test_quick_answers_and_quick_failures_are_asked_once() -> None:
    server = Server("quick")
    stats = ReadStats()
    get = HedgedGet(server, stats)
    assert [get("key", 0, 6) for _ in range(20)] == [b"answer"] * 20
    assert (server.calls, stats.num_hedges) == (20, 0)
    with pytest.raises(StorageError, match="no answer"):
        HedgedGet(Server("fails"), ReadStats())("key", 0, 6)


@pytest.mark.parametrize("behaviours", [("slow", "fails"), ("slow fails", "slow")])
def test_one_of_two_that_fails_does_not_matter(behaviours: tuple[str, str]) -> None:
    assert HedgedGet(Server(*behaviours), ReadStats())("key", 0, 6) == b"answer"


def test_a_store_that_is_slow_as_a_whole_is_not_asked_everything_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_S", 0.3)  # the first request waits four times this
    server = Server("slow")
    get = HedgedGet(server, ReadStats())
    for _ in range(2):
        get("key", 0, 6)
    assert server.calls == 2


def test_a_request_that_waits_for_a_thread_ends_when_its_reader_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "THREADS", 1)
    server = Server("slow")
    server.slow_s = PATIENCE_S
    get = HedgedGet(server, ReadStats())
    readers, errors = zip(reading(get), reading(get), strict=True)
    time.sleep(0.2)
    get.close()
    wait_until(lambda: not all(reader.is_alive() for reader in readers), "both still wait")
    server.released.set()
    for reader in readers:
        reader.join()
    assert ["reader was closed" in str(error) for found in errors for error in found] == [True]


def test_no_second_request_after_close() -> None:
    """A call that is waiting when its reader is closed gets the first request's answer."""
    server = Server("slow")
    get = HedgedGet(server, ReadStats())
    closing = threading.Timer(0.1, get.close)
    closing.start()
    assert get("key", 0, 6) == b"answer"
    closing.join()
    assert server.calls == 1
    with pytest.raises(StorageError, match="reader was closed"):
        get("key", 0, 6)


def test_when_nobody_waits_any_more_a_dead_store_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the threads would hold the process for a minute after its stream was closed."""
    with socket.socket() as refusing:  # bound, and nobody listens
        refusing.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{refusing.getsockname()[1]}"
        keys = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}
        for name, value in {"ENDPOINT_URL": endpoint, "ENDPOINT_URL_S3": endpoint, **keys}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        stats = ReadStats()
        get = HedgedGet(open_store("s3://bucket/set").get, stats)
        reader, errors = reading(get)
        time.sleep(0.5)
        assert reader.is_alive(), errors
        get.close()
        reader.join(timeout=PATIENCE_S)
        assert not reader.is_alive()
        assert len(errors) == 1
        assert stats.num_retries >= 1  # counted, and shown in the run's metrics
