"""Objects in an S3 bucket, through boto3: one client per process, retries with backoff, errors in one line."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextvars import Context, ContextVar, copy_context
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import boto3
import botocore.exceptions
import botocore.session
import urllib3.exceptions
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from scoreray.data.errors import StorageError, Unanswered, UserError
from scoreray.data.storage.s3_ranges import Ranges
from scoreray.data.storage.store import NotFound, Store, abandoned, check_key

log = logging.getLogger(__name__)

PATIENCE_S = 60.0  # how long a store that does not answer is asked again, on top of botocore's own attempts
BODY_S, LEAST_BYTES_PER_S = 10.0, 1e6  # an answer of n bytes may take BODY_S + n / LEAST_BYTES_PER_S
MULTIPART_BYTES = 64 << 20  # objects above this are uploaded in parts
CODES_NO_KEY = {"NoSuchKey", "404", "NotFound"}
CODES_CREDENTIALS = {"403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
EXPIRED_S = 20.0  # how long credentials that have expired are looked up again, where a rotation may be under way
CODES_EXPIRED = {"ExpiredToken", "RequestExpired", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
CODES_BUSY = {"500", "502", "503", "504", "InternalError", "ServiceUnavailable", "SlowDown", "Throttling",
              "RequestLimitExceeded", "RequestTimeout", "OperationAborted"}  # fmt: skip

T = TypeVar("T")


class Expired(StorageError):
    """The credentials have expired; those that the machine has may by now be others."""


class S3Store(Store):
    """Objects of s3://bucket/prefix."""

    is_remote: ClassVar[bool] = True

    @property
    def _bucket(self) -> str:
        return self.root[5:].partition("/")[0]

    def _at(self, key: str) -> dict[str, str]:
        prefix = self.root[5:].partition("/")[2]
        return {"Bucket": self._bucket, "Key": f"{prefix}/{check_key(key)}" if prefix else check_key(key)}

    def check_writable(self) -> None:
        _brief().run(super().check_writable)

    def check_reachable(self) -> None:
        _brief().run(self.exists, "scoreray-probe")

    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        if end is not None and end <= (start or 0):
            return b""
        ranged = start is not None or end is not None
        extra = {"Range": f"bytes={start or 0}-{'' if end is None else end - 1}"} if ranged else {}

        def read() -> bytes:
            if end is not None and (ranges := _ranges()).usable:
                at = self._at(key)
                data = ranges.get(at["Bucket"], at["Key"], start or 0, end, _body)
                if data is not None:
                    return data
            try:
                answer = client().get_object(**self._at(key), **extra)
            except botocore.exceptions.ClientError as error:
                if error.response["Error"].get("Code") in ("InvalidRange", "416"):
                    return b""
                raise
            with contextlib.closing(answer["Body"]) as body:
                raw = body._raw_stream  # StreamingBody waits for all
                data = _body(lambda size: raw.read1(min(size, 1 << 18)), int(answer["ContentLength"]))
            if ranged and "ContentRange" not in answer and (start or end is not None):
                return data[start or 0 : end]  # a server that does not know ranges sent all of it
            return data

        return _ask(self.url(key), read)

    def put(self, key: str, data: bytes | Path) -> None:
        at = self._at(key)
        if isinstance(data, Path):
            config = TransferConfig(multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES // 4)
            _ask(self.url(key), lambda: client().upload_file(str(data), at["Bucket"], at["Key"], Config=config))
        else:
            _ask(self.url(key), lambda: client().put_object(**at, Body=data))

    def put_new(self, key: str, data: bytes) -> bool:
        def write() -> bool:
            try:
                client().put_object(**self._at(key), Body=data, IfNoneMatch="*")
            except botocore.exceptions.ClientError as error:
                if error.response["Error"].get("Code") in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
                    return False
                raise
            return True

        return _ask(self.url(key), write)

    def size(self, key: str) -> int:
        def head() -> int:
            try:
                return client().head_object(**self._at(key))["ContentLength"]
            except botocore.exceptions.ClientError as error:
                if error.response["Error"].get("Code") in CODES_NO_KEY:
                    client().list_objects_v2(Bucket=self._bucket, MaxKeys=1)  # a HEAD can't tell a missing bucket
                raise

        return _ask(self.url(key), head)

    def _listed(self, prefix: str) -> list[tuple[str, Any]]:
        folder = self.root[5:].partition("/")[2]
        skip = len(folder) + 1 if folder else 0

        def pages() -> list[tuple[str, Any]]:
            found = []
            full = f"{folder}/{prefix}" if folder else prefix
            for page in client().get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=full):
                found += [(item["Key"][skip:], item) for item in page.get("Contents", [])]
            return [(key, item) for key, item in found if not key.endswith("/")]

        return _ask(self.url(), pages)

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        return sorted((key, item["Size"]) for key, item in self._listed(prefix))

    def stamps(self) -> dict[str, str]:
        return {key: item["ETag"].strip('"') or str(item["LastModified"]) for key, item in self._listed("")}

    def delete(self, keys: Iterable[str]) -> None:
        objects = [{"Key": self._at(key)["Key"]} for key in keys]
        for i in range(0, len(objects), 1000):  # the API's limit
            answer = _ask(self.url(), partial(self._delete, objects[i : i + 1000]))
            for failed in answer.get("Errors", []):
                if failed.get("Code") not in CODES_NO_KEY:
                    reason = failed.get("Message") or failed.get("Code")
                    raise StorageError(f"s3://{self._bucket}/{failed.get('Key')}: can't be deleted: {reason}")

    def clear_unfinished(self, prefix: str, but: str) -> None:
        def uploads() -> list[tuple[str, str]]:
            pages = client().get_paginator("list_multipart_uploads")
            found = pages.paginate(Bucket=self._bucket, Prefix=self._at(prefix.rstrip("/"))["Key"])
            return [(item["Key"], item["UploadId"]) for page in found for item in page.get("Uploads", [])]

        for key, upload in _ask(self.url(), uploads):
            if but not in key:
                _ask(self.url(), partial(self._abort, key, upload))

    def _abort(self, key: str, upload: str) -> None:
        with contextlib.suppress(client().exceptions.NoSuchUpload):
            client().abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload)

    def _delete(self, objects: Sequence[dict[str, str]]) -> Any:
        return client().delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})


