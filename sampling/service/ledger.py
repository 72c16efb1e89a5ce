"""The ledger of a service: draws requests that have an idempotency key, in a process that outlives the one that asks.

Where HTTP is answered a copy of every key is held too, so the death of either process forgets nothing: the one that
answers HTTP asks the ledger for each key that it does not know, and a ledger that was started again is told all keys
before it takes the next one. Only the death of both at once forgets keys. Without torch and without Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import NamedTuple, Protocol

from scoreray.sampling.service.config import Limits, Refused
from scoreray.sampling.service.keys import Entry, Keys
from scoreray.sampling.service.request import (
    Accepted,
    Backend,
    Drawn,
    Event,
    Failed,
    Origin,
    SampleRequest,
    draw_with_retries,
    timed_out,
)

log = logging.getLogger("scoreray.serve")


class Unsynced(NamedTuple):
    """The last event of a claim by a process that knows another epoch: sync, then claim again."""


class MadeFrom(NamedTuple):
    """The last event of a claim whose key's samples are made from another origin: claim again with that one."""

    origin: Origin


LedgerEvent = Event | Unsynced | MadeFrom


class Claim(NamedTuple):
    """A request with a key. epoch: of the ledger that the asker knows.

    instead_of: the origin that it had before, where that can't be drawn any more.
    """

    token: str
    key: str
    fingerprint: str
    origin: Origin
    epoch: str | None
    instead_of: Origin | None = None


class Record(NamedTuple):
    """A key as it is told to a ledger that was started again. done: the answer's event, where it is still held."""

    token: str
    key: str
    fingerprint: str
    origin: Origin
    age_s: float
    billed: bool
    done: Drawn | None


class Told(NamedTuple):
    """What the ledger knows of rows billed, by token: for requests with a key, and for others by other askers."""

    epoch: str
    keyed: dict[str, int]
    others: dict[str, int]


class LedgerLike(Protocol):
    """A ledger, here or in another process; every method raises Lost where it can't be reached."""

    def draw(self, claim: Claim, request: SampleRequest) -> AsyncGenerator[LedgerEvent, None]: ...

    async def sync(self, asker: str, own: dict[str, int]) -> Told: ...

    async def restore(self, records: list[Record], keyed: dict[str, int]) -> None: ...


class Ledger:
    """One for a service; all methods run on one event loop. `epoch` tells one start of it from another."""

    def __init__(self, limits: Limits, backend: Backend, busy_tries: int = 1) -> None:
        self.limits, self.backend, self.epoch = limits, backend, uuid.uuid4().hex
        self._busy_tries = busy_tries
        self._keys: Keys[Origin, _Draw] = Keys(limits)
        self._keyed: Counter[str] = Counter()
        self._own: dict[str, dict[str, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def draw(self, claim: Claim, request: SampleRequest) -> AsyncGenerator[LedgerEvent, None]:
        """The events of a request with a key: of the one draw that there is for it, begun here, under way or answered.

        Drawn has `billed`, the token's rows by keys, and `replayed`. Unsynced and MadeFrom end it where the caller
        must claim again.
        """
        if claim.epoch != self.epoch:
            yield Unsynced()
            return
        try:
            entry = self._keys.find(claim.token, claim.key, claim.fingerprint)
        except Refused as refusal:
            yield Failed(refusal.code, refusal.message)
            return
        if entry is None:
            entry = self._keys.add(claim.token, claim.key, claim.fingerprint, claim.origin)
        elif claim.origin != entry.origin:
            if claim.instead_of != entry.origin or entry.run is not None:
                yield MadeFrom(entry.origin)
                return
            entry.origin = claim.origin
        if entry.run is None:
            entry.run = _Draw()
            entry.run.task = asyncio.create_task(self._carry_out(entry, entry.run, request))
            self._tasks.add(entry.run.task)
            entry.run.task.add_done_callback(self._tasks.discard)
        draw, replayed = entry.run, entry.run.last is not None
        try:
            async with contextlib.aclosing(draw.watched()) as events:
                async for event in events:
                    if isinstance(event, Drawn):
                        event = replace(event, billed=self._keyed[claim.token], replayed=replayed)
                    yield event
        finally:
            if draw.watchers == 0 and draw.last is None:
                if entry.run is draw:
                    entry.run = None  # at once: the client may ask again before the task has ended
                if draw.task is not None:
                    draw.task.cancel()

    async def sync(self, asker: str, own: dict[str, int]) -> Told:
        """Takes down what `asker` has billed without keys, and tells what it may not know."""
        self._own[asker] = own
        others: Counter[str] = Counter()
        for name, rows in self._own.items():
            if name != asker:
                others.update(rows)
        return Told(self.epoch, dict(self._keyed), dict(others))

    async def restore(self, records: list[Record], keyed: dict[str, int]) -> None:
        """Takes keys from an asker that knew the ledger's last life."""
        for record in records:
            with contextlib.suppress(Refused):
                if self._keys.find(record.token, record.key, record.fingerprint) is None:
                    entry = self._keys.add(*record[:5])
                    entry.billed = record.billed
                    if record.done is not None:
                        entry.run = _Draw(record.done)
                        self._keys.keep(entry, len(record.done.body) + 4096)
        for token, rows in keyed.items():
            self._keyed[token] = max(self._keyed[token], rows)

    async def _carry_out(self, entry: Entry[Origin, _Draw], draw: _Draw, request: SampleRequest) -> None:
        last: Drawn | Failed = Failed("bug", "this is a bug in scoreray; the log has its traceback")
        try:
            async with asyncio.timeout(self.limits.max_request_s):
                async with contextlib.aclosing(draw_with_retries(self.backend, request, self._busy_tries)) as events:
                    async for event in events:
                        if isinstance(event, Drawn | Failed):
                            last = event
                        else:
                            draw.tell(event)
        except TimeoutError:
            last = timed_out(self.limits.max_request_s)
        except Exception:
            log.exception("a draw for a key")
        if isinstance(last, Drawn):
            if not entry.billed:
                self._keyed[entry.token] += len(request.seeds)
            entry.billed = True
            if entry.run is draw:
                self._keys.keep(entry, len(last.body) + request.num_bytes)
        elif entry.run is draw:
            entry.run = None
        draw.tell(last)


class _Draw:
    """One draw and everybody who watches it. last: its last event, once that has come."""

    def __init__(self, last: Drawn | None = None) -> None:
        self.last: Drawn | Failed | None = last
        self.watchers = 0
        self.task: asyncio.Task[None] | None = None
        self._queues: set[asyncio.Queue[Event]] = set()
        self._accepted: Event | None = None

    def tell(self, event: Event) -> None:
        if isinstance(event, Drawn | Failed):
            self.last = event
        elif isinstance(event, Accepted):
            self._accepted = event
        for queue in self._queues:
            queue.put_nowait(event)

    async def watched(self) -> AsyncGenerator[Event, None]:
        """The events from now on, up to the last one."""
        if self.last is not None:
            yield self.last
            return
        queue = asyncio.Queue[Event]()
        self._queues.add(queue)
        self.watchers += 1
        try:
            if self._accepted is not None:
                yield self._accepted
            while True:
                event = await queue.get()
                yield event
                if event is self.last:
                    return
        finally:
            self._queues.discard(queue)
            self.watchers -= 1
