"""A client of a sampling service: retries that honour Retry-After, one idempotency key a call, numpy out.

from scoreray.sampling.service.client import Client
client = Client("http://127.0.0.1:8000", token="...")
samples = client.sample(count=16, sampler="heun", steps=18, seed=1)
samples.images        # uint8 [16, H, W, C]
again = client.sample(count=16, sampler="heun", steps=18, seed=samples.about["seed"])
"""

from __future__ import annotations

import io
import json
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import urllib3

from scoreray.data.errors import StorageError, UserError

FINAL = ("timed_out",)  # of the codes of 429 and 503: asking again would only wait again
LONGEST_PAUSE_S = 30.0
ABOUT = "x-scoreray-"  # of the headers that say what made the samples, where the answer is no JSON
NUMBERS: dict[str, type[int] | type[float]] = {
    **dict.fromkeys(("images_seen", "seed", "steps", "count"), int),
    **dict.fromkeys(("guidance", "queued_s", "took_s"), float),
}


class Declined(UserError):
    """The service refused the request for good; `code` is its word for why, `status` HTTP's."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{code} ({status}): {message}")
        self.status, self.code = status, code


@dataclass(frozen=True)
class Samples:
    """What was drawn. images: uint8 [n, H, W, C], or float32 [n, ...] of npy.

    about: what made them, named and typed as in the JSON answer: id, model, checkpoint, images_seen, seed, sampler, ...
    """

    images: np.ndarray
    labels: np.ndarray
    about: dict[str, Any]


class Client:
    """Calls one service; may be used by many threads. tries: how often a call is sent, also after a broken connection.

    Every call has an idempotency key of its own, so that trying again neither draws nor bills twice.
    """

    def __init__(self, url: str, token: str | None = None, *, tries: int = 8, timeout_s: float = 300.0) -> None:
        self.url, self.tries, self._reached = url.rstrip("/"), tries, False
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = urllib3.Timeout(connect=10, read=timeout_s)
        self._pool = urllib3.PoolManager(num_pools=4, maxsize=64, retries=False, timeout=timeout)

    def sample(self, *, key: str | None = None, **fields: Any) -> Samples:
        """Draws `count` samples; fields as in docs/serving.md, numbers of numpy too.

        Raises UserError (of which Declined is one), StorageError (no answer in `tries`).
        """
        _no_stream(fields)
        response = self._send(fields, key, {"Accept": "application/x-npz"})
        with np.load(io.BytesIO(response.data), allow_pickle=False) as arrays:
            images = arrays["images"] if "images" in arrays else arrays["samples"]
            return Samples(images, arrays["labels"], _about(response.headers))

    def sample_json(self, *, key: str | None = None, **fields: Any) -> dict[str, Any]:
        """The same as the service's JSON, with base64 pictures."""
        _no_stream(fields)
        return json.loads(self._send(fields, key, {"Accept": "application/json"}).data)

    def stream(self, *, key: str | None = None, **fields: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (event, data): start, previews with the denoised estimate, and done, whose data is the JSON answer.

        Begins again, with the same key, where the connection breaks before the end.
        """
        key = key or uuid.uuid4().hex
        for attempt in range(self.tries):
            response = self._send({**fields, "stream": True}, key, {"Accept": "text/event-stream"}, preload=False)
            try:
                for name, data in _events(response):
                    if name == "error":
                        raise Declined(0, data["code"], data["message"])
                    yield name, data
                    if name == "done":
                        return
            except (urllib3.exceptions.HTTPError, OSError):
                pass
            finally:
                response.close()
            time.sleep(_pause(attempt, None))
        raise StorageError(f"{self.url}: the stream broke {self.tries} times")

    def model(self) -> dict[str, Any]:
        """What is served: checkpoints, classes, samplers, limits."""
        return json.loads(
            self._try(lambda: self._pool.request("GET", f"{self.url}/v1/model", headers=self._headers)).data
        )

    def ready(self) -> bool:
        """Whether the service takes requests now."""
        try:
            return self._pool.request("GET", f"{self.url}/readyz").status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def _send(self, fields: dict[str, Any], key: str | None, headers: dict[str, str], preload: bool = True) -> Any:
        headers = {
            **self._headers,
            **headers,
            "Content-Type": "application/json",
            "Idempotency-Key": key or uuid.uuid4().hex,
        }
        body = _body(fields)
        return self._try(
            lambda: self._pool.request(
                "POST", f"{self.url}/v1/samples", body=body, headers=headers, preload_content=preload
            )
        )

    def _try(self, call: Callable[[], Any]) -> Any:
        """The first good answer of `tries` calls, with pauses between them: Retry-After's, or growing ones."""
        last, retry_after = "", None
        for attempt in range(self.tries):
            if attempt:
                time.sleep(_pause(attempt - 1, retry_after))
            retry_after = None
            try:
                response = call()
            except (urllib3.exceptions.HTTPError, OSError) as error:
                if not self._reached and (why := _never(error)):
                    raise UserError(f"{self.url}: {why}: check the url") from None
                last = f"{type(error).__name__}: {error}"
                continue
            self._reached = True
            if response.status == 200:
                return response
            data = response.data if response.data else response.read()
            code, message = _error(data)
            if (response.status < 500 and response.status != 429) or code in FINAL:
                raise Declined(response.status, code, message)
            retry_after, last = response.headers.get("retry-after"), f"{code} ({response.status}): {message}"
        raise StorageError(f"{self.url}: no answer in {self.tries} tries; the last: {last}")


def _no_stream(fields: dict[str, Any]) -> None:
    if fields.pop("stream", False):
        raise UserError("stream = True: `sample` gives the samples at once; call `stream` for previews on the way")


def _body(fields: dict[str, Any]) -> bytes:
    """The fields as JSON. Raises UserError for what JSON has no word for."""
    if "idempotency_key" in fields:
        raise UserError("idempotency_key: every call has one already; give your own as `key`")
    for name, value in fields.items():
        try:
            json.dumps(value, default=_plain, allow_nan=False)
        except (TypeError, ValueError):
            raise UserError(f"{name} = {value!r}: must be a finite number, a string, a bool, None or a dict") from None
    return json.dumps(fields, default=_plain).encode()


def _plain(value: Any) -> Any:
    """A number of numpy (or torch) as Python's."""
    if getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError


def _about(headers: Mapping[str, str]) -> dict[str, Any]:
    told = {name.lower(): value for name, value in headers.items()}
    about: dict[str, Any] = {"id": told.get("x-request-id")}
    for header, value in told.items():
        if header.startswith(ABOUT):
            name = header.removeprefix(ABOUT).replace("-", "_")
            about[name] = NUMBERS[name](value) if name in NUMBERS else value
    return about


def _never(error: BaseException) -> str | None:
    """Why a service that has never answered will not answer the next time either; None where it may."""
    if isinstance(error, urllib3.exceptions.LocationValueError):
        return "is no url of a service"
    if isinstance(error, urllib3.exceptions.SSLError):
        return f"TLS does not work there, the service may speak plain http ({error})"
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return "no host of that name is known"
    return None


def _pause(attempt: int, retry_after: str | None) -> float:
    """Seconds before the next try; spread, so that many clients do not come back at once."""
    if retry_after is not None and retry_after.isdigit():
        return min(LONGEST_PAUSE_S, float(retry_after)) * random.uniform(1.0, 1.25)
    return min(LONGEST_PAUSE_S, 0.1 * 2**attempt) * random.uniform(0.5, 1.0)


def _error(body: bytes) -> tuple[str, str]:
    try:
        data = json.loads(body)
        return str(data["code"]), str(data["message"])
    except (ValueError, KeyError, TypeError):
        return "unknown", body[:200].decode(errors="replace")


def _events(response: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Server-sent events of a response that is read as it comes. Raises ProtocolError where it breaks off."""
    buffer = b""
    while chunk := response.read1(65536) if hasattr(response, "read1") else response.read(65536):
        buffer += chunk
        while b"\n\n" in buffer:
            block, _, buffer = buffer.partition(b"\n\n")
            lines = dict(line.split(": ", 1) for line in block.decode().split("\n") if ": " in line[1:])
            if "event" in lines:
                yield lines["event"], json.loads(lines["data"])
    raise urllib3.exceptions.ProtocolError("the stream ended before its last event")