def _brief() -> Context:
    """A context in which a store that does not answer is given up soon: for checks that a person waits for."""
    context = copy_context()
    context.run(_patience_s.set, 2.0)
    return context


_clients: dict[tuple[str | None, ...], tuple[Any, Ranges]] = {}
_lock = threading.Lock()


def _forget_clients() -> None:
    """A forked child has its own connections and locks."""
    global _lock
    _clients.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_clients)


def client() -> Any:
    """This process's S3 client for the endpoint and credentials that the environment names now."""
    return _client_and_ranges()[0]


def _ranges() -> Ranges:
    return _client_and_ranges()[1]


def _client_and_ranges() -> tuple[Any, Ranges]:
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
             "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION")  # fmt: skip
    key = tuple(os.environ.get(name) for name in names)
    with _lock:
        for name in names[:2]:
            if os.environ.get(name) and "://" not in os.environ[name]:
                raise UserError(f"{name}={os.environ[name]}: an endpoint starts with http:// or https://")
        if key not in _clients:
            session = botocore.session.get_session()
            made = boto3.session.Session(botocore_session=session).client(
                "s3",
                region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
                config=Config(
                    s3={"addressing_style": "path"},
                    retries={"mode": "standard", "total_max_attempts": 4},
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    connect_timeout=5,
                    read_timeout=20,
                    max_pool_connections=32,
                ),
            )
            _clients[key] = made, Ranges(made, session)
        return _clients[key]


_patience_s: ContextVar[float] = ContextVar("patience_s", default=math.inf)  # less than PATIENCE_S, where set
num_retries = 0  # of this process, beyond botocore's own; for metrics


