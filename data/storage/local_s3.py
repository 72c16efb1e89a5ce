"""A real S3 server on this machine (SeaweedFS), for laptops and tests: same protocol as in the cluster.

Listens on 127.0.0.1 only, sends no telemetry, requires keys (random, kept in a 0600 file of its folder), and keeps its
data in that folder from one start to the next. It dies with the process that started it, even by SIGKILL.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import IO

from scoreray.data.errors import StorageError, UserError
from scoreray.data.extras import install
from scoreray.data.storage.ports import free_ports, remove_sockets

log = logging.getLogger(__name__)

LEAST_FREE_BYTES = 200 << 20
START_S = 60.0  # measured: 1 to 4 s; a machine under load takes longer
# Runs between fork and the server: has the kernel send SIGKILL when the parent ends, and exits if it already has.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(0)
os.execv(sys.argv[2], sys.argv[2:])
"""


class LocalS3:
    """SeaweedFS over `folder`: `with LocalS3(folder) as s3: os.environ.update(s3.env)`.

    Args:
      folder: of the data and the keys; made if missing. One server at a time may use it.
      port: of the S3 endpoint; None takes a free one.

    Raises UserError when the program is missing, the port or the folder is in use, or the server died or did not
    answer (with the end of its log).
    """

    def __init__(self, folder: str | os.PathLike[str], port: int | None = None) -> None:
        self.folder = Path(folder).resolve()
        self._given_port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: list[int] = []
        self._lock: IO[str] | None = None
        self.env: dict[str, str] = {}

    def __enter__(self) -> LocalS3:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> LocalS3:
        program = _program()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
            self._lock = _locked(self.folder)
        except OSError as error:
            raise StorageError(
                f"{self.folder}: no S3 server can keep its data here: {error.strerror or error}"
            ) from None
        if free < LEAST_FREE_BYTES:
            self.stop()
            raise StorageError(
                f"{self.folder}: {free >> 20} MiB are free on its disk, an S3 server needs {LEAST_FREE_BYTES >> 20} MiB"
            )
        try:
            access_key, secret_key = _keys(self.folder)
            (self.folder / "data").mkdir(exist_ok=True)
            for stale in (self.folder / "data").glob("m[0-9]*"):
                shutil.rmtree(stale)  # the master's state at its earlier port; the volumes report everything again
            remove_sockets()
            for attempt in range(3):
                ports = self._ports = free_ports(self._given_port)
                self.env = {
                    "AWS_ACCESS_KEY_ID": access_key,
                    "AWS_SECRET_ACCESS_KEY": secret_key,
                    "AWS_SESSION_TOKEN": "",
                    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[0]}",
                    "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{ports[0]}",
                    "AWS_REGION": "us-east-1",
                    "AWS_DEFAULT_REGION": "us-east-1",
                    "AWS_EC2_METADATA_DISABLED": "true",
                    "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
                }
                self._launch([program, *_arguments(self.folder, ports)])
                problem = self._wait_ready(ports)
                if not problem:
                    return self
                self._kill()
                if attempt == 2 or "address already in use" not in problem:
                    raise UserError(problem)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Ends the server. What was written stays in the folder (SIGTERM would take 15 s and saves nothing more)."""
        self._kill()
        if self._lock:
            self._lock.close()
            self._lock = None

    def create_bucket(self, name: str) -> None:
        """Makes the bucket; one that is there already is kept."""
        import botocore.exceptions

        client = self._client()
        try:
            client.create_bucket(Bucket=name)
        except botocore.exceptions.ClientError as error:
            if error.response["Error"].get("Code") not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise UserError(f"bucket '{name}': {error.response['Error'].get('Message')}") from error

    def _client(self):  # type: ignore[no-untyped-def]
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, proxies={}),
        )

    def _launch(self, command: list[str]) -> None:
        """Starts the server from a thread that lives as long as it: the kernel's parent-death signal is sent when the
        *thread* that forked ends. A session of its own keeps a terminal's Ctrl-C away from it."""
        started = threading.Event()
        failure: list[OSError] = []

        def run() -> None:
            with open(self.folder / "server.log", "wb") as out:
                try:
                    self._process = subprocess.Popen(
                        [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *command],
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        cwd=self.folder,
                    )
                except OSError as error:
                    failure.append(error)
                    return
                finally:
                    started.set()
            self._process.wait()

        threading.Thread(target=run, name="local-s3", daemon=True).start()
        started.wait()
        if failure:
            raise UserError(f"the local S3 server can't be started: {failure[0]}")

    def _wait_ready(self, ports: list[int]) -> str:
        """'' once a write would succeed (the master has room, S3 answers), else what is wrong."""
        assert self._process
        deadline = time.monotonic() + START_S
        pending = [
            (f"http://127.0.0.1:{ports[1]}/dir/status", rb'"Max":[1-9]'),  # the master has room for volumes
            (f"http://127.0.0.1:{ports[0]}/", b"AccessDenied"),  # S3 answers, and requires keys
        ]
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                return f"the local S3 server ended with status {self._process.returncode}: {self._log_end()}"
            if not _answers(*pending[0]):
                time.sleep(0.05)
                continue
            pending.pop(0)
            if not pending:
                return ""
        return f"the local S3 server did not answer within {START_S:.0f} s: {self._log_end()}"

    def _log_end(self) -> str:
        lines = (self.folder / "server.log").read_text(errors="replace").strip().splitlines()
        lines = [line for line in lines if line.startswith("F")] or lines  # glog: a fatal line says why it ended
        return f"{' | '.join(lines[-3:])[-600:] or 'nothing in its log'} (all of it: {self.folder / 'server.log'})"

    def _kill(self) -> None:
        if self._process and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
            remove_sockets(*self._ports, *(port + 10000 for port in self._ports))
        self._process = None


