"""Parsing an untrusted tar: bounded memory and time, plain files only, member names used for grouping alone.

Python's tarfile follows whatever a header says (a 2.5 KB tar can hang it, CVE-2026-11972) and takes a tar that is cut
between two members for a whole one. Here a tar is refused, with the reason and the offset, unless it is complete.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from scoreray.data.errors import DataError

BLOCK = 512
ZEROS = bytes(BLOCK)
WINDOW_BYTES = 8 << 20
MAX_MEMBER_BYTES = 64 << 20
MAX_EXTENDED_BYTES = 64 << 10  # of a PAX or GNU long-name header
MAX_NAME = 1024
FILES, FOLDER, LONG_NAME, PAX, PAX_GLOBAL = (b"0", b"\0", b"7"), b"5", b"L", b"x", b"g"
REFUSED = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a FIFO"}
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
PICKLES = (".pkl", ".pickle", ".pyd", ".pth", ".pt", ".dill", ".joblib")


class Member(NamedTuple):
    """A plain file: `offset` is where its bytes begin in the tar."""

    name: str
    offset: int
    data: bytes

    @property
    def place(self) -> str:
        """What messages call it."""
        return f"byte {self.offset}: '{self.name}'"


class Tape:
    """A tar's bytes from `start` (of the tar, or of a member's header) to its end; a window of it is in memory.
    get(start, end), which is called for each byte once, in order, may give fewer bytes than these, and none where there
    are no more."""

    def __init__(
        self, get: Callable[[int, int], bytes], size: int, start: int = 0, window_bytes: int = WINDOW_BYTES
    ) -> None:
        self._get, self.size, self.position, self._window_bytes = get, size, start, window_bytes
        self._window, self._start = b"", start

    def take(self, n: int) -> bytes:
        """The next n bytes. Raises DataError when fewer are left."""
        if n > self.size - self.position:
            raise DataError(f"byte {self.position}: {n} bytes are announced, {self.size - self.position} are left")
        end = self.position + n
        while end > self._start + len(self._window):
            fresh_start = self._start + len(self._window)
            fresh = self._get(fresh_start, min(self.size, max(end, fresh_start + self._window_bytes)))
            if not fresh:
                raise DataError(f"byte {fresh_start}: the shard is cut")
            self._window, self._start = self._window[self.position - self._start :] + fresh, self.position
        found = self._window[self.position - self._start : end - self._start]
        self.position = end
        return found


def members(tape: Tape) -> Iterator[Member]:
    """The plain files of the tar, in order. Raises DataError with the offset of what is wrong or not accepted."""
    long_name, long_size = "", None
    while True:
        at = tape.position
        if at == tape.size:
            raise DataError(f"byte {at}: " + ("the tar ends here, without its end marker: cut" if at else "is empty"))
        header = tape.take(BLOCK)
        if at == 0 and header.startswith(COMPRESSED):
            raise DataError("byte 0: is compressed, and read as it is; unpack it to a plain .tar first")
        if header == ZEROS:
            return _check_end(tape)
        if _octal(header[148:156], at) != checksum_of(header):
            raise DataError(f"byte {at}: the header's checksum is wrong")
        kind = header[156:157]
        size = _octal(header[124:136], at)
        if kind in (LONG_NAME, PAX, PAX_GLOBAL):
            if size > MAX_EXTENDED_BYTES or long_name or long_size is not None:
                raise DataError(f"byte {at}: an extended header of {size} bytes, or a second one for the same member")
            data = _padded(tape, size)
            if kind == LONG_NAME:
                long_name = _text(data.rstrip(b"\0"), at)
            else:
                name, announced = _pax(data, at)
                if kind == PAX:
                    long_name, long_size = name, announced
            continue
        name, size = long_name or _short_name(header, at), size if long_size is None else long_size
        long_name, long_size = "", None
        _check_name(name, at)
        if kind == FOLDER:
            if size:
                raise DataError(f"byte {at}: '{name}': a folder with {size} bytes")
            continue
        if kind not in FILES:
            raise DataError(f"byte {at}: '{name}' is {REFUSED.get(kind, f'of the unknown kind {kind!r}')}: not read")
        if size > MAX_MEMBER_BYTES:
            raise DataError(f"byte {at}: '{name}' has {size} bytes, the limit is {MAX_MEMBER_BYTES}")
        offset = tape.position
        yield Member(name, offset, _padded(tape, size))


def _padded(tape: Tape, size: int) -> bytes:
    data = tape.take(size)
    tape.take(-size % BLOCK)
    return data


def _check_end(tape: Tape) -> None:
    """After the first block of zeros, which was taken, there is another, and nothing but zeros."""
    at = tape.position
    if tape.size - at < BLOCK:
        raise DataError(f"byte {at}: the tar's end marker is cut")
    while tape.position < tape.size:
        if tape.take(min(1 << 16, tape.size - tape.position)).strip(b"\0"):
            raise DataError(f"byte {at}: there is more after the tar's end marker")


def _octal(field: bytes, at: int) -> int:
    """A number of a header: octal digits, or big-endian with the first bit set (GNU)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise DataError(f"byte {at}: {field!r} in a header is no number")
    return int(digits, 8)


def _short_name(header: bytes, at: int) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name, at)


def key_and_kind(name: str) -> tuple[str, str]:
    """A member's name as WebDataset reads it: (the sample's key, up to the first dot of the file's name; the rest)."""
    *folders, file = [part for part in name.split("/") if part != "."] or [""]
    stem, _, kind = file.partition(".")
    return "/".join([*folders, stem]), kind


def key_in(header: bytes) -> str:
    """The key of the member that a header is of, for messages; "" if it is none."""
    try:
        if len(header) == BLOCK and _octal(header[148:156], 0) == checksum_of(header):
            name = _short_name(header, 0)
            _check_name(name, 0)
            return key_and_kind(name)[0]
    except DataError:
        pass
    return ""


def checksum_of(header: bytes) -> int:
    """The sum of the header's bytes, its own eight as spaces. zlib's first sum is one more, modulo 65521, which three
    parts of at most 255 bytes stay below: 0.4 us, where sum() takes 3."""
    parts = header[:148], header[156:408], header[408:]
    return sum((zlib.adler32(part) & 0xFFFF) - 1 for part in parts) + 8 * 32


def _text(data: bytes, at: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"byte {at}: a name that is not UTF-8") from error


def _pax(data: bytes, at: int) -> tuple[str, int | None]:
    """(path, size) of PAX records '<length> <key>=<value>\\n'; what else they say has no meaning here."""
    path, size = "", None
    while data:
        length, _, _ = data[:8].partition(b" ")
        if not length.isdigit() or not len(length) + 3 <= int(length) <= len(data):
            raise DataError(f"byte {at}: a PAX header that is not well-formed")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        data = data[int(length) :]
        if key == b"path":
            path = _text(value, at)
        elif key == b"size":
            if not value.isdigit() or len(value) > 19:
                raise DataError(f"byte {at}: {value[:32]!r} is no size")
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise DataError(f"byte {at}: a sparse file: not read")
    return path, size


def _check_name(name: str, at: int) -> None:
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise DataError(f"byte {at}: {name[:80]!a} can't be a member's name")
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise DataError(f"byte {at}: the name {name[:80]!a} leaves the tar: not read")
    if name.lower().endswith(PICKLES):
        raise DataError(f"byte {at}: {name[:80]!a} is a pickle, which can run code: not read; pack without it")
