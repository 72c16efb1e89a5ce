"""The HTTP of a sampling service, a FastAPI application over a `Service`: see docs/serving.md.

Everything is served from here: the page, its documentation, the metrics. No request goes elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from scoreray.sampling.http.docs_page import docs_page, request_schema, response_descriptions
from scoreray.sampling.http.headers import check_host, request_id_of, url_of
from scoreray.sampling.http.images import (
    GENERATIONS,
    ImagesBody,
    ImagesForm,
    error_page,
    is_openais,
    models_page,
    status_of,
)
from scoreray.sampling.http.parse import check_key, read_body
from scoreray.sampling.http.stream import CANCELLED, AnswerForm, Events, SamplesForm
from scoreray.sampling.http.traces import trace_request
from scoreray.sampling.service.answers import choose_media
from scoreray.sampling.service.body import SampleBody
from scoreray.sampling.service.config import ERRORS, HEADERS, Refused
from scoreray.sampling.service.draw import Draw, SampleAnswer
from scoreray.sampling.service.service import Service

log = logging.getLogger("scoreray.serve")

DRAWS = ("/v1/samples", GENERATIONS)  # paths whose requests are for samples


def make_app(service: Service) -> FastAPI:
    """The application. `service` may still be starting; until it is ready, samples are refused with 503."""
    app = FastAPI(
        title="scoreray",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,  # a redirect would go to a url made of the Host header, which the client chooses
        description="Draws samples from trained models; see docs/serving.md.",
    )

    app.add_middleware(_UntilSent, service=service)

    of_samples = response_descriptions("application/json", "image/png", "application/x-npz", "text/event-stream")
    of_images = response_descriptions("application/json", "text/event-stream", status_of=status_of)

    @app.post("/v1/samples", openapi_extra=request_schema(SampleBody), responses=of_samples)
    async def samples(request: Request) -> Response:
        """Draws samples: JSON with base64, or by Accept one PNG sheet or an npz; events when `stream`."""
        return await _answered(service, request, _samples)

    of_json = response_descriptions("application/json")

    @app.post("/v1/cost", openapi_extra=request_schema(SampleBody), responses=of_json)
    async def cost(request: Request) -> Response:
        """What a request for samples would cost, without drawing them: its sampler, steps and grid, `calls` of the
        network for a sample, and the `rows` of all calls."""
        return await _answered(service, request, _cost)

    @app.post(GENERATIONS, openapi_extra=request_schema(ImagesBody), responses=of_images)
    async def images(request: Request) -> Response:
        """Draws pictures for a prompt, as OpenAI's endpoint of this name does; `extra_body` of its client has room for
        the fields that are ours."""
        return await _answered(service, request, _images)

    @app.get("/v1/models")
    async def model_list(request: Request) -> Response:
        """The names of the models, as OpenAI lists its own."""
        return await _answered(service, request, _model_list)

    @app.get("/v1/model")
    async def model(request: Request) -> Response:
        """The models that are served: checkpoints, EMA lengths, classes, samplers with their options, limits."""
        return await _answered(service, request, _model)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """For Prometheus, of the service and all its replicas."""
        return await _answered(service, request, _metrics)

    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while the service runs at all."""
        return Response("ok\n", media_type="text/plain")

    @app.get("/readyz")
    async def readyz(request: Request) -> Response:
        """200 once the models are loaded and warm, until it is asked to end; 503 else."""
        if service.ready and not service.draining:
            return Response("ready\n", media_type="text/plain")
        code = "draining" if service.draining else "starting"
        return _refused(request, Refused(code, ERRORS[code][1], retry_after_s=1))

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return _json(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> Response:
        html = docs_page(app.openapi(), url_of(request), bool(service.config.tokens))
        return Response(html, media_type="text/html", headers=HEADERS)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(
            (files("scoreray.sampling.http") / "page.html").read_text(), media_type="text/html", headers=HEADERS
        )

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        code = {404: "no_path", 405: "bad_method"}.get(error.status_code, "bad_header")
        message = {"no_path": "no such path; see /docs", "bad_method": "this path does not take this method; see /docs"}
        refusal = Refused(code, message.get(code, str(error.detail)))
        return _refused(request, refusal, dict(error.headers or {}))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        """The client hung up, so nobody reads this. It is counted already, and is no bug for the log of errors."""
        return Response(status_code=400)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        log.error("request %s", request_id_of(request), exc_info=error)
        return _bug(request)

    for route in [route for route in app.routes if isinstance(route, APIRoute) and "GET" in (route.methods or ())]:
        app.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
    return app


class _UntilSent:
    """Middleware: a request for samples stays in `service.answering` until its answer is sent, so a drain can wait."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] not in DRAWS:
            return await self._app(scope, receive, send)
        request = object()
        self._service.answering.add(request)
        try:
            await self._app(scope, receive, send)
        finally:
            self._service.answering.discard(request)


async def _answered(
    service: Service, request: Request, handle: Callable[[Service, Request, str, str], Awaitable[Response]]
) -> Response:
    """Runs one handler behind the checks that all share; its end is always one answer and one line in the log."""
    request_id, started, who = request_id_of(request), time.monotonic(), "-"
    try:
        check_host(request, service.config.hosts)
        who = request.state.who = service.access.who(request.headers.get("authorization"))
        response = await handle(service, request, who, request_id)
        code = "ok"
    except Refused as refusal:
        response, code = _refused(request, refusal), refusal.code
    except (ClientDisconnect, asyncio.CancelledError):
        _count(service, request, CANCELLED, started)
        raise
    except Exception:
        log.exception("request %s", request_id)
        response, code = _bug(request), "bug"
    response.headers["X-Request-ID"] = request_id
    if isinstance(response, Events):
        return response  # counts when it has ended
    _count(service, request, code, started)
    if request.url.path in DRAWS:
        took_s = time.monotonic() - started
        if code == "ok":
            service.meter["request_seconds"].observe(took_s)
        trace_request(request_id, request.headers, code, took_s, getattr(request.state, "about", None))
    return response


def _count(service: Service, request: Request, code: str, started: float) -> None:
    """A line in the log for every request; those for samples are counted by how they ended."""
    took_ms, who = (time.monotonic() - started) * 1e3, getattr(request.state, "who", "-")
    log.info("%s %s %s %s %s %.0f ms", request.method, request.url.path, who, request_id_of(request), code, took_ms)
    if request.url.path not in DRAWS:
        return
    service.meter["requests"].labels(code).inc()
    if code == CANCELLED:
        service.meter["cancels"].inc()
    elif ERRORS.get(code, (0,))[0] in (429, 503):
        service.meter["sheds"].labels(code).inc()


async def _samples(service: Service, request: Request, who: str, request_id: str) -> Response:
    body = await read_body(request, service.max_body_bytes, SampleBody)
    form = SamplesForm("application/json" if body.stream else choose_media(request.headers.get("accept")))
    return await _drawn(service, request, who, body, form, body.stream)


async def _cost(service: Service, request: Request, who: str, request_id: str) -> Response:
    return _json(await service.cost(await read_body(request, service.max_body_bytes, SampleBody)))


async def _images(service: Service, request: Request, who: str, request_id: str) -> Response:
    body = await read_body(request, service.max_body_bytes, ImagesBody)
    served = service.served(body.model)
    samples = body.as_samples(served, service.limits)
    return await _drawn(service, request, who, samples, ImagesForm(body, served), bool(body.stream))


async def _drawn(
    service: Service, request: Request, who: str, body: SampleBody, form: AnswerForm, stream: bool
) -> Response:
    """The answer to a request for samples, in its form: as a whole, or as events where it streams."""
    key = check_key(request.headers.get("idempotency-key"), body.idempotency_key)
    draw = await service.submit(body, token=who, key=key, media=form.media)
    joined = draw.joined > 1
    if stream:
        return await _stream(service, draw, request, form, joined)
    try:
        answer = await _unless_gone(request, draw)
    finally:
        service.leave(draw)
    request.state.about = answer.about
    response = await asyncio.to_thread(form.whole, answer, request_id_of(request))
    response.headers.update(_replayed(joined or draw.replayed))
    return response


async def _stream(service: Service, draw: Draw, request: Request, form: AnswerForm, joined: bool) -> Response:
    """The events of a draw once a replica has taken it. Raises Refused where none does: an answer and no stream."""
    started = time.monotonic()
    try:
        await draw.accepted.wait()
        if draw.task is not None and draw.task.done():
            await draw.answer()
    except BaseException:
        service.leave(draw)
        raise
    headers = _replayed(joined or draw.replayed)
    return Events(
        service, draw, request, request_id_of(request), form, headers,
        lambda outcome: _count(service, request, outcome, started),
    )  # fmt: skip


async def _model(service: Service, request: Request, who: str, request_id: str) -> Response:
    pages = [served.page(service.limits) for served in service.all_served()]
    return _json({**pages[0], "models": pages})


async def _model_list(service: Service, request: Request, who: str, request_id: str) -> Response:
    return _json(models_page(service.all_served(), service.started_at))


async def _metrics(service: Service, request: Request, who: str, request_id: str) -> Response:
    return Response(await service.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _unless_gone(request: Request, draw: Draw) -> SampleAnswer:
    """The answer, unless the client goes away first (ClientDisconnect)."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer, left = asyncio.ensure_future(draw.answer()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        for task in (answer, left):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def _refused(request: Request, refusal: Refused, headers: dict[str, str] | None = None) -> Response:
    request_id = request_id_of(request)
    headers = {**HEADERS, **(headers or {}), **refusal.headers(request_id)}
    if is_openais(request.url.path):
        return _json(error_page(refusal), status_of(refusal.status), headers)
    return _json(refusal.page(request_id), refusal.status, headers)


def _bug(request: Request) -> Response:
    where = f"the service's standard error has its traceback, under request {request_id_of(request)}"
    return _refused(request, Refused("bug", f"this is a bug in scoreray; {where}"))


def _replayed(is_so: bool) -> dict[str, str]:
    """The header of an answer that was drawn for an earlier request with the same key, or is just being drawn."""
    return {"Idempotent-Replayed": "true"} if is_so else {}


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """JSON in ASCII: what a client sent may hold characters that have no UTF-8."""
    return Response(json.dumps(data), status, headers or HEADERS, "application/json")
