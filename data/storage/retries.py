"""Requests to a remote store: repeated while it is busy or out of reach, and its refusals as one-line errors."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from typing import TypeVar

from scoreray.data.errors import StorageError, Unanswered
from scoreray.data.storage.interface import NotFound, abandoned
from scoreray.data.storage.stats import counting

log = logging.getLogger(__name__)

PATIENCE_S = 60.0  # how long requests to a store that does not answer are repeated
EXPIRED_S = 20.0  # and those with expired credentials, as a rotation may be under way
BRIEF_S = 2.0  # where a person waits for the check
CODES_NO_KEY = {"NoSuchKey", "404", "NotFound", "BlobNotFound", "ResourceNotFound"}
CODES_NO_BUCKET = {"NoSuchBucket", "ContainerNotFound"}
CODES_CREDENTIALS = {"403", "401", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch",
                     "AuthenticationFailed"}  # fmt: skip
CODES_EXPIRED = {"ExpiredToken", "RequestExpired", "ExpiredTokenException", "TokenRefreshRequired", "InvalidToken"}
CODES_BUSY = {"429", "500", "502", "503", "504", "InternalError", "ServiceUnavailable", "SlowDown", "Throttling",
              "RequestLimitExceeded", "RequestTimeout", "OperationAborted", "ServerBusy",
              "OperationTimedOut"}  # fmt: skip
CODES_REGION = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
CODES_DAMAGED = {"XAmzContentSHA256Mismatch", "BadDigest", "IncompleteBody", "RequestTimeTooSkewed"}

T = TypeVar("T")
_patience_s: ContextVar[float] = ContextVar("patience_s", default=math.inf)  # less than PATIENCE_S, where set


class Expired(StorageError):
    """The credentials have expired; a rotation may have put new ones in place."""


@dataclass(frozen=True)
class Refusal:
    """What a store answered instead of what was requested: the HTTP status, the provider's code, its message."""

    status: str
    code: str
    message: str = ""


def brief() -> Context:
    """A context in which a store that does not answer is given up soon: for checks that a person waits for."""
    context = copy_context()
    context.run(_patience_s.set, BRIEF_S)
    return context


def retried(
    url: str,
    request: Callable[[], T],
    explain: Callable[[str, Exception], StorageError | None],
    renew: Callable[[], None],
) -> T:
    """The result of `request`, which is repeated with backoff while the store is busy or out of reach.

    Args:
      explain: the one-line error for what `request` raised, or None where it is not about storage.
      renew: makes the next request look up the credentials again.

    Raises StorageError: at once where a repetition can't help, else after PATIENCE_S.
    """
    started, patience_s = time.monotonic(), min(PATIENCE_S, _patience_s.get())
    expired_at: float | None = None
    for attempt in range(1000):
        try:
            return request()
        except Exception as error:
            explained = explain(url, error)
            if explained is None:
                raise
            wait_s = min(5.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0)
            deadline = started + patience_s
            if isinstance(explained, Expired):
                expired_at = expired_at or time.monotonic()  # before that it may have been slow for another reason
                deadline = min(deadline, expired_at + EXPIRED_S)
            if not isinstance(explained, Unanswered | Expired) or time.monotonic() + wait_s > deadline:
                raise explained from error
            if isinstance(explained, Expired) and attempt:
                renew()
            if (stats := counting.get()) is not None:
                stats.add(num_retries=1)
            log.warning("retry %d: %s", attempt + 1, explained)
            given_up = abandoned.get()
            if given_up is None:
                time.sleep(wait_s)
            elif given_up.wait(wait_s):
                raise explained from error
    raise AssertionError("unreachable: the deadline ends the loop")


def explain_refusal(url: str, endpoint: str, refusal: Refusal, settings: str) -> StorageError:
    """`settings`: the names of the environment variables that hold this store's credentials."""
    status, code, bucket = refusal.status, refusal.code, url.split("/")[2]
    if code in CODES_NO_BUCKET:
        return StorageError(f"{url}: bucket '{bucket}' does not exist at {endpoint}; create it or fix the URL")
    if code in CODES_EXPIRED:
        return Expired(f"{url}: the credentials have expired; get new ones and run the same command again")
    if code in CODES_NO_KEY:
        return NotFound(f"{url}: no such object")
    if code in CODES_BUSY or status in CODES_BUSY:
        return Unanswered(f"{url}: {endpoint} is busy ({code or status})")
    if code == "NoSuchUpload":
        return Unanswered(
            f"{url}: its multipart upload was removed meanwhile, by another start that clears up; it begins again"
        )
    if code in CODES_DAMAGED:  # before the status: a skewed clock is a 403 too
        return Unanswered(f"{url}: the request arrived damaged or late ({code}); check the network and the clock")
    if code in CODES_CREDENTIALS or status in CODES_CREDENTIALS:
        return StorageError(
            f"{url}: credentials refused ({code or status}) at {endpoint}; check {settings} and the policy of bucket "
            f"'{bucket}'"
        )
    if code in CODES_REGION:
        return StorageError(f"{url}: bucket '{bucket}' is in another region; set AWS_REGION to it")
    return StorageError(f"{url}: {endpoint} refused: {' '.join((refusal.message or code or status).split())}")
