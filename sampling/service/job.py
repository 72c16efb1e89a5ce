"""What passes between the parts of a service: a job, the events of its draw, and the draw again where a replica died.

Without torch: the ledger's process, which must be back soon after it died, needs this and no network.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

log = logging.getLogger("scoreray.serve")

MAX_DEATHS = 8  # of replicas on one request, before it is thought to be their reason

Event = dict[str, Any]
"""What a draw yields: `kind` is accepted, preview, done (once, last) or refused (once, last; see ERRORS)."""


@dataclass(frozen=True)
class Job:
    """Everything that the samples of a request depend on, and how they are wanted.

    seeds: one for each sample. labels: one for each, -1 for none; None for a model without classes.
    calls: of the network for one sample, as expected, and at most. previews: how many are wanted on the way.
    """

    checkpoint: str
    ema: str
    shape: tuple[int, ...]
    seeds: tuple[int, ...]
    labels: tuple[int, ...] | None
    sampler: str
    grid: str
    sigmas: tuple[float, ...]
    guidance: float
    calls: int
    max_calls: int
    media: str = "application/json"
    format: str = "png"
    options: dict[str, Any] = field(default_factory=dict)
    previews: int = 0

    @property
    def rows_per_call(self) -> int:
        return len(self.seeds) * (1 if self.guidance == 1 else 2)

    @property
    def num_bytes(self) -> int:
        """Of memory, roughly: an object and its place in a tuple for each number, and the rest."""
        return 4096 + 40 * (len(self.sigmas) + 2 * len(self.seeds))


class Lost(Exception):
    """A process died, or was unreachable, with a job in its hands."""


class Backend(Protocol):
    """The replicas. `draw` raises Lost when the one that draws dies; `prepare` and `metrics` reach all of them."""

    def draw(self, job: Job) -> AsyncGenerator[Event, None]: ...

    async def prepare(self, checkpoint: str, ema: str) -> None: ...

    async def metrics(self) -> dict[str, str]: ...


async def drawn(backend: Backend, job: Job, busy_tries: int = 1) -> AsyncGenerator[Event, None]:
    """The events of a job, begun again on another replica where one dies or is too busy.

    The last one is done or refused; its `deaths` is how many replicas were lost.
    """
    deaths = busy = 0
    while True:
        try:
            async with contextlib.aclosing(backend.draw(job)) as events:
                async for event in events:
                    if event["kind"] == "refused" and event["code"] == "overloaded" and busy + 1 < busy_tries:
                        busy += 1
                        break
                    if event["kind"] in ("done", "refused"):
                        yield {**event, "deaths": deaths}
                        return
                    yield event
                else:
                    raise Lost("the draw ended without an answer")
        except Lost as error:
            deaths += 1
            if deaths == MAX_DEATHS:
                message = f"{deaths} replicas died on this request: {error}"
                yield {"kind": "refused", "code": "replica_lost", "message": message, "deaths": deaths}
                return
            log.warning("a replica was lost (%s): drawing again", error)
            await asyncio.sleep(min(2.0, 0.05 * 2**deaths))


def timed_out(limit_s: float) -> Event:
    """What ends a draw that took longer than a request may."""
    message = f"no answer within {limit_s:g} s: ask for fewer samples or steps"
    return {"kind": "refused", "code": "timed_out", "message": message, "retry_after_s": 30}
