"""Where Ray Serve listens: its HTTP address, the port, and the gRPC servers of its replicas."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from functools import wraps
from typing import Any

from scoreray.cluster.hooks import SERVE_CLIENT, hook
from scoreray.data.errors import ScorerayError, UserError

LOOPBACK = "127.0.0.1"
ANY = ("[::]", "0.0.0.0")
CALLED_BY_GRPC = ("RAY_SERVE_USE_GRPC_BY_DEFAULT", "RAY_SERVE_PROXY_USE_GRPC", "RAY_SERVE_ENABLE_HA_PROXY")


def keep_grpc_to_loopback() -> None:
    """gRPC servers that this process starts from now on listen on loopback where they ask for all addresses.

    Ray Serve 2.60 starts one in every replica, `[::]:0` (ray/serve/_private/replica.py), for calls between deployments
    whose arguments are pickles, and has no setting for its address. Deployments call each other through Ray's actors
    unless CALLED_BY_GRPC say otherwise, so nobody dials it, on a cluster of many nodes neither. To be called from a
    deployment's constructor: Serve binds its server after that.
    """
    import grpc

    if any(os.environ.get(name, "0") not in ("", "0") for name in CALLED_BY_GRPC):
        return
    servers = grpc.aio.Server.__subclasses__()
    if not servers:  # of another grpcio: every one that was tried has its own
        logging.getLogger("scoreray").warning("Ray Serve's gRPC servers may listen on all addresses: close their ports")
    for server in servers:
        for name in ("add_insecure_port", "add_secure_port"):
            method = getattr(server, name)
            if not hasattr(method, "keeps_to_loopback"):
                setattr(server, name, _on_loopback(method))


def _on_loopback(add_port: Callable[..., int]) -> Callable[..., int]:
    @wraps(add_port)
    def added(self: Any, address: str, *credentials: Any) -> int:
        host, _, port = address.rpartition(":")
        return add_port(self, f"{LOOPBACK}:{port}" if host in ANY else address, *credentials)

    added.keeps_to_loopback = True  # type: ignore[attr-defined]
    return added


def start_listening(http: dict[str, Any], quiet: dict[str, Any]) -> bool:
    """Starts Serve; returns whether it ran already. Raises UserError where it does at another address.

    Only a private name of Ray Serve knows that address: `serve.start` ignores new options with a warning, and
    `serve.status` has none of them.
    """
    from ray import serve
    from ray.exceptions import RayError

    client, ran_already = hook(SERVE_CLIENT), bool(serve.status().proxies)
    if client is None and ran_already:
        raise UserError("Ray Serve already runs on this cluster, at an unknown address: shut it down first")
    try:
        serve.start(proxy_location="HeadOnly", http_options=http, logging_config=quiet)
    except (RayError, TimeoutError) as error:
        if not ran_already:
            serve.shutdown()
        raise ScorerayError(f"Ray Serve did not start to listen on port {http['port']}: {reason_of(error)}") from None
    if client is None:
        return False
    actual = client().http_config
    if (actual.host, actual.port) != (http["host"], http["port"]):
        raise UserError(
            f"Ray Serve already runs on this cluster and listens on {actual.host}:{actual.port}, "
            f"not on {http['host']}:{http['port']}: take these with --host and --port, or shut it down first"
        )
    return ran_already


def free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raises UserError where a port of this machine is taken, or the host is not one of its addresses."""
    if os.environ.get("RAY_ADDRESS"):
        return  # the listener is on another machine
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UserError(
            f"{host}:{port} can't be listened on: {error.strerror}; choose with --host and --port"
        ) from None


def reason_of(error: BaseException) -> str:
    """The line of a Serve failure that says what happened: Serve raises RuntimeError with a traceback in its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if "Error:" in line]
    return (ours or lines or [type(error).__name__])[-1]
