"""How generation, evaluation, packing and encoding grow with their actors, and what a kill costs: items that sleep.

    python benchmarks/scale_actors.py [--parts order,efficiency,slow,calls] [--jobs sampling,...] [--actors 1,2,4,8,16]
                                      [--killed 2,8,16] [--seconds 1] [--save FILE]

order: `in_order` in simulated time, where nothing but items takes any: how far the others go while one actor is slow
or is started again, by the number of actors.  efficiency: items a second over what so many actors would make that lose
no time; CPU time of the driver and S3 requests by item. Then (--killed) SIGKILL of one actor, and of the driver, whose
command is given again: seconds until as many items as there are actors are under way again, and items that were begun
twice.  slow: one of 8 actors takes 4 times as long an item; how far the others go.  calls: CPU time of the driver by
item with up to 2,048 calls under way.

Each run is a process (`sleeping_job.py`) beside a Ray cluster of one node and a real S3 server; what its items began
and ended is in a log. A call sleeps so long (--seconds) that CPU time of this machine's other work hardly counts.
Processes are forked, so that seconds until the full rate are without a command's imports, 4 s on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")  # for a busy machine
os.environ.setdefault("RAY_health_check_timeout_ms", "120000")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # as many processes as it has slots, at a job's start
os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
from simulated_ranks import BUCKET, CountedS3
from sleeping_work import Work

from scoreray.cluster.actors import Retries, in_order
from scoreray.cluster.connect.local_ray import connected, set_environment
from scoreray.cluster.connect.start import DaemonEnded, patience
from scoreray.data.storage.ports import free_ports

JOBS = ("sampling", "evaluation", "packing", "encoding")
PARTS = ("order", "efficiency", "slow", "calls")
ROUNDS = 10  # items of an actor that are measured
ITEMS = 90  # of an actor, in a job: more than are made in all parts
SLOW, OF_SLOW, SLOW_ROUNDS = 4.0, 8, 24
SLOTS = 48  # of the cluster: those that a killed job still holds are not waited for
CALL_S = 1.0
CALLS = (2, 8, 32, 128, 512, 2048)
PATIENCE_S = 600.0
ATTEMPTS = 8
ORDERS = (2, 8, 16, 64)  # actors, simulated
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Item:
    number: int
    pid: int
    begin: float
    end: float | None


class Run:
    """A job's process, what its log says, and what its driver and the S3 server have counted."""

    def __init__(self, job: str, actors: int, seconds: float, slow: float, url: str, folder: Path, s3: CountedS3):
        self.actors, self.seconds, self.s3, self.log = actors, seconds, s3, folder / "log"
        self.errors = folder / f"errors-{time.time()}"
        work = Work(str(self.log), seconds, slow)
        self.began = time.time()
        self.process = FORK.Process(target=_into, args=(self.errors, job, actors, ITEMS * actors, work, url))
        self.process.start()

    def items(self) -> list[Item]:
        found: list[Item] = []
        under_way: dict[tuple[int, int], int] = {}
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            kind, number, pid, at = line.split()
            key = int(number), int(pid)
            if kind == "begin":
                under_way[key] = len(found)
                found.append(Item(*key, float(at), None))
            else:
                i = under_way.pop(key)
                found[i] = Item(*key, found[i].begin, float(at))
        return found

    def wait(self, condition: Callable[[list[Item]], bool]) -> list[Item]:
        """Items at the first moment at which the condition holds."""
        end = time.monotonic() + PATIENCE_S
        while not condition(items := self.items()):
            if not self.process.is_alive() or time.monotonic() > end:
                raise RuntimeError(f"the job has ended, or hangs: {self.errors.read_text()[-3000:]}")
            time.sleep(0.05)
        return items

    def count(self) -> dict[str, float]:
        requests = sum(self.s3.requests().values())
        cpu = psutil.Process(self.process.pid).cpu_times()
        return {"requests": requests, "cpu": cpu.user + cpu.system, "clock": time.time()}

    def kill(self) -> float:
        """When the driver was killed. Returns once what it has started has ended, at least with its items."""
        at, before = time.time(), -1
        self.process.kill()
        self.process.join()
        while before != (before := sum(2 if i.end else 1 for i in self.items())):
            time.sleep(2.5 * self.seconds)
        return at


