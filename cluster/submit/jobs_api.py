"""A remote Ray cluster's jobs, through Ray's Jobs API: submitted, followed, stopped. What a job is: `jobs.py`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

from scoreray.cluster.connect.local_ray import token_given
from scoreray.cluster.display import say, waiting
from scoreray.cluster.submit.jobs import JobMetadata, Submission
from scoreray.data.errors import ScorerayError, UserError, nearest

ADDRESS, TOKEN = "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"
NO_AGENT, AGENT_WAIT_S, AGENT_LOOK_S = "No available agent", 120.0, 1.0  # Ray waits some seconds in each look
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class JobsClient:
    """A remote cluster's jobs. Raises UserError where it can't be reached or does not take the token."""

    def __init__(self, address: str | None) -> None:
        self.address = checked_address(address or os.environ.get(ADDRESS, ""))
        if token_given():
            os.environ["RAY_AUTH_MODE"] = "token"  # before Ray is imported, which then sends it
        from ray.job_submission import JobSubmissionClient

        for module in (
            "dashboard.modules.job.sdk",
            "dashboard.modules.dashboard_sdk",
            "_private.runtime_env.packaging",
        ):
            logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)
        with _only_our_address():
            self.client: Any = self._call(lambda: JobSubmissionClient(self.address))
        assert self.client.get_address() == self.address

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            known = self._as_ours(error)
            if known is None:
                raise
            raise known from None

    def _as_ours(self, error: Exception) -> ScorerayError | None:
        """An error of Ray's client as one of ours; None where it is none of those that are known."""
        import requests

        text = str(error).strip()
        found = re.match(r"Request failed with status code (\d{3})", text)
        status = int(found[1]) if found else getattr(getattr(error, "response", None), "status_code", 0)
        if type(error).__name__ == "AuthenticationError" or status in (401, 403):
            fault = "does not take this token" if token_given() else "asks for a token"
            return UserError(f"{self.address}: the cluster {fault} ({status or 401}); set {TOKEN}")
        if status == 404 and "does not exist" in text:
            return Gone(f"{self.address}: has no such job (any more): the cluster was replaced, or the job deleted")
        if "already exists" in text:
            return UserError(f"{self.address}: a job of this name already exists")
        last = ([line.strip() for line in text.splitlines() if re.search(r"\w", line)] or [""])[-1][:300]
        if status >= 500:
            return Unreachable(f"{self.address}: the cluster's dashboard fails ({status}): {last}")
        if isinstance(error, ConnectionError | requests.exceptions.RequestException | OSError):
            return Unreachable(
                f"{self.address}: no answer from the cluster's dashboard; check --address, and the way there"
            )
        return UserError(f"{self.address}: {last}") if isinstance(error, RuntimeError) else None

    def jobs(self) -> list[Any]:
        """Those that have a submission id, newest first."""
        found = [job for job in self._call(self.client.list_jobs) if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0, reverse=True)

    def job(self, name: str) -> Any:
        """The job of an id; of a name, its newest submission."""
        known = self.jobs()
        for job in known:
            if job.submission_id == name or re.fullmatch(rf"{re.escape(name)}-\d+", job.submission_id):
                return job
        raise UserError(f"job '{name}': not on this cluster; {nearest(name, [j.submission_id for j in known])}")

    def submit(self, job: Submission) -> str:
        """Starts it as <name>-<number>; refused while another job writes the same run.

        Ray has no lock for this. So jobs are listed again afterwards: of two that came at once the later is stopped.
        """
        known, place = self.jobs(), job.metadata.writes
        for one in _writing(place, known):
            raise UserError(
                f"job '{one.submission_id}' of this run is running: 'submit logs' follows it, 'submit stop' ends it"
            )
        numbers = [int(found[1]) for one in known
                   if (found := re.fullmatch(rf"{re.escape(job.name)}-(\d+)", one.submission_id))]  # fmt: skip
        mine = f"{job.name}-{max(numbers, default=0) + 1}"
        try:
            self._accepted(
                lambda: self.client.submit_job(
                    entrypoint=job.entrypoint,
                    submission_id=mine,
                    runtime_env=job.runtime_env,
                    metadata=job.metadata.to_ray(),
                )
            )
        except UserError as error:
            if "already exists" not in str(error):
                raise
            raise UserError(
                f"job '{mine}': was submitted by another client at this moment; see 'submit list'"
            ) from None
        if place:
            self._give_way(mine, place)
        return mine

    def _accepted(self, submit: Callable[[], Any]) -> None:
        """Submits once a node's job agent is there: it comes some seconds after the dashboard that takes the job."""
        deadline = time.monotonic() + AGENT_WAIT_S
        with contextlib.ExitStack() as stack:
            said = False
            while True:
                try:
                    self._call(submit)
                    return
                except Unreachable as error:
                    if NO_AGENT not in str(error):
                        raise
                    if time.monotonic() > deadline:
                        raise Unreachable(
                            f"{self.address}: no node has a job agent after {AGENT_WAIT_S:.0f} s; beside another Ray "
                            "of a machine give ray start a --dashboard-agent-listen-port that is free"
                        ) from None
                except UserError as error:
                    if said and "already exists" in str(error):
                        return  # it was taken: Ray says that there is no agent where one took too long, too
                    raise
                if not said:
                    said = True
                    say(
                        f"the cluster's nodes have just started: waiting up to {AGENT_WAIT_S:.0f} s for their job agent"
                    )
                    stack.enter_context(waiting("waiting for the job agent of the cluster's nodes"))
                time.sleep(AGENT_LOOK_S)

    def _give_way(self, mine: str, place: str) -> None:
        writing = {one.submission_id: one for one in _writing(place, self.jobs())}
        if mine not in writing:
            return  # it has ended already
        first = min(writing.values(), key=lambda one: (one.start_time or 0, one.submission_id)).submission_id
        if first != mine:
            self.stop(mine)
            raise UserError(f"job '{first}' of this run was submitted just before: '{mine}' was stopped")

    def stop(self, job_id: str) -> bool:
        """Ends it as SIGTERM does, so it saves first; whether it was running."""
        return bool(self._call(lambda: self.client.stop_job(job_id)))

    def logs(self, job_id: str) -> str:
        return str(self._call(lambda: self.client.get_job_logs(job_id)))

    def follow(self, job_id: str, out: Callable[[str], None], note: Callable[[str], None]) -> int:
        """Passes the output on, each character once, also when the connection breaks; the exit status at the end.

        Raises Gone when the cluster does not know the job (any more), UserError when it refuses the token.
        """
        shown, pause, lost = 0, 0.5, False
        while True:
            broken = False
            try:
                shown, broken = asyncio.run(self._tail(job_id, shown, out))
                job = self._call(lambda: self.client.get_job_info(job_id))
                if job.status in ENDED:
                    out(self._rest(job_id, shown, note))
                    return _status(job)
            except Unreachable:
                broken = True
            if broken and not lost:
                note("connection lost; the job goes on, trying again")
            lost, pause = broken, min(10.0, pause * 1.5) if broken else 0.5
            time.sleep(pause)

    async def _tail(self, job_id: str, shown: int, out: Callable[[str], None]) -> tuple[int, bool]:
        """How many characters are shown now, and whether it ended by an error; which one, the job's state says."""
        seen = 0
        tail = self.client.tail_job_logs(job_id)
        while True:
            try:
                text = await anext(tail)
            except StopAsyncIteration:
                return shown, False
            except Exception:
                return shown, True
            seen += len(text)
            if seen > shown:
                out(text[-(seen - shown) :])
                shown = seen

    def _rest(self, job_id: str, shown: int, note: Callable[[str], None]) -> str:
        """What the job printed beyond `shown`; without its node, that is lost."""
        for pause in (1.0, 3.0, 0.0):
            try:
                return self.logs(job_id)[shown:]
            except Unreachable:
                time.sleep(pause)
        note("the job has ended; the end of its output can't be had from the cluster")
        return ""


