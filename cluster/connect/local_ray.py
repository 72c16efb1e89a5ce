"""Connecting to Ray: the cluster that RAY_ADDRESS names, or an embedded one that ends with this process."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scoreray.cluster.connect.folder import RAYS_OWN, private_folder
from scoreray.cluster.connect.start import (
    SHORT_LOOKS,
    START_S,
    DaemonEnded,
    load_line,
    not_started,
    patience,
    start_wait_s,
)
from scoreray.cluster.connect.watch import STOPPING, watched
from scoreray.cluster.display import say, waiting
from scoreray.cluster.hooks import PRINTED_LINES, replaced
from scoreray.data import own_code
from scoreray.data.errors import MachineError, UserError
from scoreray.data.scratch import SCRATCH
from scoreray.data.units import whole_number

LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
# Must be set before `import ray` (and are inherited by every process that Ray starts).
QUIET_AND_LOCAL = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    LOOPBACK_ONLY: "0",  # listeners bind to loopback; not where nodes of a cluster must reach this process
    # Ray starts workers at niceness 15, where a browser or a compiler beside them leaves them little of a busy machine.
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a dead worker is seen in half a second instead of two
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # for resources: after a node's death the first count is stale
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    "RAY_TRAIN_METRICS_ENABLED": "0",  # ours say more
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "scoreray.sampling.http.connection:in_serves_proxy",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # after 5 s, on a busy machine, Serve would kill its own listener
}

OBJECT_STORE_BYTES = 256 << 20  # small: only configs and progress pass through it
OUR_KILL = "killed by `ray.kill`"


@contextlib.contextmanager
def connected(
    *,
    num_cpus: int | None = None,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    verbose: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Iterator[str]:
    """A Ray cluster for the duration: RAY_ADDRESS's if that is set, else an embedded one with `num_cpus` slots.

    Yields where its dashboard is, HOST:PORT; "" where there is none. object_store_bytes: of an embedded one, at most;
    a quarter of what is free in /dev/shm is not exceeded. environment: variables of the processes that Ray
    starts for this one.

    The embedded one listens on loopback only, asks for a token that only this process and its children have, sends
    no statistics, and is gone when this process is, however that ends. Raises UserError when RAY_ADDRESS can't be
    reached, MachineError when no Ray can be started here.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        yield ""
        return
    variables = {**own_code.environment(), **(environment or {})}
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("ray").setLevel(logging.INFO if verbose else logging.ERROR)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_off_stdout(verbose))
        if address := os.environ.get("RAY_ADDRESS"):
            dashboard = stack.enter_context(_joined(address, verbose, variables))
        else:
            os.environ |= variables  # which all of an embedded cluster inherit
            dashboard = stack.enter_context(_embedded(num_cpus or os.cpu_count() or 1, verbose, object_store_bytes))
        yield dashboard


@contextlib.contextmanager
def _joined(address: str, verbose: bool, variables: dict[str, str]) -> Iterator[str]:
    """The cluster at RAY_ADDRESS. Raises UserError where it can't be reached."""
    import ray

    _check_address(address)
    try:
        level = logging.INFO if verbose else logging.ERROR
        # Ray refuses one that the job was submitted with, which this process then has.
        added = {name: value for name, value in variables.items() if name not in os.environ}
        modules = own_code.py_modules()
        if modules:  # in the process of a job there are none: they came with the job
            added = {**added, **own_code.environment()}
        runtime = {name: value for name, value in (("env_vars", added), ("py_modules", modules)) if value} or None
        with waiting(f"connecting to the Ray cluster at {address}"), interruptible():
            context = ray.init(address=address, log_to_driver=verbose, logging_level=level, runtime_env=runtime)
    except (ConnectionError, RuntimeError, ValueError) as error:
        message = str(error).splitlines()[0]
        hint = "was its token refused?" if token_given() else "does it ask for a token (RAY_AUTH_TOKEN)?"
        raise UserError(f"RAY_ADDRESS={address}: no Ray cluster could be reached there ({message}); {hint}") from None
    signal.signal(signal.SIGTERM, stop)  # Ray has set a handler that prints a stack and dies
    _warn_without_token(ray.get_runtime_context().gcs_address)
    try:
        with watched(embedded=False):
            yield context.dashboard_url or ""
    finally:
        ray.shutdown()


def _warn_without_token(gcs: str) -> None:
    """A line where a cluster asks for no token, and so runs whatever is sent to it."""
    from scoreray.cluster.connect.open_ports import asks_for_token

    if asks_for_token(gcs) is False:
        say(
            f"warning: the Ray cluster at {gcs} asks for no token: all who reach its ports may run code there; "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on every node (docs/security.md)"
        )


class _TooSlow(MachineError):
    """Ray's daemons did not answer in time."""


class _GaveUp(_TooSlow):
    """One of Ray's daemons has ended, as a raylet of Ray 2.60 does after 15 s without its agents' ports."""


