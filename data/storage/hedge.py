"""Hedged requests: a second one for a straggler; the first answer counts (Dean & Barroso 2013, "The Tail at Scale")."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from scoreray.data.storage.interface import StorageError, abandoned
from scoreray.data.storage.stats import ReadStats, counting

LEAST_S = 1.0  # no second request before this
TIMES_MEDIAN = 4.0  # nor before so many times the recent median
REMEMBERED = 64
THREADS = 32  # twice the readers' requests, and room for some that hang


class HedgedGet:
    """`get(key, start, end)`, requested a second time when the answer takes much longer than recent ones did. Retries
    and second requests are counted in `stats`."""

    def __init__(self, get: Callable[[str, int, int], bytes], stats: ReadStats) -> None:
        self._get, self._stats = get, stats
        self._took: deque[float] = deque(maxlen=REMEMBERED)
        self._threads: ThreadPoolExecutor | None = None
        self._lock, self._closed = threading.Lock(), threading.Event()

    def _begin_thread(self) -> None:
        abandoned.set(self._closed)
        counting.set(self._stats)

    def __call__(self, key: str, start: int, end: int) -> bytes:
        with self._lock:
            after_s = max(LEAST_S, TIMES_MEDIAN * statistics.median(self._took)) if self._took else 4 * LEAST_S
        started = time.monotonic()
        first = self._request(key, start, end)
        if first is None:
            raise StorageError(f"{key}: not read, its reader was closed")
        requests = [first]
        if not wait(requests, timeout=after_s).done:
            if second := self._request(key, start, end):
                self._stats.add(num_hedges=1)
                requests.append(second)
            wait(requests, return_when=FIRST_COMPLETED)
            requests.sort(key=_rank)
        data = requests[0].result()  # of two that failed, either explains it
        with self._lock:
            self._took.append(time.monotonic() - started)
        return data

    def _request(self, key: str, start: int, end: int) -> Future[bytes] | None:
        """None after `close`, which may come while another thread is in a call."""
        with self._lock:
            if self._closed.is_set():
                return None
            if self._threads is None:
                self._threads = ThreadPoolExecutor(THREADS, "scoreray-get", self._begin_thread)
            return self._threads.submit(self._get, key, start, end)

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            if self._threads is not None:
                self._threads.shutdown(wait=False, cancel_futures=True)


def _rank(request: Future[bytes]) -> int:
    """Answered before under way before failed."""
    if not request.done():
        return 1
    return 0 if request.exception() is None else 2
