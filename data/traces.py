"""Spans for OpenTelemetry, sent to where OTEL_EXPORTER_OTLP_ENDPOINT says; without it nothing is imported or kept.

The standard's variables hold (OTEL_EXPORTER_OTLP_HEADERS, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, ...); what is sent is
OTLP over HTTP, from a thread of its own. Needs the extra `otel`. A collector that is away costs the traces, and a run
that ends the time of one more attempt.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

from scoreray.data.errors import UserError
from scoreray.data.extras import check_installed

EXPORTER = "opentelemetry.exporter.otlp.proto.http"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_MS, SEND_EVERY_MS = 5000, 1000  # a process that is killed takes what it has not sent with it

log = logging.getLogger(__name__)
_off: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_made: list[Any] = []  # [provider, tracer] of this process, or [None, None] where the packages are missing
_making = threading.Lock()


def span(name: str, **attributes: Any) -> contextlib.AbstractContextManager[Any]:
    """`with span("train.restore", rank=0):`; a child of this thread's span. Exceptions are recorded on it."""
    tracer = _tracer()
    return _off if tracer is None else tracer.start_as_current_span(name, attributes=_plain(attributes))


def finished(
    name: str,
    took_s: float,
    children: Iterable[tuple[str, float, float]] = (),
    headers: Mapping[str, str] | None = None,
    error: str = "",
    **attributes: Any,
) -> None:
    """A span that ends now and began `took_s` ago; children: (name, from, to), seconds after it began.

    headers: of a request; its `traceparent` (W3C Trace Context) is the parent.
    """
    tracer = _tracer()
    if tracer is None:
        return
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    end = time.time_ns()
    begin = end - int(took_s * 1e9)
    above = TraceContextTextMapPropagator().extract(dict(headers or {}))
    whole = tracer.start_span(name, above, start_time=begin, attributes=_plain(attributes))
    within = trace.set_span_in_context(whole)
    for child, start_s, end_s in children:
        part = tracer.start_span(child, within, start_time=begin + int(start_s * 1e9))
        part.end(begin + int(end_s * 1e9))
    if error:
        whole.set_status(trace.StatusCode.ERROR, error)
    whole.end(end)


def flush() -> None:
    """Sends what waits; where a process may be killed afterwards."""
    if _made and _made[0] is not None:
        _made[0].force_flush(FLUSH_MS)


def _tracer() -> Any:
    if not any(name in os.environ for name in ENDPOINTS):
        return None
    with _making:
        if not _made:
            _made.extend(_make())
    return _made[1]


def _make() -> tuple[Any, Any]:
    try:
        check_installed("otel", f"{ENDPOINTS[0]} is set, but no traces are sent", "opentelemetry.sdk", EXPORTER)
    except UserError as error:
        log.warning("%s", error)
        return None, None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    service = os.environ.get("OTEL_SERVICE_NAME", "scoreray")
    provider = TracerProvider(resource=Resource.create({"service.name": service, "process.pid": os.getpid()}))
    delay_ms = float(os.environ.get("OTEL_BSP_SCHEDULE_DELAY", SEND_EVERY_MS))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=delay_ms))
    return provider, provider.get_tracer("scoreray")


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {f"scoreray.{name}": value for name, value in attributes.items() if value is not None}
