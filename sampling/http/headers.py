"""What the headers of a request say: the host that it was sent to, where the client reaches the service, its id."""

from __future__ import annotations

import re
import uuid

from fastapi import Request

from scoreray.sampling.service.config import Refused

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_host(request: Request, hosts: tuple[str, ...]) -> None:
    """Without tokens only loopback names are answered: a web page whose own DNS name leads to 127.0.0.1 (DNS rebinding)
    could else use the service of its visitor.
    """
    host = re.sub(r":\d*$", "", request.headers.get("host", "")).strip("[]").lower()
    if hosts and host not in hosts:
        raise Refused("bad_header", f"the header Host names none of {', '.join(hosts)}")


def url_of(request: Request) -> str:
    """Where the client reaches this, for a curl line to copy: only from headers that look like a host."""
    host, scheme = request.headers.get("host", ""), request.headers.get("x-forwarded-proto", request.url.scheme)
    host = host if re.fullmatch(r"[A-Za-z0-9.-]{1,253}(:\d{1,5})?|\[[0-9a-fA-F:]{2,45}\](:\d{1,5})?", host) else "HOST"
    return f"{'https' if scheme == 'https' else 'http'}://{host}"


def request_id_of(request: Request) -> str:
    """The client's X-Request-ID where it is a plain word, else a new one; the same through one request."""
    if not hasattr(request.state, "request_id"):
        given = request.headers.get("x-request-id", "")
        request.state.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    return request.state.request_id
