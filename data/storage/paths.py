"""Files below a folder of this machine as a store, and what can be wrong with a path, in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from scoreray.data.errors import StorageError
from scoreray.data.storage.interface import (
    TEMPORARY,
    NotAFile,
    NotFound,
    Store,
    StoredObject,
    UnfinishedWrite,
    check_key,
)

TRIES = 10  # of a write into a folder that others clear at the same time


class PathStore(Store):
    """Files below a folder. A write goes to a temporary file, is synced and then renamed: whole or not there."""

    def _path(self, key: str) -> Path:
        return _checked_path(self.root, key)

    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        path = self._path(key)
        if end is None:
            with explained(path), _opened(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
                file.seek(start or 0)
                return file.read()
        with explained(path), _opened(path) as descriptor:
            at, parts = start or 0, []
            while at < end and (part := os.pread(descriptor, end - at, at)):  # all at once, but for odd file systems
                parts.append(part)
                at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def advise(self, key: str, start: int, end: int) -> None:
        with contextlib.suppress(OSError, NotAFile), _opened(self._path(key)) as descriptor:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)

    def put(self, key: str, data: bytes | Path) -> None:
        path = self._path(key)
        _write(path, data, lambda temporary: os.replace(temporary, path))

    def put_new(self, key: str, data: bytes) -> bool:
        path, new = self._path(key), True

        def link(temporary: str) -> None:
            nonlocal new
            try:
                os.link(temporary, path)
            except FileExistsError:
                new = False

        _write(path, data, link)
        return new

    def size(self, key: str) -> int:
        path = self._path(key)
        with explained(path):
            if path.is_dir():
                raise FileNotFoundError(errno.ENOENT, "is a folder")
            return path.stat().st_size

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        return [(one.key, one.bytes) for one in self.objects(prefix)]

    def objects(self, prefix: str = "") -> Sequence[StoredObject]:
        found = [one for one, is_temporary in self._walked(prefix) if not is_temporary]
        return sorted(one for one in found if one.key.startswith(prefix))

    def unfinished(self, prefix: str = "") -> Sequence[UnfinishedWrite]:
        found = []
        for one in (one for one, is_temporary in self._walked(prefix) if is_temporary):
            folder, slash, name = one.key.rpartition("/")
            key = f"{folder}{slash}{name.removeprefix(TEMPORARY).rpartition('-')[0]}"
            if key.startswith(prefix) and not key.endswith("/") and key:
                found.append(UnfinishedWrite(key, one.bytes, one.written_s, name))
        return sorted(found)

    def abandon(self, writes: Iterable[UnfinishedWrite]) -> None:
        for one in writes:
            path = self._path(one.key).with_name(one.token)
            with explained(path), contextlib.suppress(FileNotFoundError):
                path.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()

    def _walked(self, prefix: str) -> Sequence[tuple[StoredObject, bool]]:
        """Every file of the folder that `prefix` is in, or below, as an object of its own name; whether it is what a
        write left."""
        found = []
        top = os.path.join(self.root, os.path.dirname(prefix)) if prefix else self.root
        with explained(Path(top)):
            for folder, folders, names in os.walk(top, onerror=_unless_gone):
                if prefix and folder == top:  # the only ones that may lead to a key with the prefix
                    folders[:] = [name for name in folders if name.startswith(os.path.basename(prefix))]
                for name in names:
                    path = os.path.join(folder, name)
                    key = os.path.relpath(path, self.root)
                    is_temporary = name.startswith(TEMPORARY)
                    if is_temporary or key.startswith(prefix):
                        with contextlib.suppress(FileNotFoundError):  # removed since
                            about = os.stat(path)
                            found.append((StoredObject(key, about.st_size, about.st_mtime), is_temporary))
        return found

    def stamps(self) -> dict[str, str]:
        found = {}
        for key, _ in self.list():
            with contextlib.suppress(FileNotFoundError):  # removed since
                found[key] = f"changed {os.stat(os.path.join(self.root, key)).st_mtime_ns}"
        return found

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            with explained(path), contextlib.suppress(FileNotFoundError):
                path.unlink()
            for folder in path.parents:  # as on S3, a folder without objects does not exist
                if not folder.is_relative_to(self.root) or folder == Path(self.root):
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break

    def check_writable(self) -> None:
        """Leaves no folder that was not there: a mistyped path must not look right the next time."""
        root = Path(self.root)
        made = [folder for folder in (root, *root.parents) if not folder.exists()]
        super().check_writable()
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def clear_unfinished(self, prefix: str, but: str) -> None:
        top = os.path.join(self.root, os.path.dirname(prefix))
        with explained(Path(top)):
            for folder, folders, names in os.walk(top):
                for name in names:
                    target = name.removeprefix(TEMPORARY).rpartition("-")[0]
                    key = os.path.relpath(os.path.join(folder, target), self.root)
                    if name.startswith(TEMPORARY) and key.startswith(prefix) and but not in key:
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(os.path.join(folder, name))
                        with contextlib.suppress(OSError):
                            os.rmdir(folder)
                if not prefix.endswith("/"):
                    folders.clear()


@lru_cache(maxsize=1024)  # of a read of a few members pathlib took half of the time
def _checked_path(root: str, key: str) -> Path:
    return Path(root, check_key(key))


def mode_of(path: Path) -> int:
    """What is at a path, as os.stat has it; 0 for nothing. Raises StorageError where that can't be found out."""
    with explained(path):
        try:
            return os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0


