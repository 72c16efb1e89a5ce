"""A client of a sampling service: retries that honour Retry-After, one idempotency key a call, numpy out.

from scoreray.sampling.http.client import Client
client = Client("http://127.0.0.1:8000", token="...")
samples = client.sample(count=16, sampler="heun", steps=18, seed=1)
samples.images        # uint8 [16, H, W, C]
again = client.sample(count=16, sampler="heun", steps=18, seed=samples.about["seed"])
drawn = client.sample(condition={"caption": "a red square", "coarse": np.load("field.npy")}, guidance={"caption": 4.0})
"""

from __future__ import annotations

import base64
import io
import json
import random
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import urllib3

from scoreray.data.errors import StorageError, UserError

FINAL = ("timed_out",)  # codes of 503 after which another try would only wait as long again
LONGEST_PAUSE_S = 30.0
ABOUT = "x-scoreray-"  # prefix of the headers that say what made the samples, where the answer is not JSON
TYPED = frozenset(
    (
        "images_seen",
        "seed",
        "steps",
        "count",
        "guidance",
        "conditions",
        "acceptance",
        "calls",
        "rows",
        "parallel",
        "queued_s",
        "took_s",
    )
)
"""Of these headers the value is JSON; the others are text."""


class Declined(UserError):
    """The service refused the request for good; `code` is one of those in docs/serving.md, `status` HTTP's."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{code} ({status}): {message}")
        self.status, self.code = status, code


@dataclass(frozen=True)
class SampleBatch:
    """The samples of one answer. images: uint8 [n, H, W, C], or float32 [n, ...] of npy, in the data's own units.

    about: what made them, named and typed as in the JSON answer: id, model, checkpoint, images_seen, seed, sampler, ...
    """

    images: np.ndarray
    labels: np.ndarray
    about: dict[str, Any]


class _Retry(urllib3.Retry):
    """urllib3's count of tries and pauses (Retry-After's, or growing ones), spread so that clients come back apart."""

    def get_retry_after(self, response: urllib3.BaseHTTPResponse) -> float | None:
        try:
            seconds = super().get_retry_after(response)
        except urllib3.exceptions.InvalidHeader:
            return None
        return None if seconds is None else min(LONGEST_PAUSE_S, seconds) * random.uniform(1.0, 1.25)


class Client:
    """Calls one service; may be used by many threads. tries: how often a call is sent, also after a broken connection.

    Every call has an idempotency key of its own, so that trying again neither draws nor bills twice.
    """

    def __init__(self, url: str, token: str | None = None, *, tries: int = 8, timeout_s: float = 300.0) -> None:
        self.url, self.tries, self._reached = url.rstrip("/"), tries, False
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        timeout = urllib3.Timeout(connect=10, read=timeout_s)
        self._retry: urllib3.Retry = _Retry(
            tries - 1, backoff_factor=0.1, backoff_max=LONGEST_PAUSE_S, backoff_jitter=0.1
        )
        self._pool = urllib3.PoolManager(num_pools=4, maxsize=64, retries=False, timeout=timeout)

    def sample(self, *, key: str | None = None, **fields: Any) -> SampleBatch:
        """Draws `count` samples; fields as in docs/serving.md, numbers of numpy too, and arrays as conditions.

        Raises UserError (of which Declined is one), StorageError (no answer in `tries`).
        """
        _no_stream(fields)
        response = self._send(fields, key, {"Accept": "application/x-npz"})
        with np.load(io.BytesIO(response.data), allow_pickle=False) as arrays:
            images = arrays["images"] if "images" in arrays else arrays["samples"]
            return SampleBatch(images, arrays["labels"], _about(response.headers))

    def sample_json(self, *, key: str | None = None, **fields: Any) -> dict[str, Any]:
        """The same as the service's JSON, with base64 pictures."""
        _no_stream(fields)
        return json.loads(self._send(fields, key, {"Accept": "application/json"}).data)

    def stream(self, *, key: str | None = None, **fields: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (event, data): start, previews with the denoised estimate, and done, whose data is the JSON answer.

        Begins again, with the same key, where the connection breaks before the end.
        """
        key, retry = key or uuid.uuid4().hex, self._retry
        while True:
            response = self._send(
                {**fields, "stream": True}, key, {"Accept": "text/event-stream"}, preload_content=False
            )
            try:
                for name, data in _events(response):
                    if name == "error":
                        raise Declined(0, data["code"], data["message"])
                    yield name, data
                    if name == "done":
                        return
            except (urllib3.exceptions.HTTPError, OSError) as error:
                last = f"the stream broke off: {error}"
            finally:
                response.close()
            retry = self._wait(retry, last)

    def model(self) -> dict[str, Any]:
        """What is served: checkpoints, classes, samplers, limits."""
        return json.loads(self._request("GET", "/v1/model", self._headers).data)

    def ready(self) -> bool:
        """Whether the service takes requests now."""
        try:
            return self._pool.request("GET", f"{self.url}/readyz").status == 200
        except urllib3.exceptions.HTTPError:
            return False

    def _send(self, fields: dict[str, Any], key: str | None, headers: dict[str, str], **how: Any) -> Any:
        """POSTs a request for samples. how: of urllib3."""
        more = {"Content-Type": "application/json", "Idempotency-Key": key or uuid.uuid4().hex}
        return self._request("POST", "/v1/samples", {**self._headers, **headers, **more}, body=_body(fields), **how)

    def _request(self, method: str, path: str, headers: dict[str, str], **how: Any) -> Any:
        """The first good answer of `tries` calls. Raises UserError where another would get no other, StorageError."""
        retry = self._retry
        while True:
            response: urllib3.BaseHTTPResponse | None = None
            try:
                response = self._pool.request(method, self.url + path, headers=headers, **how)
                if response.status != 200:
                    code, message = _error(response.data)
            except (urllib3.exceptions.HTTPError, OSError) as error:
                if not self._reached and (why := _never(error)):
                    raise UserError(f"{self.url}: {why}: check the url") from None
                last = f"{type(error).__name__}: {error}"
            else:
                self._reached = True
                if response.status == 200:
                    return response
                if (response.status < 500 and response.status != 429) or code in FINAL:
                    raise Declined(response.status, code, message)
                last = f"{code} ({response.status}): {message}"
            retry = self._wait(retry, last, response)

    def _wait(self, retry: urllib3.Retry, last: str, response: Any = None) -> urllib3.Retry:
        """Pauses before the next try, with what counts that one. Raises StorageError where there is none."""
        try:
            retry = retry.increment(response=response)
        except urllib3.exceptions.MaxRetryError:
            raise StorageError(f"{self.url}: no answer in {self.tries} tries; the last: {last}") from None
        retry.sleep(response)
        return retry


def _no_stream(fields: dict[str, Any]) -> None:
    if fields.pop("stream", False):
        raise UserError("stream = True: `sample` gives the samples at once; call `stream` for previews on the way")


def _body(fields: dict[str, Any]) -> bytes:
    """The fields as JSON. Raises UserError for what JSON has no word for."""
    if "idempotency_key" in fields:
        raise UserError("idempotency_key: every call has one already; give your own as `key`")
    parts = []
    for name, value in fields.items():
        try:
            default = _array if name == "condition" else _plain
            parts.append(f"{json.dumps(name)}: {json.dumps(value, default=default, allow_nan=False)}")
        except (TypeError, ValueError) as error:
            if name == "condition":
                raise UserError(f"condition: {error}: must be text, finite numbers or arrays, by name") from None
            raise UserError(f"{name} = {value!r}: must be a finite number, a string, a bool, None or a dict") from None
    return f"{{{', '.join(parts)}}}".encode()


def _plain(value: Any) -> Any:
    """A number of numpy (or torch) as Python's."""
    if getattr(value, "shape", None) == ():
        return value.item()
    raise TypeError(f"a {type(value).__name__}")


def _array(value: Any) -> Any:
    """An array of numpy (or a tensor of torch, on the CPU) as the base64 of an .npy."""
    if not getattr(value, "shape", None):
        return _plain(value)
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(value), allow_pickle=False)
    return {"npy": base64.b64encode(file.getvalue()).decode()}


def _about(headers: Mapping[str, str]) -> dict[str, Any]:
    given = {name.lower(): value for name, value in headers.items()}
    about: dict[str, Any] = {"id": given.get("x-request-id")}
    for header, value in given.items():
        if header.startswith(ABOUT):
            name = header.removeprefix(ABOUT).replace("-", "_")
            about[name] = json.loads(value) if name in TYPED else value
    return about


def _never(error: BaseException) -> str | None:
    """Why a service that has not answered once will not answer the next time either; None where it may."""
    if isinstance(error, urllib3.exceptions.LocationValueError):
        return "is no url of a service"
    if isinstance(error, urllib3.exceptions.SSLError):
        return f"TLS does not work there, the service may speak plain http ({error})"
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return "no host of that name is known"
    return None


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
