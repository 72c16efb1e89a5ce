"""An embedded Ray: whose folder it is in, how long it may take to start."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import psutil
import pytest
import yaml
from waiting import PATIENCE_S, wait_until

from scoreray.cluster.connect import local_ray
from scoreray.cluster.connect import start as ray_start
from scoreray.cluster.connect import watch as ray_watch
from scoreray.cluster.connect.folder import LONGEST_SOCKET, MOST_BYTES, RAYS_OWN, VARIABLE, private_folder
from scoreray.cluster.connect.open_ports import asks_for_token
from scoreray.cluster.connect.watch import Daemon
from scoreray.data.errors import MachineError, UserError
from scoreray.data.scratch import SCRATCH

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


def test_what_still_writes_into_the_folder_is_ended_but_not_its_owner() -> None:
    with private_folder() as folder:
        log = open(folder / "log", "w")  # noqa: SIM115
        left = subprocess.Popen(["sleep", "600"], stdout=log)
    with log:
        assert left.wait(PATIENCE_S) == -9


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
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    for length in range(2, 200):
        monkeypatch.setenv(VARIABLE, "/" + "x" * (length - 1))
        if length <= MOST_BYTES:
            with private_folder() as folder:
                assert len(f"{folder}/{RAYS_OWN}{LONGEST_SOCKET}") <= 107
        else:
            with pytest.raises(UserError, match=f"{length} bytes, at most {MOST_BYTES}") as refused, private_folder():
                raise AssertionError
            assert len(str(refused.value)) < 220


@pytest.mark.parametrize("reaped", [False, True])  # Ray asks some of its children whether they have ended
@pytest.mark.parametrize("seen", [False, True])
def test_a_daemon_that_died_while_ray_started_is_seen(tmp_path: Path, reaped: bool, seen: bool) -> None:
    daemons, started = ray_start.Daemons(), []
    for number, name in enumerate(ray_start.DAEMONS):
        assert daemons.ended(ray_start.DAEMONS[:number]) == ""
        (tmp_path / name).symlink_to("/bin/sleep")
        started.append(subprocess.Popen([str(tmp_path / name), "600"]))
    assert not seen or daemons.ended(ray_start.DAEMONS) == ""
    started[1].kill()
    os.waitid(os.P_PID, started[1].pid, os.WEXITED | os.WNOWAIT)
    if reaped:
        started[1].wait()
    assert daemons.ended(ray_start.DAEMONS) == "raylet"
    assert daemons.ended() == ("" if reaped and not seen else "raylet")
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("looks", "ended"), [("....", False), (".x.xxx..", False), ("..xxxx", True)])
def test_a_daemon_that_ended_while_ray_waits_for_something_else_ends_the_command(
    looks: str, ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    left = iter(looks)
    daemons: Any = SimpleNamespace(ended=lambda: "raylet" if next(left) == "x" else "")
    over: Any = SimpleNamespace(wait=lambda _: len(looks) == len(waited) or waited.append(0), is_set=lambda: False)
    waited: list[int] = []
    monkeypatch.setattr(ray_start, "end", said.append)
    ray_start.guard(daemons, over)
    message = "its raylet has ended; see docs/faq.md#ray-doesnt-start"
    assert [line.rpartition(": ")[2] for line in said] == [message] * ended


def test_ray_is_polled_for_as_long_as_its_daemons_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """The originals wait half a minute and more at a time, in C++: no signal is seen meanwhile."""
    from ray._private import node, services

    originals = node.wait_for_persisted_port, services.get_node
    answers: list[Any] = [RuntimeError("Timed out waiting for file"), RuntimeError(), 6379]
    calls: list[dict[str, Any]] = []

    def wait(*arguments: Any, **named: Any) -> Any:
        calls.append(named)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(node, "wait_for_persisted_port", wait)
    ended: list[str] = []
    monkeypatch.setattr(ray_start.Daemons, "ended", lambda *_: "".join(ended))
    with ray_start.patience(30):
        assert node.wait_for_persisted_port("folder", "id", "name", timeout_ms=30_000) == 6379
        assert calls == [{"timeout_ms": 100}] * 3
        ended.append("gcs_server")
        answers[:] = [RuntimeError()] * 2
        with pytest.raises(ray_start.DaemonEnded, match="its gcs_server has ended"):
            node.wait_for_persisted_port("folder", "id", "name", timeout_ms=30_000)
    monkeypatch.undo()
    assert (node.wait_for_persisted_port, services.get_node) == originals


@pytest.mark.parametrize(("loads", "tries"), [([1, 1], 1), ([16, 16], 1), ([2, 16], 2), ([16, 1], 1)])
def test_a_ray_that_was_too_slow_is_started_again_only_with_a_longer_limit(
    loads: list[float], tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    waits, setting = list[str](), next(iter(ray_start.START_WAITS))

    def init(**_: Any) -> None:
        waits.append(os.environ[setting])
        raise Exception("The current node timed out during startup.")  # as Ray's

    left = [*loads, *loads[-1:] * 9]
    monkeypatch.delenv(setting, raising=False)
    monkeypatch.setattr(ray_start, "crowding", lambda: max(1.0, left.pop(0) / 2))
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    timed_out = pytest.raises(MachineError, match=r"could not be started on this machine .* timed out")
    with timed_out, local_ray._embedded(1, False):
        raise AssertionError
    assert waits == ["30", "240"][:tries] if loads[0] < 16 else ["240"]


@pytest.mark.parametrize(("load", "tries"), [(1, 1), (16, 2)])
def test_a_ray_whose_daemon_ended_is_started_once_more_on_a_busy_machine(
    load: float, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a raylet gives up waiting for its own agents; elsewhere it has a reason that stays."""
    import ray

    begun = list[str]()

    def init(**_: Any) -> None:
        begun.append("")
        raise ray_start.DaemonEnded("its raylet has ended")

    monkeypatch.setattr(ray_start, "crowding", lambda: max(1.0, load / 2))
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(MachineError, match="its raylet has ended"), local_ray._embedded(1, False):
        raise AssertionError
    assert len(begun) == tries


