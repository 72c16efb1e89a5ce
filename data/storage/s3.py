"""Objects in an S3 bucket: ranged reads through obstore, all else through boto3; one client per process.

A ranged read is what a stream makes, over and over: obstore takes a tenth of boto3's CPU time for one (0.16 ms, not
1.4, at 64 KB: benchmarks/RESULTS.md). Credentials, endpoint and certificates are boto3's, and so is every answer out
of the ordinary (redirects to another region, skewed clocks, servers without ranges), which it knows how to follow.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import boto3
import botocore.exceptions
import botocore.httpsession
import botocore.session
import obstore
import obstore.store
import urllib3.exceptions
from boto3.s3.transfer import TransferConfig

from scoreray.data.errors import StorageError, Unanswered
from scoreray.data.storage import clouds
from scoreray.data.storage.interface import PROBE, Store, StoredObject, UnfinishedWrite, check_key
from scoreray.data.storage.retries import (
    CODES_BUSY,
    CODES_CREDENTIALS,
    CODES_EXPIRED,
    CODES_NO_BUCKET,
    CODES_NO_KEY,
    Refusal,
    brief,
    explain_refusal,
    retried,
)
from scoreray.data.storage.s3_access import access_now, bucket_of, client, renew

BODY_S, LEAST_BYTES_PER_S = 10.0, 1 << 20  # an answer of n bytes may take BODY_S + n / LEAST_BYTES_PER_S
MULTIPART_BYTES = 64 << 20  # objects above this are uploaded in parts
SETTINGS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL"
# Errors that boto3 would only repeat; it answers others itself (another region, a skewed clock).
PLAIN_ERRORS = CODES_NO_KEY | CODES_NO_BUCKET | CODES_CREDENTIALS | CODES_EXPIRED | CODES_BUSY

T = TypeVar("T")


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
        brief().run(super().check_writable)

    def check_reachable(self) -> None:
        brief().run(self.exists, PROBE)

    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        if end is not None and end <= (start or 0):
            return b""
        ranged = start is not None or end is not None
        extra = {"Range": f"bytes={start or 0}-{'' if end is None else end - 1}"} if ranged else {}

        def read() -> bytes:
            if end is not None and (data := _read_range(self._at(key), start or 0, end)) is not None:
                return data
            try:
                answer = client().get_object(**self._at(key), **extra)
            except botocore.exceptions.ClientError as error:
                if error.response["Error"].get("Code") in ("InvalidRange", "416"):
                    return b""
                raise
            with contextlib.closing(answer["Body"]) as body:
                data = _read_body(body._raw_stream, int(answer["ContentLength"]))  # StreamingBody has no such deadline
            if ranged and "ContentRange" not in answer and (start or end is not None):
                return data[start or 0 : end]  # a server that does not know ranges sent all of it
            return data

        return _retried(self.url(key), read)

    def put(self, key: str, data: bytes | Path) -> None:
        at = self._at(key)
        if isinstance(data, Path):
            config = TransferConfig(multipart_threshold=MULTIPART_BYTES, multipart_chunksize=MULTIPART_BYTES // 4)
            _retried(self.url(key), lambda: client().upload_file(str(data), at["Bucket"], at["Key"], Config=config))
        else:
            _retried(self.url(key), lambda: client().put_object(**at, Body=data))

    def put_new(self, key: str, data: bytes) -> bool:
        def write() -> bool:
            try:
                client().put_object(**self._at(key), Body=data, IfNoneMatch="*")
            except botocore.exceptions.ClientError as error:
                if error.response["Error"].get("Code") in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
                    return False
                raise
            return True

        return _retried(self.url(key), write)

    def size(self, key: str) -> int:
        def head() -> int:
            try:
                return client().head_object(**self._at(key))["ContentLength"]
            except botocore.exceptions.ClientError as error:
                if error.response["Error"].get("Code") in CODES_NO_KEY:
                    client().list_objects_v2(Bucket=self._bucket, MaxKeys=1)  # a HEAD can't tell a missing bucket
                raise

        return _retried(self.url(key), head)

    def _listed(self, prefix: str) -> list[tuple[str, Any]]:
        folder = self.root[5:].partition("/")[2]
        skip = len(folder) + 1 if folder else 0

        def pages() -> list[tuple[str, Any]]:
            found = []
            full = f"{folder}/{prefix}" if folder else prefix
            for page in client().get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=full):
                found += [(item["Key"][skip:], item) for item in page.get("Contents", [])]
            return [(key, item) for key, item in found if not key.endswith("/")]

        return _retried(self.url(), pages)

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        return sorted((key, item["Size"]) for key, item in self._listed(prefix))

    def objects(self, prefix: str = "") -> Sequence[StoredObject]:
        found = self._listed(prefix)
        return sorted(StoredObject(key, item["Size"], item["LastModified"].timestamp()) for key, item in found)

    def unfinished(self, prefix: str = "") -> Sequence[UnfinishedWrite]:
        found = [self._unfinished(key, upload, begun) for key, upload, begun in self._uploads(prefix)]
        return sorted(one for one in found if one is not None)

    def _unfinished(self, full: str, upload: str, begun_s: float) -> UnfinishedWrite | None:
        """None where it has ended meanwhile."""

        def parts() -> list[Any]:
            try:
                pages = client().get_paginator("list_parts").paginate(Bucket=self._bucket, Key=full, UploadId=upload)
                return [part for page in pages for part in page.get("Parts", [])]
            except client().exceptions.NoSuchUpload:
                return [None]

        found, folder = _retried(self.url(), parts), self.root[5:].partition("/")[2]
        if None in found:
            return None
        written_s = max([begun_s, *(part["LastModified"].timestamp() for part in found)])
        key = full.removeprefix(f"{folder}/") if folder else full
        return UnfinishedWrite(key, sum(part["Size"] for part in found), written_s, upload)

    def abandon(self, writes: Iterable[UnfinishedWrite]) -> None:
        for one in writes:
            _retried(self.url(one.key), partial(self._abort, self._at(one.key)["Key"], one.token))

    def stamps(self) -> dict[str, str]:
        return {key: item["ETag"].strip('"') or str(item["LastModified"]) for key, item in self._listed("")}

    def delete(self, keys: Iterable[str]) -> None:
        objects = [{"Key": self._at(key)["Key"]} for key in keys]
        for i in range(0, len(objects), 1000):  # the API's limit
            answer = _retried(self.url(), partial(self._delete, objects[i : i + 1000]))
            for failed in answer.get("Errors", []):
                if failed.get("Code") not in CODES_NO_KEY:
                    reason = failed.get("Message") or failed.get("Code")
                    raise StorageError(f"s3://{self._bucket}/{failed.get('Key')}: can't be deleted: {reason}")

    def clear_unfinished(self, prefix: str, but: str) -> None:
        for key, upload, _ in self._uploads(prefix):
            if but not in key:
                _retried(self.url(), partial(self._abort, key, upload))

    def _uploads(self, prefix: str) -> Sequence[tuple[str, str, float]]:
        """(whole key, upload's name, Unix time of its begin)."""
        folder = self.root[5:].partition("/")[2]
        full = f"{folder}/{prefix}" if folder else prefix

        def uploads() -> Sequence[tuple[str, str, float]]:
            found = (
                client().get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=full.rstrip("/"))
            )
            items = [item for page in found for item in page.get("Uploads", []) if item["Key"].startswith(full)]
            return [(item["Key"], item["UploadId"], item["Initiated"].timestamp()) for item in items]

        return _retried(self.url(), uploads)

    def _abort(self, key: str, upload: str) -> None:
        with contextlib.suppress(client().exceptions.NoSuchUpload):
            client().abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload)

    def _delete(self, objects: Sequence[dict[str, str]]) -> Any:
        return client().delete_objects(Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True})


