"""The folder of an embedded Ray: mode 0700, a path short enough for sockets, removed however its owner ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from scoreray.data.errors import MachineError, UserError, shortened

VARIABLE = "RAY_TMPDIR"
RAYS_OWN = "r"
LEAST_BYTES = 32 << 20  # below it Ray's daemons wait for each other's files until they give up
# What Ray adds to its folder for a socket, at its longest; a socket's path may have 107 bytes (man 7 unix).
LONGEST_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
MOST_BYTES = 107 - len(f"/sr-12345678/{RAYS_OWN}{LONGEST_SOCKET}")

# Runs beside this process ($1) and cleans up also when that is killed: the pipe closes with it, however it ends. Ray's
# agents would outlive their raylet by a minute; they are known by the log files that they have open in our folder ($0).
# A shell script and not Python with psutil, as it waits for as long as the command lasts: 1.6 MB instead of 13 MB.
_CLEAN_UP = """cat >/dev/null; sleep 3
for p in /proc/[0-9]*; do
  [ "$p" = "/proc/$1" ] && continue
  ls -l "$p/fd" 2>/dev/null | grep -qF " $0/" && kill -9 "${p#/proc/}"
done
sleep 1; rm -rf "$0"
"""


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder of mode 0700 in RAY_TMPDIR (which is made where it is missing), else in the temporary folder.

    Ray opens the folder that it is given to everybody (0777): give it `RAYS_OWN` within this one. Processes that still
    have files open in it 3 s later are ended. Raises UserError for a RAY_TMPDIR that can't be used,
    MachineError where there is no temporary folder, or no room in it.
    """
    folder = _make()
    if (free := shutil.disk_usage(folder).free) < LEAST_BYTES:
        folder.rmdir()
        raise MachineError(
            f"{folder.parent}: {free >> 20} MiB are free on its disk, Ray needs {LEAST_BYTES >> 20} MiB for its logs; "
            f"free some, or set {VARIABLE} to a folder on another disk"
        )
    command = ["sh", "-c", _CLEAN_UP, str(folder), str(os.getpid())]
    quiet = subprocess.DEVNULL  # who reads our output would else wait for this process too
    remover = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)
    assert remover.stdin is not None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        remover.stdin.close()  # it looks for what Ray could not end, such as a process that was stopped


def _make() -> Path:
    given = os.environ.get(VARIABLE, "")
    if not given:
        try:
            base = tempfile.gettempdir()
            fits = _is_plain(base) and len(base) <= MOST_BYTES
            return Path(tempfile.mkdtemp(prefix="sr-", dir=base if fits else "/tmp"))
        except OSError as error:
            raise MachineError(f"no temporary folder for Ray: {error.strerror or error}; set {VARIABLE}") from None
    base, shown = os.path.abspath(os.path.expanduser(given)), shortened(ascii(given)[1:-1])
    if not _is_plain(base):
        raise UserError(
            f"{VARIABLE}={shown}: Ray takes folders of printable ASCII without quotes and backslashes; give "
            "another one, or unset it for the temporary folder"
        )
    if len(base) > MOST_BYTES:
        raise UserError(
            f"{VARIABLE}={shown}: {len(base)} bytes, at most {MOST_BYTES} as sockets are made in it; "
            "give a shorter path, or unset it for the temporary folder"
        )
    try:
        os.makedirs(base, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="sr-", dir=base))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "a folder was expected"
        raise UserError(
            f"{VARIABLE}={shown}: Ray's folder can't be made there: {reason}; give a folder that can be "
            "written to, or unset it for the temporary folder"
        ) from None


def _is_plain(path: str) -> bool:
    """Ray (2.60) has the name of its folder in messages, as ASCII, and in command lines that its raylet parses."""
    return path.isascii() and path.isprintable() and not set(path) & set("'\"\\")
