"""How a service grows with its replicas, and what its one ingress carries: `scoreray serve` with a network that sleeps.

    python benchmarks/scale_serving.py replicas [--replicas 1 2 4] [--loads 0.5 0.8 1.2] [--seconds 60]
    python benchmarks/scale_serving.py ingress [--seconds 20]

`replicas`: over HTTP on loopback, Poisson arrivals of requests of 8 samples by 4 Euler steps, at a share of what the
replicas would ideally draw: 32 rows a call of 1 s. Throughput and p95 beside the ideal: the same
requests, dealt in turn to as many step batchers in simulated time, where nothing but the network takes any. `ingress`:
closed-loop clients and a network that takes no time; the CPU time of each process of the service by request, for one
sample as a PNG and for 64 as an npz of 3 x 64 x 64. A process that uses a whole core is full: the rate is 1 over its
CPU time a request.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["SCORERAY_WITH"] = str(Path(__file__).with_name("sleeping.py"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import psutil
from serving import MAX_ROWS, Asked, simulate
from sleeping import Sleeping

from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.serve.command import served
from scoreray.cluster.serve.options import Placement
from scoreray.data.packing.pack import pack
from scoreray.sampling.http.client import Client
from scoreray.sampling.service.config import Limits, ServeConfig
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train

SLOW, INSTANT = Sleeping(1.0), Sleeping()  # on a busy machine the service's own CPU time must be little beside it
STEPS, COUNT = 4, 8
ANSWERS: dict[str, dict[str, Any]] = {
    "1 sample, PNG": {"count": 1, "format": "png"},
    "64 samples, npz": {"count": 64, "format": "npz"},
}
ROLES = {"proxy": "ProxyActor", "ingress": ":ingress", "replica": ":model"}


def checkpoint(folder: Path, network: Sleeping) -> str:
    """A run of one step, whose network sleeps."""
    np.savez(folder / "images.npz", images=np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8))
    pack(str(folder / "images.npz"), str(folder / "set"))
    config = {
        "run": {"name": "run", "storage": str(folder / "runs")},
        "data": {"url": str(folder / "set"), "global_batch_size": 8},
        "network": {"kind": "sleeping:Sleeping", "base_s": network.base_s, "row_s": network.row_s},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": 8},
    }
    train(load_config(config))
    return str(folder / "runs" / "run")


@contextlib.contextmanager
def service(url: str, replicas: int) -> Iterator[str]:
    limits = Limits(token_requests=100_000, token_rows=10_000_000, max_waiting_rows=10_000_000, max_wait_s=1e6)
    config = ServeConfig((("mine", url),), max_batch=MAX_ROWS, compile="off", limits=limits, threads=1)
    placement = Placement(port=0, replicas=(replicas, replicas), cpus_per_replica=0.1)
    with served(config, placement) as address:
        yield address


def part_replicas(arguments: argparse.Namespace, folder: Path) -> None:
    url, full_s = checkpoint(folder, SLOW), SLOW.seconds(MAX_ROWS)
    each = MAX_ROWS / (STEPS * full_s) / COUNT  # requests a second
    print(f"ideal: {each:.2f} requests/s a replica\n")
    print("| replicas | load | requests | answered/s | ideal | ratio | p95 | ideal | ratio | CPU load |")
    print("|" + "---|" * 10)
    for replicas in arguments.replicas:
        with service(url, replicas) as address:
            _send(address, [Asked(0, COUNT, STEPS)] * 2 * replicas)  # connections and routes
            for load in arguments.loads:
                asked = arrivals(load * each * replicas, arguments.seconds)
                took = _send(address, asked)
                best = ideal(asked, replicas)
                rates = [rate(asked, done, arguments.seconds) for done in (took, best)]
                tails = [p95(asked, done) for done in (took, best)]
                print(
                    f"| {replicas} | {load} | {len(asked)} | {rates[0]:.2f} | {rates[1]:.2f} "
                    f"| {rates[0] / rates[1]:.2f} "
                    f"| {tails[0]:.2f} s | {tails[1]:.2f} s | {tails[0] / tails[1]:.2f} | {os.getloadavg()[0]:.0f} |",
                    flush=True,
                )


def arrivals(rate: float, seconds: float, seed: int = 0) -> list[Asked]:
    rng, at, asked = random.Random(seed), 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds:
        asked.append(Asked(len(asked), COUNT, STEPS, at))
    return asked


def ideal(asked: list[Asked], replicas: int) -> dict[int, float]:
    """When each request would be done, dealt in turn to batchers that cost nothing."""
    done: dict[int, float] = {}
    for first in range(replicas):
        done |= simulate("step", SLOW.seconds, asked[first::replicas])[0]
    return done


def rate(asked: list[Asked], done: dict[int, float], seconds: float) -> float:
    """Answers a second, after the first quarter of the time that requests come in."""
    return sum(0.25 * seconds <= done[one.number] < seconds for one in asked) / (0.75 * seconds)


def p95(asked: list[Asked], done: dict[int, float]) -> float:
    return float(np.percentile([done[one.number] - one.at for one in asked], 95))


def _send(address: str, asked: list[Asked]) -> dict[int, float]:
    """Each request at its time, all answers waited for; when each was answered."""
    done, began, local = dict[int, float](), time.perf_counter(), threading.local()

    def send(one: Asked) -> None:
        time.sleep(max(0.0, began + one.at - time.perf_counter()))
        if not hasattr(local, "client"):
            local.client = Client(address)
        local.client.sample(count=one.count, steps=one.steps, sampler="euler", seed=one.number)
        done[one.number] = time.perf_counter() - began

    with ThreadPoolExecutor(256) as pool:
        list(pool.map(send, asked))
    return done


def part_ingress(arguments: argparse.Namespace, folder: Path) -> None:
    url = checkpoint(folder, INSTANT)
    print("| answer | bytes | requests | " + " | ".join(f"{role}, ms of CPU" for role in ROLES) + " | of one ingress |")
    print("|---|---|---|" + "---|" * len(ROLES) + "---|")
    with service(url, 1) as address:
        for name, fields in ANSWERS.items():
            asked_for = {**fields, "steps": 1, "sampler": "euler"}
            size = _answer_bytes(address, asked_for)
            _closed_loop(address, asked_for, arguments.seconds / 4)
            found = []
            for _ in range(3):
                before = _cpu_s()
                answered = _closed_loop(address, asked_for, arguments.seconds / 3)
                after = _cpu_s()
                found.append({role: (after[role] - before[role]) / answered for role in ROLES} | {"answered": answered})
            each = {role: statistics.median(one[role] for one in found) for role in ROLES}
            cells = " | ".join(f"{1e3 * each[role]:.2f}" for role in ROLES)
            answered = sum(one["answered"] for one in found)
            print(f"| {name} | {size:,} | {answered} | {cells} | {1 / each['ingress']:.0f}/s |", flush=True)


def _answer_bytes(address: str, fields: dict[str, Any]) -> int:
    import json
    import urllib.request

    body, kind = {k: v for k, v in fields.items() if k != "format"}, {"png": "image/png", "npz": "application/x-npz"}
    headers = {"Content-Type": "application/json", "Accept": kind[fields["format"]]}
    call = urllib.request.Request(f"{address}/v1/samples", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(call) as answer:
        return len(answer.read())


def _closed_loop(address: str, fields: dict[str, Any], seconds: float) -> int:
    """Four clients, each with one request at a time; how many were answered."""
    end, counts = time.perf_counter() + seconds, [0] * 4
    import http.client
    import json
    from urllib.parse import urlsplit

    body = json.dumps({k: v for k, v in fields.items() if k != "format"})
    kind = {"png": "image/png", "npz": "application/x-npz"}[fields["format"]]

    def client(number: int) -> None:
        connection = http.client.HTTPConnection(urlsplit(address).netloc)
        while time.perf_counter() < end:
            connection.request("POST", "/v1/samples", body, {"Content-Type": "application/json", "Accept": kind})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
            counts[number] += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(client, range(4)))
    return sum(counts)


def _cpu_s() -> dict[str, float]:
    """User and system seconds of the service's processes, by role."""
    spent = dict.fromkeys(ROLES, 0.0)
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        title = " ".join(process.info["cmdline"] or ())
        for role, part in ROLES.items():
            if title.startswith("ray::") and part in title and process.uids().real == os.getuid():
                spent[role] += process.info["cpu_times"].user + process.info["cpu_times"].system
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("replicas", "ingress"))
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8, 1.2])
    parser.add_argument("--seconds", type=float, default=60.0, help="of each measurement")
    arguments = parser.parse_args()
    parts = {"replicas": part_replicas, "ingress": part_ingress}
    with connected(num_cpus=4):
        for part in arguments.parts:
            with tempfile.TemporaryDirectory() as folder:
                parts[part](arguments, Path(folder))


if __name__ == "__main__":
    main()
