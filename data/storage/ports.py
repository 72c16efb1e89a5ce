"""Ports and sockets of the local S3 server: free ones to start with, and what a killed server leaves."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
import time
from pathlib import Path

from scoreray.data.errors import UserError

JUST_MADE_S = 60.0


def free_ports(given: int | None) -> list[int]:
    """Ports for S3, master, volume and filer, each with the one 10,000 above it free too (its gRPC twin). Below the
    range that the kernel gives to outgoing connections (32768 on Linux), so none is taken in between."""
    if given is not None and not 1 <= given <= 55535:
        raise UserError(f"port {given}: between 1 and 55535 is needed, as port + 10000 is used too")
    if given is not None and not (_is_free(given) and _is_free(given + 10000)):
        raise UserError(f"port {given} or {given + 10000} on 127.0.0.1 is in use; give another, or none for a free one")
    ports = [given] if given is not None else []
    chance = random.SystemRandom()
    while len(ports) < 4:
        port = chance.randrange(11000, 22000)
        if port not in ports and _is_free(port) and _is_free(port + 10000):
            ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def remove_sockets(*ports: int) -> None:
    """The Unix sockets at these ports, which the server leaves at SIGKILL; and those of this user's other servers
    that nobody listens on any more: a command that was killed with its server can't remove its own.

    It puts most of them into /tmp, whatever TMPDIR says.
    """
    for path in Path("/tmp").glob("seaweedfs-*.sock"):
        port = path.stem.rpartition("-")[2]
        with contextlib.suppress(OSError):  # another server's end removes them too
            if (port.isdigit() and int(port) in ports) or _is_dead(path):
                path.unlink()


def _is_dead(path: Path) -> bool:
    found = path.lstat()
    just_made = time.time() - found.st_mtime < JUST_MADE_S  # perhaps bound, and not listened on yet
    if just_made or not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False
