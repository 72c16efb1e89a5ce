"""Idempotency keys: the same key again is the same samples, drawn once and billed once, within time and memory."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from scoreray.sampling.service.config import Limits, Refused

RunT = TypeVar("RunT")
OriginT = TypeVar("OriginT")


@dataclass
class Entry(Generic[OriginT, RunT]):
    """What is known of a key: the request, what its job was made from, the run that draws it or has drawn it."""

    token: str
    key: str
    fingerprint: str
    origin: OriginT
    at: float
    run: RunT | None = None
    num_bytes: int = 0
    billed: bool = False
    forgotten: bool = False


class Keys(Generic[OriginT, RunT]):
    """Entries by (token, key), at most `remember_keys` of them, for `remember_s` each.

    Answers are kept within `remember_bytes`, the oldest let go first. Of a request whose answer was let go the
    origin stays, its checkpoint and seed: it is drawn again, the same, and not billed again.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._entries: OrderedDict[tuple[str, str], Entry[OriginT, RunT]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry[OriginT, RunT]]:
        """The oldest first."""
        return iter(list(self._entries.values()))

    @property
    def num_bytes(self) -> int:
        return self._bytes

    def age_s(self, entry: Entry[OriginT, RunT]) -> float:
        return self._clock() - entry.at

    def find(self, token: str, key: str, fingerprint: str) -> Entry[OriginT, RunT] | None:
        """The entry of a key, None for a new one. Raises Refused where it came with another request."""
        self._forget()
        entry = self._entries.get((token, key))
        if entry is not None and entry.fingerprint != fingerprint:
            message = "this idempotency key came with another request before, or another Accept: use a new key for each"
            raise Refused("key_reused", message)
        return entry

    def add(self, token: str, key: str, fingerprint: str, origin: OriginT, age_s: float = 0.0) -> Entry[OriginT, RunT]:
        entry: Entry[OriginT, RunT] = Entry(token, key, fingerprint, origin, self._clock() - age_s)
        self._entries[token, key] = entry
        self._forget()
        return entry

    def keep(self, entry: Entry[OriginT, RunT], num_bytes: int) -> None:
        """Counts an answer's bytes, and lets the oldest answers go where there are too many."""
        if entry.forgotten:
            return
        self._bytes += num_bytes - entry.num_bytes
        entry.num_bytes = num_bytes
        for old in self._entries.values():
            if self._bytes <= self._limits.remember_bytes:
                return
            self._release(old)

    def _forget(self) -> None:
        now = self._clock()
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if len(self._entries) <= self._limits.remember_keys and now - oldest.at <= self._limits.remember_s:
                return
            oldest.forgotten = True
            self._release(self._entries.popitem(last=False)[1])

    def _release(self, entry: Entry[OriginT, RunT]) -> None:
        if entry.num_bytes:
            self._bytes -= entry.num_bytes
            entry.num_bytes, entry.run = 0, None


def seed_of(token: str, key: str) -> int:
    """The seed of a request without one, so that its key alone makes its samples: in [0, 2^31)."""
    return int.from_bytes(hashlib.sha256(f"{token}\n{key}".encode()).digest()[:4], "big") >> 1
