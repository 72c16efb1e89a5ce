"""Counters of a stream's reads: requests, retries, hedges, bytes, cache hits; they become the run's metrics."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass
class ReadStats:
    """What a stream has read so far. Several threads count: they use `add`."""

    num_samples: int = 0  # handed out in batches
    bytes_read: int = 0
    num_requests: int = 0
    num_retries: int = 0  # requests repeated because the store was busy, out of reach or cut the answer off
    num_hedges: int = 0  # further requests, made because the answer was slow
    num_rereads: int = 0  # requests repeated because the bytes were not those of the index
    cache_hits: int = 0  # pieces found in `data.cache_dir`
    cache_misses: int = 0  # pieces fetched into it
    stall_s: float = 0.0  # how long the consumer waited for a batch
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **amounts: float) -> None:
        """Adds to the counters of these names."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)


counting: ContextVar[ReadStats | None] = ContextVar("counting", default=None)
"""The counters of the stream for which this thread makes requests."""
