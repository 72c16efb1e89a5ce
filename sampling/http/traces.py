"""One request for samples as a span: what it waited, and what its steps took (see `data/traces.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scoreray.data.traces import finished


def trace_request(
    request_id: str, headers: Mapping[str, str], code: str, took_s: float, about: Mapping[str, Any] | None = None
) -> None:
    """Call it when the answer is made. about: of the answer; a replayed one was drawn earlier and has no parts here."""
    parts = []
    if about is not None and about["took_s"] <= took_s:
        begin = took_s - about["took_s"]  # on the way to the replica and back, of which nothing more is known
        steps = begin + about["queued_s"]
        parts = [("serve.queue", begin, steps), ("serve.steps", steps, took_s)]
    facts = {name: about[name] for name in ("model", "checkpoint") if name in about} if about else {}
    if about is not None and about.get("conditions"):
        facts["conditions"] = ",".join(about["conditions"])
    error = "" if code == "ok" else code
    finished("serve.request", took_s, parts, headers, error, request_id=request_id, code=code, **facts)