def _into(errors: Path, *job: Any) -> None:
    """A forked process: what it prints goes to a file."""
    file = os.open(errors, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import sleeping_job

    sleeping_job.run(*job)


def under_way(items: list[Item], at: float, dead: frozenset[int] = frozenset()) -> int:
    return sum(i.begin <= at and (i.end is None or i.end > at) for i in items if i.pid not in dead)


def first_full(items: list[Item], since: float, actors: int, dead: frozenset[int] = frozenset()) -> float | None:
    """The first moment at which so many items are under way."""
    moments = sorted(i.begin for i in items if i.begin >= since)
    return next((at for at in moments if under_way(items, at, dead) >= actors), None)


def made(items: list[Item], since: float, until: float, pids: set[int] | None = None) -> float:
    """Seconds of work between two moments."""
    chosen = [i for i in items if pids is None or i.pid in pids]
    return sum(max(0.0, min(until, i.end or until) - max(since, i.begin)) for i in chosen)


def efficiency(run: Run, seconds: float) -> dict[str, Any]:
    n = run.actors
    items = run.wait(lambda items: first_full(items, run.began, n) is not None)
    full = first_full(items, run.began, n)
    assert full is not None
    run.wait(lambda items: sum(i.end is not None and i.begin >= full for i in items) >= 2 * n)
    before, since = run.count(), len([i for i in run.items() if i.end])
    run.wait(lambda items: sum(i.end is not None for i in items) >= since + ROUNDS * n)
    after, items = run.count(), run.items()
    done = sum(before["clock"] <= (i.end or 0) < after["clock"] for i in items)
    span = after["clock"] - before["clock"]
    gaps = sorted(gap for pid in {i.pid for i in items} for gap in _gaps(items, pid, before["clock"], after["clock"]))
    return {
        "start: s": full - run.began,
        "items": done,
        "efficiency": made(items, before["clock"], after["clock"]) / (n * span),
        "gap: ms": 1e3 * statistics.median(gaps),
        "driver: CPU ms an item": 1e3 * (after["cpu"] - before["cpu"]) / done,
        "requests an item": (after["requests"] - before["requests"]) / done,
        "load": os.getloadavg()[0],
    }


def _gaps(items: list[Item], pid: int, since: float, until: float) -> Iterator[float]:
    own = sorted((i for i in items if i.pid == pid and i.end and since <= i.end <= until), key=lambda i: i.begin)
    for a, b in itertools.pairwise(own):
        assert a.end is not None
        yield b.begin - a.end


def actor_killed(run: Run, seconds: float) -> dict[str, Any]:
    n, items = run.actors, run.items()
    victim = max((i for i in items if i.end is None), key=lambda i: i.begin).pid
    last = {i.number for i in items if i.end is not None}
    os.kill(victim, signal.SIGKILL)
    at, dead = time.time(), frozenset([victim])
    items = run.wait(lambda items: first_full(items, at, n, dead) is not None)
    full = first_full(items, at, n, dead)
    assert full is not None
    run.wait(lambda items: time.time() > full + 3 * seconds)
    items = run.items()
    others = {i.pid for i in items if i.begin < at} - dead
    return {
        "actor killed, full rate after: s": full - at,
        "actor killed, begun twice": begun_twice(items, at),
        "actor killed, done and begun again": len(last & {i.number for i in items if i.begin > at}),
        "actor killed, the others' rate meanwhile": made(items, at, full, others) / max(1, n - 1) / (full - at),
    }


def begun_twice(items: list[Item], since: float) -> int:
    """Items begun before and since."""
    return len({i.number for i in items if i.begin < since} & {i.number for i in items if i.begin >= since})


def measure_job(job: str, actors: int, seconds: float, is_killed: bool, s3: CountedS3, folder: Path) -> dict[str, Any]:
    url = f"s3://{BUCKET}/{folder.name}"
    run = Run(job, actors, seconds, 1.0, url, folder, s3)
    again = run
    try:
        found = efficiency(run, seconds)
        if not is_killed:
            return found
        found |= actor_killed(run, seconds)
        at = run.kill()
        done = {i.number for i in run.items() if i.end is not None and i.end < at - 0.3}  # stored by then
        again = Run(job, actors, seconds, 1.0, url, folder, s3)
        items = again.wait(lambda items: first_full(items, again.began, actors) is not None)
        full = first_full(items, again.began, actors)
        assert full is not None
        again.wait(lambda items: time.time() > full + 3 * seconds)
        items = again.items()
        return found | {
            "driver killed, full rate after: s": full - again.began,
            "driver killed, begun twice": begun_twice(items, again.began),
            "driver killed, done and begun again": len(done & {i.number for i in items if i.begin >= again.began}),
        }
    finally:
        for one in (run, again):
            if one.process.is_alive():
                one.kill()


def measure_slow(job: str, seconds: float, s3: CountedS3, folder: Path) -> dict[str, Any]:
    n = OF_SLOW
    run = Run(job, n, seconds, SLOW, f"s3://{BUCKET}/{folder.name}", folder, s3)
    try:
        items = run.wait(lambda items: first_full(items, run.began, n) is not None)
        full = first_full(items, run.began, n)
        assert full is not None
        run.wait(lambda items: time.time() > full + SLOW_ROUNDS * seconds)
        items, until = run.items(), full + SLOW_ROUNDS * seconds
        slow = int(Path(f"{run.log}.slow").read_text())
        others = {i.pid for i in items} - {slow}
        done = Counter(i.pid for i in items if i.end)
        return {
            "the others' efficiency": made(items, full, until, others) / ((n - 1) * (until - full)),
            "items of the slow one": done[slow],
            "items of another": statistics.median(done[pid] for pid in others),
            "load": os.getloadavg()[0],
        }
    finally:
        run.kill()


class Simulated:
    """ObjectRefs of calls to actors that take their items one after another, in simulated time, an item in 1 s.

    factor: how many times as long the first actor takes for each.  away: (from, for how many seconds) it is away, as
    when it is started again, and then begins the item once more that it was at.
    """

    def __init__(self, actors: int, factor: float = 1.0, away: tuple[float, float] = (math.inf, 0.0)) -> None:
        self.now, self.made, self._factor, self._away = 0.0, [0] * actors, factor, away
        self._free, self._ends = [0.0] * actors, list[tuple[float, int, int, Any]]()
        self._count = itertools.count()

    def call(self, actor: int, value: int) -> SimpleNamespace:
        begin = max(self.now, self._free[actor])
        end, (lost, away_s) = begin + (self._factor if actor == 0 else 1.0), self._away
        if actor == 0 and lost < end and begin < lost + away_s:
            end = lost + away_s + self._factor
        self._free[actor] = end
        future: Future[int] = Future()
        heapq.heappush(self._ends, (end, next(self._count), actor, (future, value)))
        return SimpleNamespace(future=lambda: future)

    def poll(self) -> None:
        """The next item ends."""
        if self._ends:
            self.now, _, actor, (future, value) = heapq.heappop(self._ends)
            self.made[actor] += 1
            future.set_result(value)


def others_rate(actors: int, at_once: int, seconds: float, **options: Any) -> float:
    """What all actors but the first make in the first `seconds`, over what they would if none waited."""
    simulated = Simulated(actors, **options)
    calls = [partial(simulated.call, actor) for actor in range(actors)] * at_once

    def poll() -> None:
        if simulated.now >= seconds:
            raise TimeoutError
        simulated.poll()

    retries, items = Retries(0, "item {}", ""), range(round(2 * actors * seconds))
    with contextlib.suppress(TimeoutError):
        for _ in in_order(calls, items, retries, poll_s=0.0, poll=poll):
            pass
    return min(1.0, sum(simulated.made[1:]) / ((actors - 1) * seconds))


def measure_order() -> Iterator[tuple[str, dict[str, float]]]:
    for at_once, job in ((2, "sampling"), (1, "packing")):
        for name, options in (
            ("one takes 4 times as long", {"factor": 4.0}),
            ("one takes 16 times as long", {"factor": 16.0}),
            ("one is away for 30 items", {"away": (10.5, 30.0)}),
        ):
            rates = {str(n): others_rate(n, at_once, 60.0, **options) for n in ORDERS}
            yield f"{job}, {name}", rates


def measure_calls(results: Any) -> None:
    """CPU time of the driver by result, with as many calls under way, all of one actor that sleeps."""
    import asyncio

    import ray

    class Sleeper:
        async def call(self, value: int) -> int:
            await asyncio.sleep(CALL_S)
            return value

    with connected():
        sleeper = ray.remote(num_cpus=1, max_concurrency=2 * max(CALLS))(Sleeper).remote()
        ray.get(sleeper.call.remote(0))
        for calls in CALLS:
            items, found = max(64, 3 * calls), []
            for _ in range(3):
                cpu, wall = time.process_time(), time.perf_counter()
                for _ in in_order([sleeper.call.remote] * calls, range(items), Retries(0, "item {}", "")):
                    pass
                found.append((time.process_time() - cpu, time.perf_counter() - wall))
            cpu, wall = sorted(found)[1]
            rounds = -(-items // calls)
            results.put((calls, {"CPU us an item": 1e6 * cpu / items, "efficiency": CALL_S * rounds / wall}))
        results.put(None)


@contextlib.contextmanager
def cluster() -> Iterator[None]:
    """RAY_ADDRESS is that of a cluster of one node, in a process of its own, for the duration."""
    mine, its = FORK.Pipe()
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:  # sockets' paths must be short
        os.environ["RAY_TMPDIR"] = short
        process = FORK.Process(target=_cluster, args=(its,))
        process.start()
        os.environ["RAY_ADDRESS"] = mine.recv()
        try:
            yield
        finally:
            mine.send("stop")
            process.join(60)


def _cluster(pipe: Any) -> None:
    from ray.cluster_utils import Cluster

    nodes = Cluster(shutdown_at_exit=True)
    # Of agents without a port of their own a raylet waits 15 s for it, and then ends.
    agents = ("metrics_agent_port", "metrics_export_port", "runtime_env_agent_port", "dashboard_agent_listen_port")
    for attempt in range(ATTEMPTS):  # as it does where an agent takes longer to start, on a busy machine
        ports = dict(zip(agents, free_ports(None), strict=True))
        try:
            with patience(600):
                nodes.add_node(num_cpus=SLOTS, include_dashboard=False, object_store_memory=512 << 20, **ports)
            break
        except DaemonEnded:
            if attempt + 1 == ATTEMPTS:
                pipe.send("")
                raise
    pipe.send(nodes.address)
    pipe.recv()
    nodes.shutdown()


def measure(options: argparse.Namespace, found: dict[str, Any]) -> None:
    def note(part: str, size: str, value: Any) -> None:
        found.setdefault(part, {})[size] = value
        print(f"{part} {size}: {json.dumps(value)}", file=sys.stderr, flush=True)
        if options.save:
            options.save.write_text(json.dumps(found, indent=1) + "\n")

    parts, jobs = options.parts.split(","), options.jobs.split(",")
    killed = {int(n) for n in options.killed.split(",") if n}
    if "order" in parts:
        for name, rates in measure_order():
            note("order", name, rates)
    if not set(parts) - {"order"}:
        return
    with tempfile.TemporaryDirectory(prefix="scale-") as name, CountedS3(Path(name) / "s3") as s3, cluster():
        if "calls" in parts:
            results = FORK.Queue()
            FORK.Process(target=measure_calls, args=(results,)).start()
            while (found_one := results.get()) is not None:
                note("calls", str(found_one[0]), found_one[1])
        for job in jobs:
            sizes = [int(n) for n in options.actors.split(",")] if "efficiency" in parts else []
            for actors in sizes:
                folder = Path(name) / f"{job}-{actors}"
                folder.mkdir()
                with attempted(job, actors):
                    value = measure_job(job, actors, options.seconds, actors in killed, s3, folder)
                    note(job, str(actors), value)
            if "slow" in parts:
                folder = Path(name) / f"{job}-slow"
                folder.mkdir()
                with attempted(job, OF_SLOW):
                    note("slow", job, measure_slow(job, options.seconds, s3, folder))


@contextlib.contextmanager
def attempted(job: str, actors: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        print(f"{job}, {actors} actors: {error}", file=sys.stderr, flush=True)


def report(found: dict[str, Any]) -> None:
    """Tables of what was measured."""
    for job in [job for job in JOBS if job in found]:
        sizes = sorted(found[job], key=int)
        names = list(dict.fromkeys(name for size in sizes for name in found[job][size]))
        print(f"| {job} | {' | '.join(sizes)} |\n|---|{'---:|' * len(sizes)}")
        for name in names:
            print(f"| {name} | {' | '.join(_short(found[job][size].get(name)) for size in sizes)} |")
        print()
    for part, title in (
        ("order", "simulated: the others' rate, by actors"),
        ("slow", f"one of {OF_SLOW} takes {SLOW:g} times as long"),
        ("calls", "calls under way"),
    ):
        if part in found:
            names = list(next(iter(found[part].values())))
            print(f"| {title} | {' | '.join(names)} |\n|---|{'---:|' * len(names)}")
            for size, value in found[part].items():
                print(f"| {size} | {' | '.join(_short(value.get(name)) for name in names)} |")
            print()


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--actors", default="1,2,4,8,16")
    parser.add_argument("--killed", default="2,8,16", help="at which of them an actor and the driver are killed")
    parser.add_argument("--seconds", type=float, default=1.0, help="of an item")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load", type=Path, help="tables of what was saved")
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.load.read_text()) if options.load else {}
    if not options.load:
        set_environment()
        import sleeping_job  # noqa: F401  what it imports is there in the processes that are forked

        measure(options, found)
    report(found)


if __name__ == "__main__":
    main()
