"""Which ports of this machine's Ray processes others can reach, and whether Ray asks for its token.

Ports are named by the process that listens, as that decides who is let in: the GCS, raylets and the dashboard check the
token, agents and workers never do.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from dataclasses import dataclass

import psutil

from scoreray.cluster.finding import Finding

PROCESSES = {  # a part of the command line -> what it is
    "/gcs_server": "GCS",
    "/raylet/raylet": "raylet",
    "ray/dashboard/dashboard.py": "dashboard",
    "dashboard_DashboardHead": "dashboard",
    "ray/dashboard/agent.py": "agent",
    "runtime_env/agent/main.py": "agent",
    "ray.util.client.server": "client server",
    "ray::DashboardAgent": "agent",
    "ray::RuntimeEnvAgent": "agent",
    "ray::": "worker",
    "default_worker.py": "worker",
}
ANSWER_S = 5.0
OPEN = ("agent", "worker")  # metrics and a worker's own servers (Serve's HTTP, gloo, NCCL) ask for no token


@dataclass(frozen=True)
class OpenPort:
    """A TCP port on which a process listens at an address that is not loopback's."""

    process: str  # one of PROCESSES
    address: str
    port: int


def open_ports(session: str) -> list[OpenPort]:
    """Those of this machine's Ray node.

    session: Ray's session folder, which its processes name in their command lines or have logs open in: processes of
    other clusters on this machine are left out.
    """
    found: dict[tuple[str, int], OpenPort] = {}  # once where a forked child holds its parent's socket too
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        what = next((name for part, name in PROCESSES.items() if part in line), None)
        if what is None or process.pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error):  # it has ended, or is another user's
            if session not in line and not any(file.path.startswith(session) for file in process.open_files()):
                continue
            for connection in process.net_connections("tcp"):
                address, port = connection.laddr
                if connection.status == psutil.CONN_LISTEN and not _is_loopback(address):
                    found[what, port] = OpenPort(what, address, port)
    return [found[key] for key in sorted(found)]


def _is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback  # a socket for both has ::ffff:127.0.0.1


def asks_for_token(gcs: str) -> bool | None:
    """Whether Ray's GCS at HOST:PORT refuses a call without a token; None where that can't be found out."""
    try:
        import grpc
    except ImportError:  # it comes with Ray Serve
        return None
    with grpc.insecure_channel(gcs) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            refused = error.code() is grpc.StatusCode.UNAUTHENTICATED
            return True if refused else None
    return False


def judge_ports(node: str, ports: list[OpenPort], token: bool) -> Finding:
    """A problem where others can reach Ray and it asks for no token, a note where they can."""
    facts = {"node": node, "listening": ports}
    if not ports:
        return Finding("ports", "good", f"{node}: Ray listens on loopback only", facts)
    by_process: dict[str, list[str]] = {}
    for one in ports:
        by_process.setdefault(one.process, []).append(str(one.port))
    text = f"{node}: others reach " + ", ".join(f"{what} {_few(those)}" for what, those in by_process.items())
    if not token:
        fix = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on every node, and close them to all but the cluster"
        return Finding("ports", "problem", f"{text}; and may run code there: {fix}", facts)
    unchecked = [what for what in by_process if what in OPEN]
    text += f"; {' and '.join(unchecked)} ask for no token" if unchecked else ""
    try:
        public = ipaddress.ip_address(node.partition(" ")[0]).is_global
    except ValueError:
        public = False
    text += f"; {'THE ADDRESS IS PUBLIC: ' if public else ''}a firewall should let in only the cluster's own nodes"
    return Finding("ports", "problem" if public else "note", text, facts)


def _few(ports: list[str]) -> str:
    return " ".join(ports[:4]) + (f" and {len(ports) - 4} more" if len(ports) > 4 else "")
