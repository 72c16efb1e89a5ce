"""What a cluster's dashboard answers, and what is made of it; the dashboard is a stand-in."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from scoreray.cluster import display
from scoreray.cluster.submit import jobs_api
from scoreray.cluster.submit.jobs import JobMetadata, Submission
from scoreray.cluster.submit.jobs_api import JobsClient, Unreachable

JOB = Submission("python -m scoreray.cluster.cli doctor", {}, JobMetadata("doctor"), "scoreray-doctor")
NO_AGENT = "Request failed with status code 500: No available agent to submit job, please try again later."


def client_that_fails(monkeypatch: pytest.MonkeyPatch, *faults: str) -> tuple[JobsClient, list[Any], io.StringIO]:
    """A client whose first submissions fail by these faults; what it has submitted; what it says."""
    sent, said, left = list[Any](), io.StringIO(), list(faults)

    def submit_job(**job: Any) -> None:
        if left:
            raise RuntimeError(left.pop(0))
        sent.append(job["submission_id"])

    client = object.__new__(JobsClient)
    client.address, client.client = "http://head:8265", SimpleNamespace(submit_job=submit_job, list_jobs=list)
    monkeypatch.setattr(jobs_api, "AGENT_LOOK_S", 0.0)
    monkeypatch.setattr(display, "console", Console(file=said, width=200))
    return client, sent, said


def test_a_job_waits_for_the_agent_of_a_cluster_that_has_just_started(monkeypatch: pytest.MonkeyPatch) -> None:
    client, sent, said = client_that_fails(monkeypatch, NO_AGENT, NO_AGENT)
    assert client.submit(JOB) == "scoreray-doctor-1"
    assert sent == ["scoreray-doctor-1"]
    assert said.getvalue().count("have just started: waiting up to 120 s for their job agent") == 1


def test_it_waits_for_nothing_else_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    client, sent, said = client_that_fails(monkeypatch, "Request failed with status code 500: the disk is full")
    with pytest.raises(Unreachable, match="the disk is full"):
        client.submit(JOB)
    client, sent, said = client_that_fails(monkeypatch, NO_AGENT)
    monkeypatch.setattr(jobs_api, "AGENT_WAIT_S", -1.0)
    with pytest.raises(
        Unreachable, match=r"no node has a job agent after .* --dashboard-agent-listen-port that is free"
    ):
        client.submit(JOB)
    assert (sent, said.getvalue()) == ([], "")