def _read_range(at: dict[str, str], start: int, end: int) -> bytes | None:
    """Bytes [start, end) of an object, fewer where it ends; None where boto3 should be used instead."""
    access = access_now()
    if not clouds.usable_here():
        return None
    try:
        # obstore's time limit is the client's, not the request's: a client for each power of two of MiB.
        limit_s = BODY_S + (1 << ((end - start - 1) >> 20).bit_length()) * (1 << 20) / LEAST_BYTES_PER_S
        if (bucket := access.buckets.get((at["Bucket"], limit_s))) is None:
            bucket = access.buckets.setdefault((at["Bucket"], limit_s), bucket_of(access, at["Bucket"], limit_s))
        return obstore.get_range(bucket, at["Key"], start=start, end=end).to_bytes()
    except ValueError:  # no credentials, a key that obstore does not take
        return None
    except clouds.ERRORS as error:
        if clouds.is_beyond_the_end(error):
            return b""
        if (refusal := clouds.refusal_of(error)) is None:
            plain = "HTTP error" in str(error)  # of the network
        else:
            plain = (refusal.code or refusal.status) in PLAIN_ERRORS or refusal.status in CODES_BUSY
        if plain:
            raise
        return None


def _retried(url: str, request: Callable[[], T]) -> T:
    return retried(url, request, _explain, renew)


def _read_body(stream: Any, size: int) -> bytes:
    """`size` bytes of an answer, within a time that grows with them: each byte restarts the socket's own timeout, so a
    server that trickles would hold us for ever."""
    deadline = time.monotonic() + BODY_S + size / LEAST_BYTES_PER_S
    parts, missing = [], size
    while missing:
        part = stream.read1(min(missing, 1 << 18))
        if not part:
            raise ConnectionError(f"{missing} of {size} bytes are missing")
        parts.append(part)
        missing -= len(part)
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"{missing} of {size} bytes had not come in time")
    return b"".join(parts)


def _explain(url: str, error: Exception) -> StorageError | None:
    """The one-line error for what boto3 or obstore raised, or None when it is not about storage."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    known = botocore.exceptions
    if isinstance(error, boto3.exceptions.S3UploadFailedError):
        error = error.__context__ if isinstance(error.__context__, Exception) else error
    if isinstance(error, clouds.ERRORS):
        return clouds.explain(url, endpoint, SETTINGS, error)
    if isinstance(error, known.ClientError):
        status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
        code, message = (str(error.response["Error"].get(name) or "") for name in ("Code", "Message"))
        return explain_refusal(url, endpoint, Refusal(status, code, message), SETTINGS)
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
