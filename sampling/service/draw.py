"""One draw of a service and the requests that wait for it: more than one where they have the same idempotency key."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from scoreray.sampling.guidance.guidance import condition_names
from scoreray.sampling.samplers.sample import ADAPTIVE, calls_each
from scoreray.sampling.service.config import Refused
from scoreray.sampling.service.request import Completed, Preview, SampleRequest
from scoreray.sampling.service.ticket import terms_of


@dataclass(frozen=True)
class SampleAnswer:
    """What a draw ends in: the encoded samples, and what made them."""

    body: bytes
    about: dict[str, Any]

    @staticmethod
    def of(request: SampleRequest, drawn: Completed) -> SampleAnswer:
        about = {
            "model": request.origin.model,
            "checkpoint": request.origin.checkpoint,
            "images_seen": request.origin.images_seen,
            "ema": request.ema,
            **({"adapter": request.adapter} if request.adapter else {}),
            "precision": drawn.precision,
            "sampler": request.sampler,
            "steps": len(request.sigmas) - 1,
            "grid": request.grid,
            **({"grid_checkpoint": request.grid_checkpoint} if request.grid_checkpoint else {}),
            "seed": request.origin.seed,
            "guidance": dict(request.weights) or request.guidance,
            "conditions": [] if request.condition is None else sorted(condition_names(request.condition)),
            "count": len(request.seeds),
            "format": request.format,
            **({} if drawn.acceptance is None else {"acceptance": round(drawn.acceptance, 6)}),
            **_cost(request, drawn.rows),
            **({"parallel": True} if drawn.parallel else {}),
            "queued_s": round(drawn.queued_s, 4),
            "took_s": round(drawn.took_s, 4),
        }
        return SampleAnswer(drawn.body, about)

    def as_json(self, request_id: str) -> bytes:
        """What made the samples, then `data`, an array that is already JSON."""
        head = json.dumps({"id": request_id, **self.about})
        return head[:-1].encode() + b', "data": ' + self.body + b"}"


def expected_cost(request: SampleRequest) -> dict[str, Any]:
    """What a request fills in, and what it will cost: exactly, or of rk45, which chooses its steps, about."""
    return {
        "sampler": request.sampler,
        "steps": len(request.sigmas) - 1,
        "grid": request.grid,
        "calls": request.expected_calls,
        "rows": request.expected_calls * len(request.seeds) * len(terms_of(request)),
        "exact": request.sampler not in ADAPTIVE,
    }


def _cost(request: SampleRequest, rows: int | None) -> dict[str, Any]:
    """calls: of the network for one sample, on average where they differ (rk45), and in parallel in time as if each of
    its states had one of its own. rows: that these calls had in all;
    guidance takes two or more of each call for a sample."""
    if rows is None:
        return {}
    return {"calls": calls_each(rows, len(request.seeds) * len(terms_of(request))), "rows": rows}


class Draw:
    """One draw and the requests that wait for it; given up when none does."""

    def __init__(self, request: SampleRequest) -> None:
        self.request = request
        self.started = time.monotonic()
        self.task: asyncio.Task[SampleAnswer] | None = None
        self.accepted = asyncio.Event()
        self.progress = 0.0
        self.waiting = self.joined = 0  # requests that wait now, and all that ever did
        self.replayed = False  # its answer had been drawn before
        self.cut_off: Refused | None = None  # the answer of its requests, where the service cancels it
        self._queues: set[asyncio.Queue[Preview | None]] = set()

    def show(self, preview: Preview) -> None:
        """Hands a preview on, unless one as late was shown before (by a replica that died since)."""
        if preview.progress > self.progress:
            self.progress = preview.progress
            for queue in self._queues:
                queue.put_nowait(preview)

    def end(self) -> None:
        self.accepted.set()
        for queue in self._queues:
            queue.put_nowait(None)

    async def previews(self) -> AsyncIterator[Preview]:
        """The previews from now on, until the draw ends."""
        queue = asyncio.Queue[Preview | None]()
        self._queues.add(queue)
        try:
            if self.task is not None and self.task.done():
                return
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._queues.discard(queue)

    async def answer(self) -> SampleAnswer:
        assert self.task is not None
        return await asyncio.shield(self.task)
