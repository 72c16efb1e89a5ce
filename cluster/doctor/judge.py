"""Findings from what the nodes of a cluster report: functions of the reports alone."""

from __future__ import annotations

import statistics
from typing import Any, Literal

from scoreray.cluster.connect.open_ports import judge_ports
from scoreray.cluster.doctor.facts import Clock, NodeFacts, NodeReport, RunNeeds, StorageProbe
from scoreray.cluster.doctor.machine import gpu_kind
from scoreray.cluster.finding import Finding

CLOCK_S, DISK_BYTES, SHM_BYTES = 2.0, 20 << 30, 1 << 30
THIS_MACHINE = "this machine"
SILENT = "open TCP 10002-19999 (Ray's workers) between the nodes, or look at the raylet's log there"


def judge(reports: dict[str, NodeReport]) -> list[Finding]:
    """Findings from what each node (by address) reports; a difference is named by node and thing."""
    found = [
        Finding("node", "problem", f"{node}: does not answer ({report.error[:200]}); {SILENT}", {"node": node})
        for node, report in reports.items()
        if report.error
    ]
    facts_of = {node: report.facts for node, report in reports.items() if report.facts}
    if not facts_of:
        return found
    found += _versions(facts_of) + _clocks({node: report.clock for node, report in reports.items() if report.clock})
    for node, facts in facts_of.items():
        found += _disk_findings(node, facts)
        found.append(judge_ports(node, facts.ports, facts.has_token))
        if not facts.has_token:
            text = f"{node}: Ray asks for no token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN on every node"
            found.append(Finding("token", "problem", text, {"node": node}))
        found += _storage(node, facts.storage) if facts.storage else []
        if facts.data_error:
            text = f"{node}: can't read the data set: {facts.data_error}; give its role the right to get and list"
            found.append(Finding("data", "problem", text, {"node": node}))
    if all(facts.has_token for facts in facts_of.values()):
        found.append(Finding("token", "good", "every node asks for it"))
    return found


def judge_room(resources: dict[str, dict[str, float]], needs: RunNeeds, *, grows: bool = False) -> list[Finding]:
    """Whether the run's least number of workers fits the nodes (of `ray.nodes()`), when nothing else is there.

    grows: an autoscaler adds nodes; else a run that does not fit is refused, or would wait for good.
    """
    from scoreray.trainer.on_ray.workers import workers_that_fit

    kinds = {node: gpu_kind(has) or "GPUs" for node, has in resources.items() if has.get("GPU", 0) > 0}
    gpus = ", ".join(f"{node} {resources[node]['GPU']:g} x {kind}" for node, kind in kinds.items()) or "no GPUs"
    found = [Finding("GPUs", "note" if len(set(kinds.values())) > 1 else "good", gpus, {"kinds": kinds})]
    if needs.workers:
        fit = workers_that_fit(resources, {"CPU": needs.cpus, "GPU": needs.gpus})
        each = f"{needs.cpus:g} CPUs" + (" and a GPU" if needs.gpus else "")
        text = f"room for {min(fit, needs.workers)} of {needs.workers} workers of {each}"
        state: Literal["good", "note", "problem"] = "good"
        if fit < needs.workers:
            state = "note" if grows else "problem"
            text += "; the run waits for its autoscaler's nodes" if grows else "; add nodes or lower scaling.workers"
        found.append(Finding("room", state, text, {"fit": fit}))
    return found


def _versions(facts_of: dict[str, NodeFacts]) -> list[Finding]:
    found = []
    for name in next(iter(facts_of.values())).versions:
        given = {node: facts.versions.get(name) for node, facts in facts_of.items()}
        usual = statistics.mode(given.values())
        for node, version in given.items():
            if version != usual:
                text = f"{node}: {name} {version}, the others have {usual}; install the same on this node"
                found.append(Finding("versions", "problem", text, {"node": node, "name": name, "version": version}))
    return found or [Finding("versions", "good", f"the same on {len(facts_of)} node(s)")]


def _disk_findings(node: str, facts: NodeFacts) -> list[Finding]:
    found = []
    shm = "enlarge it (Kubernetes: an emptyDir with medium Memory)"
    disks = [("disk", folder, free, DISK_BYTES, "free some, or put that folder on another disk")
             for folder, free in facts.disks.items()]  # fmt: skip
    for what, folder, free, least, fix in [*disks, ("/dev/shm", "/dev/shm", facts.shm_free, SHM_BYTES, shm)]:
        text = f"{node}: {free / 2**30:,.1f} GiB free" + (f" for {folder}" if what == "disk" else "")
        low = free < least
        text += f", {least / 2**30:,.0f} GiB are wanted; {fix}" if low else ""
        about = {"node": node, "folder": folder, "free_bytes": free}
        found.append(Finding(what, "problem" if free < least / 20 else "note" if low else "good", text, about))
    return found


def _clocks(clocks: dict[str, Clock]) -> list[Finding]:
    """Which clock differs from most, this machine's among them: alone against many it is the one that is wrong."""
    all_clocks = {THIS_MACHINE: Clock(0.0, 0.0), **clocks}
    usual = statistics.median_low(clock.skew_s for clock in all_clocks.values())
    if len(clocks) < 2 or abs(usual) <= CLOCK_S:
        usual = 0.0
    found = []
    for node, clock in all_clocks.items():
        skew_s = clock.skew_s - usual
        if abs(skew_s) - clock.within_s > CLOCK_S:
            text = f"{node}: its clock is {skew_s:+.1f} s from the others'; S3 refuses 900 s, set up NTP"
            found.append(Finding("clock", "problem", text, {"node": node, "skew_s": skew_s}))
    return found or [Finding("clock", "good", f"within {CLOCK_S:g} s on {len(clocks)} node(s)")]


def _storage(node: str, probe: StorageProbe) -> list[Finding]:
    found = []
    for step, error in probe.errors.items():
        if error:
            text = f"{node}: can't {step} in run.storage: {error}; give its role that right"
            found.append(Finding("storage", "problem", text, {"node": node, "step": step}))
    if not found:
        speeds: dict[str, Any] = {
            step: probe.bytes_per_s[step] for step in ("write", "read") if step in probe.bytes_per_s
        }
        text = ", ".join(f"{step} {speed / 1e6:,.0f} MB/s" for step, speed in speeds.items()) or "can be listed"
        found.append(Finding("storage", "good", f"{node}: {text}", {"node": node, **speeds}))
    return found
