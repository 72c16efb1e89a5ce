"""One contract for every store of idempotency keys: SQLite, and a real Redis server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from waiting import PATIENCE_S

from scoreray.data.errors import UserError
from scoreray.sampling.service import idempotency, key_store
from scoreray.sampling.service.config import Limits, Refused
from scoreray.sampling.service.idempotency import open_key_store
from scoreray.sampling.service.key_store import KeyStore, StoreLost
from scoreray.sampling.service.request import Claim, Completed, Origin

ORIGIN = Origin("small", "s3://b/runs/small/checkpoints/64", 64, 7)
NEWER = Origin("small", "s3://b/runs/small/checkpoints/128", 128, 7)


Open = Callable[..., KeyStore]


@pytest.fixture
def opened(keys_url: str) -> Iterator[Open]:
    stores: list[KeyStore] = []

    def open_one(**limits: float) -> KeyStore:
        stores.append(open_key_store(keys_url, Limits(**limits)))  # type: ignore[arg-type]
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


def claim(key: str = "k", owner: str = "first", fingerprint: str = "f", token: str = "ana") -> Claim:
    return Claim(token, key, fingerprint, owner)


def answer(body: bytes = b"samples") -> Completed:
    return Completed(body, "fp32", 0.25, 1.5)


def test_a_key_is_answered_from_one_draw_and_billed_once(opened: Open) -> None:
    first, second = opened(), opened()
    entry = first.begin(claim(), ORIGIN)
    assert (entry.origin, entry.mine, entry.answer) == (ORIGIN, True, None)
    assert first.finish(claim(), answer(), 3) == answer()
    again = second.begin(claim(owner="second"), NEWER)
    assert (again.origin, again.answer) == (ORIGIN, answer())
    assert second.finish(claim(owner="second"), answer(b"others"), 3) == answer()  # drawn twice: the first one counts
    assert second.bill("second", {}) == {"ana": 3}


def test_an_answer_that_was_drawn_in_parallel_in_time_stays_one(opened: Open) -> None:
    store, drawn = opened(), replace(answer(), rows=40, parallel=True)
    store.begin(claim(), ORIGIN)
    assert store.finish(claim(), drawn, 1) == drawn
    assert store.begin(claim(), ORIGIN).answer == drawn


def test_a_key_belongs_to_its_token_and_to_one_request(opened: Open) -> None:
    store = opened()
    store.begin(claim(), ORIGIN)
    assert store.begin(claim(token="bob"), NEWER).origin == NEWER
    with pytest.raises(Refused, match="another request") as refused:
        store.begin(claim(fingerprint="other"), ORIGIN)
    assert refused.value.code == "key_reused"
    store.finish(claim(), answer(), 1)
    with pytest.raises(Refused, match="another request"):
        store.begin(claim(fingerprint="other"), ORIGIN)


def test_a_draw_that_goes_on_is_waited_for_and_one_that_stopped_is_taken_over(
    opened: Open, lease_of: Callable[[float], None]
) -> None:
    lease_of(0.3)
    store, mine, other = opened(), claim(), claim(owner="second")
    store.begin(mine, ORIGIN)
    assert store.begin(mine, ORIGIN).mine  # the same process asks again: a client that left came back
    for _ in range(4):
        time.sleep(0.15)
        store.renew(mine)
        assert not store.begin(other, NEWER).mine
    time.sleep(0.4)
    taken = store.begin(other, NEWER)
    assert (taken.mine, taken.origin) == (True, ORIGIN)
    store.renew(mine)  # too late, and not its own any more
    assert not store.begin(mine, ORIGIN).mine
    store.finish(other, answer(), 2)
    assert store.begin(mine, ORIGIN).answer == answer()


def test_a_removed_checkpoint_is_replaced_by_the_one_who_found_it_so(opened: Open) -> None:
    store = opened(remember_bytes=1)
    store.begin(claim(), ORIGIN)
    store.finish(claim(), answer(), 2)
    newest = Origin("small", "s3://b/runs/small/checkpoints/256", 256, 7)
    assert store.begin(claim(), NEWER, instead_of=ORIGIN).origin == NEWER
    assert store.begin(claim(), newest, instead_of=ORIGIN).origin == NEWER  # another one was quicker
    store.finish(claim(), answer(), 2)
    assert store.bill("", {}) == {"ana": 2}


def test_keys_are_forgotten_in_time(opened: Open) -> None:
    store = opened(remember_s=0.3)
    store.begin(claim(), ORIGIN)
    store.finish(claim(), answer(), 1)
    assert store.begin(claim(), NEWER).origin == ORIGIN
    time.sleep(0.4)
    assert store.begin(claim(fingerprint="other"), NEWER) == key_store.KeyEntry(NEWER)


def test_the_oldest_keys_go_where_there_are_too_many(opened: Open) -> None:
    store = opened(remember_keys=3)
    for i in range(5):
        store.begin(claim(f"{i}"), ORIGIN)
        store.finish(claim(f"{i}"), answer(b"%d" % i), 1)
        time.sleep(0.002)
    answers = [store.begin(claim(f"{i}"), ORIGIN).answer for i in (4, 3, 2)]
    assert answers == [answer(b"4"), answer(b"3"), answer(b"2")]
    assert store.begin(claim("1", fingerprint="other"), ORIGIN).answer is None


def test_the_oldest_answers_go_where_they_are_too_large_and_their_keys_stay(opened: Open) -> None:
    store = opened(remember_bytes=2 * (10_000 + key_store.OVERHEAD_BYTES))
    for i in range(20):
        store.begin(claim(f"{i}"), ORIGIN)
        store.finish(claim(f"{i}"), answer(bytes([i]) * 10_000), 1)
        time.sleep(0.002)
    assert [store.begin(claim(f"{i}"), NEWER).answer is not None for i in range(16, 20)] == [False, False, True, True]
    again = store.begin(claim("3", owner="second"), NEWER)  # its draw has ended: there is nothing to wait for
    assert (again.mine, again.origin, again.answer) == (True, ORIGIN, None)
    with pytest.raises(Refused):
        store.begin(claim("3", fingerprint="other"), NEWER)
    store.finish(claim("3"), answer(), 1)
    assert store.bill("", {}) == {"ana": 20}, "drawn again, and billed again"
    store.begin(claim("large"), ORIGIN)
    assert store.finish(claim("large"), answer(b"x" * 30_000), 1).body == b"x" * 30_000
    assert store.begin(claim("large"), ORIGIN).answer is None


def test_an_answer_of_a_forgotten_key_is_billed_and_not_kept(opened: Open) -> None:
    store = opened(remember_keys=1)
    store.begin(claim("a"), ORIGIN)
    time.sleep(0.002)
    store.begin(claim("b"), ORIGIN)
    assert store.finish(claim("a"), answer(), 4) == answer()
    assert store.bill("", {}) == {"ana": 4}
    assert store.begin(claim("a"), NEWER).origin == NEWER


def test_rows_without_keys_are_set_not_added(opened: Open) -> None:
    store = opened()
    store.bill("first", {"ana": 2, "a\nb": 1})
    store.bill("first", {"ana": 5})
    store.begin(claim(), ORIGIN)
    store.finish(claim(), answer(), 1)
    assert opened().bill("second", {"ana": 3}) == {"ana": 9, "a\nb": 1}


def test_many_at_once_agree_on_one_draw(opened: Open) -> None:
    stores = [opened() for _ in range(4)]

    def draw(i: int) -> tuple[bytes, int]:
        store, mine = stores[i % 4], claim(owner=f"{i}")
        while True:
            entry = store.begin(mine, ORIGIN)
            if entry.answer is not None:
                return entry.answer.body, 0
            if entry.mine:
                time.sleep(0.05)
                return store.finish(mine, answer(b"by %d" % i), 1).body, 1
            time.sleep(0.005)

    with ThreadPoolExecutor(16) as pool:
        drawn = list(pool.map(draw, range(16)))
    assert len({body for body, _ in drawn}) == 1
    assert sum(draws for _, draws in drawn) == 1
    assert stores[0].bill("", {}) == {"ana": 1}


WRITER = """
import itertools, sys
from scoreray.sampling.service.config import Limits
from scoreray.sampling.service.idempotency import open_key_store
from scoreray.sampling.service.request import Claim, Completed, Origin
store = open_key_store(sys.argv[1], Limits(remember_bytes=3_000_000))
for i in itertools.count():
    claim = Claim("ana", f"{sys.argv[2]}-{i}", "f", sys.argv[2])
    store.begin(claim, Origin("m", "c", 1, i))
    store.finish(claim, Completed(bytes([i % 256]) * 200_000, "fp32", 0.0, 0.0), 1)
    print(i, flush=True)
