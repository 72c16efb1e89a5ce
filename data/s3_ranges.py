"""Ranged GETs from S3 at a fraction of boto3's CPU time (0.3 ms a request instead of 1.8).

It is what a stream asks for, over and over. Credentials, endpoint and trusted certificates are those of the boto3
client; the signature is AWS Signature Version 4 (docs.aws.amazon.com, "Signature calculations for the Authorization
Header"). Whatever is not an everyday answer (redirects, skewed clocks, other regions, proxies) is left to boto3.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
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

CONNECT_S, READ_S = 5.0, 20.0
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
        self._idle: deque[http.client.HTTPConnection] = deque(maxlen=32)
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
                connection.request("GET", path, headers=headers)
                answer = connection.getresponse()
            except (ConnectionError, http.client.BadStatusLine) as error:
                connection.close()
                if fresh:
                    raise ConnectionError(str(error)) from error
                continue  # the server had closed what we kept
            except BaseException:
                connection.close()
                raise
            break
        try:
            found = self._taken(answer, start, end, body)
        except http.client.HTTPException as error:
            connection.close()
            raise ConnectionError(str(error)) from error
        except BaseException:
            connection.close()
            raise
        if answer.isclosed() and not answer.will_close:
            self._idle.append(connection)
        else:
            connection.close()
        return found

    def _taken(self, answer: http.client.HTTPResponse, start: int, end: int, body: Body) -> bytes | None:
        if answer.status in (200, 206) and answer.length is not None:
            data = body(answer.read1, answer.length)
            answer.read()  # nothing is left; this ends the answer
            return data if answer.status == 206 else data[start:end]  # 200: a server that does not know ranges
        if answer.status == 416:
            answer.read()
            return b""
        text = answer.read(MAX_ERROR_BYTES).decode("utf-8", "replace")
        said = {name: re.search(f"<{name}>([^<]*)</{name}>", text) for name in ("Code", "Message")}
        error = {name: match[1] if match else "" for name, match in said.items()}
        if error["Code"] not in PLAIN_ERRORS and answer.status not in (429, 500, 502, 503, 504):
            return None
        about = {"Error": error, "ResponseMetadata": {"HTTPStatusCode": answer.status}}
        raise botocore.exceptions.ClientError(about, "GetObject")  # type: ignore[arg-type]

    def _connect(self) -> http.client.HTTPConnection:
        connection = (
            http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_S, context=self._context)
            if self._context
            else http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        )
        try:
            connection.connect()
        except ssl.SSLError as error:
            raise botocore.exceptions.SSLError(endpoint_url=self._endpoint, error=error) from error
        except OSError as error:  # no such name, refused, too late
            raise botocore.exceptions.EndpointConnectionError(endpoint_url=self._endpoint, error=error) from error
        connection.sock.settimeout(READ_S)
        return connection

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