def _unless_gone(error: OSError) -> None:
    """A folder that can't be listed is an error: what is in it would look as if it were not there."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        with explained(Path(os.fsdecode(error.filename))):
            raise error


def _write(path: Path, data: bytes | Path, place: Callable[[str], None]) -> None:
    """Writes `data` to a temporary file beside `path`, to which `place` gives its name."""
    for attempt in range(TRIES):
        with explained(path), _temporary(path, data) as temporary:
            try:
                place(temporary)
            except FileNotFoundError:  # a concurrent clear_unfinished() took it for what a killed write left
                if attempt == TRIES - 1:
                    raise
                continue
            with contextlib.suppress(FileNotFoundError):  # a concurrent delete() removed the file, then the folder
                _sync_folder(path.parent)
            return


@contextlib.contextmanager
def _temporary(path: Path, data: bytes | Path) -> Iterator[str]:
    """A synced file with `data` beside `path`, removed at the end if it still has its temporary name."""
    for attempt in range(TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=f"{TEMPORARY}{path.name[:100]}-", dir=path.parent)
            break
        except FileNotFoundError as error:  # a concurrent delete() removed the empty folder; always so in /proc
            if attempt == TRIES - 1:
                raise StorageError(f"{path.parent}: can't be written: no folder can be made here") from error
    try:
        with open(descriptor, "wb") as file:
            if isinstance(data, Path):
                with open(data, "rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
            else:
                file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o666 & ~_UMASK)
            os.fsync(file.fileno())
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A file's descriptor. Raises NotAFile where opening or reading could wait for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO without a writer would wait
    try:
        check_is_file(path, os.fstat(descriptor).st_mode)
        yield descriptor
    finally:
        os.close(descriptor)


def check_is_file(path: str | os.PathLike[str], mode: int) -> None:
    """Raises NotAFile where `mode` (of os.stat) is that of a FIFO, a socket or a device."""
    kind = special_kind(mode)
    if kind:
        raise NotAFile(f"{os.fspath(path)}: is {kind}, no file; copy what comes out of it to a file and give that")


def special_kind(mode: int) -> str | None:
    """What `mode` (of os.stat) is of, where that is a FIFO, a socket or a device."""
    return _SPECIAL.get(stat.S_IFMT(mode))


_SPECIAL = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_umask() -> int:
    """The process's umask; it can only be read by setting it, so once, before any thread runs."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


_UMASK = _read_umask()

_FIXES = {
    errno.ENOSPC: "no space left on this disk; free some, or give a URL on another",
    errno.EDQUOT: "the disk quota is used up; free some space, or give a URL on another disk",
    errno.EFBIG: "a file may not grow that large here (ulimit -f); raise the limit, or give a URL on another disk",
    errno.EACCES: "permission denied; check the owner and mode of the file and its folders",
    errno.EPERM: "not permitted; check the owner and mode of the file and its folders",
    errno.EROFS: "this file system is read-only; give a URL that can be written to",
    errno.EISDIR: "is a folder, a file was expected",
    errno.EEXIST: "a part of this path is a file, a folder was expected",
    errno.ENOTDIR: "a part of this path is a file, a folder was expected",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.EIO: "the disk reports an error; see the kernel's log",
}


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Errors of the file system as one line that names `path`. Raises NotFound, StorageError."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{path}: no such file") from error
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, f"{error.strerror or error}")
        raise StorageError(f"{path}: {fix}") from error
