"""`scoreray submit`: a verb of this command line as a job on a remote Ray cluster, through Ray's Jobs API.

The job is named after its run; its code is this checkout's, its config a file that travels with it. Credentials do
not travel: whoever may see the dashboard sees a job's environment, so it names the cluster's variables, not values.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scoreray.cluster.wheel import build_wheel
from scoreray.data.errors import ScorerayError, UserError, nearest

ADDRESS, TOKEN = "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"
VERBS = ("train", "tune", "sample", "evaluate", "export", "compare", "doctor", "data")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
SECRET = re.compile(r"(?i)secret|token|passw|credential|_key\b|access_key|private")
LOOKS_SECRET = re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|://[^/\s:@]+:[^/\s@]+@|BEGIN [A-Z ]*PRIVATE KEY")
SAVE_WITHIN_S = 120  # after `stop`, before Ray kills the driver
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Job:
    """What is sent: a shell line, where it runs (Ray's runtime_env), and what its metadata says."""

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    name: str


@contextlib.contextmanager
def prepared(words: list[str], env: list[str], from_env: list[str], name: str | None) -> Iterator[Job]:
    """The job of a verb and its words; its files last as long as the context. Raises UserError."""
    if not words or words[0] not in VERBS:
        given = words[0] if words else ""
        raise UserError(f"submit {given}: not a verb that runs as a job; {nearest(given, VERBS)}")
    variables, references = _variables(env), _references(from_env)
    for word in words:
        if LOOKS_SECRET.search(word):
            raise UserError("submit: a word looks like a credential, and a job's words can be read by others; "
                            "let the cluster's environment or role have it (--from-env)")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="scoreray-submit-") as folder:
        place = Path(folder, "files")
        place.mkdir()
        sent, run = _with_files(words, place)
        line = " ".join([*(f'{mine}="${theirs}"' for mine, theirs in references), "python -m scoreray.cluster.command",
                         *map(shlex.quote, sent)])  # fmt: skip
        runtime_env = {"py_modules": [str(build_wheel(Path(folder)))], "working_dir": str(place), "env_vars": variables}
        metadata = {"scoreray_verb": words[0], "scoreray_run": run}
        yield Job(line, runtime_env, metadata, name or "-".join(filter(None, ("scoreray", words[0], run))))


def _variables(pairs: list[str]) -> dict[str, str]:
    found = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_JOB_STOP_WAIT_TIME_S": f"{SAVE_WITHIN_S}"}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not NAME.fullmatch(name):
            raise UserError(f"--env {name}: write NAME=VALUE")
        if SECRET.search(name) or LOOKS_SECRET.search(value):
            raise UserError(f"--env {name}: a credential's value would be shown with the job; write "
                            f"--from-env {name}=VARIABLE, a variable that the cluster's nodes have")  # fmt: skip
        found[name] = value
    return found


def _references(pairs: list[str]) -> list[tuple[str, str]]:
    found = []
    for pair in pairs:
        mine, _, theirs = pair.partition("=")
        if not NAME.fullmatch(mine) or not NAME.fullmatch(theirs or mine):
            raise UserError(f"--from-env {mine}: write NAME=VARIABLE, both names of variables")
        found.append((mine, theirs or mine))
    return found


def _with_files(words: list[str], place: Path) -> tuple[list[str], str]:
    """The words with local YAML files copied to `place` and named as there, and the run's name in the first of them."""
    sent, run = [], ""
    for word in words:
        path = Path(word)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            text = path.read_text()
            if LOOKS_SECRET.search(text):
                raise UserError(f"{word}: something in it looks like a credential; configs hold none")
            page = _page(text)
            run = run or _name(page, "run") or _name(page, "study")
            base = path.parent / str(page.get("base", ""))
            if base.is_file():  # of a sweep
                shutil.copy(base, place / f"base-{base.name}")
                text = yaml.safe_dump(page | {"base": f"base-{base.name}"}, sort_keys=False)
            (place / path.name).write_text(text)
            word = path.name
        elif word.startswith("run.name="):
            run = word.partition("=")[2]
        sent.append(word)
    return sent, re.sub(r"[^A-Za-z0-9_.-]", "-", run)


def _page(text: str) -> dict[str, Any]:
    with contextlib.suppress(yaml.YAMLError):
        page = yaml.safe_load(text)
        return page if isinstance(page, dict) else {}
    return {}  # its mistake is told by the verb


def _name(page: dict[str, Any], section: str) -> str:
    inner = page.get(section)
    return str(inner.get("name") or "") if isinstance(inner, dict) else ""


def check_locally(words: list[str]) -> None:
    """Mistakes in a training config are told here, before anything is sent. Raises UserError."""
    if words[:1] == ["train"] and len(words) > 1 and Path(words[1]).is_file():
        from scoreray.trainer.config import load_config

        load_config(Path(words[1]), [w for w in words[2:] if "=" in w and not w.startswith("-")])


