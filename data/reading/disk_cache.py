"""A cache of shards on a disk of this machine, shared by its ranks: pieces of a fixed size, within a limit of bytes.

A piece is a file named by the SHA-256 of its shard and its number, so data sets never mix, whatever they are called. It
appears by a rename and is checked when it is read (its size here, its members' digests in the reader). Locks are held
on open files, so the kernel frees those of a process that dies:

    <folder>/<2 hex>/<sha256>-<piece>         a piece; its modification time is when it was last read
    <folder>/<2 hex>/<sha256>-<piece>.part    being fetched by the process that holds its lock; others wait for it
    <folder>/used                             bytes taken, as 8 bytes; counted again whenever something is removed

Removing a piece that another process reads is harmless: it holds the file open, or finds it gone and fetches it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from scoreray.data.storage.stats import ReadStats

log = logging.getLogger(__name__)

PIECE_BYTES = 4 << 20
KEEP = 0.9  # of the limit stays when pieces have to go
WAIT_S = 30.0  # for what another process fetches; then it is fetched twice

Fetch = Callable[[int, int], bytes]  # (start, end) of the shard


class DiskCache:
    """Ranges of shards through the cache at `folder`, of at most `max_bytes`; used by several threads and processes."""

    def __init__(
        self, folder: str | os.PathLike[str], max_bytes: int, stats: ReadStats, piece_bytes: int = PIECE_BYTES
    ) -> None:
        self.folder, self.max_bytes, self.stats, self.piece_bytes = (
            Path(folder).expanduser(),
            max_bytes,
            stats,
            piece_bytes,
        )
        self._writable = True
        self._lock = threading.Lock()

    def get(self, sha256: str, size: int, start: int, end: int, fetch: Fetch) -> bytes:
        """Bytes [start, end) of the shard with this SHA-256 and size; missing pieces are fetched and kept."""
        end, n = min(end, size), self.piece_bytes
        parts: list[bytes] = []
        missing: list[int] = []
        for piece in range(start // n, -(-end // n)):
            found = self._read(sha256, piece, size)
            if found is None:
                missing.append(piece)
                continue
            parts += self._fetched(sha256, size, missing, fetch)
            missing = []
            parts.append(found)
        if missing and not self._writable:
            return fetch(start, end)
        parts += self._fetched(sha256, size, missing, fetch)
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        return whole[start - start // n * n :][: end - start]

    def forget(self, sha256: str, start: int, end: int) -> None:
        """Removes the pieces that hold these bytes: they are not what they should be."""
        for piece in range(start // self.piece_bytes, -(-end // self.piece_bytes)):
            with contextlib.suppress(OSError):
                self._path(sha256, piece).unlink()

    def _path(self, sha256: str, piece: int) -> Path:
        return self.folder / sha256[:2] / f"{sha256}-{piece}"

    def _size(self, piece: int, size: int) -> int:
        return min(self.piece_bytes, size - piece * self.piece_bytes)

    def _read(self, sha256: str, piece: int, size: int) -> bytes | None:
        path = self._path(sha256, piece)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._give_up(error)
            return None
        if len(data) != self._size(piece, size):  # a power cut may leave a name without its bytes
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self.stats.add(cache_hits=1)
        return data

    def _fetched(self, sha256: str, size: int, pieces: list[int], fetch: Fetch) -> list[bytes]:
        """Neighbouring missing pieces, in one request; of those that another process is fetching, its result."""
        if not pieces:
            return []
        first, end = pieces[0] * self.piece_bytes, min(size, (pieces[-1] + 1) * self.piece_bytes)
        with contextlib.ExitStack() as held:
            files = [held.enter_context(self._claimed(sha256, piece)) for piece in pieces]  # in one order: no deadlock
            theirs = [self._read(sha256, piece, size) for piece in pieces]
            if all(data is not None for data in theirs):
                return theirs  # type: ignore[return-value]
            data = fetch(first, end)
            self.stats.add(cache_misses=len(pieces))
            n = self.piece_bytes
            parts = [data[i * n : (i + 1) * n] for i in range(len(pieces))]
            for piece, part, file in zip(pieces, parts, files, strict=True):
                if file is not None and len(part) == self._size(piece, size):
                    self._keep(self._path(sha256, piece), part, file)
            return parts

    @contextlib.contextmanager
    def _claimed(self, sha256: str, piece: int) -> Iterator[int | None]:
        """The locked file that the piece is to be written to, or None when nothing can be written."""
        path = self._path(sha256, piece).with_name(f"{sha256}-{piece}.part")
        descriptor = None
        try:
            while self._writable and descriptor is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                locked = _lock_within(descriptor, WAIT_S)
                if not locked or not _is_at(descriptor, path):  # renamed or removed while we waited
                    os.close(descriptor)
                    descriptor = None
                if not locked:
                    break
        except OSError as error:
            self._give_up(error)
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    if _is_at(descriptor, path):
                        path.unlink()
                os.close(descriptor)

    def _keep(self, path: Path, data: bytes, descriptor: int) -> None:
        try:
            if path.exists() or not self._reserve(len(data)):
                return
            os.ftruncate(descriptor, 0)
            view, at = memoryview(data), 0
            while at < len(data):
                at += os.pwrite(descriptor, view[at:], at)
            os.rename(path.with_name(path.name + ".part"), path)
        except OSError as error:
            self._give_up(error)

    def _reserve(self, num_bytes: int) -> bool:
        """Makes room. What a process reserved before it died is given back when pieces are next counted."""
        if num_bytes > self.max_bytes:
            return False
        descriptor = os.open(self.folder / "used", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            stored = os.pread(descriptor, 8, 0)
            used = int.from_bytes(stored, "little") if len(stored) == 8 else self.max_bytes + 1
            if used + num_bytes > self.max_bytes:
                used = self._shrink(min(KEEP * self.max_bytes, self.max_bytes - num_bytes))
            fits = used + num_bytes <= self.max_bytes
            os.pwrite(descriptor, (used + num_bytes * fits).to_bytes(8, "little"), 0)
        finally:
            os.close(descriptor)
        return fits

    def _shrink(self, target: float) -> int:
        """Removes the pieces that were not read for longest until at most `target` bytes are left: how many are."""
        found, used = [], 0
        for entry in (entry for part in os.scandir(self.folder) if part.is_dir() for entry in os.scandir(part)):
            with contextlib.suppress(FileNotFoundError):
                about = entry.stat()
                if entry.name.endswith(".part"):
                    used += 0 if _removed_if_left(entry.path) else self.piece_bytes  # its writer has reserved as much
                else:
                    found.append((about.st_mtime_ns, about.st_size, entry.path))
                    used += about.st_size
        for _, size, path in sorted(found):
            if used <= target:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            used -= size
        return used

    def _give_up(self, error: OSError) -> None:
        """A full or broken disk costs speed, not the run."""
        with self._lock:
            was_writable, self._writable = self._writable, False
        if was_writable:
            log.warning(
                "data.cache_dir %s: %s; going on without writing to it", self.folder, error.strerror or str(error)
            )


def _lock_within(descriptor: int, seconds: float) -> bool:
    deadline, pause_s = time.monotonic() + seconds, 0.001
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(pause_s)
            pause_s = min(0.05, 2 * pause_s)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _removed_if_left(path: str) -> bool:
    """Removes what a process that died was fetching. False if a live one holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
