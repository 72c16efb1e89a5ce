"""One draw of a service and everybody who waits for it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from scoreray.sampling.service.config import Refused
from scoreray.sampling.service.job import Event, Job
from scoreray.sampling.service.keys import Entry
from scoreray.sampling.service.ledger import Origin
from scoreray.sampling.service.models import Served
from scoreray.sampling.service.request import SampleBody


@dataclass(frozen=True)
class Answer:
    """What a run ends in: the encoded samples, and what made them."""

    body: bytes
    about: dict[str, Any]


class Run:
    """One draw and everybody who waits for it; given up when nobody does."""

    def __init__(self, job: Job, served: Served, seed: int, body: SampleBody) -> None:
        self.job, self.served, self.seed, self.body = job, served, seed, body
        self.started = time.monotonic()
        self.task: asyncio.Task[Answer] | None = None
        self.accepted = asyncio.Event()
        self.progress = 0.0
        self.waiters = self.asked = 0  # who wait now, and all who ever did
        self.replayed = False  # by the ledger, which had its answer from before
        self.entry: Entry[Origin, Run] | None = None
        self.cut_off: Refused | None = None  # what its callers are told, where it is cancelled for another's reason
        self._queues: set[asyncio.Queue[Event | None]] = set()

    def show(self, preview: Event) -> None:
        """Hands a preview on, unless one as late was shown before (by a replica that died since)."""
        if preview["progress"] > self.progress:
            self.progress = preview["progress"]
            for queue in self._queues:
                queue.put_nowait(preview)

    def end(self) -> None:
        self.accepted.set()
        for queue in self._queues:
            queue.put_nowait(None)

    async def previews(self) -> AsyncIterator[Event]:
        """The previews from now on, until the run ends."""
        queue = asyncio.Queue[Event | None]()
        self._queues.add(queue)
        try:
            if self.task is not None and self.task.done():
                return
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._queues.discard(queue)

    async def answer(self) -> Answer:
        assert self.task is not None
        return await asyncio.shield(self.task)

    def done_event(self) -> Event | None:
        """The event that the answer was made of, where there is one."""
        if self.task is None or not self.task.done() or self.task.cancelled() or self.task.exception() is not None:
            return None
        answer = self.task.result()
        told = {name: answer.about[name] for name in ("precision", "queued_s", "took_s")}
        return {"kind": "done", "body": answer.body, **told}


def json_answer(request_id: str, answer: Answer) -> bytes:
    """The JSON of an answer: what made the samples, then `data`, an array that is already JSON."""
    head = json.dumps({"id": request_id, **answer.about})
    return head[:-1].encode() + b', "data": ' + answer.body + b"}"
