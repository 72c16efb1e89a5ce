"""What Ray Serve's HTTP proxy runs for us: time limits for connections, and refusals in JSON.

uvicorn's protocol limits idle connections only, one byte resets that limit, and what is no HTTP gets plain text: a
client that sends a byte now and then (slowloris) would hold its connection for ever. Ray Serve starts uvicorn in a
process of its own, which calls `in_serves_proxy` as RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH says. Without torch: that
process needs no more than HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.middleware import Middleware
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from scoreray.sampling.service.config import HEADERS, Refused

log = logging.getLogger("scoreray.serve")

MAX_HEADER_BYTES = 64 << 10
BY_STATUS = {404: "no_path", 405: "bad_method", 408: "timed_out", 429: "overloaded"}
UNAVAILABLE = "the process that answers requests has died or is not ready yet: ask again"


@dataclass(frozen=True)
class ConnectionTimeouts:
    """Seconds, each counted from the event that is named; bytes that arrive meanwhile do not reset them.

    idle_s: for a request to begin. header_s: from a request's first byte to the end of its header. rest_s: to the
    end of a body that is answered already, or of what follows a refusal. stall_s: while the client reads nothing.
    """

    idle_s: float = 60.0
    header_s: float = 30.0
    rest_s: float = 5.0
    stall_s: float = 60.0


class TimedHttpProtocol(HttpToolsProtocol):
    """One connection. While a request is being answered none of these limits runs: the application has its own."""

    timeouts = ConnectionTimeouts()

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.ws_protocol_class = None  # nothing here speaks WebSocket: such a request is answered as any other
        self._in_header = self._in_message = self._refused = False
        self._header_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._within(self.timeouts.idle_s, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return  # read on, so that the answer is not lost to a reset (RFC 9112, 9.6)
        in_header = self._in_header
        super().data_received(data)
        if in_header and self._in_header:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self.refuse(Refused("bad_request", f"the header is larger than {MAX_HEADER_BYTES} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_header = self._in_message = True
        self._header_bytes = 0
        if not self._answering():
            self._within(self.timeouts.header_s, self._header_is_late)

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._unlimited()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_message = False
        if not self._answering():
            self._within(self.timeouts.idle_s, self._hang_up)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._hang_up()
        elif self._answering():
            self._unlimited()  # the next of several that came at once
        elif self._in_header:
            self._within(self.timeouts.header_s, self._header_is_late)
        elif self._in_message:
            self._within(self.timeouts.rest_s, self._hang_up)
        else:
            self._within(self.timeouts.idle_s, self._hang_up)

    def send_400_response(self, msg: str) -> None:
        self.refuse(Refused("bad_request", "this is no request of HTTP/1.1"))

    def refuse(self, refusal: Refused) -> None:
        """Answers and hangs up; where a request before this one is being answered, hangs up after that."""
        if self._answering():
            self.cycle.keep_alive = False
            return
        self._refused = True
        request_id = uuid.uuid4().hex
        body = json.dumps(refusal.page(request_id)).encode()
        status = HTTPStatus(refusal.status)
        headers = {**HEADERS, "Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [f"{name}: {value}" for name, value in {**headers, "X-Request-ID": request_id}.items()]
        head = "\r\n".join([f"HTTP/1.1 {status.value} {status.phrase}", *lines, "Connection: close", "", ""])
        self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self._within(self.timeouts.rest_s, self._hang_up)
        else:  # TLS
            self._hang_up()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self.timeouts.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _header_is_late(self) -> None:
        self.refuse(Refused("too_slow", f"the header did not arrive within {self.timeouts.header_s:g} s"))

    def _hang_up(self) -> None:
        """Closes; what is written and not read yet has `stall_s` left."""
        self.transport.close()
        self._within(self.timeouts.stall_s, self.transport.abort)

    def _within(self, seconds: float, otherwise: Callable[[], None]) -> None:
        self._unlimited()
        self._timer = self.loop.call_later(seconds, otherwise)

    def _unlimited(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class JsonRefusals:
    """Around an ASGI application: an answer of 400 and above that is no JSON becomes one of ours, by its status.

    Ray Serve's listener answers in plain text where there is no application, or its process has died.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        replaced = False

        async def send_json(message: Any) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] >= 400:
                headers = {bytes(name).lower(): bytes(value) for name, value in message.get("headers", ())}
                replaced = not headers.get(b"content-type", b"").startswith(b"application/json")
                if replaced:
                    request_id = headers.get(b"x-request-id", b"").decode("latin-1") or uuid.uuid4().hex
                    for one in _in_json(message["status"], request_id):
                        await send(one)
            if not replaced:
                await send(message)

        await self._app(scope, receive, send_json if scope["type"] == "http" else send)


def _in_json(status: int, request_id: str) -> list[dict[str, Any]]:
    code = BY_STATUS.get(status, "unavailable" if status >= 500 else "bad_request")
    message = UNAVAILABLE if code == "unavailable" else HTTPStatus(status).phrase.lower()
    refusal = Refused(code, message)
    body = json.dumps(refusal.page(request_id)).encode()
    headers = {**HEADERS, **refusal.headers(request_id), "Content-Length": str(len(body))}
    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return [
        {"type": "http.response.start", "status": refusal.status, "headers": pairs},
        {"type": "http.response.body", "body": body},
    ]


def in_serves_proxy() -> list[Middleware]:
    """Ray Serve calls this in its proxy's process, before that listens, and wraps the application in the result.

    uvicorn takes a protocol class (`http=`), but Serve 2.60 has no setting to pass one: so the class that uvicorn's
    default, "auto", stands for is replaced by ours. Without that (another uvicorn) the service works, without limits.
    """
    try:
        import uvicorn.config

        uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{TimedHttpProtocol.__module__}:{TimedHttpProtocol.__qualname__}"
    except (AttributeError, TypeError) as error:
        log.warning("slow and idle connections are not closed: %s", error)
    return [Middleware(JsonRefusals)]
