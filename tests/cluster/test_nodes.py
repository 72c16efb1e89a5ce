"""The doctor's questions to a cluster: what differs is told by the node's address and the thing's name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from scoreray.cluster.doctor import Finding
from scoreray.cluster.nodes import ask_cluster, facts_of_node, judge, judge_pair

GOOD: dict[str, Any] = {
    "versions": {"ray": "2.60.0", "torch": "2.13.0", "scoreray": "0123456789ab"},
    "disk_free": 100 << 30, "shm_free": 8 << 30, "token": True, "skew_s": 0.01, "within_s": 0.005,
    "storage": {"list": "", "write": "", "read": "", "delete": "", "write_bytes_per_s": 2e8, "read_bytes_per_s": 3e8},
}  # fmt: skip


def cluster(**changed: Any) -> list[Finding]:
    """Findings about three nodes, of which 10.0.0.3 is changed."""
    facts = {f"10.0.0.{i}": copy.deepcopy(GOOD) for i in (1, 2, 3)}
    for name, value in changed.items():
        here = facts["10.0.0.3"]
        here[name] = here[name] | value if isinstance(here.get(name), dict) else value
    return judge(facts)


def problems(found: list[Finding]) -> list[Finding]:
    return [one for one in found if one.state == "problem"]


def test_a_good_cluster_has_no_problems() -> None:
    found = cluster()
    assert not problems(found)
    assert {one.topic for one in found} == {"versions", "clock", "disk", "/dev/shm", "token", "storage"}


@pytest.mark.parametrize(
    ("changed", "topic", "words"),
    [
        ({"versions": {"ray": "2.59.0"}}, "versions", "ray 2.59.0, the others have 2.60.0"),
        ({"versions": {"scoreray": "ffffffffffff"}}, "versions", "scoreray ffffffffffff"),
        ({"skew_s": 40.0}, "clock", "+40.0 s"),
        ({"skew_s": -3.0}, "clock", "-3.0 s"),
        ({"disk_free": 100 << 20}, "disk", "0.1 GiB free"),
        ({"shm_free": 10 << 20}, "/dev/shm", "medium Memory"),
        ({"token": False}, "token", "RAY_AUTH_MODE=token"),
        (
            {"storage": {"write": "s3://b/runs: access denied"}},
            "storage",
            "can't write there: s3://b/runs: access denied",
        ),
        ({"storage": {"list": "s3://b/runs: access denied"}}, "storage", "can't list"),
        ({"error": "GetTimeoutError"}, "node", "does not answer"),
    ],
)
def test_what_is_wrong_on_one_node_is_told_by_name(changed: dict[str, Any], topic: str, words: str) -> None:
    (found,) = problems(cluster(**changed))
    assert found.topic == topic
    assert found.text.startswith("10.0.0.3: ")
    assert words in found.text
    assert found.facts["node"] == "10.0.0.3"


def test_a_clock_is_not_blamed_for_a_slow_answer() -> None:
    assert not problems(cluster(skew_s=4.0, within_s=5.0))


def test_a_pair_that_cannot_meet_is_told_with_the_mend() -> None:
    found = judge_pair("10.0.0.1", "10.0.0.2", [{"error": "", "bytes_per_s": 1e9}, {"error": "timed out"}])
    assert found.state == "problem"
    assert "10.0.0.1 and 10.0.0.2" in found.text
    assert "open TCP" in found.text
    good = judge_pair("10.0.0.1", "10.0.0.2", [{"error": "", "bytes_per_s": 1e9}, {"error": "", "bytes_per_s": 5e8}])
    assert (good.state, good.facts["bytes_per_s"]) == ("good", 5e8)


def test_every_node_of_a_real_cluster_is_asked(ray_cluster: None, s3_url: str) -> None:
    found = ask_cluster(s3_url)
    assert {"versions", "clock", "storage", "token", "network", "/dev/shm", "disk"} <= {one.topic for one in found}
    (storage,) = [one for one in found if one.topic == "storage"]
    assert storage.state == "good"
    assert storage.facts["read"] > 0
    (missing,) = problems([one for one in ask_cluster("s3://no-such-bucket-here/x") if one.topic == "storage"][:1])
    assert "no-such-bucket-here" in missing.text


def test_two_processes_meet_over_gloo() -> None:
    """The all-reduce of the doctor itself, without Ray."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from scoreray.cluster.nodes import Reducer

    meet = ("127.0.0.1", _free_port())
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        told = [pool.submit(Reducer().reduce, meet, rank, 2, 60.0) for rank in range(2)]
        assert judge_pair("a", "b", [one.result(timeout=120) for one in told]).state == "good"


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    told = facts_of_node(str(tmp_path), write=True)["storage"]
    assert not any(told[step] for step in ("list", "write", "read", "delete"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
