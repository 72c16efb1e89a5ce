"""Temporary files and folders, removed after use; a full disk is a StorageError that names it."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from scoreray.data.errors import StorageError

SCRATCH = "SCORERAY_SCRATCH"
"""Variable that names a folder for temporary files, which what started Ray removes at its end, also after a SIGKILL."""

_ELSEWHERE = "set TMPDIR to a folder on another disk"
NO_ROOM = {
    errno.ENOSPC: f"no space left on its disk; free some there, or {_ELSEWHERE}",
    errno.EDQUOT: f"the disk quota is used up; free some there, or {_ELSEWHERE}",
    errno.EFBIG: "a file may not grow that large here (ulimit -f); raise the limit",
}


@contextlib.contextmanager
def scratch_file() -> Iterator[tuple[IO[bytes], Path]]:
    """An empty file without a name, and a path by which it can be opened meanwhile (Linux); gone with the process,
    however that ends. Raises StorageError where there is no room for it, also when it is closed."""
    with _explained(), tempfile.TemporaryFile(prefix="scoreray-") as file:
        yield file, Path(f"/proc/self/fd/{file.fileno()}")


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder. Raises StorageError where there is no room for what is written into it."""
    with _explained(), tempfile.TemporaryDirectory(prefix="scoreray-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What keeps a temporary file from being made or filled; other errors of the block pass, they are not ours."""
    place = ""
    try:
        place = tempfile.gettempdir()
        yield
    except OSError as error:
        if place and error.errno not in NO_ROOM:
            raise
        where = f"temporary folder {place}" if place else "no temporary folder"
        reason = NO_ROOM.get(error.errno or 0) or f"{error.strerror or error}; {_ELSEWHERE}"
        raise StorageError(f"{where}: {reason}") from error
