"""Who reaches whom: the policies are applied as Kubernetes does, to the pods of all overlays at once."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any

import pytest


@dataclass(frozen=True)
class End:
    """One end of a connection: a pod with labels, in a namespace with labels, or an address outside."""

    labels: frozenset[tuple[str, str]] = frozenset()
    namespace: frozenset[tuple[str, str]] = frozenset()
    address: str = ""
    ours: bool = False


def matches(selector: dict[str, Any] | None, labels: frozenset[tuple[str, str]]) -> bool:
    return set((selector or {}).get("matchLabels", {}).items()) <= labels


def peer_is(peer: dict[str, Any], end: End) -> bool:
    if block := peer.get("ipBlock"):
        inside = lambda net: ipaddress.ip_address(end.address) in ipaddress.ip_network(net)  # noqa: E731
        return bool(end.address) and inside(block["cidr"]) and not any(map(inside, block.get("except", [])))
    if end.address:
        return False
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], end.namespace):
            return False
    elif not end.ours:
        return False
    return "podSelector" not in peer or matches(peer["podSelector"], end.labels)


def one_way(policies: list[dict[str, Any]], way: str, mine: End, other: End, port: int, protocol: str) -> bool:
    """Whether `mine`, a pod of ours, may be connected (Ingress) by, or connect (Egress) to, `other`."""
    chosen = [
        p["spec"]
        for p in policies
        if way in p["spec"]["policyTypes"] and matches(p["spec"]["podSelector"], mine.labels)
    ]
    if not chosen:
        return True
    peers = "from" if way == "Ingress" else "to"
    for rule in (rule for spec in chosen for rule in spec.get(way.lower(), [])):
        ports = rule.get("ports")
        right_port = not ports or any(
            protocol == p["protocol"] and p["port"] <= port <= p.get("endPort", p["port"]) for p in ports
        )
        if right_port and (peers not in rule or any(peer_is(peer, other) for peer in rule[peers])):
            return True
    return False


@pytest.fixture(scope="module")
def reaches(built: Any, pods: Any) -> Any:
    policies = [one for some in built.values() for one in some if one["kind"] == "NetworkPolicy"]
    ends = {pod.where.replace("/RayJob", "").replace("/RayService", "").replace("/RayCluster", ""): pod for pod in pods}

    def named(name: str) -> End:
        if name[0].isdigit():
            return End(address=name)
        if name in ends:
            return End(frozenset(ends[name].labels.items()), ours=True)
        spaces = {
            "operator": ("kubernetes.io/metadata.name", "kuberay-operator"),
            "dns": ("kubernetes.io/metadata.name", "kube-system"),
            "prometheus": ("scoreray.io/scrapes", "true"),
            "client": ("scoreray.io/clients", "true"),
            "stranger": ("kubernetes.io/metadata.name", "other"),
        }
        return End(frozenset({("app.kubernetes.io/name", "scoreray")}), frozenset({spaces[name]}))

    def connected(source: str, target: str, port: int, protocol: str = "TCP") -> bool:
        a, b = named(source), named(target)
        out = not a.ours or one_way(policies, "Egress", a, b, port, protocol)
        return out and (not b.ours or one_way(policies, "Ingress", b, a, port, protocol))

    return connected


ALLOWED = [
    ("train/workers", "train/head", 6379),  # the GCS
    ("train/head", "train/workers", 6380),  # a raylet
    ("train/workers", "train/workers", 29500 + 10000),  # NCCL, gloo, torch's store: what the kernel chooses
    ("train/workers", "train/head", 15000),  # a worker process
    ("train/submitter", "train/head", 8265),  # the job
    ("operator", "train/head", 8265),
    ("train/workers", "52.216.1.1", 443),  # S3
    ("prometheus", "train/workers", 8080),
    ("prometheus", "sample/head", 8000),
    ("client", "sample/workers", 8000),
    ("operator", "sample/head", 8265),
    ("sample/head", "sample/StatefulSet/scoreray-redis-sample", 6379),
    ("sample/workers", "sample/StatefulSet/scoreray-redis-sample", 6379),  # idempotency keys
    ("sample/head", "10.0.0.1", 6443),  # the autoscaler and the Kubernetes API
    ("dev/workers", "dev/Deployment/scoreray-s3-dev", 8333),
]
DENIED = [
    ("stranger", "train/head", 8265),  # a label of ours in another namespace does not help
    ("stranger", "sample/workers", 8000),
    ("client", "sample/head", 8265),
    ("client", "sample/head", 6379),
    ("client", "train/head", 8000),
    ("prometheus", "train/head", 8265),
    ("operator", "train/workers", 8265),
    ("train/workers", "sample/head", 6379),  # one cluster's pods and another's
    ("evaluate/workers", "train/head", 8265),
    ("train/workers", "169.254.169.254", 443),  # the node's rights are not a pod's
    ("train/workers", "169.254.169.254", 80),
    ("train/workers", "52.216.1.1", 80),
    ("train/workers", "52.216.1.1", 22),
    ("train/workers", "10.0.0.1", 6443),
    ("train/submitter", "52.216.1.1", 443),  # hands on a job, reads nothing
    ("train/head", "sample/StatefulSet/scoreray-redis-sample", 6379),
    ("stranger", "sample/StatefulSet/scoreray-redis-sample", 6379),
    ("sample/StatefulSet/scoreray-redis-sample", "52.216.1.1", 443),
    ("train/workers", "dev/Deployment/scoreray-s3-dev", 8333),
    ("dev/Deployment/scoreray-s3-dev", "52.216.1.1", 443),
]


@pytest.mark.parametrize(("source", "target", "port"), ALLOWED)
def test_reaches(reaches: Any, source: str, target: str, port: int) -> None:
    assert reaches(source, target, port)


@pytest.mark.parametrize(("source", "target", "port"), DENIED)
def test_does_not_reach(reaches: Any, source: str, target: str, port: int) -> None:
    assert not reaches(source, target, port)


def test_every_pod_may_reach_dns_and_none_is_open_by_default(reaches: Any, built: Any, pods: Any) -> None:
    (deny,) = [o for o in built["platform"] if o["kind"] == "NetworkPolicy" and o["metadata"]["name"] == "default-deny"]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert reaches("train/head", "dns", 53, "UDP")
    assert reaches("sample/StatefulSet/scoreray-redis-sample", "dns", 53, "UDP")
    assert not reaches("train/head", "dns", 443)


def test_ports_of_raylets_and_workers_are_those_that_the_policies_open(specs: Any, built: Any) -> None:
    for overlay, spec in specs.items():
        (policy,) = [o for o in built[overlay] if o["metadata"]["name"] == f"scoreray-ray-{overlay}"]
        open_ports = [(p["port"], p.get("endPort", p["port"])) for p in policy["spec"]["ingress"][0]["ports"]]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            for name, value in group["rayStartParams"].items():
                if name.endswith("port"):
                    assert any(low <= int(value) <= high for low, high in open_ports), (overlay, name, value)
