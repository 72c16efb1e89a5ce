"""Idempotency keys: the same key again is the same samples, drawn once and billed once, within time and memory.

A replica writes the answer of a request with a key into the store of keys before it hands it on. So a draw whose
ingress died ends all the same, and the request that comes again, to another ingress, waits for its answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from scoreray.data.extras import check_installed
from scoreray.sampling.service.config import Limits, Refused
from scoreray.sampling.service.key_store import LEASE_S, KeyEntry, KeyStore, SQLiteKeyStore, StoreLost
from scoreray.sampling.service.request import Claim, Completed, Event, Failed, Origin, SampleRequest

log = logging.getLogger("scoreray.serve")

PASSWORD = "SCORERAY_REDIS_PASSWORD"  # environment variable of each process: a url shows in logs and configs
SYNC_S = 1.0  # what an ingress bills without keys in this time is lost with it
AGAIN_S = 2.0
THREADS = ThreadPoolExecutor(8, "scoreray-keys")
T = TypeVar("T")


def open_key_store(url: str, limits: Limits) -> KeyStore:
    """The store at a path (SQLite), a redis:// or rediss:// url, or in this process's memory where `url` is empty.

    Raises UserError.
    """
    if url.partition("://")[0] not in ("redis", "rediss"):
        return SQLiteKeyStore(url or ":memory:", limits)
    check_installed("redis", url, "redis")
    from scoreray.sampling.service.key_store_redis import RedisKeyStore

    return RedisKeyStore(url, os.environ.get(PASSWORD), limits)


async def _called(method: Callable[..., T], *arguments: Any) -> T:
    """A store's method in a thread of its own pool: a Redis that hangs holds these, and no request without a key."""
    return await asyncio.get_running_loop().run_in_executor(THREADS, method, *arguments)


async def begin_key(store: KeyStore, claim: Claim, origin: Origin, instead_of: Origin | None = None) -> KeyEntry:
    """`KeyStore.begin`. Raises Refused: key_reused, and ledger_lost where the store can't be reached."""
    try:
        return await _called(store.begin, claim, origin, instead_of)
    except StoreLost as error:
        raise Refused("ledger_lost", _lost(error), retry_after_s=AGAIN_S) from None


async def kept(
    store: KeyStore | None, request: SampleRequest, events: AsyncGenerator[Event, None]
) -> AsyncGenerator[Event, None]:
    """The events of a draw; of a request with a key, its answer is in the store before it is handed on.

    Where another draw of its key was stored first, that one's answer. To be called again around these does nothing.
    """
    claim = request.claim
    async with contextlib.aclosing(events):
        if store is None or claim is None:
            async for event in events:
                yield event
            return
        renewing = asyncio.create_task(_renew(store, claim))
        try:
            async for event in events:
                if isinstance(event, Completed) and not event.kept:
                    stored = await _called(store.finish, claim, event, len(request.seeds))
                    event = replace(stored, deaths=event.deaths, kept=True)
                yield event
        except StoreLost as error:
            yield Failed("ledger_lost", _lost(error), retry_after_s=AGAIN_S)
        finally:
            renewing.cancel()


async def _renew(store: KeyStore, claim: Claim) -> None:
    """Says again and again that a draw goes on: where nobody does, the next request with its key begins another."""
    while True:
        await asyncio.sleep(LEASE_S / 3)
        with contextlib.suppress(StoreLost):
            await _called(store.renew, claim)


def _lost(error: StoreLost) -> str:
    log.warning("the store of idempotency keys can't be reached: %s", error)
    return "the store of idempotency keys can't be reached: send it again with the same key, which is billed once"


class Bills:
    """Rows billed by token, as the counter of one ingress shows them: never twice, and never backwards.

    Those of requests with a key are counted in the store, where an answer is stored; the others here, and are written
    to the store as this ingress' total, so that a write may be repeated.
    """

    def __init__(self, store: KeyStore, source: str) -> None:
        self._store, self._source = store, source
        self._own, self._written = Counter[str](), Counter[str]()
        self._totals: dict[str, int] = {}
        self._shown: Counter[str] = Counter()

    def add(self, token: str, num_rows: int) -> None:
        """Of a request without a key."""
        self._own[token] += num_rows

    async def sync(self) -> None:
        """Writes what was added, and reads what all have billed; the next one does where the store can't be reached."""
        own = self._own.copy()
        with contextlib.suppress(StoreLost):
            self._totals = await _called(self._store.bill, self._source, own)
            self._written = own

    async def follow(self) -> None:
        """Writes what was added, each SYNC_S."""
        while True:
            if self._own != self._written:
                await self.sync()
            await asyncio.sleep(SYNC_S)

    def grown(self) -> Iterable[tuple[str, int]]:
        """(token, rows) billed since this was last called, as far as `sync` has read."""
        for token, total in self._totals.items():
            if total > self._shown[token]:
                yield token, total - self._shown[token]
                self._shown[token] = total


def seed_of(token: str, key: str) -> int:
    """The seed of a request without one, so that its key alone makes its samples: in [0, 2^31)."""
    return int.from_bytes(hashlib.sha256(f"{token}\n{key}".encode()).digest()[:4], "big") >> 1
