"""Watches Ray's GCS and raylet: where one has ended or hangs, the command ends with a line, before Ray ends it.

Ray's own answer comes up to a minute later, from C++: the process is gone, without an exception that could be caught.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

POLL_S = 0.5
SILENT_S = 120.0  # without an answer of the GCS; Ray itself takes a node that is silent for a minute for dead
GCS_MAY_RESTART_S = 50.0  # of a cluster: with fault tolerance its GCS comes back; after 60 s Ray ends this process
STATUS, STOPPED_STATUS = 3, 130
GOES_ON = "the same command goes on from what is committed"
STOPPING = threading.Event()  # set by a signal to stop: where all of the process group got it, Ray ends first


@dataclass
class Daemon:
    """A process of Ray's, by the port that it listens on for as long as it lives."""

    name: str
    host: str
    port: int
    patience_s: float
    gone_since: float | None = field(default=None)

    def gone_for(self, now: float) -> float:
        """Seconds since its port refuses connections; 0 while it takes them. Too busy to answer is not gone."""
        try:
            socket.create_connection((self.host, self.port), timeout=5).close()
            self.gone_since = None
        except ConnectionRefusedError:
            self.gone_since = now if self.gone_since is None else self.gone_since
        except OSError:
            pass
        return 0.0 if self.gone_since is None else now - self.gone_since


@contextlib.contextmanager
def watched(*, embedded: bool) -> Iterator[None]:
    """While the block runs, a thread looks at the GCS and at this machine's raylet; where one has gone, this process
    ends with a line and status 3. An exception of the block that came of it ends the same way."""
    daemons, over = _daemons(embedded), threading.Event()
    STOPPING.clear()
    heard = _Heartbeat(over)
    heartbeat = threading.Thread(target=heard.keep, name="ray-heartbeat", daemon=True)
    looking = threading.Thread(target=watch, args=(daemons, heard, over), name="ray-watch", daemon=True)
    for thread in (heartbeat, looking):
        thread.start()
    try:
        yield
    except BaseException as error:
        for daemon in daemons:
            daemon.gone_for(time.monotonic())
            if daemon.gone_since is not None and (daemon.patience_s == 0 or isinstance(error, Exception)):
                _end(f"{daemon.name} has ended")
        raise
    finally:
        over.set()
        heartbeat.join(10)  # a call after Ray has been shut down would start another Ray


def _daemons(embedded: bool) -> list[Daemon]:
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    found = [Daemon("Ray's GCS", host.strip("[]"), int(port), 0.0 if embedded else GCS_MAY_RESTART_S)]
    for node in ray.nodes():
        if node["NodeID"] == context.get_node_id():
            found.append(Daemon("Ray's raylet", node["NodeManagerAddress"], node["NodeManagerPort"], 0.0))
    return found


class _Heartbeat:
    """When the GCS last answered, and whether it takes this machine's raylet for dead."""

    def __init__(self, over: threading.Event) -> None:
        self._over, self.at, self.raylet_is_dead = over, time.monotonic(), False

    def keep(self) -> None:
        import ray

        this_node = ray.get_runtime_context().get_node_id()
        while not self._over.wait(4 * POLL_S):
            with contextlib.suppress(Exception):  # `watch` decides what it means that no answer comes
                alive = {node["NodeID"]: node["Alive"] for node in ray.nodes()}
                self.at, self.raylet_is_dead = time.monotonic(), not alive.get(this_node, True)


def watch(daemons: list[Daemon], heard: _Heartbeat, over: threading.Event) -> None:
    """The thread's work, until `over` is set: ends this process when a daemon is lost."""
    heard_at, silent = heard.at, 0  # looks, not seconds: while this process is stopped itself, nothing counts
    while not over.wait(POLL_S):
        now = time.monotonic()
        heard_at, silent = heard.at, silent + 1 if heard.at == heard_at else 0
        gone = [one for one in daemons if one.gone_for(now) > one.patience_s]
        if over.is_set():
            return
        if gone:
            _end(f"{gone[0].name} has ended")
        if heard.raylet_is_dead:
            _end("Ray's raylet does not answer")
        if silent * POLL_S > SILENT_S:
            _end(f"Ray's GCS has not answered for {SILENT_S:.0f} s")


def _end(what: str) -> None:
    if STOPPING.is_set():
        end(f"stopped, and Ray with it, so what was under way was cut off; {GOES_ON}", STOPPED_STATUS)
    end(f"{what} (killed, or no memory left?); {GOES_ON}")


def end(line: str, status: int = STATUS) -> None:
    """From whatever thread: nothing that is open can be closed without Ray, and what is committed needs no closing."""
    from scoreray.cluster import display

    with contextlib.suppress(Exception):
        display.console.show_cursor()
        sys.stdout.flush()
    os.write(2, f"scoreray: {line}\n".encode())
    os._exit(status)