def _ask(url: str, request: Callable[[], T]) -> T:
    """The answer to `request`, asked again with backoff while the store is busy or cut off, up to PATIENCE_S."""
    global num_retries
    started, patience_s = time.monotonic(), min(PATIENCE_S, _patience_s.get())
    for attempt in range(1000):
        try:
            return request()
        except Exception as error:
            explained = _explain(url, error)
            if explained is None:
                raise
            wait_s = min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0)
            deadline = started + (min(patience_s, EXPIRED_S) if isinstance(explained, Expired) else patience_s)
            if not isinstance(explained, Unanswered | Expired) or time.monotonic() + wait_s > deadline:
                raise explained from error
            if isinstance(explained, Expired) and attempt:
                with _lock:
                    _clients.clear()  # the next one asks the environment, ~/.aws and the machine's role anew
            num_retries += 1
            log.warning("asking again (%d): %s", attempt + 1, explained)
            given_up = abandoned.get()
            if given_up is None:
                time.sleep(wait_s)
            elif given_up.wait(wait_s):
                raise explained from error
    raise AssertionError("unreachable: the deadline ends the loop")


def _body(read1: Callable[[int], bytes], size: int) -> bytes:
    """`size` bytes of an answer, within a time that grows with them: a server that trickles would else hold us for
    ever, as each byte restarts the socket's own time-out."""
    deadline = time.monotonic() + BODY_S + size / LEAST_BYTES_PER_S
    parts, missing = [], size
    while missing:
        part = read1(missing)
        if not part:
            raise ConnectionError(f"{missing} of {size} bytes are missing")
        parts.append(part)
        missing -= len(part)
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"{missing} of {size} bytes had not come in time")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _explain(url: str, error: Exception) -> StorageError | None:
    """The one-line error for what boto3 raised, or None when it is not about storage."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    known = botocore.exceptions
    if isinstance(error, boto3.exceptions.S3UploadFailedError):
        error = error.__context__ if isinstance(error.__context__, Exception) else error
    if isinstance(error, known.ClientError):
        return _explain_answer(url, endpoint, error)
    if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError):
        return StorageError(
            f"{url}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)"
        )
    if isinstance(error, known.EndpointConnectionError | known.ConnectTimeoutError | known.ProxyConnectionError):
        return Unanswered(f"{url}: the endpoint {endpoint} is not reachable; check AWS_ENDPOINT_URL and the network")
    if isinstance(error, known.SSLError):
        return StorageError(f"{url}: no trusted TLS connection to {endpoint}; check its certificate, AWS_CA_BUNDLE")
    if isinstance(error, known.HTTPClientError | urllib3.exceptions.HTTPError | ConnectionError | TimeoutError):
        return Unanswered(f"{url}: the connection to {endpoint} broke off ({type(error).__name__})")
    if isinstance(error, known.BotoCoreError | boto3.exceptions.Boto3Error):
        return StorageError(f"{url}: {' '.join(str(error).split())}")
    if isinstance(error, OSError):
        return StorageError(f"{url}: {error.filename or ''} {error.strerror or error}")
    return None


def _explain_answer(url: str, endpoint: str, error: botocore.exceptions.ClientError) -> StorageError:
    code = str(error.response["Error"].get("Code", ""))
    status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    bucket = url[5:].partition("/")[0]
    if code == "NoSuchBucket":
        return StorageError(f"{url}: bucket '{bucket}' does not exist at {endpoint}; create it or mend the URL")
    if code in CODES_EXPIRED:
        return Expired(f"{url}: the credentials have expired; get new ones and run the same command again")
    if code in CODES_NO_KEY:
        return NotFound(f"{url}: no such object")
    if code in CODES_BUSY or status in CODES_BUSY:
        return Unanswered(f"{url}: {endpoint} is busy ({code or status})")
    if code == "NoSuchUpload":
        return Unanswered(f"{url}: its upload was removed meanwhile, as what another start clears up; it begins again")
    if code in CODES_CREDENTIALS or status == "403":
        return StorageError(
            f"{url}: credentials refused ({code}) at {endpoint}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            f"AWS_ENDPOINT_URL and the policy of bucket '{bucket}'"
        )
    if code in ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return StorageError(f"{url}: bucket '{bucket}' lies in another region; set AWS_REGION to it")
    if code in ("XAmzContentSHA256Mismatch", "BadDigest", "IncompleteBody", "RequestTimeTooSkewed"):
        return Unanswered(f"{url}: the request arrived damaged or late ({code}); check the network and the clock")
    message = " ".join(str(error.response["Error"].get("Message") or code or status).split())
    return StorageError(f"{url}: {endpoint} refused: {message}")
