"""The configuration of a sampling service (models, sizes, limits), and the codes of everything that it refuses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from scoreray.data.errors import UserError, readable
from scoreray.data.units import MOST_THREADS


@dataclass(frozen=True)
class Limits:
    """What one request, one token and one replica may hold. Rows are samples; with guidance each costs two or more."""

    max_body_bytes: int = 64 << 10
    max_condition_bytes: int = 4 << 20  # of one condition's values; a body may then have twice as many more
    max_count: int = 256
    max_steps: int = 1000
    max_calls: int = 10_000  # of the network, for one sample
    max_request_s: float = 120.0
    max_waiting_rows: int = 1024  # in one replica; above it the next request is refused
    max_wait_s: float = 30.0  # estimated, from the calls that wait and the time of one
    token_requests: int = 64
    token_rows: int = 2048
    remember_keys: int = 10_000
    remember_bytes: int = 64 << 20
    remember_s: float = 3600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise UserError(f"{name} = {value}: must be a positive number")


@dataclass(frozen=True)
class ServeConfig:
    """A service. models: (name, URL) pairs, the first is the default; a run's URL follows its newest checkpoint.

    adapters: (name, URL) pairs of LoRAs of the one model, both URLs of checkpoints, so that all replicas have the same.
    ema: the default length, None for each run's first. max_models: weights that a replica keeps in memory at once.
    precision, compile: see `fast.py`. parallel: whether a request that is alone, of few samples, runs in parallel in
    time (`sampling/samplers/parallel.py`). reload_s: how often runs are searched for a newer checkpoint.
    keys: where idempotency keys are stored (`open_key_store`); empty for the memory of the process that answers HTTP.
    tokens: (name, SHA-256 of the token in hex) pairs; empty lets everybody in. hosts: Host headers that are answered,
    empty for all. samplers: `package.module:Name` of those of somebody else's that requests may name.
    """

    models: tuple[tuple[str, str], ...]
    adapters: tuple[tuple[str, str], ...] = ()
    ema: str | None = None
    max_batch: int = 32
    max_models: int = 4
    precision: str = "auto"
    compile: str = "auto"
    warmup_s: float = 120.0
    threads: int | None = None
    parallel: bool = False
    reload_s: float = 10.0
    limits: Limits = field(default_factory=Limits)
    keys: str = ""
    tokens: tuple[tuple[str, str], ...] = ()
    hosts: tuple[str, ...] = ()
    samplers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("no model to serve: give at least one checkpoint")
        for what, pairs in (("models", self.models), ("adapters", self.adapters)):
            names = [name for name, _ in pairs]
            if len(set(names)) < len(names):
                raise UserError(f"{what} {', '.join(names)}: a name stands twice; write NAME=URL to choose others")
        if self.adapters and len(self.models) > 1:
            raise UserError("--lora: of one model; serve others on their own")
        if self.adapters and self.compile == "on":
            raise UserError("--compile on: adapters are chosen call by call, which can't be compiled; leave one out")
        if self.max_models < 2:
            raise UserError(f"max_models = {self.max_models}: must be 2 or more, for the old and the new at a reload")
        for name, most in (("max_batch", 1_000_000), ("threads", MOST_THREADS), ("reload_s", 1_000_000)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise UserError(f"{name} = {value}: must be above 0, at most {most:,}")


ERRORS: dict[str, tuple[int, str]] = {
    "bad_request": (400, "what came is no HTTP/1.1 request, or its header is larger than 64 KiB"),
    "bad_json": (400, "the body is not JSON, or nested or numbered beyond reason"),
    "bad_header": (400, "a header (Host, Idempotency-Key, Content-Length) can't be used"),
    "no_token": (401, "no bearer token, or one that is not known"),
    "no_path": (404, "no such path"),
    "no_model": (404, "no model of that name is served here"),
    "bad_method": (405, "the path does not take this method"),
    "too_slow": (408, "the request's header did not arrive within 30 s"),
    "body_too_large": (413, "the body is larger than the limit"),
    "condition_too_large": (413, "a condition has more bytes than the limit"),
    "not_json": (415, "the content type is not application/json"),
    "invalid": (422, "a field is unknown, of a wrong type or out of its range"),
    "too_many": (422, "count, steps or calls of the network are above the limit"),
    "not_finite": (422, "these options lead to numbers that are not finite"),
    "key_reused": (422, "this idempotency key came with another request, or another Accept, before"),
    "token_busy": (429, "this token already has as many requests or rows under way as it may have"),
    "overloaded": (503, "too many rows wait"),
    "starting": (503, "the service is not ready yet"),
    "draining": (503, "the service is shutting down"),
    "timed_out": (503, "the samples were not ready within the time limit"),
    "replica_lost": (503, "replica after replica died during this request"),
    "ledger_lost": (503, "the store of idempotency keys can't be reached; the same key again is billed once"),
    "storage": (503, "the checkpoint can't be read at the moment"),
    "unavailable": (503, "the process that answers requests has died, or is not ready yet"),
    "bug": (500, "a bug in scoreray"),
}
"""Codes of errors: HTTP status, and what each means. Clients may rely on them."""


HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}
"""Of every answer."""


class Refused(Exception):
    """A request that is not answered with samples: an answer of HTTP, and no bug. `code` is one of ERRORS."""

    def __init__(self, code: str, message: str, *, field: str | None = None, retry_after_s: float | None = None):
        super().__init__(code, message, field, retry_after_s)
        message = readable(message).replace("\n", " ")  # names and values that were sent may hold line breaks
        self.code, self.message, self.field, self.retry_after_s = code, message, field, retry_after_s

    @property
    def status(self) -> int:
        return ERRORS[self.code][0]

    @property
    def retry_after(self) -> str | None:
        """The header's value: whole seconds, on 429 and 503 only."""
        if self.status not in (429, 503):
            return None
        return str(max(1, math.ceil(self.retry_after_s or 1)))

    def page(self, request_id: str) -> dict[str, str]:
        """The JSON of the answer."""
        page = {"code": self.code, "message": self.message, "request_id": request_id}
        return {**page, "field": self.field} if self.field else page

    def headers(self, request_id: str) -> dict[str, str]:
        """What the answer has beside HEADERS."""
        headers = {"Content-Type": "application/json", "X-Request-ID": request_id}
        if self.retry_after is not None:
            headers["Retry-After"] = self.retry_after
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="scoreray"'
        return headers


@contextlib.contextmanager
def refused_at(field: str) -> Iterator[None]:
    """A UserError inside it is a refusal (`invalid`) that names this field of the request."""
    try:
        yield
    except UserError as error:
        raise Refused("invalid", str(error), field=field) from None
