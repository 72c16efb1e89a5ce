"""The answer to a request with `stream`: server-sent events, counted by how it ended, which is known only then."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from scoreray.sampling.http.traces import trace_request
from scoreray.sampling.service.config import HEADERS, Refused
from scoreray.sampling.service.draw import Draw, SampleAnswer
from scoreray.sampling.service.request import Preview
from scoreray.sampling.service.service import Service

HEARTBEAT_S = 15.0
CANCELLED = "cancelled"


class AnswerForm(Protocol):
    """How a draw is answered: as a whole, or as events, each the bytes of one or none. media: of the draw's samples."""

    media: str

    def whole(self, answer: SampleAnswer, request_id: str) -> Response: ...

    def start(self, draw: Draw, request_id: str) -> bytes: ...

    def preview(self, preview: Preview) -> bytes: ...

    def done(self, answer: SampleAnswer, request_id: str) -> bytes: ...

    def error(self, refusal: Refused, request_id: str) -> bytes: ...


class Events(StreamingResponse):
    """Events of a draw: its start, then previews, then its end or the refusal that it ended in.

    ended: called once with the outcome: ok, an error's code, or CANCELLED where the client went away before the last
    event, even before the first.
    """

    def __init__(
        self,
        service: Service,
        draw: Draw,
        request: Request,
        request_id: str,
        form: AnswerForm,
        headers: dict[str, str],
        ended: Callable[[str], None],
    ) -> None:
        super().__init__(self._events(), media_type="text/event-stream", headers={**HEADERS, **headers})
        self._service, self._draw, self._request, self._id = service, draw, request, request_id
        self._form, self._ended, self._outcome = form, ended, CANCELLED

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.leave(self._draw)
            self._ended(self._outcome)

    async def _events(self) -> AsyncIterator[bytes]:
        draw = self._draw
        try:
            yield self._form.start(draw, self._id)
            async for preview in self._previews():
                yield preview
            answer = await draw.answer()
            took_s = time.monotonic() - draw.started
            self._service.meter["request_seconds"].observe(took_s)
            trace_request(self._id, self._request.headers, "ok", took_s, answer.about)
            yield self._form.done(answer, self._id)
            self._outcome = "ok"
        except Refused as refusal:
            trace_request(self._id, self._request.headers, refusal.code, time.monotonic() - draw.started)
            yield self._form.error(refusal, self._id)
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
                yield self._form.preview(preview)
                pending = asyncio.ensure_future(anext(previews, None))
        finally:
            pending.cancel()


class SamplesForm:
    """Of `POST /v1/samples`: JSON, a PNG sheet or an npz; events start, preview, done (the JSON answer) and error."""

    def __init__(self, media: str) -> None:
        self.media = media

    def whole(self, answer: SampleAnswer, request_id: str) -> Response:
        if self.media == "application/json":
            return Response(answer.as_json(request_id), media_type=self.media, headers=HEADERS)
        about = {f"X-Scoreray-{name.replace('_', '-').title()}": _latin(value) for name, value in answer.about.items()}
        return Response(answer.body, media_type=self.media, headers={**HEADERS, **about})

    def start(self, draw: Draw, request_id: str) -> bytes:
        origin = draw.request.origin
        return event("start", {"id": request_id, "model": origin.model, "checkpoint": origin.checkpoint})

    def preview(self, preview: Preview) -> bytes:
        return event("preview", preview.page())

    def done(self, answer: SampleAnswer, request_id: str) -> bytes:
        return b"event: done\ndata: " + answer.as_json(request_id) + b"\n\n"

    def error(self, refusal: Refused, request_id: str) -> bytes:
        return event("error", refusal.page(request_id))


def event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()


def _latin(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text.encode("ascii", "backslashreplace").decode()
