"""Hedged requests: another one for a straggler; the first answer counts (Dean & Barroso 2013, "The Tail at Scale")."""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from scoreray.data.storage.interface import StorageError, abandoned
from scoreray.data.storage.stats import ReadStats, counting

LEAST_S = 1.0  # no further request before this
TIMES_MEDIAN = 4.0  # nor before so many times the recent median
MOST_REQUESTS = 4  # for one range, each given twice as long as the one before: a busy store must not get busier
REMEMBERED = 64
THREADS = 48  # all requests of 8 readers, and room for some that hang


class HedgedGet:
    """`get(key, start, end)`, requested again when the answer takes much longer than recent ones did, and again when
    that answer does too. Retries and further requests are counted in `stats`."""

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
        answers: queue.SimpleQueue[Future[bytes]] = queue.SimpleQueue()
        answer: Future[bytes] | None = None
        num_requests = under_way = int(self._request(answers, key, start, end))
        while under_way:
            try:
                answer = answers.get(timeout=after_s if num_requests < MOST_REQUESTS else None)
            except queue.Empty:
                after_s *= 2
                if self._request(answers, key, start, end):
                    self._stats.add(num_hedges=1)
                    num_requests, under_way = num_requests + 1, under_way + 1
                continue
            under_way -= 1
            if not answer.cancelled() and answer.exception() is None:
                break
        if answer is None or answer.cancelled():  # no thread had begun it
            raise StorageError(f"{key}: not read, its reader was closed")
        data = answer.result()
        with self._lock:
            self._took.append(time.monotonic() - started)
        return data

    def _request(self, answers: queue.SimpleQueue[Future[bytes]], key: str, start: int, end: int) -> bool:
        """A request that is put into `answers` when it has ended; False after `close`, which may come while another
        thread is in a call."""
        with self._lock:
            if self._closed.is_set():
                return False
            if self._threads is None:
                self._threads = ThreadPoolExecutor(THREADS, "scoreray-get", self._begin_thread)
            request = self._threads.submit(self._get, key, start, end)
        request.add_done_callback(answers.put)
        return True

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            if self._threads is not None:
                self._threads.shutdown(wait=False, cancel_futures=True)
