"""Samples of a model of latents, decoded on a thread of its own: of all requests that wait, together.

A step of the network never waits for a decode: on a CPU the thread gives way to those that step (it is the last in the
queue for a core), on a GPU its kernels are on a stream of low priority.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future

import torch
from torch import Tensor

LOWEST = 19  # of the scheduler's niceness
MOST_ROWS = 64  # in one call of `decode`, which cuts them into what fits its device


class DecodeQueue:
    """submit(samples [b, ...]) -> a future of `decode` of them; `decode` treats each row alone."""

    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        self._decode = decode
        self._waiting = queue.SimpleQueue[tuple[Tensor, Future[Tensor]] | None]()
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def submit(self, samples: Tensor) -> Future[Tensor]:
        found = Future[Tensor]()
        self._waiting.put((samples, found))
        return found

    def close(self) -> None:
        """Finishes what waits, then ends the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # not of a thread where this is not Linux
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
        stream = torch.cuda.Stream(priority=0) if torch.cuda.is_available() else None  # 0: below the steps' by default
        with torch.cuda.stream(stream):
            while (first := self._waiting.get()) is not None:
                if not self._answer(self._with_others(first)):
                    return

    def _with_others(self, first: tuple[Tensor, Future[Tensor]]) -> list[tuple[Tensor, Future[Tensor]] | None]:
        found: list[tuple[Tensor, Future[Tensor]] | None] = [first]
        rows = len(first[0])
        with contextlib.suppress(queue.Empty):
            while rows < MOST_ROWS and found[-1] is not None:
                found.append(self._waiting.get_nowait())
                rows += len(found[-1][0]) if found[-1] is not None else 0
        return found

    def _answer(self, found: list[tuple[Tensor, Future[Tensor]] | None]) -> bool:
        """Decodes; False where the queue ends with these."""
        items = [one for one in found if one is not None and one[1].set_running_or_notify_cancel()]
        try:
            values = self._decode(torch.cat([samples for samples, _ in items])) if items else torch.empty(0)
        except Exception as error:  # whatever it is, it is the error of these requests, and others go on
            for _, future in items:
                future.set_exception(error)
        else:
            for (_, future), part in zip(items, values.split([len(samples) for samples, _ in items]), strict=True):
                future.set_result(part)
        return found[-1] is not None
