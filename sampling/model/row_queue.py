"""Work of several requests' rows in one call, on a thread of its own: reading texts, decoding latents.

A step of the network never waits for it: on a GPU its kernels are on a stream of their own, and on a CPU a thread of
niceness LOWEST gives way to those that step.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch
from torch import Tensor

LOWEST = 19  # of the scheduler's niceness
MOST_DECODED = 64  # rows in one call

Rows = TypeVar("Rows", bound=Sized)
Made = TypeVar("Made")


class RowQueue(Generic[Rows, Made]):
    """submit(rows) -> a future of what `call` makes of them.

    call: takes the rows of each request that waits, in order, until they are `most_rows` or more; gives a result for
    each. Where it raises, each request is tried alone: an error is its request's own.
    niceness: of the thread, 0 to LOWEST.
    """

    def __init__(
        self,
        call: Callable[[Sequence[Rows]], Sequence[Made]],
        name: str,
        *,
        most_rows: float = math.inf,
        niceness: int = 0,
    ) -> None:
        self._call, self._most_rows, self._niceness = call, most_rows, niceness
        self._waiting = queue.SimpleQueue[tuple[Rows, Future[Made]] | None]()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, rows: Rows) -> Future[Made]:
        found = Future[Made]()
        self._waiting.put((rows, found))
        return found

    def close(self) -> None:
        """Finishes what waits, then ends the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        if self._niceness:
            with contextlib.suppress(OSError):  # not of a thread where this is not Linux
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        stream = torch.cuda.Stream(priority=0) if torch.cuda.is_available() else None  # 0: below the steps' by default
        with torch.cuda.stream(stream):
            ended = False
            while not ended:
                found = [self._waiting.get()]
                with contextlib.suppress(queue.Empty):
                    while found[-1] is not None and sum(len(one[0]) for one in found if one) < self._most_rows:
                        found.append(self._waiting.get_nowait())
                ended = found[-1] is None
                self._answer([one for one in found if one is not None and one[1].set_running_or_notify_cancel()])

    def _answer(self, items: Sequence[tuple[Rows, Future[Made]]]) -> None:
        if not items:
            return
        try:
            results = self._call([rows for rows, _ in items])
        except Exception as error:  # whatever it is, other requests go on
            if len(items) == 1:
                items[0][1].set_exception(error)
                return
            for item in items:
                self._answer([item])
        else:
            for (_, future), result in zip(items, results, strict=True):
                future.set_result(result)


def decode_queue(decode: Callable[[Tensor], Tensor]) -> RowQueue[Tensor, Tensor]:
    """Of samples [b, ...], for a `decode` that treats each row alone, and cuts them into what fits its device."""

    def call(given: Sequence[Tensor]) -> Sequence[Tensor]:
        return decode(torch.cat(list(given))).split([len(samples) for samples in given])

    return RowQueue(call, "decode", most_rows=MOST_DECODED, niceness=LOWEST)