def checked_address(address: str) -> str:
    """http(s)://HOST[:PORT][/PATH], without a slash at the end. Raises UserError."""
    if "@" in address:
        raise UserError(f"--address: no user, password or token in it; the token comes from {TOKEN}")
    try:
        parts = urllib.parse.urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        raise UserError(f"--address {address}: HOST:PORT has no such port; a dashboard's is 8265") from None
    if not good or re.search(r"[\s?#\\]", address):
        raise UserError(f"--address {address or '(none)'}: write http(s)://HOST:PORT of a dashboard, or set {ADDRESS}")
    return address.rstrip("/")


@contextlib.contextmanager
def _only_our_address() -> Iterator[None]:
    """Ray's client prefers these variables to the address that it is given."""
    kept = {name: os.environ.pop(name) for name in (ADDRESS, "RAY_ADDRESS") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _writing(place: str, jobs: list[Any]) -> list[Any]:
    """Running jobs that write to `place`, whatever their name and verb."""
    return [
        job for job in jobs if place and job.status not in ENDED and JobMetadata.from_ray(job.metadata).writes == place
    ]


class Unreachable(ScorerayError):
    """The cluster does not answer at the moment."""

    exit_status = 3


class Gone(ScorerayError):
    """The cluster does not know the job that was there before."""

    exit_status = 3


def _status(job: Any) -> int:
    """The exit status of the verb on the cluster; 130 where it was stopped."""
    if job.status == "SUCCEEDED":
        return 0
    code = job.driver_exit_code
    return 130 if job.status == "STOPPED" else code if code is not None and 0 < code < 256 else 1


def answer(job: Any) -> dict[str, Any]:
    """A job for --json and `list`."""
    seconds = ((job.end_time or time.time() * 1000) - job.start_time) / 1000 if job.start_time else None
    metadata = JobMetadata.from_ray(job.metadata)
    return {
        "id": job.submission_id, "status": str(getattr(job.status, "value", job.status)), "seconds": seconds,
        "verb": metadata.verb, "run": metadata.run, "message": job.message or "",
    }  # fmt: skip
