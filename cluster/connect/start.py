"""How long to wait for Ray's daemons to start: longer on a busy machine, and no longer once one of them has ended.

Ray (2.60) waits for them in C++, where Ctrl-C does not reach it, and as long where they died at once.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

from scoreray.cluster.connect.watch import end
from scoreray.cluster.display import say
from scoreray.cluster.hooks import GCS_PORT, RAYLET_NODE, replaced
from scoreray.data.errors import MachineError

START_S = 30  # Ray's own patience with its daemons
MOST_CROWDED = 8.0
TELL_AFTER_S = 15.0
LOOK_S = 0.1
GUARD_S, SEEN_BEFORE = 0.5, 3  # looks at a daemon that has ended before that ends us: an exception can be handled
# Environment variables of Ray's waits while it starts -> how many of their units are a second.
START_WAITS = {"RAY_gcs_server_port_wait_time_s": 1, "RAY_agent_register_timeout_ms": 1000}
# Each look for the raylet, of which `patience` makes many, waits so long in C++. Read when Ray is imported.
SHORT_LOOKS = {"RAY_raylet_start_wait_time_s": "1"}
DAEMONS = ("gcs_server", "raylet")  # in the order in which they are started; their processes' names
# Where Ray waits for them -> daemons that must have been started by then, and what makes one look short.
WAITS: dict[str, tuple[Sequence[str], dict[str, int]]] = {
    GCS_PORT: (DAEMONS[:1], {"timeout_ms": round(LOOK_S * 1000)}),
    RAYLET_NODE: (DAEMONS, {}),
}


class DaemonEnded(MachineError):
    """One of Ray's daemons has ended while it was waited for."""


def start_wait_s() -> int:
    """How long Ray's daemons may take, as crowded as this machine is now."""
    return round(START_S * min(crowding(), MOST_CROWDED))


def crowding() -> float:
    """How many processes wait for each core of this machine, over the last minute; at least 1."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def load_line() -> str:
    """ "load 9 on 2 cores"."""
    return f"load {os.getloadavg()[0]:.0f} on {len(os.sched_getaffinity(0))} cores"


def not_started(state: str, reason: str) -> str:
    """The line with which a command ends."""
    return f"Ray could not be started on this machine ({state}): {reason}; see docs/faq.md#ray-doesnt-start"


@contextlib.contextmanager
def patience(wait_s: int) -> Iterator[threading.Timer]:
    """While the block starts Ray, its daemons have `wait_s`, with a line where that is used on a busy machine.

    Raises DaemonEnded out of the block where one of them has ended.
    """
    ours = {name: str(wait_s * per_s) for name, per_s in START_WAITS.items() if name not in os.environ}
    line = f"Ray is still starting, on a busy machine ({load_line()}): waiting up to {wait_s} s"
    timer = threading.Timer(TELL_AFTER_S, say, [line])
    timer.daemon = True
    if wait_s <= START_S:
        timer.finished.set()
    os.environ |= ours
    timer.start()
    try:
        with _looked_after(wait_s):
            yield timer
    finally:
        timer.cancel()
        for name in ours:
            os.environ.pop(name, None)


class Daemons:
    """Ray's daemons among the processes that this one starts from now on."""

    def __init__(self) -> None:
        self._before, self._found = set(_children()), dict[str, int]()

    def ended(self, started: Sequence[str] = ()) -> str:
        """The name of one that has ended, "" where none has. `started`: those that must have been, seen or not."""
        children = _children()
        for pid, (name, _) in children.items():
            if pid not in self._before and name in DAEMONS:
                self._found[name] = pid
        for name in {*started, *self._found}:
            _, status = children.get(self._found.get(name, 0), ("", psutil.STATUS_DEAD))  # no child: waited for already
            if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return name
        return ""


def _children() -> dict[int, tuple[str, str]]:
    """Processes that this one has started and not waited for: id -> name and status."""
    found = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            found[child.pid] = child.name(), child.status()
    return found


@contextlib.contextmanager
def _looked_after(wait_s: float) -> Iterator[None]:
    """Both of Ray's waits for a daemon look at the daemons too, and last `wait_s` (the second would 30 s)."""
    daemons, over = Daemons(), threading.Event()
    threading.Thread(target=guard, args=(daemons, over), name="ray-start", daemon=True).start()
    with contextlib.ExitStack() as stack:
        stack.callback(over.set)
        for path, (started, options) in WAITS.items():
            ended = functools.partial(daemons.ended, started)
            stack.enter_context(replaced(path, functools.partial(_patiently, options, wait_s, ended)))
        yield


def guard(daemons: Daemons, over: threading.Event) -> None:
    """Ends this process with a line where a daemon has ended and Ray, in a wait of another kind, does not see it: it
    would end us itself after a minute, from C++ and with status 1."""
    looks = 0
    while not over.wait(GUARD_S):
        name = daemons.ended()
        looks = looks + 1 if name else 0
        if looks > SEEN_BEFORE and not over.is_set():
            end(not_started(load_line(), f"its {name} has ended"))


def _patiently(
    options: dict[str, Any], wait_s: float, ended: Callable[[], str], wait: Callable[..., Any]
) -> Callable[..., Any]:
    """Calls `wait` again and again with these `options` until it returns, for `wait_s` at most."""

    def waiting(*arguments: Any, **named: Any) -> Any:
        end = time.monotonic() + wait_s
        while True:
            try:
                return wait(*arguments, **named | options)
            except RuntimeError:  # it is not there yet, or never will be
                if name := ended():
                    raise DaemonEnded(f"its {name} has ended") from None
                if time.monotonic() > end:
                    raise
                time.sleep(LOOK_S)

    return waiting
