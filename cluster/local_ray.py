"""Connecting to Ray: the cluster that RAY_ADDRESS names, or one of our own on this machine that ends with us."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scoreray.data.errors import MachineError, UserError
from scoreray.trainer.run import SCRATCH

LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Must be set before `import ray` (and are inherited by every process that Ray starts).
QUIET_AND_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    LOOPBACK_ONLY: "0",  # listeners bind to loopback; not where nodes of a cluster must reach this process
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker is seen in half a second instead of two
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # for resources: after a node's death the first count is stale
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    "RAY_TRAIN_METRICS_ENABLED": "0",  # ours say more
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # after 5 s, on a busy machine, Serve would kill its own listener
}

OUR_KILL = "killed by `ray.kill`"
_verbose = False  # of the newest connection of this process


@contextlib.contextmanager
def connected(*, num_cpus: int | None = None, verbose: bool = False) -> Iterator[None]:
    """A Ray cluster for the duration: RAY_ADDRESS's if that is set, else an embedded one with `num_cpus` slots.

    The embedded one listens on loopback only, asks for a token that only this process and its children have, sends
    no statistics, and is gone when this process is, however that ends. Raises UserError when RAY_ADDRESS can't be
    reached, MachineError when no Ray can be started here.
    """
    _set_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    _keep_off_stdout(verbose)
    warnings.filterwarnings("ignore", category=FutureWarning)
    level = logging.INFO if verbose else logging.ERROR
    logging.getLogger("ray").setLevel(level)
    if address := os.environ.get("RAY_ADDRESS"):
        _check_address(address)
        try:
            ray.init(address=address, log_to_driver=verbose, logging_level=level)
        except (ConnectionError, RuntimeError, ValueError) as error:
            message = str(error).splitlines()[0]
            hint = "was its token refused?" if _token_given() else "does it ask for a token (RAY_AUTH_TOKEN)?"
            raise UserError(
                f"RAY_ADDRESS={address}: no Ray cluster could be reached there ({message}); {hint}"
            ) from None
        signal.signal(signal.SIGTERM, stop)  # Ray has put its own there, which prints a stack and dies
        try:
            yield
        finally:
            ray.shutdown()
        return
    with _short_folder() as folder:
        os.environ[SCRATCH] = str(folder)
        try:
            ray.init(
                num_cpus=num_cpus or os.cpu_count(),
                include_dashboard=False,
                log_to_driver=verbose,
                logging_level=level,
                configure_logging=True,
                object_store_memory=_object_store_bytes(),
                _temp_dir=str(folder),
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:  # what Ray raises has no class in common, some of it is plain Exception
            raise MachineError(_why_not(error)) from error
        signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            ray.shutdown()


def _why_not(error: Exception) -> str:
    """One line on a Ray that could not be started here, with what a person may look at."""
    free = ", ".join(
        f"{shutil.disk_usage(place).free / 2**30:.1f} GiB free in {place}"
        for place in ("/dev/shm", tempfile.gettempdir())
        if os.path.isdir(place)
    )
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return f"Ray could not be started on this machine ({free}, load {os.getloadavg()[0]:.0f}): {reason}"


def _keep_off_stdout(verbose: bool) -> None:
    """What Ray tells of raylets and workers goes to stderr: standard output is for a command's answer (--json).

    That tasks fail whose actor we have ended ourselves is no news, and not told. Without `verbose` nothing of Ray's own
    is: who waits for a worker that died tells of it in a line, and Ray would in a paragraph (kernel's log, advice).
    """
    global _verbose
    _verbose = verbose
    from ray._private import worker

    printed = worker.print_to_stdstream
    if not hasattr(printed, "to_stderr"):

        def on_stderr(data: dict[str, Any], ignore_prefix: bool) -> None:
            lines = [line for line in data["lines"] if OUR_KILL not in line]
            if lines and (_verbose or data.get("pid") != "raylet"):
                printed({**data, "lines": lines, "is_err": True}, ignore_prefix)

        on_stderr.to_stderr = True  # type: ignore[attr-defined]
        worker.print_to_stdstream = on_stderr


def _check_address(address: str) -> None:
    """Seconds, where Ray would try for a minute and a half. Raises UserError when nothing listens there."""
    host, colon, port = address.rpartition("//")[2].partition("/")[0].rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto", or a form that only Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS={address}: nothing answers there ({error.strerror or error})") from None


def stop(*_: object) -> None:
    """A handler that makes SIGTERM what Ctrl-C is: everything is closed in order."""
    raise KeyboardInterrupt


def _set_environment() -> None:
    """What Ray reads from the environment when it is imported: so before that, and for the rest of this process.

    An embedded cluster gets a token that is in this process's environment and nowhere on disk.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    for name, value in QUIET_AND_LOCAL.items():
        if name != LOOPBACK_ONLY or "127.0.0.1" in address or "localhost" in address or not address:
            os.environ.setdefault(name, value)
    if address and _token_given():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _token_given() -> bool:
    return any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))


# Runs beside us and cleans up also when this process is killed: the pipe closes with it, however it ends. Ray's agents
# would outlive their raylet by a minute; they are known by the log files that they have open in our folder.
_CLEAN_UP = """cat >/dev/null; sleep 3
for p in /proc/[0-9]*; do ls -l "$p/fd" 2>/dev/null | grep -qF " $0/" && kill -9 "${p#/proc/}"; done
sleep 1; rm -rf "$0"
"""


@contextlib.contextmanager
def _short_folder() -> Iterator[Path]:
    """A folder for Ray's sockets and logs: short, as a socket's path may have 107 characters."""
    base = os.environ.get("RAY_TMPDIR", tempfile.gettempdir())
    if len(base) > 40:
        base = "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="sr-", dir=base))
    remover = subprocess.Popen(["sh", "-c", _CLEAN_UP, str(folder)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield folder
    finally:
        os.environ.pop(SCRATCH, None)
        shutil.rmtree(folder, ignore_errors=True)
        remover.kill()
        remover.wait()


def _object_store_bytes() -> int:
    """A small object store: only configs and progress pass through it, and /dev/shm may be small in a container."""
    with contextlib.suppress(OSError):
        return max(80 << 20, min(256 << 20, shutil.disk_usage("/dev/shm").free // 4))
    return 128 << 20
