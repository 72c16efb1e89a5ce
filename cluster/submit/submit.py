"""`scoreray submit`: sends a verb as a job and follows it; lists, follows and stops jobs of before."""

from __future__ import annotations

import json
import sys
from typing import Any

from scoreray.cluster.display import say
from scoreray.cluster.submit.jobs import Parse, prepared
from scoreray.cluster.submit.jobs_api import JobsClient, answer
from scoreray.data.errors import UserError

ABOUT_JOBS = ("status", "logs", "stop", "list")


def submit(
    arguments: list[str],
    *,
    address: str | None,
    env: list[str],
    from_env: list[str],
    name: str | None,
    detach: bool,
    as_json: bool,
    parse: Parse,
) -> int:
    """Returns the exit status of the verb (0 with --detach, 130 after Ctrl-C). Raises ScorerayErrors."""
    so_far = "stopped; nothing was submitted"
    try:
        if arguments[:1] and arguments[0] in ABOUT_JOBS:
            so_far = "stopped"
            return _about_jobs(arguments, address, as_json)
        with prepared(arguments, env, from_env, name, parse) as job:
            cluster = JobsClient(address)
            so_far = "stopped while it was being submitted; scoreray submit list shows whether it is there"
            job_id = cluster.submit(job)
    except KeyboardInterrupt:
        say(so_far)
        return 130
    if as_json:
        print(json.dumps({"id": job_id, "address": cluster.address}), flush=True)
    say(f"submitted as {job_id} to {cluster.address}")
    if detach:
        say(f"  scoreray submit logs {job_id} follows it, scoreray submit stop {job_id} ends it")
        return 0
    return _follow(cluster, job_id, as_json)


def _follow(cluster: JobsClient, job_id: str, as_json: bool = False) -> int:
    stream = sys.stderr if as_json else sys.stdout

    def out(text: str) -> None:
        stream.write(text)
        stream.flush()

    try:
        status = cluster.follow(job_id, out, say)
    except KeyboardInterrupt:
        say(f"not followed any more; the job is running: scoreray submit logs {job_id}, or submit stop {job_id}")
        return 130
    say(f"{job_id} ended with {status}")
    return status


def _about_jobs(arguments: list[str], address: str | None, as_json: bool) -> int:
    command, rest = arguments[0], [word for word in arguments[1:] if word != "--json"]
    as_json = as_json or "--json" in arguments[1:]
    for word in rest:
        if word.startswith("-"):
            raise UserError(f"submit {command} {word}: options of submit come before it: submit {word} ... {command}")
    if command == "list":
        if rest:
            raise UserError(f"submit list {rest[0]}: takes no arguments")
        found = [answer(job) for job in JobsClient(address).jobs()]
        print(json.dumps(found) if as_json else "\n".join(map(_line, found)) or "no jobs")
        return 0
    if len(rest) != 1:
        raise UserError(f"submit {command}: give one job, submit {command} ID; submit list shows them")
    cluster = JobsClient(address)
    job = cluster.job(rest[0])
    if command == "logs":
        return _follow(cluster, job.submission_id, as_json)
    if command == "stop":
        was_running = cluster.stop(job.submission_id)
        answered = {"id": job.submission_id, "stopped": was_running}
        line = f"{job.submission_id}: {'stopping' if was_running else 'had ended before'}"
        print(json.dumps(answered) if as_json else line)
        return 0
    print(json.dumps(answer(job)) if as_json else _line(answer(job)))
    return 0


def _line(job: dict[str, Any]) -> str:
    seconds = "" if job["seconds"] is None else f"{job['seconds']:,.0f} s"
    return f"{job['id']:40} {job['status']:10} {seconds:>10}"
