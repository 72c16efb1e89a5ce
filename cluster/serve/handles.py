"""The replicas of a service as its ingress reaches them on Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from scoreray.sampling.service.request import Event, Lost, SampleRequest

READY_WITHIN_S = 600.0
LOOK_EVERY_S = 0.2


class RayBackend:
    """The replicas behind a Serve handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def draw(self, request: SampleRequest) -> AsyncGenerator[Event, None]:
        return _events(self._handle, request)

    async def prepare(self, checkpoint: str, ema: str) -> None:
        """On every replica that there is. Raises Lost where none could, with the reason of one.

        Waits for the first replica: Serve starts it together with the ingress, which on a busy machine is ready before
        it, and gives up on the service once the ingress has failed three times (measured: within 15 s).
        """
        until = time.monotonic() + READY_WITHIN_S
        while (
            not (outcomes := await self._all("prepare", READY_WITHIN_S, checkpoint, ema)) and time.monotonic() < until
        ):
            await asyncio.sleep(LOOK_EVERY_S)
        failed = [outcome for outcome in outcomes if outcome != ""]
        if failed or not outcomes:
            raise Lost(str(failed[0]) if failed else "no replica answers")

    async def metrics(self) -> dict[str, str]:
        pages = await self._all("metrics", 5.0)
        return dict(page for page in pages if isinstance(page, tuple))

    async def _all(self, method: str, timeout_s: float, *arguments: Any) -> list[Any]:
        """What every replica answers; nothing where there is none."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import DeploymentUnavailableError

        try:
            response = self._handle.broadcast(method, *arguments)
            outcomes = await response.results_async(timeout_s=timeout_s, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        return [outcome for outcome in outcomes if not isinstance(outcome, RayActorError)]  # dead: another will come


async def last_of(draw: AsyncGenerator[Event, None]) -> Event:
    """The last event of a draw: for one without previews, whose answer is one message."""
    async with contextlib.aclosing(draw) as events:
        everything = [event async for event in events]
    return everything[-1]


async def _events(handle: Any, request: SampleRequest) -> AsyncGenerator[Event, None]:
    """What `draw` yields behind a handle, or its last event alone, in one message. Raises Lost; leaving it cancels."""
    response: Any = None
    try:
        with _lost():
            if request.previews > 0:
                response = handle.options(stream=True).draw.remote(request)
                async for event in response:
                    yield event
            else:
                response = handle.draw_at_once.remote(request)
                yield await response
        response = None
    finally:
        if response is not None:
            response.cancel()


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """Raises Lost for every exception of Ray that says that a process died or is not reached in time.

    RayTaskError is the exception that the replica's own code raised: a bug, which another replica would only repeat.
    """
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except RayTaskError:
        raise
    except (RayError, RayServeException, TimeoutError) as error:
        raise Lost(f"{type(error).__name__}") from error
