"""Ranged GETs from S3 at a fraction of boto3's CPU time (0.3 ms a request instead of 1.8).

It is what a stream asks for, over and over. Credentials, endpoint and trusted certificates are those of the boto3
client; the signature is AWS Signature Version 4 (docs.aws.amazon.com, "Signature calculations for the Authorization
Header"). Whatever is not an everyday answer (redirects, skewed clocks, other regions, proxies) is left to boto3.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import ssl
import time
import urllib.request
from collections import deque
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urlsplit

import botocore.exceptions
import botocore.httpsession

from scoreray.data.storage.connection import Answer, Connection

CONNECT_S, BEGIN_S, PIECE_S = 5.0, 20.0, 10.0
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
MAX_ERROR_BYTES = 1 << 16
PLAIN_ERRORS = {"NoSuchKey", "NoSuchBucket", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "SlowDown",
                "ExpiredToken", "ExpiredTokenException", "InternalError", "ServiceUnavailable"}  # fmt: skip

Body = Callable[[Any, int], bytes]  # (read1, size): the body of an answer


class Ranges:
    """GETs of ranges through connections that are kept; used by several threads.

    Args:
      client: of boto3, for its endpoint and region.
      session: of botocore, for credentials (refreshed by it when they expire) and certificates.
    """

    def __init__(self, client: Any, session: Any) -> None:
        self._endpoint = client.meta.endpoint_url
        at = urlsplit(self._endpoint)
        self._host, self._port, self._netloc, self._path = at.hostname or "", at.port, at.netloc, at.path.rstrip("/")
        self._region = client.meta.region_name
        self._credentials = session.get_credentials()
        self._context: ssl.SSLContext | None = None
        if at.scheme == "https":
            bundle = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE") or True
            self._context = ssl.create_default_context(cafile=botocore.httpsession.get_cert_path(bundle))
        proxied = at.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(self._host)
        self.usable = self._credentials is not None and bool(self._region) and not proxied
        self._idle: deque[Connection] = deque(maxlen=32)
        self._key: tuple[tuple[str, str], bytes] = ("", ""), b""

    def get(self, bucket: str, key: str, start: int, end: int, body: Body) -> bytes | None:
        """Bytes [start, end) of the object, fewer where it ends; None when boto3 should be asked.

        Raises botocore's ClientError and connection errors, and OSError."""
        path = quote(f"{self._path}/{bucket}/{key}", safe="/-_.~")
        headers = self._signed(path, f"bytes={start}-{end - 1}")
        while True:
            try:
                connection, fresh = self._idle.pop(), False
            except IndexError:
                connection, fresh = self._connect(), True
            try:
                answer = connection.get(path, headers)
            except ConnectionError:
                connection.close()
                if fresh:
                    raise
                continue  # the server had closed what we kept
            except BaseException:
                connection.close()
                raise
            break
        try:
            found = self._taken(answer, start, end, body)
        finally:
            if answer.keeps and answer.left == 0:
                self._idle.append(connection)
            else:
                connection.close()
        return found

    def _taken(self, answer: Answer, start: int, end: int, body: Body) -> bytes | None:
        if answer.status == 206 and answer.left is not None:
            if answer.left > end - start:
                raise ConnectionError(f"{answer.left} bytes came where {end - start} were asked for")
            return body(answer.read1, answer.left)
        if answer.status == 200 and answer.left is not None:  # a server that does not know ranges
            return body(answer.read1, min(answer.left, end))[start:]
        text = _error_text(answer)
        if answer.status == 416:
            return b""
        said = {name: re.search(f"<{name}>([^<]*)</{name}>", text) for name in ("Code", "Message")}
        error = {name: match[1] if match else "" for name, match in said.items()}
        if error["Code"] not in PLAIN_ERRORS and answer.status not in (429, 500, 502, 503, 504):
            return None
        about = {"Error": error, "ResponseMetadata": {"HTTPStatusCode": answer.status}}
        raise botocore.exceptions.ClientError(about, "GetObject")  # type: ignore[arg-type]

    def _connect(self) -> Connection:
        port = self._port or (443 if self._context else 80)
        try:
            return Connection(self._host, port, self._context, CONNECT_S, BEGIN_S, PIECE_S)
        except ssl.SSLError as error:
            raise botocore.exceptions.SSLError(endpoint_url=self._endpoint, error=error) from error
        except OSError as error:  # no such name, refused, too late
            raise botocore.exceptions.EndpointConnectionError(endpoint_url=self._endpoint, error=error) from error

    def _signed(self, path: str, wanted: str) -> dict[str, str]:
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        credentials = self._credentials.get_frozen_credentials()
        headers = {"host": self._netloc, "range": wanted, "x-amz-content-sha256": EMPTY_SHA256, "x-amz-date": now}
        if credentials.token:
            headers["x-amz-security-token"] = credentials.token
        names = ";".join(headers)  # in alphabetical order
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        request = hashlib.sha256(f"GET\n{path}\n\n{lines}\n{names}\n{EMPTY_SHA256}".encode()).hexdigest()
        scope = f"{now[:8]}/{self._region}/s3/aws4_request"
        if self._key[0] != (credentials.secret_key, now[:8]):
            key = f"AWS4{credentials.secret_key}".encode()
            for part in (now[:8], self._region, "s3", "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._key = (credentials.secret_key, now[:8]), key
        text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{request}"
        signature = hmac.digest(self._key[1], text.encode(), "sha256").hex()
        who = f"{credentials.access_key}/{scope}"
        headers["authorization"] = f"AWS4-HMAC-SHA256 Credential={who}, SignedHeaders={names}, Signature={signature}"
        return headers

    def close(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()


def _error_text(answer: Answer) -> str:
    """What a server says of an error, as far as it comes soon: it may be in pieces of a length each (chunked)."""
    text, deadline = b"", time.monotonic() + PIECE_S
    with contextlib.suppress(TimeoutError):
        while len(text) < MAX_ERROR_BYTES and time.monotonic() < deadline:
            if answer.left is None and b"</Error>" in text:
                break
            part = answer.read1(MAX_ERROR_BYTES if answer.left is not None else 1)
            if not part:
                break
            text += part
    return text.decode("utf-8", "replace")