"""


def test_a_kill_between_two_writes_or_in_one_leaves_whole_entries(keys_url: str, opened: Open) -> None:
    """SIGKILL of a process that writes without a pause: what it wrote is stored whole, and billed once."""
    num_written = 0
    for life in range(2):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, keys_url, f"life{life}"], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(10 + 7 * life):
            last = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        said = [int(line) for line in writer.stdout.read().splitlines() if line.strip()]
        last = max([last, *said])
        writer.wait()
        store = opened(remember_bytes=3_000_000)
        for i in (last - 1, last):
            kept = store.begin(claim(f"life{life}-{i}", owner="reader"), NEWER)
            assert kept.answer is not None
            assert kept.answer.body == bytes([i % 256]) * 200_000
        after = store.begin(claim(f"life{life}-{last + 1}", owner="reader"), NEWER)  # begun or finished, or neither
        num_written += last + 1 + (after.answer is not None)
        assert store.bill("", {}) == {"ana": num_written}


def test_a_store_that_does_not_answer_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys.sqlite"
    store = open_key_store(str(file), Limits())
    monkeypatch.setattr(key_store, "BUSY_S", 0.05)
    impatient = open_key_store(str(file), Limits())
    store._db.execute("BEGIN IMMEDIATE")  # type: ignore[attr-defined]
    with pytest.raises(StoreLost, match="SQLite: database is locked"):
        impatient.begin(claim(), ORIGIN)
    store._db.execute("ROLLBACK")  # type: ignore[attr-defined]
    assert impatient.begin(claim(), ORIGIN).mine
    pytest.importorskip("redis")
    with pytest.raises(StoreLost, match="Redis: ConnectionError"):
        open_key_store("redis://127.0.0.1:9", Limits()).begin(claim(), ORIGIN)


def test_a_redis_that_hangs_is_lost_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    store_module = pytest.importorskip("scoreray.sampling.service.key_store_redis")
    monkeypatch.setattr(store_module, "WITHIN_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = open_key_store(f"redis://127.0.0.1:{silent.getsockname()[1]}", Limits())
        started = time.monotonic()
        with pytest.raises(StoreLost, match="Redis: TimeoutError"):
            store.begin(claim(), ORIGIN)
        assert time.monotonic() - started < PATIENCE_S / 2


def test_a_connection_that_redis_cut_is_opened_again(
    redis_url: str, redis_password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import redis

    monkeypatch.setenv(idempotency.PASSWORD, redis_password)
    store, admin = open_key_store(redis_url, Limits()), redis.Redis.from_url(redis_url, password=redis_password)
    admin.flushall()
    store.begin(claim(), ORIGIN)
    admin.client_kill_filter(skipme=True, _type="normal")
    assert store.begin(claim(), NEWER).origin == ORIGIN


def test_a_wrong_password_is_not_shown(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(idempotency.PASSWORD, "wrong-word")
    with pytest.raises(StoreLost, match="Redis: AuthenticationError") as lost:
        open_key_store(redis_url, Limits()).begin(claim(), ORIGIN)
    assert "wrong-word" not in str(lost.value)


def test_redis_without_its_package_is_a_mistake_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "scoreray.sampling.service.key_store_redis", raising=False)
    with pytest.raises(UserError, match=r"^redis://h:1: needs redis, which is not installed: pip install [^\n]*$"):
        open_key_store("redis://h:1", Limits())
