"""An embedded Ray: whose folder it is in, how long it may take to start."""

from __future__ import annotations

import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from scoreray.cluster import local_ray
from scoreray.cluster.listening import asks_for_token
from scoreray.cluster.ray_folder import LONGEST_SOCKET, MOST_BYTES, RAYS_OWN, VARIABLE, private_folder
from scoreray.data.errors import UserError
from scoreray.trainer.run import SCRATCH

NOBODY = 65534


def test_nobody_else_reaches_the_sockets_of_an_embedded_ray(ray_cluster: None, tmp_path: Path) -> None:
    folder = Path(os.environ[SCRATCH])
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    sockets = list(folder.glob("*/session_2*/sockets"))
    assert len(sockets) == 1
    names = sorted(path.name for path in sockets[0].iterdir())
    assert {"plasma_store", "raylet"} <= set(names)
    if os.geteuid() != 0:
        return
    tmp_path.chmod(0o777)
    for place in (sockets[0], folder, folder / RAYS_OWN):
        touched = subprocess.run(["touch", str(place / "theirs")], user=NOBODY, capture_output=True, text=True)
        assert "Permission denied" in touched.stderr
    moved = subprocess.run(["mv", str(sockets[0] / "plasma_store"), "/tmp/x"], user=NOBODY, capture_output=True)
    assert moved.returncode
    assert sorted(path.name for path in sockets[0].iterdir()) == names


def test_a_cluster_without_a_token_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    def answers(code: grpc.StatusCode) -> grpc.GenericRpcHandler:
        def call(request: bytes, context: grpc.ServicerContext) -> bytes:
            if code is not grpc.StatusCode.OK:
                context.abort(code, "InvalidAuthToken")
            return b""

        handler = grpc.unary_unary_rpc_method_handler(call)
        return grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", {"CheckAlive": handler})

    for code, asks in ((grpc.StatusCode.UNAUTHENTICATED, True), (grpc.StatusCode.OK, False)):
        server = grpc.server(ThreadPoolExecutor(1), handlers=[answers(code)])
        gcs = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        assert asks_for_token(gcs) is asks
        local_ray._warn_without_token(gcs)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (0 if asks else 1)
        assert asks or f"the Ray cluster at {gcs} asks for no token" in lines[0]
        server.stop(None).wait()
    assert asks_for_token(gcs) is None  # nothing answers


def test_this_ray_asks_for_a_token(ray_cluster: None) -> None:
    import ray

    assert asks_for_token(ray.get_runtime_context().gcs_address) is True


def test_a_folder_for_ray_that_is_missing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path("/tmp") / f"srt-{os.getpid()}" / "a"
    monkeypatch.setenv(VARIABLE, str(base))
    with private_folder() as folder:
        assert folder.parent == base
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()
    base.rmdir()
    base.parent.rmdir()


def test_a_socket_of_ray_has_at_most_107_bytes_or_its_folder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(prefix: str, dir: str) -> str:
        return f"{dir}/{prefix}12345678"

    monkeypatch.setattr("os.makedirs", lambda *_, **__: None)
    monkeypatch.setattr("tempfile.mkdtemp", make)
    for length in range(2, 200):
        monkeypatch.setenv(VARIABLE, "/" + "x" * (length - 1))
        if length <= MOST_BYTES:
            with private_folder() as folder:
                assert len(f"{folder}/{RAYS_OWN}{LONGEST_SOCKET}") <= 107
        else:
            with pytest.raises(UserError, match=f"{length} bytes, at most {MOST_BYTES}") as refused, private_folder():
                raise AssertionError
            assert len(str(refused.value)) < 220


UNUSABLE = [
    ("/proc/x", "can't be made there"),
    ("/dev/null", "a folder was expected"),
    ("/dev/null/x", "a folder was expected"),
    ("/tmp/a\0b", "null"),
]


@pytest.mark.parametrize(("place", "words"), UNUSABLE)
def test_a_folder_that_ray_can_not_use_is_one_line(place: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, VARIABLE: place})
    with pytest.raises(UserError, match=f"^{VARIABLE}=") as refused, private_folder():
        raise AssertionError
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("load", "cores", "wait_s"), [(0.2, 2, 30), (2.0, 2, 30), (8.0, 2, 120), (9.0, 64, 30),
                                                       (500.0, 2, 240)])  # fmt: skip
def test_a_busy_machine_has_longer_to_start_ray(
    load: float, cores: int, wait_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(local_ray, "TELL_AFTER_S", 0.0)
    monkeypatch.setattr(local_ray, "say", said.append)
    monkeypatch.setattr(os, "environ", {})
    with local_ray.patience() as timer:
        timer.join()
        waits = {name: os.environ[name] for name in local_ray.START_WAITS}
    assert waits == {name: str(wait_s * unit) for name, unit in local_ray.START_WAITS.items()}
    assert [f"waiting up to {wait_s} s" in line for line in said] == [True] * (wait_s > 30)
