"""A checked request for samples, the events of its draw, and the draw again where a replica died."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # the stores of keys do without torch
    from scoreray.sampling.samplers.sigmas import Grid
    from scoreray.trainer.diffusion.condition import Condition

log = logging.getLogger("scoreray.serve")

MAX_DEATHS = 8  # of replicas during one request, which may then be what kills them


class Origin(NamedTuple):
    """What samples are made from beside the request's fields: enough to make the same ones again."""

    model: str
    checkpoint: str
    images_seen: int
    seed: int


NOT_SERVED = Origin("", "", 0, 0)
"""Of a request that goes to a batcher directly."""


class Claim(NamedTuple):
    """A request's idempotency key, as the store of keys knows it (`key_store.py`).

    fingerprint: of the request's fields, which a key may not change. owner: the ingress process that answers it.
    """

    token: str
    key: str
    fingerprint: str
    owner: str


@dataclass(frozen=True)
class SampleRequest:
    """A request for samples whose every value is checked and filled in: what replicas and their batchers draw.

    The first group is all that a `StepBatcher` needs, and alone decides the samples of one network, so that any
    replica may draw them, or draw them again. The second says which network, and the form of the answer.

    seeds: one for each sample. condition: a row for each sample (what all share is one row, expanded, and travels as
    one); None for none. negative: one row of what guidance leads away from instead of the condition's null.
    sigmas: descending noise levels that end in 0. guidance: classifier-free weight of all conditions but those in
    `weights`, by name (`guidance.guidance_terms`).
    adapter: the LoRA beside the network, "" for none.
    expected_calls: calls of the network that a sample is thought to take: orders requests, and estimates their wait.
    calls_limit: the service's own: a sample that takes more fails, so that no sampler runs for ever. What a request may
    cost by its own word (`max_calls`) is spent by then: it has become sampler, steps and grid.
    previews: how many are sent on the way, at most. raw: latents are not decoded, but in previews.
    """

    seeds: Sequence[int]
    shape: tuple[int, ...]
    sigmas: Sequence[float]
    sampler: str = "heun"
    options: dict[str, Any] = field(default_factory=dict)
    condition: Condition | None = None
    negative: Condition | None = None
    guidance: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    expected_calls: int = 1
    calls_limit: int | None = None
    adapter: str = ""

    origin: Origin = NOT_SERVED
    ema: str = ""
    grid: Grid = ""
    grid_checkpoint: str | None = None
    media: str = "application/json"
    format: str = "png"
    previews: int = 0
    raw: bool = False
    claim: Claim | None = None


@dataclass(frozen=True)
class Accepted:
    """A replica has taken the request."""


@dataclass(frozen=True)
class Preview:
    """The denoised estimate of the first samples on the way.

    progress: share of the expected calls that are made. sigma: the highest noise level of the samples shown.
    b64_json: their sheet, where they are pictures. points: their values otherwise, None where these are too many.
    """

    progress: float
    sigma: float
    b64_json: str | None = None
    points: list[list[float]] | None = None

    def page(self) -> dict[str, Any]:
        """The JSON of its server-sent event."""
        shown = {"denoised": self.points} if self.b64_json is None else {"b64_json": self.b64_json}
        return {"progress": self.progress, "sigma": self.sigma, **shown}


@dataclass(frozen=True)
class Completed:
    """The last event of a draw: the encoded samples.

    queued_s: before the first call of the network. took_s: in the replica, queue included. acceptance: the share of a
    Metropolis sampler's proposals that were accepted. rows: that the network was called with for it, None of an answer
    that was stored before they were counted. parallel: whether steps of a sample shared calls. deaths: replicas that
    were lost on the way. kept: whether the store of idempotency keys has it.
    """

    body: bytes
    precision: str
    queued_s: float
    took_s: float
    acceptance: float | None = None
    rows: int | None = None
    parallel: bool = False
    deaths: int = 0
    kept: bool = False


@dataclass(frozen=True)
class Failed:
    """The last event of a draw without samples. code: one of ERRORS. It is a value, as Ray logs what is raised."""

    code: str
    message: str
    retry_after_s: float | None = None
    deaths: int = 0


Event = Accepted | Preview | Completed | Failed


class Lost(Exception):
    """A process died, or was unreachable, while it drew a request."""


class Backend(Protocol):
    """The replicas. `draw` raises Lost when the one that draws dies; `prepare` and `metrics` reach all of them."""

    def draw(self, request: SampleRequest) -> AsyncGenerator[Event, None]: ...

    async def prepare(self, checkpoint: str, ema: str) -> None: ...

    async def metrics(self) -> dict[str, str]: ...


async def draw_with_retries(
    backend: Backend, request: SampleRequest, busy_tries: int = 1
) -> AsyncGenerator[Event, None]:
    """The events of a request, begun again on another replica where one dies, or up to `busy_tries` are too busy.

    The last one is Completed or Failed; its `deaths` is how many replicas were lost.
    """
    deaths = busy = 0
    while True:
        try:
            async with contextlib.aclosing(backend.draw(request)) as events:
                async for event in events:
                    if isinstance(event, Failed) and event.code == "overloaded" and busy + 1 < busy_tries:
                        busy += 1
                        break
                    if isinstance(event, Completed | Failed):
                        yield replace(event, deaths=deaths)
                        return
                    yield event
                else:
                    raise Lost("the draw ended without an answer")
        except Lost as error:
            deaths += 1
            if deaths == MAX_DEATHS:
                yield Failed("replica_lost", f"{deaths} replicas died during this request: {error}", deaths=deaths)
                return
            log.warning("a replica was lost (%s): drawing again", error)
            await asyncio.sleep(min(2.0, 0.05 * 2**deaths))


def timed_out(limit_s: float) -> Failed:
    """What ends a draw that took longer than a request may."""
    return Failed("timed_out", f"no answer within {limit_s:g} s: ask for fewer samples or steps", retry_after_s=30)
