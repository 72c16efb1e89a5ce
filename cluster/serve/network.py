"""Where the processes of a service listen, as far as Ray Serve leaves that to us."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from typing import Any

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
    for server in grpc.aio.Server.__subclasses__():
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
