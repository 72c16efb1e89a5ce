"""The doctor on a cluster's nodes: what differs is named by the node's address and the thing's name."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_S

from scoreray.cluster.connect.open_ports import OpenPort, judge_ports, open_ports
from scoreray.cluster.doctor.facts import Clock, NodeFacts, NodeReport, RunNeeds, StorageProbe, facts_of_node
from scoreray.cluster.doctor.judge import judge, judge_room
from scoreray.cluster.doctor.nodes import examine_cluster
from scoreray.cluster.doctor.reach import Prober, Reduced, judge_dialled, judge_pair, rounds
from scoreray.cluster.finding import Finding

GOOD = NodeFacts(
    versions={"ray": "2.60.0", "torch": "2.13.0", "scoreray": "0123456789ab"},
    disks={"/tmp": 100 << 30},
    shm_free=8 << 30,
    has_token=True,
    ports=[],
    storage=StorageProbe(dict.fromkeys(("list", "write", "read", "delete"), ""), {"write": 2e8, "read": 3e8}),
    data_error="",
)
CLOCK = Clock(0.01, 0.005)


def cluster(**changed: Any) -> list[Finding]:
    """Findings about three nodes, of which 10.0.0.3 is changed."""
    reports = {f"10.0.0.{i}": NodeReport(GOOD, CLOCK) for i in (1, 2, 3)}
    whole = {name: changed.pop(name) for name in ("clock", "error") if name in changed}
    facts = {name: getattr(GOOD, name) | value if isinstance(value, dict) else value for name, value in changed.items()}
    reports["10.0.0.3"] = NodeReport(**{"facts": replace(GOOD, **facts), "clock": CLOCK, **whole})
    if "error" in whole:
        reports["10.0.0.3"] = NodeReport(error=whole["error"])
    return judge(reports)


def problems(found: list[Finding]) -> list[Finding]:
    return [one for one in found if one.state == "problem"]


def test_a_good_cluster_has_no_problems() -> None:
    found = cluster()
    assert not problems(found)
    assert {one.topic for one in found} == {
        "versions", "clock", "disk", "/dev/shm", "token", "ports", "storage",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "topic", "words"),
    [
        ({"versions": {"ray": "2.59.0"}}, "versions", "ray 2.59.0, the others have 2.60.0"),
        ({"versions": {"scoreray": "ffffffffffff"}}, "versions", "scoreray ffffffffffff"),
        ({"clock": Clock(40.0, 0.005)}, "clock", "+40.0 s"),
        ({"clock": Clock(-3.0, 0.005)}, "clock", "-3.0 s"),
        ({"disks": {"/tmp": 100 << 20}}, "disk", "0.1 GiB free for /tmp"),
        ({"disks": {"/scratch/cache": 0}}, "disk", "0.0 GiB free for /scratch/cache"),
        ({"data_error": "s3://b/data: access denied"}, "data", "can't read the data set: s3://b/data: access"),
        ({"shm_free": 10 << 20}, "/dev/shm", "medium Memory"),
        ({"has_token": False}, "token", "RAY_AUTH_MODE=token"),
        (
            {"storage": StorageProbe({"write": "s3://b/runs: access denied"})},
            "storage",
            "can't write in run.storage: s3://b/runs: access denied",
        ),
        ({"storage": StorageProbe({"list": "s3://b/runs: access denied"})}, "storage", "can't list"),
        ({"error": "GetTimeoutError"}, "node", "does not answer (GetTimeoutError); open TCP 10002-19999"),
    ],
)
def test_what_is_wrong_on_one_node_is_named(changed: dict[str, Any], topic: str, words: str) -> None:
    (found,) = problems(cluster(**changed))
    assert found.topic == topic
    assert found.text.startswith("10.0.0.3: ")
    assert words in found.text
    assert found.facts["node"] == "10.0.0.3"


def test_a_clock_is_not_blamed_for_a_slow_answer() -> None:
    assert not problems(cluster(clock=Clock(4.0, 5.0)))


def test_of_many_clocks_the_one_that_is_alone_is_blamed() -> None:
    reports = {f"10.0.0.{i}": NodeReport(GOOD, Clock(-40.0, 0.005)) for i in (1, 2, 3)}
    (found,) = problems(judge(reports))
    assert (found.topic, found.facts["node"]) == ("clock", "this machine")
    assert "+40.0 s" in found.text


def test_a_pair_that_cannot_meet_is_a_problem_with_its_fix() -> None:
    found = judge_pair("10.0.0.1", "10.0.0.2", [Reduced(1e9), Reduced(error="timed out")])
    assert found.state == "problem"
    assert "10.0.0.1 and 10.0.0.2" in found.text
    assert "open TCP" in found.text
    good = judge_pair("10.0.0.1", "10.0.0.2", [Reduced(1e9), Reduced(5e8)])
    assert (good.state, good.facts["bytes_per_s"]) == ("good", 5e8)


def test_a_port_that_cannot_be_reached_is_of_the_node_that_was_dialled() -> None:
    (found,) = judge_dialled("10.0.0.2", "10.0.0.1", {"raylet": "", "object manager": "", "worker": "timed out"})
    assert found.text.startswith("10.0.0.2: its worker's port can't be reached from 10.0.0.1 (timed out); open TCP")


def test_workers_that_do_not_fit_and_gpus_that_differ_are_found() -> None:
    nodes = {"10.0.0.1": {"CPU": 4.0}, "10.0.0.2": {"CPU": 64.0, "GPU": 8.0, "accelerator_type:H200": 1.0}}
    gpus, room = judge_room(nodes, RunNeeds(workers=16, cpus=7.0, gpus=1), grows=True)
    assert (gpus.state, gpus.text) == ("good", "10.0.0.2 8 x H200")
    assert (room.state, room.facts["fit"]) == ("note", 8)
    assert "room for 8 of 16 workers of 7 CPUs and a GPU; the run waits for its autoscaler's nodes" in room.text
    alone = judge_room(nodes, RunNeeds(workers=16, cpus=7.0, gpus=1))[1]
    assert (alone.state, alone.text.partition("; ")[2]) == ("problem", "add nodes or lower scaling.workers")
    assert judge_room(nodes, RunNeeds(workers=12, cpus=5.0))[1].state == "good"
    more = {**nodes, "10.0.0.3": {"CPU": 64.0, "GPU": 8.0, "accelerator_type:L4": 1.0}}
    assert judge_room(more, RunNeeds())[0].state == "note"
    assert [one.text for one in judge_room({"10.0.0.1": {"CPU": 4.0}}, RunNeeds())] == ["no GPUs"]


def test_a_ring_in_rounds() -> None:
    """Each node meets the next and the one before, and one at a time."""
    for count in range(2, 9):
        made = rounds(count)
        for pairs in made:
            nodes = [node for pair in pairs for node in pair]
            assert len(nodes) == len(set(nodes))
        edges = {tuple(sorted(pair)) for pairs in made for pair in pairs}
        assert len(edges) == (count if count > 2 else 1)
    assert len(rounds(8)) == 2


def test_what_listens_for_others_is_a_problem_without_a_token() -> None:
    ports = [OpenPort("raylet", "::", 4000 + i) for i in range(7)]
    ports.append(OpenPort("agent", "0.0.0.0", 8080))
    note = judge_ports("10.0.0.3", ports, token=True)
    assert note.state == "note"
    assert "raylet 4000 4001 4002 4003 and 3 more, agent 8080; agent ask for no token" in note.text
    assert judge_ports("10.0.0.3", ports, token=False).state == "problem"
    public = judge_ports("8.8.4.4", ports, token=True)
    assert public.state == "problem"
    assert "PUBLIC" in public.text
    assert judge_ports("10.0.0.3", [], token=False).state == "good"


def test_listening_sockets_of_processes_are_found(tmp_path: Path) -> None:
    """A process that looks like Ray's raylet, with a port for all, one for loopback and one of IPv6."""
    script = tmp_path / "raylet" / "raylet"
    script.parent.mkdir()
    script.write_text(
        "import socket, sys\n"
        "made = [socket.create_server((host, 0)) for host in ('0.0.0.0', '127.0.0.1')]\n"
        "made.append(socket.create_server(('::', 0), family=socket.AF_INET6))\n"
        "print(*(one.getsockname()[1] for one in made), flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        everywhere, loopback, six = map(int, process.stdout.readline().split())
        found = {one.port: one for one in open_ports(str(tmp_path))}
        assert not open_ports(str(tmp_path / "other"))
        process.communicate(b"", timeout=PATIENCE_S)
    assert found[everywhere] == OpenPort("raylet", "0.0.0.0", everywhere)
    assert found[six].address == "::"
    assert loopback not in found


def test_agents_are_known_by_the_names_that_they_give_themselves(tmp_path: Path) -> None:
    script = tmp_path / "serve.py"
    script.write_text("import socket, sys\ns = socket.create_server(('0.0.0.0', 0))\nprint(flush=True)\ninput()\n")
    options: dict[str, Any] = {"executable": sys.executable, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(["ray::DashboardAgent", str(script)], **options) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (found,) = open_ports(str(tmp_path))
        process.communicate(b"\n", timeout=PATIENCE_S)
    assert found.process == "agent"


def test_every_node_of_a_real_cluster_is_asked(ray_cluster: None, s3_url: str) -> None:
    found = examine_cluster(RunNeeds(s3_url))
    assert {"versions", "clock", "storage", "token", "network", "/dev/shm", "disk"} <= {one.topic for one in found}
    (storage,) = [one for one in found if one.topic == "storage"]
    assert storage.state == "good"
    assert storage.facts["read"] > 0
    absent = "s3://no-such-bucket-here/x"
    named = {
        one.topic for one in problems(examine_cluster(RunNeeds(absent, absent))) if "no-such-bucket-here" in one.text
    }
    assert named == {"storage", "data"}


def test_two_processes_meet_over_gloo() -> None:
    """The all-reduce of the doctor itself, without Ray."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    meet = ("127.0.0.1", _free_port())
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = [pool.submit(Prober().reduce, meet, rank, 2, 60.0) for rank in range(2)]
        assert judge_pair("a", "b", [one.result(timeout=PATIENCE_S) for one in results]).state == "good"


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    probe = facts_of_node(RunNeeds(str(tmp_path))).storage
    assert probe is not None
    assert probe.errors == dict.fromkeys(("list", "write", "read", "delete"), "")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
