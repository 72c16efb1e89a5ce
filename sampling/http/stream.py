"""The answer to a request with `stream`: server-sent events, counted by how it ended, which is known only then."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from scoreray.sampling.http.traces import trace_request
from scoreray.sampling.service.config import HEADERS, Refused
from scoreray.sampling.service.draw import Draw
from scoreray.sampling.service.service import Service

HEARTBEAT_S = 15.0
CANCELLED = "cancelled"


class Events(StreamingResponse):
    """Events of a draw: start, then previews, then done (as the JSON answer) or error (as the JSON error).

    ended: called once with the outcome: ok, an error's code, or CANCELLED where the client went away before the last
    event, even before the first.
    """

    def __init__(
        self,
        service: Service,
        draw: Draw,
        request: Request,
        request_id: str,
        headers: dict[str, str],
        ended: Callable[[str], None],
    ) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers={**HEADERS, **headers})
        self._service, self._draw, self._request, self._id = service, draw, request, request_id
        self._ended, self._outcome = ended, CANCELLED

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.leave(self._draw)
            self._ended(self._outcome)

    async def _events(self) -> AsyncIterator[bytes]:
        draw = self._draw
        try:
            origin = draw.request.origin
            yield _event("start", {"id": self._id, "model": origin.model, "checkpoint": origin.checkpoint})
            async for preview in self._previews():
                yield preview
            answer = await draw.answer()
            took_s = time.monotonic() - draw.started
            self._service.meter["request_seconds"].observe(took_s)
            trace_request(self._id, self._request.headers, "ok", took_s, answer.about)
            yield b"event: done\ndata: " + answer.as_json(self._id) + b"\n\n"
            self._outcome = "ok"
        except Refused as refusal:
            trace_request(self._id, self._request.headers, refusal.code, time.monotonic() - draw.started)
            yield _event("error", refusal.page(self._id))
            self._outcome = refusal.code

    async def _previews(self) -> AsyncIterator[bytes]:
        """Each as an event, and a comment every HEARTBEAT_S, as proxies close connections that are silent for long."""
        previews = self._draw.previews()
        pending = asyncio.ensure_future(anext(previews, None))
        try:
            while True:
                done, _ = await asyncio.wait({pending}, timeout=HEARTBEAT_S)
                if not done:
                    yield b": waiting\n\n"
                    continue
                preview = pending.result()
                if preview is None:
                    return
                yield _event("preview", preview.page())
                pending = asyncio.ensure_future(anext(previews, None))
        finally:
            pending.cancel()


def _event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()
