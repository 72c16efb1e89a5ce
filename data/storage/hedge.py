"""A second request for a straggler: of two answers the first one counts (Dean & Barroso 2013, "The Tail at Scale")."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from scoreray.data.storage.store import abandoned

LEAST_S = 1.0  # no second request before this
TIMES_MEDIAN = 4.0  # nor before so many times the median of late
REMEMBERED = 64
THREADS = 32  # twice the readers' requests, and room for some that hang


class HedgedGet:
    """`get(key, start, end)`, asked a second time when the answer takes much longer than most of late did."""

    def __init__(self, get: Callable[[str, int, int], bytes]) -> None:
        self._get = get
        self._took: deque[float] = deque(maxlen=REMEMBERED)
        self._threads: ThreadPoolExecutor | None = None
        self._lock, self._closed = threading.Lock(), threading.Event()
        self.num_hedged = 0

    def __call__(self, key: str, start: int, end: int) -> bytes:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(THREADS, "scoreray-get", abandoned.set, (self._closed,))
            threads = self._threads
            after_s = max(LEAST_S, TIMES_MEDIAN * statistics.median(self._took)) if self._took else 4 * LEAST_S
        started = time.monotonic()
        requests: list[Future[bytes]] = [threads.submit(self._get, key, start, end)]
        if not wait(requests, timeout=after_s).done:
            with self._lock:
                self.num_hedged += 1
            requests.append(threads.submit(self._get, key, start, end))
            wait(requests, return_when=FIRST_COMPLETED)
            requests.sort(key=_rank)
        data = requests[0].result()  # of two that failed, either says why
        with self._lock:
            self._took.append(time.monotonic() - started)
        return data

    def close(self) -> None:
        self._closed.set()
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def _rank(request: Future[bytes]) -> int:
    """Answered before under way before failed."""
    if not request.done():
        return 1
    return 0 if request.exception() is None else 2
