"""One HTTP/1.1 connection for GETs with a body of known length, which wakes up seldom.

A reading thread that wakes up for each packet takes the interpreter from the thread that decodes. Here it sleeps in
the kernel until a large piece of the body is there (SO_RCVLOWAT), and what comes in one piece is not copied again.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

MAX_HEAD_BYTES = 64 << 10
PIECE_BYTES = 1 << 20  # of a body, at most at once


@dataclass
class Answer:
    """status; left: bytes of the body not yet read (None: not told); keeps: the server leaves the connection open."""

    status: int
    left: int | None
    keeps: bool
    _piece: Callable[[int], bytes]

    def read1(self, size: int) -> bytes:
        """Up to `size` bytes of the body, all of them where they come in time and are not very many; b"" at its end.
        Raises TimeoutError when none come, ConnectionError."""
        if self.left is None:
            return self._piece(size)
        piece = self._piece(min(size, self.left)) if self.left else b""
        self.left -= len(piece)
        return piece


class Connection:
    """To a server, kept between requests; used by one thread at a time.

    Timeouts are in seconds: of connecting, of an answer's begin, and of a piece of its body.
    Raises OSError, ssl.SSLError among them, and ConnectionError for what is no HTTP.
    """

    def __init__(
        self, host: str, port: int, context: ssl.SSLContext | None, connect_s: float, begin_s: float, piece_s: float
    ) -> None:
        self._begin_s, self._piece_s = begin_s, piece_s
        self.sock = socket.create_connection((host, port), connect_s)
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if context is not None:
                self.sock = context.wrap_socket(self.sock, server_hostname=host)
        except BaseException:
            self.sock.close()
            raise
        self._plain, self._rest = context is None, b""

    def get(self, path: str, headers: dict[str, str]) -> Answer:
        """Asks for `path` (encoded), and the answer up to its body. `headers` must hold host."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.sock.settimeout(self._begin_s)
        deadline = time.monotonic() + self._begin_s
        try:
            self.sock.sendall(f"GET {path} HTTP/1.1\r\n{lines}\r\n".encode("ascii"))
        except ssl.SSLError as error:
            raise ConnectionError(str(error)) from error
        status = 100
        while 100 <= status < 200:  # says only that more will follow
            status, fields = _parsed(self._head(deadline))
        self.sock.settimeout(self._piece_s)
        coded = b"transfer-encoding" in fields
        length = fields.get(b"content-length", b"")
        keeps = b"close" not in fields.get(b"connection", b"").lower()
        told = length.isdigit() and len(length) < 19 and not coded
        return Answer(status, int(length) if told else None, keeps, self._piece)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.close()

    def _head(self, deadline: float) -> bytes:
        """An answer's lines up to the empty one; of what follows not a byte is taken, or it waits in `_rest`."""
        head = self._rest
        while (end := head.find(b"\r\n\r\n")) < 0:
            if len(head) > MAX_HEAD_BYTES:
                raise ConnectionError("the answer's head does not end")
            seen = self._received(4096, socket.MSG_PEEK if self._plain else 0)
            if not seen:
                raise ConnectionError("the server closed the connection")
            if time.monotonic() > deadline:
                raise TimeoutError("the answer's head had not come in time")
            if self._plain:  # so that a body need not be put together from its first bytes and the others
                end = (head + seen).find(b"\r\n\r\n")
                seen = self._received(len(seen) if end < 0 else end + 4 - len(head), 0)
            head += seen
        self._rest = head[end + 4 :]
        return head[: end + 4]

    def _piece(self, size: int) -> bytes:
        if self._rest:
            piece, self._rest = self._rest[:size], self._rest[size:]
            return piece
        size = min(size, PIECE_BYTES)
        if not self._plain:
            return self._received(size, 0)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
        try:
            return self._received(size, 0)
        finally:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    def _received(self, size: int, flags: int) -> bytes:
        try:
            return self.sock.recv(size, flags)
        except ssl.SSLError as error:
            raise ConnectionError(str(error)) from error


def _parsed(head: bytes) -> tuple[int, dict[bytes, bytes]]:
    """(status, fields by their names in small letters). Raises ConnectionError."""
    first, *lines = head[:-4].split(b"\r\n")
    words = first.split(maxsplit=2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or len(words[1]) != 3 or not words[1].isdigit():
        raise ConnectionError(f"no HTTP answer: {first[:40]!r}")
    fields = {}
    for line in lines:
        name, _, value = line.partition(b":")
        fields[name.strip().lower()] = value.strip()
    if words[0] == b"HTTP/1.0":
        fields.setdefault(b"connection", b"close")
    return int(words[1]), fields