@contextlib.contextmanager
def _embedded(num_cpus: int, verbose: bool, object_store_bytes: int = OBJECT_STORE_BYTES) -> Iterator[str]:
    """A Ray of our own. Raises MachineError where it can't be started."""
    import ray

    with contextlib.ExitStack() as stack:
        wait_s = start_wait_s()
        try:
            folder = stack.enter_context(_started(num_cpus, object_store_bytes, verbose, wait_s))
        except _TooSlow as error:
            longer_s = start_wait_s()
            if longer_s <= START_S if isinstance(error, _GaveUp) else longer_s < 2 * wait_s:
                raise
            say(f"{error}; the machine is busy: once more, waiting up to {longer_s} s")
            folder = stack.enter_context(_started(num_cpus, object_store_bytes, verbose, longer_s))
        os.environ[SCRATCH] = str(folder)
        signal.signal(signal.SIGTERM, stop)  # Ray has set a handler that prints a stack and dies
        try:
            with watched(embedded=True):
                yield ""
        finally:
            os.environ.pop(SCRATCH, None)
            with waiting("stopping Ray"):  # seconds, on a busy machine
                ray.shutdown()


@contextlib.contextmanager
def _started(num_cpus: int, object_store_bytes: int, verbose: bool, wait_s: int) -> Iterator[Path]:
    """Ray's daemons, in a folder that is yielded, and removed with them."""
    import ray

    with private_folder() as folder:
        try:
            with waiting(f"starting Ray on this machine ({num_cpus} slots)"), patience(wait_s), interruptible():
                ray.init(
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=verbose,
                    logging_level=logging.INFO if verbose else logging.ERROR,
                    configure_logging=True,
                    object_store_memory=_object_store_bytes(object_store_bytes),
                    _temp_dir=str(folder / RAYS_OWN),
                    _node_ip_address="127.0.0.1",
                )
        except SystemExit:  # by Ray's own handler of SIGTERM, which is ours again once Ray has started
            raise KeyboardInterrupt from None
        except Exception as error:  # what Ray raises has no class in common, some of it is plain Exception
            ray.shutdown()
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            kind = _TooSlow if "timed out" in reason.lower() else MachineError
            kind = _GaveUp if isinstance(error, DaemonEnded) else kind
            raise kind(not_started(_state(folder), reason)) from error
        yield folder


def _state(folder: Path) -> str:
    """Facts for the message that Ray does not start: disks that may be full, and load."""
    free = [
        f"{shutil.disk_usage(place).free / 2**30:.1f} GiB free in {place}"
        for place in ("/dev/shm", str(folder.parent))
        if os.path.isdir(place)
    ]
    return ", ".join([*free, load_line()])


@contextlib.contextmanager
def _off_stdout(verbose: bool) -> Iterator[None]:
    """Ray's lines about raylets and workers go to stderr: standard output is for a command's answer (--json).

    Failures of tasks whose actor we have ended ourselves are left out. Without `verbose` all lines of raylets are: the
    command reports a worker that died in one line of its own, where Ray has a paragraph (kernel's log, advice).
    """

    def on_stderr(printed: Callable[[dict[str, Any], bool], None], data: dict[str, Any], ignore_prefix: bool) -> None:
        lines = [line for line in data["lines"] if OUR_KILL not in line]
        if lines and (verbose or data.get("pid") != "raylet"):
            printed({**data, "lines": lines, "is_err": True}, ignore_prefix)

    with replaced(PRINTED_LINES, lambda printed: functools.partial(on_stderr, printed)):
        yield


def _check_address(address: str) -> None:
    """Seconds, where Ray would try for a minute and a half. Raises UserError when nothing listens there."""
    host, colon, port = address.rpartition("//")[2].partition("/")[0].rpartition(":")
    if not colon or not 0 < (whole_number(port) or 0) < 65536:
        return  # "auto", or a form that only Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: nothing answers there ({error.strerror or error}); give the address of a cluster "
            "that runs, or unset it to start Ray on this machine"
        ) from None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While the block runs, Ctrl-C and SIGTERM interrupt it; at its end at the latest, where the exception was lost.

    Python only prints one that is raised in a hook of fork (seen: logging's, as Ray forks its daemons), a destructor
    or a weak reference's callback: on a busy machine `serve` started all the same. For the main thread.
    """
    came, print_lost = False, sys.unraisablehook

    def interrupt(*_: object) -> None:
        nonlocal came
        came = True
        stop()

    def unless_interrupt(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            print_lost(lost)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.unraisablehook = unless_interrupt
    try:
        yield
    except Exception:
        if not came:
            raise
    finally:
        sys.unraisablehook = print_lost
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def stop(*_: object) -> None:
    """A handler that makes SIGTERM what Ctrl-C is: everything is closed in order, where Ray has not got it too."""
    STOPPING.set()
    raise KeyboardInterrupt


def set_environment() -> None:
    """What Ray reads from the environment when it is imported: so before that, and for the rest of this process.

    An embedded cluster gets a token that is in this process's environment and nowhere on disk.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    for name, value in QUIET_AND_LOCAL.items():
        if name != LOOPBACK_ONLY or "127.0.0.1" in address or "localhost" in address or not address:
            os.environ.setdefault(name, value)
    if address and token_given():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
        os.environ |= SHORT_LOOKS
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def token_given() -> bool:
    return any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))


def _object_store_bytes(most: int) -> int:
    """`most`, or what is fit for /dev/shm, which may be small in a container."""
    with contextlib.suppress(OSError):
        return max(80 << 20, min(most, shutil.disk_usage("/dev/shm").free // 4))
    return 128 << 20