def is_installed() -> bool:
    """Whether there is a server to start."""
    return _found() is not None


def _found() -> str | None:
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


def _program() -> str:
    found = _found()
    if not found:
        raise UserError(f"the local S3 server's program 'weed' is not installed: {install('local-s3')}")
    return found


def _locked(folder: Path) -> IO[str]:
    lock = open(folder / "lock", "a+")  # noqa: SIM115  held until stop()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise UserError(f"{folder}: another local S3 server (of process {holder}) uses this folder; stop it") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _keys(folder: Path) -> tuple[str, str]:
    """The folder's access key and secret, made at random the first time, in the file that the server reads."""
    path = folder / "s3.json"
    if not path.exists():
        pair = {"accessKey": secrets.token_hex(10).upper(), "secretKey": secrets.token_urlsafe(30)}
        config = {"identities": [{"name": "owner", "credentials": [pair], "actions": ["Admin"]}]}
        temporary = folder / f"s3.json.{os.getpid()}"
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(config, file)
        os.replace(temporary, path)
    pair = json.loads(path.read_text())["identities"][0]["credentials"][0]
    return pair["accessKey"], pair["secretKey"]


def _arguments(folder: Path, ports: list[int]) -> list[str]:
    s3, master, volume, filer = ports
    return [
        "-logtostderr=true", "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master}", "-master.telemetry=false", "-master.electionTimeout=1s", "-master.resumeState=false",
        # Every bucket grows up to seven volumes: small ones, so that a small disk holds enough of them.
        "-master.volumeSizeLimitMB=256", "-volume.max=0", f"-volume.port={volume}",
        # A ranged GET reads whole pieces of an object: small ones, and recent ones from memory.
        "-filer", f"-filer.port={filer}", "-filer.maxMB=1", "-s3.cacheCapacityMB=64",
        "-s3", f"-s3.port={s3}", "-s3.ip.bind=127.0.0.1", f"-s3.config={folder / 's3.json'}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false",
    ]  # fmt: skip


def _answers(url: str, pattern: bytes) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        try:
            answer = opener.open(url, timeout=5)
        except urllib.error.HTTPError as refused:
            answer = refused
        with answer:
            return re.search(pattern, answer.read(65536)) is not None
    except OSError:
        return False
