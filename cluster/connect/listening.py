"""What of Ray listens on a node for others than that machine itself, read from /proc.

Ports of Ray's own processes are told by process, and judged: which ask for the token, and which never do.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scoreray.cluster.finding import Finding

LISTEN = "0A"  # linux/include/net/tcp_states.h
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
OPEN = ("agent", "worker")  # metrics and a worker's own servers (Serve's HTTP, gloo, NCCL) ask for nothing


def listening(session: str) -> list[dict[str, Any]]:
    """{"process", "address", "port"} of each TCP port that is not loopback's of this Ray node, in this namespace.

    session: Ray's session folder, which its processes name or have logs open in: other clusters' are not told.
    """
    inodes = dict(_sockets())
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            what = next((name for part, name in PROCESSES.items() if part in line), None)
            if what is None:
                continue
            files = set(_open_files(process))
            if session not in line and not any(file.startswith(session) for file in files):
                continue
            for address, port in (inodes[file] for file in files & inodes.keys()):
                if not ipaddress.ip_address(address).is_loopback:
                    found.append({"process": what, "address": address, "port": port})
    unique = {(one["process"], one["port"]): one for one in found}  # a forked child holds its parent's socket too
    return sorted(unique.values(), key=lambda one: (one["process"], one["port"]))


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


def _open_files(process: Path) -> Iterator[str]:
    for file in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            yield os.readlink(file)


def _sockets() -> Iterator[tuple[str, tuple[str, int]]]:
    """("socket:[inode]", (address, port)) of every listening TCP socket (proc(5), /proc/net/tcp)."""
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == LISTEN:
                    hexadecimal, _, port = columns[1].partition(":")
                    yield f"socket:[{columns[9]}]", (_address(hexadecimal), int(port, 16))


def _address(hexadecimal: str) -> str:
    """Words of 32 bits in the machine's order: "0100007F" is 127.0.0.1 on x86."""
    words = [int(hexadecimal[i : i + 8], 16) for i in range(0, len(hexadecimal), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def judge_listening(node: str, ports: list[dict[str, Any]], token: bool) -> Finding:
    """A problem where others can reach Ray and it asks for no token, a note where they can."""
    facts = {"node": node, "listening": ports}
    if not ports:
        return Finding("ports", "good", f"{node}: Ray listens on loopback only", facts)
    by_process: dict[str, list[str]] = {}
    for one in ports:
        by_process.setdefault(one["process"], []).append(str(one["port"]))
    text = f"{node}: others reach " + ", ".join(f"{what} {_few(those)}" for what, those in by_process.items())
    if not token:
        mend = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on every node, and close them to all but the cluster"
        return Finding("ports", "problem", f"{text}; whoever does may run code there: {mend}", facts)
    ask_nothing = [what for what in by_process if what in OPEN]
    text += f"; {' and '.join(ask_nothing)} ask for no token" if ask_nothing else ""
    try:
        public = ipaddress.ip_address(node.partition(" ")[0]).is_global
    except ValueError:
        public = False
    text += f"; {'THE ADDRESS IS PUBLIC: ' if public else ''}a firewall should let in only the cluster's own nodes"
    return Finding("ports", "problem" if public else "note", text, facts)


def _few(ports: list[str]) -> str:
    return " ".join(ports[:4]) + (f" and {len(ports) - 4} more" if len(ports) > 4 else "")
