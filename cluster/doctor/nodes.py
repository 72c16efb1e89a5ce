"""`scoreray doctor` on a cluster: a task on every node collects facts, `judge.py` makes findings of them."""

from __future__ import annotations

import time
from typing import Any

from scoreray.cluster.connect.room import REPORTED_S, autoscaler
from scoreray.cluster.doctor.facts import Clock, NodeReport, RunNeeds, facts_of_node, time_of_node
from scoreray.cluster.doctor.judge import judge, judge_room
from scoreray.cluster.doctor.reach import reached
from scoreray.cluster.finding import Finding, error_line

WITHIN_S = 60.0


def resources_of_nodes() -> list[dict[str, float]]:
    """Of each node of the cluster that this process is connected to."""
    return [node["Resources"] for node in _alive()]


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def examine_cluster(needs: RunNeeds, dashboard: str = "") -> list[Finding]:
    """All nodes of the cluster that this process is connected to, and its dashboard at HOST:PORT."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    nodes = _alive()
    names = _names(nodes)
    on = {
        name: {"scheduling_strategy": On(node["NodeID"], soft=False)} for name, node in zip(names, nodes, strict=True)
    }
    task, time_of = (ray.remote(num_cpus=0, max_retries=0)(one) for one in (facts_of_node, time_of_node))
    facts = {name: task.options(**on[name]).remote(needs) for name in names}
    reports, end = {}, time.monotonic() + WITHIN_S
    for name in names:
        try:
            reports[name] = NodeReport(ray.get(facts[name], timeout=max(1.0, end - time.monotonic())))
        except Exception as error:  # of every kind: what Ray raises, and what the node's own code does
            reports[name] = NodeReport(error=error_line(error))
    for name, report in reports.items():  # one by one, and after the facts: starting a worker takes seconds
        if not report.error:
            reports[name] = _with_clock(report, time_of.options(**on[name]))
    answering = [node for name, node in zip(names, nodes, strict=True) if not reports[name].error]
    resources = dict(zip(names, (node["Resources"] for node in nodes), strict=True))
    room = judge_room(resources, needs, grows=autoscaler(REPORTED_S).is_there)
    return [*judge(reports), *room, *_token_of(dashboard), *reached(answering)]


def _with_clock(report: NodeReport, time_of: Any) -> NodeReport:
    import ray

    try:
        began = time.time()
        theirs = ray.get(time_of.remote(), timeout=WITHIN_S)
        ended = time.time()
    except Exception as error:
        return NodeReport(error=error_line(error))
    return NodeReport(report.facts, Clock(theirs - (began + ended) / 2, (ended - began) / 2))


def _names(nodes: list[Any]) -> list[str]:
    """A node's address; where several have the same, with a part of its id."""
    addresses = [str(node["NodeManagerAddress"]) for node in nodes]
    return [
        address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:6]})"
        for address, node in zip(addresses, nodes, strict=True)
    ]


def _token_of(url: str) -> list[Finding]:
    """Whether the dashboard, through which jobs come, refuses calls without a token."""
    import urllib.error
    import urllib.request

    if not url:
        return []
    try:
        urllib.request.urlopen(f"http://{url}/api/jobs/", timeout=10).close()
    except urllib.error.HTTPError as refused:
        if refused.code in (401, 403):
            return [Finding("token", "good", f"the dashboard at {url} refuses calls without one ({refused.code})")]
        return []
    except OSError as error:
        return [Finding("token", "note", f"the dashboard at {url} does not answer from this machine ({error})")]
    text = f"the dashboard at {url} takes jobs without a token; set RAY_AUTH_MODE=token on the head"
    return [Finding("token", "problem", text, {"dashboard": url})]
