"""Drains this machine before it goes away: Ray's node on it, and our own drivers. A pod's preStop hook runs it.

    python -m scoreray.cluster.drain --deadline-s 150

Ray Train's workers on a node that drains save at once and start again on another; Serve's replicas finish the requests
that they have. A `scoreray` driver on this machine gets SIGTERM: it saves and ends with 130, and KubeRay starts it
again (backoffLimit of its RayJob).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

from scoreray.cluster.hooks import GCS_CLIENT, hook

REASON = "this machine goes away"


def drivers() -> list[int]:
    """Process ids of `scoreray` commands on this machine, however they were started (a job's is a Python module)."""
    processes = psutil.process_iter(["cmdline"])
    return [one.pid for one in processes if one.pid != os.getpid() and _is_command(one.info["cmdline"] or [""])]


def _is_command(arguments: list[str]) -> bool:
    name, rest = arguments[0].rpartition("/")[2], [*arguments[1:], "", "", ""]
    if not name.startswith("python"):
        return name == "scoreray"
    while rest[0] in ("-u", "-X", "-W"):
        rest = rest[1:] if rest[0] == "-u" else rest[2:]
    if rest[0] == "-m":
        return rest[1] == "scoreray.cluster.cli"
    return rest[0].rpartition("/")[2] == "scoreray"


def drain_node(deadline_s: float, address: str) -> Callable[[], bool]:
    """Asks the GCS at `address` (host:port) to drain the nodes of this machine; returns whether any is still alive.

    Raises RuntimeError where the GCS refuses or can't be reached.
    """
    client = hook(GCS_CLIENT)
    if client is None:
        raise RuntimeError("this version of Ray can't be asked to")
    from ray.core.generated import autoscaler_pb2, gcs_pb2

    gcs = client(address=address)

    def nodes_of_this_machine() -> list[Any]:
        alive = gcs_pb2.GcsNodeInfo.GcsNodeState.ALIVE
        ours = {socket.gethostname(), *_addresses()}
        nodes = gcs.get_all_node_info(timeout=10).values()
        return [n for n in nodes if n.state == alive and {n.node_manager_address, n.node_manager_hostname} & ours]

    deadline_ms = int((time.time() + deadline_s) * 1000)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    for node in nodes_of_this_machine():
        accepted, why = gcs.drain_node(node.node_id.hex(), reason, REASON, deadline_ms)
        if not accepted:
            raise RuntimeError(why)
    return lambda: bool(nodes_of_this_machine())


def _addresses() -> set[str]:
    with contextlib.suppress(OSError):
        return {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    return set()


def main(argv: list[str] | None = None) -> int:
    """Waits for at most the deadline. Always 0: a pod that can't be drained must end all the same."""
    parser = argparse.ArgumentParser(prog="python -m scoreray.cluster.drain", description=__doc__)
    parser.add_argument("--deadline-s", type=float, default=60.0, help="how long it may take")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS", "127.0.0.1:6379"), help="the GCS")
    options = parser.parse_args(argv)
    until = time.monotonic() + options.deadline_s
    stopping = drivers()
    for pid in stopping:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGTERM)
    alive: Callable[[], bool] = lambda: False  # noqa: E731
    if not stopping:  # a driver's own node is needed until it has saved
        try:
            alive = drain_node(options.deadline_s, options.address.rpartition("//")[2])
        except Exception as error:
            print(f"not drained: {error}", file=sys.stderr)
    with contextlib.suppress(Exception):
        while time.monotonic() < until and (set(stopping) & set(drivers()) or alive()):
            time.sleep(0.5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
