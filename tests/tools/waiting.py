"""How long tests wait for what must come."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

# Far above what anything here takes on an idle machine (seconds), so that only what never comes fails; under pytest's
# own limit of a test, so that the failure says what was waited for.
PATIENCE_S = 240.0

# The environment of a Ray node on a busy machine. By default it ends where its dashboard takes more than 60 s to start,
# a part of the dashboard or the raylet's agent more than 30 s: by then it may have answered a first request.
PATIENT_RAY = {
    "RAY_gcs_server_port_wait_time_s": f"{PATIENCE_S:.0f}",
    "RAY_raylet_start_wait_time_s": f"{PATIENCE_S:.0f}",
    "RAY_agent_register_timeout_ms": f"{1000 * PATIENCE_S:.0f}",
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": f"{PATIENCE_S:.0f}",
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": f"{PATIENCE_S:.0f}",
}


def wait_until(condition: Callable[[], Any], what: str | Callable[[], object], every_s: float = 0.05) -> Any:
    """The condition's first true value. `what` is in the failure where there is none within PATIENCE_S: a text, or a
    function that makes one then."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {PATIENCE_S:.0f} s: {what if isinstance(what, str) else what()}")
        time.sleep(every_s)
    return found