class Cluster:
    """A remote cluster's jobs. Raises UserError where it can't be reached or does not take the token."""

    def __init__(self, address: str | None) -> None:
        address = address or os.environ.get(ADDRESS, "")
        if not re.match(r"https?://", address):
            raise UserError(
                f"--address {address or '(none)'}: write http(s)://HOST:PORT of a dashboard, or set {ADDRESS}"
            )
        if urllib.parse.urlsplit(address).password:
            raise UserError(f"--address: no password in it; the token comes from {TOKEN}")
        self.address = address.rstrip("/")
        if os.environ.get(TOKEN) or os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ["RAY_AUTH_MODE"] = "token"  # before Ray is imported, which then sends it
        from ray.job_submission import JobSubmissionClient

        for module in (
            "dashboard.modules.job.sdk",
            "dashboard.modules.dashboard_sdk",
            "_private.runtime_env.packaging",
        ):
            logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)
        self.client: Any = self._asked(lambda: JobSubmissionClient(self.address))

    def _asked(self, call: Callable[[], Any]) -> Any:
        import requests

        try:
            return call()
        except Exception as error:
            text = f"{type(error).__name__} {error}"
            if "Authentication" in text or " 401" in text or " 403" in text or "Unauthorized" in text:
                raise UserError(f"{self.address}: the cluster does not take this token (401); set {TOKEN}") from None
            if isinstance(error, ConnectionError | requests.exceptions.RequestException | OSError):
                raise Unreachable(f"{self.address}: no answer from the cluster's dashboard") from None
            if isinstance(error, RuntimeError):
                raise UserError(f"{self.address}: {str(error).strip().splitlines()[-1][:300]}") from None
            raise

    def jobs(self) -> list[Any]:
        """Those that have a submission id, newest first."""
        found = [job for job in self._asked(self.client.list_jobs) if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0, reverse=True)

    def job(self, name: str) -> Any:
        """The job of an id; of a name, its newest submission."""
        known = self.jobs()
        for job in known:
            if job.submission_id == name or re.fullmatch(rf"{re.escape(name)}-\d+", job.submission_id):
                return job
        raise UserError(f"job '{name}': not on this cluster; {nearest(name, [j.submission_id for j in known])}")

    def submit(self, job: Job) -> str:
        """Starts it as <name>-<number>; refused while an earlier one goes on, as two would write one run."""
        earlier = [j for j in self.jobs() if re.fullmatch(rf"{re.escape(job.name)}-\d+", j.submission_id)]
        for one in earlier:
            if one.status not in ENDED and job.metadata["scoreray_run"]:
                raise UserError(
                    f"job '{one.submission_id}' of this run goes on: 'submit logs' follows it, 'submit stop' ends it"
                )
        number = max((int(j.submission_id.rpartition("-")[2]) for j in earlier), default=0) + 1
        return str(self._asked(lambda: self.client.submit_job(
            entrypoint=job.entrypoint, submission_id=f"{job.name}-{number}", runtime_env=job.runtime_env,
            metadata=job.metadata)))  # fmt: skip

    def stop(self, job_id: str) -> bool:
        """Asks it to end (as by SIGTERM: it saves first); whether it was going on."""
        return bool(self._asked(lambda: self.client.stop_job(job_id)))

    def logs(self, job_id: str) -> str:
        return str(self._asked(lambda: self.client.get_job_logs(job_id)))

    def follow(self, job_id: str, out: Callable[[str], None], note: Callable[[str], None]) -> int:
        """Hands on the output, each character once, also when the connection breaks; the exit status at the end."""
        shown, pause, lost = 0, 0.5, False
        while True:
            try:
                shown = asyncio.run(self._tail(job_id, shown, out))
                job = self._asked(lambda: self.client.get_job_info(job_id))
                if job.status in ENDED:
                    rest = self.logs(job_id)
                    out(rest[shown:])
                    return _status(job)
                pause, lost = 0.5, False
            except (Unreachable, _Broken) as error:
                shown = error.shown if isinstance(error, _Broken) else shown
                if not lost:
                    note("connection lost; the job goes on, trying again")
                lost = True
                pause = min(10.0, pause * 1.5)
            time.sleep(pause)

    async def _tail(self, job_id: str, shown: int, out: Callable[[str], None]) -> int:
        seen = 0
        try:
            async for text in self.client.tail_job_logs(job_id):
                seen += len(text)
                if seen > shown:
                    out(text[-(seen - shown) :])
                    shown = seen
        except Exception:
            raise _Broken(shown) from None
        return shown


class Unreachable(ScorerayError):
    """The cluster does not answer at the moment."""

    exit_status = 3


class _Broken(Exception):
    def __init__(self, shown: int) -> None:
        super().__init__(shown)
        self.shown = shown


def _status(job: Any) -> int:
    """The exit status of the verb on the cluster; 130 where it was stopped."""
    if job.status == "SUCCEEDED":
        return 0
    code = job.driver_exit_code
    return 130 if job.status == "STOPPED" else code if code is not None and 0 < code < 256 else 1


def answer(job: Any) -> dict[str, Any]:
    """A job for --json and `list`."""
    seconds = ((job.end_time or time.time() * 1000) - job.start_time) / 1000 if job.start_time else None
    return {
        "id": job.submission_id, "status": str(getattr(job.status, "value", job.status)), "seconds": seconds,
        "verb": (job.metadata or {}).get("scoreray_verb", ""), "run": (job.metadata or {}).get("scoreray_run", ""),
        "message": job.message or "",
    }  # fmt: skip
