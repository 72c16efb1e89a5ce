"""The replicas behind a Serve handle, while they start and when there is none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from scoreray.cluster.serve import handles
from scoreray.cluster.serve.handles import RayBackend
from scoreray.sampling.service.request import Lost


class StartingHandle:
    """Of a deployment whose replicas are not there at the first calls; then each call's answers in turn."""

    def __init__(self, *answers: list[Any] | None) -> None:
        self.answers = list(answers)

    def broadcast(self, method: str, *arguments: Any) -> StartingHandle:
        return self

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        from ray.serve._private.common import DeploymentID
        from ray.serve.exceptions import DeploymentUnavailableError

        answer = self.answers.pop(0)
        if answer is None:
            raise DeploymentUnavailableError(DeploymentID(name="model", app_name="scoreray"))
        return answer


def test_an_ingress_that_is_ready_before_the_replicas_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "LOOK_EVERY_S", 0.0)
    handle = StartingHandle(None, None, [], ["", ""])
    asyncio.run(RayBackend(handle).prepare("run", "0.100"))
    assert handle.answers == []


def test_a_replica_that_cannot_prepare_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Lost, match="too large"):
        asyncio.run(RayBackend(StartingHandle(None, ["", "too large"])).prepare("run", "0.100"))
    monkeypatch.setattr(handles, "READY_WITHIN_S", 0.0)
    with pytest.raises(Lost, match="no replica answers"):
        asyncio.run(RayBackend(StartingHandle(None)).prepare("run", "0.100"))


def test_without_replicas_there_are_no_metrics_of_them() -> None:
    assert asyncio.run(RayBackend(StartingHandle(None)).metrics()) == {}
