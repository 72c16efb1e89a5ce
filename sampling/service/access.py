"""Bearer tokens, and how many requests and rows each may have under way."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from scoreray.data.errors import UserError
from scoreray.sampling.service.config import Limits, Refused

VARIABLE = "SCORERAY_TOKENS"
MIN_CHARACTERS = 16
NOBODY = "anonymous"


def read_tokens(file: Path | None) -> tuple[tuple[str, str], ...]:
    """(name, SHA-256) of each token in `file`, else in SCORERAY_TOKENS. Raises UserError, never showing a token.

    One a line (in the variable also separated by commas): `name:token`, or `name:sha256:HEX` to keep the token itself
    out of the file. Empty lines and lines that begin with # are skipped; a file or a variable with nothing else is
    refused: it was set to keep people out, and without tokens everybody is let in. An empty variable counts as not set.
    """
    if file is not None:
        try:
            text, where = file.read_text(), f"--token-file {file}"
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--token-file {file}: can't be read: {getattr(error, 'strerror', None) or error}"
            ) from None
        given = True
    else:
        text, where = os.environ.get(VARIABLE, "").replace(",", "\n"), VARIABLE
        given = text != ""
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, colon, secret = line.partition(":")
        here = f"{where}, line {number}"
        if not colon or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
            raise UserError(f"{here}: write name:token, the name of letters, digits and ._-")
        if name in found:
            raise UserError(f"{here}: the name '{name}' stands twice")
        if secret.startswith("sha256:"):
            digest = secret.removeprefix("sha256:").lower()
            if not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise UserError(f"{here}: after sha256: 64 hexadecimal digits are needed")
        elif len(secret) < MIN_CHARACTERS:
            raise UserError(f"{here}: the token of '{name}' has fewer than {MIN_CHARACTERS} characters")
        else:
            digest = hash_of(secret)
        found[name] = digest
    if given and not found:  # no token would mean no check at all
        raise UserError(f"{where}: holds no token; write one line for each, name:token, or leave it out")
    return tuple(found.items())


def hash_of(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether a host to listen on is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Access:
    """Checks tokens, and counts what each has under way (requests, rows)."""

    def __init__(self, tokens: tuple[tuple[str, str], ...], limits: Limits) -> None:
        self._tokens, self._limits = tokens, limits
        self._requests: Counter[str] = Counter()
        self._rows: Counter[str] = Counter()

    def who(self, authorization: str | None) -> str:
        """The name of the token in an Authorization header. Raises Refused; takes equally long for every token."""
        if not self._tokens:
            return NOBODY
        scheme, _, token = (authorization or "").partition(" ")
        digest = hash_of(token.strip())
        found = None
        for name, known in self._tokens:
            if hmac.compare_digest(known, digest):
                found = name
        if scheme.lower() != "bearer" or found is None:
            raise Refused("no_token", "send the header 'Authorization: Bearer TOKEN' with a token of this service")
        return found

    @contextlib.contextmanager
    def under_way(self, name: str, rows: int) -> Iterator[None]:
        """Counts a request while it is drawn. Raises Refused when the token then had more than it may have."""
        for what, used, more, most in (
            ("requests", self._requests[name], 1, self._limits.token_requests),
            ("rows", self._rows[name], rows, self._limits.token_rows),
        ):
            if used + more > most and used > 0:
                raise Refused(
                    "token_busy", f"'{name}' has {used} {what} under way, at most {most} are allowed", retry_after_s=1
                )
        self._requests[name] += 1
        self._rows[name] += rows
        try:
            yield
        finally:
            self._requests[name] -= 1
            self._rows[name] -= rows
