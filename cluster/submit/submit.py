"""The words of `scoreray submit`: sends a verb, follows it, and what can be asked of jobs that are there."""

from __future__ import annotations

import json
import sys
from typing import Any

from scoreray.cluster.display import say
from scoreray.cluster.submit.jobs import Parse, prepared
from scoreray.cluster.submit.jobs_api import Cluster, answer
from scoreray.data.errors import UserError

ASKS = ("status", "logs", "stop", "list")


def submit(
    words: list[str],
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
        if words[:1] and words[0] in ASKS:
            so_far = "stopped"
            return _ask(words, address, as_json)
        with prepared(words, env, from_env, name, parse) as job:
            cluster = Cluster(address)
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


def _follow(cluster: Cluster, job_id: str, as_json: bool = False) -> int:
    stream = sys.stderr if as_json else sys.stdout

    def out(text: str) -> None:
        stream.write(text)
        stream.flush()

    try:
        status = cluster.follow(job_id, out, say)
    except KeyboardInterrupt:
        say(f"not followed any more; the job goes on: scoreray submit logs {job_id}, or submit stop {job_id}")
        return 130
    say(f"{job_id} ended with {status}")
    return status


def _ask(words: list[str], address: str | None, as_json: bool) -> int:
    asked, rest = words[0], [word for word in words[1:] if word != "--json"]
    as_json = as_json or "--json" in words[1:]
    for word in rest:
        if word.startswith("-"):
            raise UserError(f"submit {asked} {word}: options of submit stand before it: submit {word} ... {asked}")
    if asked == "list":
        if rest:
            raise UserError(f"submit list {rest[0]}: takes no further words")
        found = [answer(job) for job in Cluster(address).jobs()]
        print(json.dumps(found) if as_json else "\n".join(map(_line, found)) or "no jobs")
        return 0
    if len(rest) != 1:
        raise UserError(f"submit {asked}: write one job, submit {asked} ID; submit list shows them")
    cluster = Cluster(address)
    job = cluster.job(rest[0])
    if asked == "logs":
        return _follow(cluster, job.submission_id, as_json)
    if asked == "stop":
        going = cluster.stop(job.submission_id)
        told = {"id": job.submission_id, "stopped": going}
        print(
            json.dumps(told) if as_json else f"{job.submission_id}: {'told to stop' if going else 'had ended before'}"
        )
        return 0
    print(json.dumps(answer(job)) if as_json else _line(answer(job)))
    return 0


def _line(job: dict[str, Any]) -> str:
    seconds = "" if job["seconds"] is None else f"{job['seconds']:,.0f} s"
    return f"{job['id']:40} {job['status']:10} {seconds:>10}"