@pytest.mark.parametrize("name", ["ä", "\udcff", "a\nb", "it's", "x" * 60])
def test_a_temporary_folder_that_ray_can_not_use_is_passed_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))
    with private_folder() as folder:
        assert folder.parent == Path("/tmp")


def test_a_disk_without_room_for_ray_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=20 << 20))
    line = rf"^/\S+: 20 MiB are free on its disk, Ray needs 32 MiB .* set {VARIABLE} to a folder on another disk$"
    with pytest.raises(MachineError, match=line), private_folder():
        raise AssertionError


UNUSABLE = [
    ("/proc/x", "can't be made there"),
    ("/dev/null", "a folder was expected"),
    ("/dev/null/x", "a folder was expected"),
    ("/tmp/a\0b", "printable ASCII"),
    ("/tmp/a\nb", "printable ASCII"),
    ("/tmp/it's", "without quotes"),
    ("/tmp/Müller", "printable ASCII"),
    ("/tmp/\udcff", "printable ASCII"),
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
    monkeypatch.setattr(ray_start, "TELL_AFTER_S", 0.0)
    monkeypatch.setattr(ray_start, "say", said.append)
    monkeypatch.setattr(os, "environ", {})
    with ray_start.patience(ray_start.start_wait_s()) as timer:
        timer.join()
        waits = dict(os.environ)
    assert waits == {name: str(wait_s * unit) for name, unit in ray_start.START_WAITS.items()}
    assert not os.environ
    assert [f"waiting up to {wait_s} s" in line for line in said] == [True] * (wait_s > 30)


def test_sigterm_while_ray_starts_is_what_it_is_later(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: sys.exit(15))  # what Ray's handler does
    with pytest.raises(KeyboardInterrupt), local_ray._embedded(1, False):
        raise AssertionError


WAITS = """
import sys, time
from scoreray.cluster.connect.local_ray import connected
with connected(num_cpus=1):
    import ray
    print(sys.argv, flush=True)
    ray.get(ray.remote(lambda: time.sleep(600)).remote())
"""
ENDED = "has ended (killed, or no memory left?); the same command goes on from what is committed"


def of_no_ray() -> dict[str, str]:
    """This process's variables without those of the session's Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def training(folder: Path, settings: dict[str, Any]) -> list[str]:
    """The command, of a config in this folder."""
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "scoreray.cluster.cli", "train", str(folder / "config.yaml")]


@contextlib.contextmanager
def running(command: list[str], **options: int) -> Iterator[subprocess.Popen[str]]:
    """On a Ray of its own. Killed at the block's end: else a failure in it would wait for the command without end."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=of_no_ray(), **options) as process:
        try:
            yield process
        finally:
            process.kill()


def daemon_of(process: subprocess.Popen[str], name: str) -> psutil.Process:
    """The oldest of its children by that name: a worker that a raylet has just forked has the raylet's."""
    named = [one for one in psutil.Process(process.pid).children() if "".join(cmdline(one)[:1]).endswith(f"/{name}")]
    return min(named, key=psutil.Process.create_time)


@pytest.mark.slow
@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
def test_a_daemon_of_ray_that_is_killed_ends_a_command_in_one_line(daemon: str) -> None:
    """Ray itself would end it without a word (the raylet) or after a minute (the GCS), with status 1."""
    with running([sys.executable, "-c", WAITS], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        victim = daemon_of(process, daemon)
        folder = next(part for part in victim.cmdline() if "/sr-" in part).partition("/sr-")[2][:8]
        victim.kill()
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, errors
    name = {"raylet": "Ray's raylet", "gcs_server": "Ray's GCS"}[daemon]
    assert errors.splitlines()[-1] == f"scoreray: {name} {ENDED}"
    assert "Traceback" not in errors
    wait_until(
        lambda: not [one for one in psutil.process_iter() if f"/sr-{folder}" in " ".join(cmdline(one))],
        "all have ended",
    )


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_daemon_is_gone_when_its_port_refuses_and_back_when_it_listens_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        daemon = Daemon("Ray's GCS", "127.0.0.1", listening.getsockname()[1], 50.0)
        assert [daemon.gone_for(now) for now in (1.0, 2.0)] == [0.0, 0.0]
    assert [daemon.gone_for(now) for now in (3.0, 3.5, 40.0)] == [0.0, 0.5, 37.0]
    with socket.create_server(("127.0.0.1", daemon.port)):
        assert daemon.gone_for(41.0) == 0.0
    assert daemon.gone_for(45.0) == 0.0


class Heard:
    """A heartbeat that stops after a number of polls."""

    def __init__(self, beats: int, raylet_is_dead: bool) -> None:
        self.raylet_is_dead, self._beats, self._looks = raylet_is_dead, beats, 0

    @property
    def at(self) -> int:
        self._looks += 1
        return min(self._looks, self._beats)


SILENT_LOOKS = round(ray_watch.SILENT_S / ray_watch.POLL_S)


@pytest.mark.parametrize(
    ("beats", "looks", "raylet_is_dead", "line"),
    [
        (10_000, 900, False, None),
        (200, 100 + SILENT_LOOKS - 2, False, None),
        (200, 100 + SILENT_LOOKS + 2, False, "Ray's GCS has not answered for 120 s"),
        (10_000, 1, True, "Ray's raylet does not answer"),
    ],
)
def test_a_daemon_that_listens_but_does_not_answer_is_lost_too(
    beats: int, looks: int, raylet_is_dead: bool, line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    left = iter(range(looks))
    over: Any = SimpleNamespace(wait=lambda _: next(left, None) is None, is_set=lambda: False)
    monkeypatch.setattr(ray_watch, "_end", said.append)
    ray_watch.watch([], Heard(beats, raylet_is_dead), over)  # type: ignore[arg-type]
    assert said[:1] == ([line] if line else [])


@pytest.mark.parametrize(("stopping", "status"), [(False, 3), (True, 130)])
def test_a_ray_that_ends_with_the_service_that_is_being_stopped_is_no_fault(
    stopping: bool, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where SIGTERM goes to the whole process group (systemd, timeout)."""
    ended: list[Any] = []
    flag = SimpleNamespace(is_set=lambda: stopping)

    def leave(*words: Any) -> None:
        ended.extend(words)
        raise SystemExit

    monkeypatch.setattr(ray_watch, "STOPPING", flag)
    monkeypatch.setattr(ray_watch, "end", lambda line, status=3: leave(line, status))
    gone: Any = SimpleNamespace(name="Ray's GCS", patience_s=0.0, gone_for=lambda _: 1.0)
    over: Any = SimpleNamespace(wait=lambda _: False, is_set=lambda: False)
    with pytest.raises(SystemExit):
        ray_watch.watch([gone], Heard(1, False), over)  # type: ignore[arg-type]
    assert ended[1] == status
    assert ("killed, or no memory left?" in ended[0]) is not stopping


@pytest.mark.slow
@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
def test_training_goes_on_by_the_same_command_after_a_daemon_was_killed(
    daemon: str, small_run: Callable[..., Any], tmp_path: Path
) -> None:
    settings = small_run("run", tmp_path, 3200, checkpoint={"every_images": 320, "keep": 2})
    command = training(tmp_path, settings)
    with running(command) as process:
        wait_until(lambda: any(tmp_path.glob("run/checkpoints/*/COMMITTED.json")), "a checkpoint")
        daemon_of(process, daemon).kill()
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, errors
    assert errors.splitlines()[-1].endswith(ENDED)
    assert "Traceback" not in errors
    again = subprocess.run(command, capture_output=True, text=True, timeout=280, env=of_no_ray())
    assert again.returncode == 0, again.stderr
    assert "goes on from" in again.stderr
    assert "trained to 3,200 images" in again.stdout


@pytest.mark.slow
def test_sigterm_to_all_of_its_process_group_stops_training_and_is_no_fault(
    small_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Ray's daemons and workers end by it at once, so nothing of the last steps is saved; what is committed stays."""
    settings = small_run("run", tmp_path, 3200, checkpoint={"every_images": 320, "keep": 2})
    command = training(tmp_path, settings)
    with running(command, start_new_session=True) as process:
        wait_until(lambda: any(tmp_path.glob("run/checkpoints/*/COMMITTED.json")), "a checkpoint")
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1].startswith("scoreray: stopped"), errors
    assert errors.splitlines()[-1].endswith("the same command goes on from what is committed")
    assert "Traceback" not in errors
    again = subprocess.run(command, capture_output=True, text=True, timeout=280, env=of_no_ray())
    assert again.returncode == 0, again.stderr
    assert "trained to 3,200 images" in again.stdout


@pytest.mark.slow
@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
def test_a_daemon_that_is_killed_while_ray_starts_ends_a_command_in_one_line(
    daemon: str, small_run: Callable[..., Any], tmp_path: Path
) -> None:
    """Ray itself would wait for it: half a minute for the raylet, a minute for the GCS, and then end with status 1."""
    command = training(tmp_path, small_run("run", tmp_path, 64))
    with running(command) as process:
        family = psutil.Process(process.pid)

        def killed() -> bool:  # each time: on a busy machine Ray is started once more
            for child in family.children() if process.poll() is None else ():
                with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                    if child.name() == daemon:
                        child.kill()
            return process.poll() is not None

        wait_until(killed, "the command's end")
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3, errors
    assert errors.splitlines()[-1].startswith("scoreray: Ray could not be started on this machine (")
    assert errors.splitlines()[-1].endswith(f"its {daemon} has ended; see docs/faq.md#ray-doesnt-start")
    assert "Traceback" not in errors


def test_a_worker_of_an_embedded_ray_gets_as_much_of_a_busy_machine_as_others(ray_cluster: None) -> None:
    """Ray's default is a niceness of 15 above its own."""
    import ray

    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_python_loses_comes_at_the_end_of_the_block(
    number: signal.Signals, lost: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a hook of fork, of which Python goes on after printing the exception."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    went_on: list[bool] = []

    class Ends:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def start() -> None:
        with local_ray.interruptible():
            if lost:
                Ends()
            else:
                signal.raise_signal(number)
            went_on.append(True)
            raise RuntimeError("what came of it")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert went_on == [True] * lost
    assert capfd.readouterr().err == ""
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_nothing_is_interrupted_without_a_signal() -> None:
    with pytest.raises(RuntimeError, match="on its own"), local_ray.interruptible():
        raise RuntimeError("on its own")
