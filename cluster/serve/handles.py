"""The parts of a service as its other parts reach them on Ray Serve, and the deployment of the ledger.

Without torch, so that a ledger that died is soon back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Iterator
from typing import Any, TypeVar

from scoreray.cluster.serve.log import log_here
from scoreray.cluster.serve.network import keep_grpc_to_loopback
from scoreray.sampling.service.config import Limits
from scoreray.sampling.service.ledger import Claim, Ledger, LedgerEvent, Record, Told
from scoreray.sampling.service.request import Event, Lost, SampleRequest

EventT = TypeVar("EventT")

READY_WITHIN_S = 600.0
SYNC_WITHIN_S = 10.0


class RayBackend:
    """The replicas behind a Serve handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def draw(self, request: SampleRequest) -> AsyncGenerator[Event, None]:
        return _events(self._handle, request.previews > 0, request)

    async def prepare(self, checkpoint: str, ema: str) -> None:
        """On every replica that there is. Raises Lost where none could, with the reason of one."""
        outcomes = await self._all("prepare", READY_WITHIN_S, checkpoint, ema)
        failed = [outcome for outcome in outcomes if outcome != ""]
        if failed or not outcomes:
            raise Lost(str(failed[0]) if failed else "no replica answers")

    async def metrics(self) -> dict[str, str]:
        pages = await self._all("metrics", 5.0)
        return dict(page for page in pages if isinstance(page, tuple))

    async def _all(self, method: str, timeout_s: float, *arguments: Any) -> list[Any]:
        from ray.exceptions import RayActorError

        response = self._handle.broadcast(method, *arguments)
        outcomes = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
        return [outcome for outcome in outcomes if not isinstance(outcome, RayActorError)]  # dead: another will come


class RayLedger:
    """The ledger behind a Serve handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def draw(self, claim: Claim, request: SampleRequest) -> AsyncGenerator[LedgerEvent, None]:
        return _events(self._handle, request.previews > 0, claim, request)

    async def sync(self, asker: str, own: dict[str, int]) -> Told:
        return await self._ask("sync", asker, own)

    async def restore(self, records: list[Record], keyed: dict[str, int]) -> None:
        await self._ask("restore", records, keyed)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        with _lost():
            async with asyncio.timeout(SYNC_WITHIN_S):
                return await getattr(self._handle, method).remote(*arguments)


class LedgerReplica:
    """The Serve deployment of the ledger: one `Ledger` in a process of its own."""

    def __init__(self, limits: Limits, most_replicas: int, handle: Any) -> None:
        prepare_process()
        self._ledger = Ledger(limits, RayBackend(handle), busy_tries=min(3, most_replicas))

    async def draw(self, claim: Claim, request: SampleRequest) -> AsyncGenerator[LedgerEvent, None]:
        async with contextlib.aclosing(self._ledger.draw(claim, request)) as events:
            async for event in events:
                yield event

    async def draw_at_once(self, claim: Claim, request: SampleRequest) -> LedgerEvent:
        return await last_of(self._ledger.draw(claim, request))

    async def sync(self, asker: str, own: dict[str, int]) -> Told:
        return await self._ledger.sync(asker, own)

    async def restore(self, records: list[Record], keyed: dict[str, int]) -> None:
        await self._ledger.restore(records, keyed)

    async def pid(self) -> int:
        return os.getpid()


async def last_of(draw: AsyncGenerator[EventT, None]) -> EventT:
    """The last event of a draw: for one without previews, whose answer is one message."""
    async with contextlib.aclosing(draw) as events:
        everything = [event async for event in events]
    return everything[-1]


async def _events(handle: Any, streams: bool, *arguments: Any) -> AsyncGenerator[Any, None]:
    """What `draw` yields behind a handle, or its last event alone, in one message. Raises Lost; leaving it cancels."""
    response: Any = None
    try:
        with _lost():
            if streams:
                response = handle.options(stream=True).draw.remote(*arguments)
                async for event in response:
                    yield event
            else:
                response = handle.draw_at_once.remote(*arguments)
                yield await response
        response = None
    finally:
        if response is not None:
            response.cancel()


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """Turns what Ray raises where a process died, or is not reached in time, into Lost."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except RayTaskError:
        raise  # the other side's own exception: a bug, not its death
    except (RayError, RayServeException, TimeoutError) as error:
        raise Lost(f"{type(error).__name__}") from error


def prepare_process(errors: str = "") -> None:
    """For the constructor of a deployment: what holds in each process of a service. errors: as of `log_here`."""
    keep_grpc_to_loopback()
    log_here(errors)
