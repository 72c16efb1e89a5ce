"""The doctor on two Ray nodes with addresses of their own, of which the second has one thing wrong at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from waiting import PATIENCE_S

from scoreray.cluster.cli import options
from scoreray.data.storage.local_s3 import _arguments, _program
from scoreray.data.storage.ports import free_ports

OWNER, READER = ("OWNER", "owners-secret"), ("READER", "readers-secret")
PORTS = ("--node-manager-port=6101", "--object-manager-port=6102")
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
#define AHEAD 40
int clock_gettime(clockid_t which, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(which, now);
    if (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE) now->tv_sec += AHEAD;
    return status;
}
int gettimeofday(struct timeval *result, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    result->tv_sec = now.tv_sec, result->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *seconds) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return seconds ? (*seconds = now.tv_sec) : now.tv_sec;
}
"""
"""A machine's wall clock can't differ by namespace: this one, preloaded, is 40 s ahead for a node's processes."""


def keys(of: tuple[str, str]) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": of[0], "AWS_SECRET_ACCESS_KEY": of[1]}


@pytest.fixture(scope="module")
def cluster(nodes: Any) -> Iterator[Any]:
    """The first node: an S3 server whose second user may only read, a packed data set, a config, and Ray's head."""
    if shutil.which("iptables") is None:
        pytest.skip("a node's port is blocked by iptables, which is not installed")
    folder, address, ports = nodes.folder, nodes.addresses[0], free_ports(None)
    users = (("owner", OWNER, ["Admin"]), ("reader", READER, ["Read", "List"]))
    identities = [
        {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for name, (key, secret), actions in users
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    (folder / "scratch").mkdir()
    nodes.environment |= {
        **keys(OWNER), "AWS_ENDPOINT_URL": f"http://{address}:{ports[0]}", "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "*", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    }  # fmt: skip
    for name in ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE"):
        nodes.environment.pop(name, None)
    server = [word.replace("127.0.0.1", address) for word in _arguments(folder, ports)]
    with open(folder / "weed.log", "w") as log:
        weed = subprocess.Popen(["ip", "netns", "exec", nodes.names[0], _program(), *server], stdout=log, stderr=log)
    try:
        images = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8)
        np.savez(folder / "p.npz", images=images)
        make = "import boto3; boto3.client('s3').create_bucket(Bucket='bucket')"
        until = f'until {sys.executable} -c "{make}"; do sleep 1; done'
        nodes.run(0, ["sh", "-c", until], timeout=PATIENCE_S, check=True)
        pack = ["-m", "scoreray.cluster.cli", "data", "pack", f"{folder}/p.npz", "s3://bucket/data"]
        nodes.run(0, [sys.executable, *pack], timeout=PATIENCE_S, check=True)
        settings = {
            "run": {"name": "two", "storage": "s3://bucket/runs"},
            "data": {"url": "s3://bucket/data", "global_batch_size": 16, "cache_dir": f"{folder}/scratch"},
            "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
            "scaling": {"workers": 2},
            "duration": {"images": 1000},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        nodes.start(0)
        yield nodes
    finally:
        weed.kill()
        weed.wait()
        for port in ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-*{port}.sock"):
                left.unlink(missing_ok=True)


@pytest.fixture
def second(cluster: Any) -> Iterator[Any]:
    """Starts the second node as the test asks for; gone again at its end, also for the head."""
    yield lambda **how: cluster.start(1, *PORTS, **how)
    cluster.run(1, ["iptables", "-F"], check=True)
    pids = subprocess.run(["ip", "netns", "pids", cluster.names[1]], capture_output=True, text=True).stdout.split()
    with contextlib.suppress(OSError):
        (raylet,) = [pid for pid in pids if "/raylet/raylet" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(int(raylet), signal.SIGTERM)  # it signs off
        deadline = time.monotonic() + PATIENCE_S
        while Path(f"/proc/{raylet}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
    cluster.kill(1)


def examined(cluster: Any) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and findings of the doctor on the first node."""
    done = cluster.run(
        0, [sys.executable, "-m", "scoreray.cluster.cli", "doctor", f"{cluster.folder}/config.yaml", "--json"],
        {"RAY_ADDRESS": f"{cluster.addresses[0]}:6399"}, timeout=260,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def patched(cluster: Any) -> dict[str, Any]:
    """Another version of a library before the installed one, and another file of ours over the installed one."""
    about = cluster.folder / "other" / "webdataset-0.9.9.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: webdataset\nVersion: 0.9.9\n")
    ours = cluster.folder / "options.py"
    ours.write_text(Path(str(options.__file__)).read_text() + "# another version\n")
    return {"environment": {"PYTHONPATH": str(about.parent)}, "before": f"mount --bind {ours} {options.__file__}"}


def firewall(cluster: Any) -> dict[str, Any]:
    rule = f"iptables -A INPUT -i v{cluster.names[1]} -p tcp --syn -j DROP --dport"
    return {"before": f"{rule} 32768:60999 && {rule} 6102"}


def mute(cluster: Any) -> dict[str, Any]:
    return {"before": f"iptables -A INPUT -i v{cluster.names[1]} -p tcp --syn -j DROP --dport 10002:19999"}


def ahead(cluster: Any) -> dict[str, Any]:
    if shutil.which("gcc") is None:
        pytest.skip("the clock that is wrong is compiled by gcc, which is not installed")
    source, library = cluster.folder / "clock.c", cluster.folder / "clock.so"
    source.write_text(CLOCK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return {"environment": {"LD_PRELOAD": str(library)}}


def full(cluster: Any) -> dict[str, Any]:
    scratch = cluster.folder / "scratch"
    return {"before": f"mount -t tmpfs -o size=8m full {scratch} && head -c 8000000 /dev/zero >{scratch}/taken"}


def reader(cluster: Any) -> dict[str, Any]:
    return {"environment": keys(READER)}


def stranger(cluster: Any) -> dict[str, Any]:
    return {"environment": keys(("OWNER", "a-secret-of-somebody-else"))}


FAULTS = {
    "healthy": (lambda cluster: {}, {}),
    "another version": (patched, {"versions": ["webdataset 0.9.9, the others have 1.0.2; install", "scoreray "]}),
    "blocked ports": (firewall, {"network": ["its object manager's port can't be reached from", "open TCP 32768"]}),
    "workers behind a firewall": (mute, {"node": ["does not answer", "open TCP 10002-19999"]}),
    "wrong clock": (ahead, {"clock": ["its clock is +40.", "set up NTP"]}),
    "full disk": (full, {"disk": ["0.0 GiB free for", "scratch", "put that folder on another disk"]}),
    "no right to write": (reader, {"storage": ["can't write in run.storage", "give its role that right"]}),
    "refused credentials": (
        stranger,
        {"storage": ["can't list in run.storage", "can't write"], "data": ["can't read the data"]},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_on_a_node_is_found_and_nothing_else(cluster: Any, second: Any, fault: str) -> None:
    """Each problem is of the second node, with its fix in its line; without one the exit status is 0."""
    prepare, expected = FAULTS[fault]
    second(**prepare(cluster))
    status, found = examined(cluster)
    problems = [one for one in found if one["state"] == "problem"]
    assert {one["topic"] for one in problems} == set(expected), problems
    assert status == (2 if expected else 0)
    first, other = cluster.addresses
    assert all(one["text"].startswith(f"{other}: ") and one["facts"]["node"] == other for one in problems), problems
    for topic, pieces in expected.items():
        lines = "\n".join(one["text"] for one in problems if one["topic"] == topic)
        assert all(piece in lines for piece in pieces), lines
    if not expected:
        (network,) = [one for one in found if one["topic"] == "network"]
        assert network["facts"]["bytes_per_s"] > 0
        assert {one["facts"]["node"] for one in found if one["topic"] == "storage" and one["facts"]} == {first, other}
        ports = {one["facts"]["node"]: one["facts"]["listening"] for one in found if one["topic"] == "ports"}
        assert {"process": "raylet", "address": "::", "port": 6101} in ports[other]
        assert 6399 in {one["port"] for one in ports[first] if one["process"] == "GCS"}
