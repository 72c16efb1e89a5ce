"""Calls in threads: one that may never return, which the process does not wait for at its end, and many in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_daemon_thread(call: Callable[[], T], name: str) -> Future[T]:
    """The result of `call`, which begins at once. An executor's threads would be joined when Python ends."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def map_in_threads(workers: int, make: Callable[[int], T], numbers: Iterable[int]) -> Iterator[T]:
    """`map` by `workers` threads, a few ahead only: a mistake shows at once, and results do not pile up."""
    ahead: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for number in numbers:
                ahead.append(pool.submit(make, number))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
