"""Step-level batching against batching of whole requests: one network, one machine, the same requests.

    python benchmarks/serving.py curve                        how long a forward pass takes, by its rows
    python benchmarks/serving.py simulate                     every policy in simulated time, no Ray
    python benchmarks/serving.py saturation [--stand-in]      samples/s with a backlog, on Ray Serve
    python benchmarks/serving.py latency [--stand-in]         p50 and p95 of Poisson arrivals, see below
    python benchmarks/serving.py overhead                     the batcher's own time per step at 16 rows
    python benchmarks/serving.py scheduling                   its CPU time per step, with a network that does nothing
    python benchmarks/serving.py decoding                     rows/s where samples are decoded, against undecoded
    python benchmarks/serving.py few-steps                    samples/s over HTTP by 2 calls each, against 35

Requests ask for 1 to 8 samples of 10 to 100 Euler steps, both uniform, at most 32 rows a call. The policies:

    step         StepBatcher: rows of any request at any step share each call
    rectangular  @serve.batch around the sampler: whole requests up to 32 rows, every row until the longest is done
    early-leave  the same, but rows leave when they are done, and so do their requests
    same-steps   only requests of equal steps share a batch, the longest waiting first

--stand-in is a network that takes t(b) = 4 ms + 0.03 ms b, as a GPU's does that is bound by launches and memory. Parts
take under 4 minutes each; numbers are kept in DIR/serving.json. `latency` takes from there 70 % of each baseline's
capacity, as `saturation` measured it, and runs that baseline and step-level on the same arrivals.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import uvicorn
from torch import Tensor

from scoreray.sampling.http.app import make_app
from scoreray.sampling.http.client import Client
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.row_queue import RowQueue, decode_queue
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import per_row, start
from scoreray.sampling.samplers.sigmas import karras
from scoreray.sampling.service.batcher import StepBatcher
from scoreray.sampling.service.config import Limits, ServeConfig
from scoreray.sampling.service.models import ServedModel
from scoreray.sampling.service.replica import Replica, _Model
from scoreray.sampling.service.request import SampleRequest
from scoreray.sampling.service.service import LocalBackend, Service
from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.networks.unet import UNetConfig

MAX_ROWS, STEPS, COUNTS = 32, (10, 100), (1, 8)
SIZES = (1, 2, 4, 8, 16, 24, 32)
NETWORK, SHAPE = UNetConfig(model_channels=16, channel_mult=(1, 2), num_blocks=1), (1, 16, 16)
LARGE, LARGE_SHAPE = UNetConfig(model_channels=32, channel_mult=(1, 2, 2), head_channels=32), (3, 32, 32)
POLICIES = ("step", "rectangular", "early-leave", "same-steps")
LOAD = 0.7


@dataclass(frozen=True)
class Asked:
    """A request of the mix: it arrives at `at` seconds."""

    number: int
    count: int
    steps: int
    at: float = 0.0


def mix(n: int, seed: int = 0, rate: float = 0.0) -> list[Asked]:
    """n requests; Poisson arrivals at `rate` a second, all at once for 0."""
    rng, at, asked = random.Random(seed), 0.0, []
    for number in range(n):
        at += rng.expovariate(rate) if rate else 0.0
        asked.append(Asked(number, rng.randint(*COUNTS), rng.randint(*STEPS), at))
    return asked


def network(config: UNetConfig, shape: tuple[int, ...]) -> Denoiser:
    torch.manual_seed(0)
    built = config.build(shape)
    for parameter in built.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return Denoiser(built.eval().requires_grad_(False)).eval()


def request(seeds: range, shape: tuple[int, ...], steps: int) -> SampleRequest:
    return SampleRequest(seeds, shape, karras(steps), "euler", expected_calls=steps)


class StandIn:
    """A network that takes as long as a GPU's would."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        end = time.perf_counter() + gpu_s(len(x))
        time.sleep(max(0.0, end - time.perf_counter() - 2e-4))
        while time.perf_counter() < end:
            pass
        return x * 0.5


def gpu_s(rows: int) -> float:
    return 4e-3 + 3e-5 * rows


# The baselines: requests in lockstep on their own samplers, in batches that are fixed when they begin.


class Lockstep:
    """Some requests' samplers side by side; `leave`: a row that is done takes no more of the network's time."""

    def __init__(self, denoiser: Callable[..., Tensor], leave: bool) -> None:
        self.denoiser, self.leave, self.calls, self.rows = denoiser, leave, 0, 0

    def run(self, batch: list[Asked], done: Callable[[Asked, Tensor], None]) -> None:
        """`done` is called for each request as its batch lets it go."""
        with torch.no_grad():
            waiting = [self._begin(asked) for asked in batch]
            finished: list[tuple[Asked, Tensor]] = []
            idle = 0
            while waiting:
                x = torch.cat([x for _, _, x, _ in waiting])
                sigma = torch.cat([per_row(sigma, x) for _, _, x, sigma in waiting])
                if idle:
                    x, sigma = (
                        torch.cat([x, x[:1].expand(idle, *x.shape[1:])]),
                        torch.cat([sigma, sigma[:1].expand(idle)]),
                    )
                denoised = self.denoiser(x, sigma)
                self.calls, self.rows = self.calls + 1, self.rows + len(x) - idle
                going = []
                parts = denoised[: len(x) - idle].split([len(x) for _, _, x, _ in waiting])
                for (asked, steps, _, _), part in zip(waiting, parts, strict=True):
                    try:
                        going.append((asked, steps, *steps.send(part)))
                    except StopIteration as end:
                        if self.leave:
                            done(asked, end.value)
                        else:
                            finished.append((asked, end.value))
                            idle += asked.count
                waiting = going
            for asked, samples in finished:
                done(asked, samples)

    def _begin(self, asked: Asked) -> tuple[Asked, Any, Tensor, Any]:
        noise = SampleNoise(range(asked.number << 8, (asked.number << 8) + asked.count))
        x = noise.normal((asked.count, *SHAPE)) * 80.0
        steps = start("euler", x, karras(asked.steps), noise)
        return (asked, steps, *next(steps))


def batches(waiting: deque[Asked], same_steps: bool) -> list[Asked]:
    """The next batch: the longest waiting, and those behind that fit (with equal steps, or the very next ones)."""
    if same_steps:
        chosen, rows = [], 0
        for asked in [other for other in waiting if other.steps == waiting[0].steps]:
            if rows + asked.count <= MAX_ROWS:
                chosen.append(asked)
                rows += asked.count
        for asked in chosen:
            waiting.remove(asked)
        return chosen
    chosen, rows = [], 0
    while waiting and rows + waiting[0].count <= MAX_ROWS:
        chosen.append(waiting.popleft())
        rows += chosen[-1].count
    return chosen


# Simulated time: the real StepBatcher and the same batches, with a clock that only calls of the network move.


class Clock:
    def __init__(self, curve: Callable[[int], float]) -> None:
        self.now, self.curve, self.calls, self.rows = 0.0, curve, 0, 0
        self.progress: list[tuple[float, int]] = []

    def call(self, rows: int, useful: int) -> None:
        self.now += self.curve(rows)
        self.calls, self.rows = self.calls + 1, self.rows + useful
        self.progress.append((self.now, self.rows))

    def capacity(self) -> float:
        """Samples a second while there is a backlog: by rows, as whatever ends early would flatter a short window."""
        now, rows = next(pair for pair in self.progress if pair[1] >= 0.75 * self.rows)
        return rows / now / statistics.mean(STEPS)


def simulate(policy: str, curve: Callable[[int], float], asked: list[Asked]) -> tuple[dict[int, float], Clock]:
    """When each request is done, and the clock that saw all calls."""
    clock, done = Clock(curve), dict[int, float]()
    if policy == "step":
        _simulate_steps(clock, asked, done)
    else:
        _simulate_batches(policy, clock, asked, done)
    return done, clock


def _simulate_steps(clock: Clock, asked: list[Asked], done: dict[int, float]) -> None:
    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        clock.call(len(x), len(x))
        return x

    batcher, coming = StepBatcher(denoiser, MAX_ROWS), deque(asked)
    tickets: dict[int, Any] = {}
    while coming or tickets:
        while coming and coming[0].at <= clock.now:
            one = coming.popleft()
            tickets[one.number] = batcher.submit(request(range(one.count), (1,), one.steps))
        if not batcher.step():
            clock.now = max(clock.now, coming[0].at)
        for number in [number for number, ticket in tickets.items() if ticket.done()]:
            tickets.pop(number).result()
            done[number] = clock.now


def _simulate_batches(policy: str, clock: Clock, asked: list[Asked], done: dict[int, float]) -> None:
    coming, waiting = deque(asked), deque[Asked]()
    while coming or waiting:
        while coming and coming[0].at <= clock.now:
            waiting.append(coming.popleft())
        if not waiting:
            clock.now = coming[0].at
            continue
        batch = batches(waiting, policy == "same-steps")
        whole = sum(one.count for one in batch)
        for step in range(max(one.steps for one in batch)):
            useful = sum(one.count for one in batch if one.steps > step)
            clock.call(useful if policy == "early-leave" else whole, useful)
            if policy == "early-leave":
                done.update({one.number: clock.now for one in batch if one.steps == step + 1})
        if policy != "early-leave":
            done.update({one.number: clock.now for one in batch})


def latencies(asked: list[Asked], done: dict[int, float]) -> tuple[float, float]:
    """(p50, p95) of the requests after the first tenth."""
    took = [done[one.number] - one.at for one in asked[len(asked) // 10 :] if one.number in done]
    p50, p95 = np.percentile(took, [50, 95])
    return float(p50), float(p95)


def part_simulate(arguments: argparse.Namespace, kept: dict[str, Any]) -> None:
    measured = {int(rows): seconds for rows, seconds in kept.get("curve", {}).items()}
    if not measured:
        measured = part_curve(arguments, kept)
    curves = {
        "CPU, measured": lambda rows: float(np.interp(rows, list(measured), list(measured.values()))),
        "GPU-like": gpu_s,
    }
    for name, curve in curves.items():
        many, capacity = mix(600), dict[str, float]()
        print(f"\n## {name}: t(1) {1e3 * curve(1):.1f} ms, t(32) {1e3 * curve(32):.1f} ms\n")
        print("| policy | samples/s | step-level against it | occupancy |\n|---|---|---|---|")
        for policy in POLICIES:
            _, clock = simulate(policy, curve, many)
            capacity[policy], occupancy = clock.capacity(), clock.rows / (clock.calls * MAX_ROWS)
            print(
                f"| {policy} | {capacity[policy]:.1f} | {capacity['step'] / capacity[policy]:.2f} | {occupancy:.0%} |"
            )
        print(
            f"\n| at {LOAD:.0%} of the capacity of | its p50, p95 | step-level's p50, p95 | ratios |\n|---|---|---|---|"
        )
        for policy in POLICIES[1:]:
            asked = mix(600, 1, LOAD * capacity[policy] / statistics.mean(COUNTS))
            theirs, ours = (latencies(asked, simulate(p, curve, asked)[0]) for p in (policy, "step"))
            print(row(policy, theirs, ours))
            least = [one.steps * curve(one.count) for one in asked]
            print(f"| (nobody else there) | | {np.median(least):.2f} s, {np.percentile(least, 95):.2f} s | |")


def row(policy: str, theirs: tuple[float, float], ours: tuple[float, float]) -> str:
    shown = ["{:.2f} s, {:.2f} s".format(*pair) for pair in (theirs, ours)]
    return f"| {policy} | {shown[0]} | {shown[1]} | {ours[0] / theirs[0]:.2f}, {ours[1] / theirs[1]:.2f} |"


def part_curve(arguments: argparse.Namespace, kept: dict[str, Any]) -> dict[int, float]:
    torch.set_num_threads(1)
    denoiser, curve = network(NETWORK, SHAPE), {}
    with torch.no_grad():
        for rows in SIZES:
            x, sigma = torch.randn(rows, *SHAPE), torch.ones(rows)
            curve[rows] = min(timed(lambda: denoiser(x, sigma)) for _ in range(30))  # noqa: B023
    kept["curve"] = curve
    print("forward pass, one thread: " + ", ".join(f"{rows} rows {1e3 * s:.2f} ms" for rows, s in curve.items()))
    return curve


# On Ray Serve: one replica, called through its handle by threads of this process.


def deployment(policy: str, stand_in: bool) -> Any:
    """The application of one policy. Everything is defined in here, to travel to the replica by value."""
    from ray import serve

    options = {"max_ongoing_requests": 10_000, "ray_actor_options": {"num_cpus": 1}}

    @serve.deployment(**options)
    class Step:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.batcher = StepBatcher(StandIn() if stand_in else network(NETWORK, SHAPE), MAX_ROWS).start()

        async def draw(self, asked: Asked) -> float:
            seeds = range(asked.number << 8, (asked.number << 8) + asked.count)
            ticket = self.batcher.submit(request(seeds, SHAPE, asked.steps))
            return float((await ticket).mean())

        async def counted(self) -> tuple[int, int]:
            return self.batcher.calls, self.batcher.rows

    @serve.deployment(**options)
    class WholeRequests:
        """@serve.batch around the sampler, as it is usually put."""

        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.lockstep = Lockstep(StandIn() if stand_in else network(NETWORK, SHAPE), leave=False)

        @serve.batch(
            max_batch_size=MAX_ROWS, batch_wait_timeout_s=0.005, batch_size_fn=lambda all_: sum(a.count for a in all_)
        )
        async def batch(self, batch: list[Asked]) -> list[float]:
            import asyncio

            results: dict[int, float] = {}
            finish = lambda asked, samples: results.update({asked.number: float(samples.mean())})  # noqa: E731
            await asyncio.to_thread(self.lockstep.run, batch, finish)
            return [results[asked.number] for asked in batch]

        async def draw(self, asked: Asked) -> float:
            return await self.batch(asked)

        async def counted(self) -> tuple[int, int]:
            return self.lockstep.calls, self.lockstep.rows

    @serve.deployment(**options)
    class OwnQueue:
        """early-leave and same-steps: a thread that takes batches, as soon as the one before is done."""

        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.lockstep = Lockstep(StandIn() if stand_in else network(NETWORK, SHAPE), policy == "early-leave")
            self.waiting: deque[Asked] = deque()
            self.futures: dict[int, Any] = {}
            self.there = threading.Condition()
            threading.Thread(target=self.work, daemon=True).start()

        def work(self) -> None:
            while True:
                with self.there:
                    while not self.waiting:
                        self.there.wait()
                    batch = batches(self.waiting, policy == "same-steps")
                self.lockstep.run(batch, self.finish)

        def finish(self, asked: Asked, samples: Tensor) -> None:
            future = self.futures.pop(asked.number)
            future.get_loop().call_soon_threadsafe(future.set_result, float(samples.mean()))

        async def draw(self, asked: Asked) -> float:
            import asyncio

            future = self.futures[asked.number] = asyncio.get_running_loop().create_future()
            with self.there:
                self.waiting.append(asked)
                self.there.notify()
            return await future

        async def counted(self) -> tuple[int, int]:
            return self.lockstep.calls, self.lockstep.rows

    return {"step": Step, "rectangular": WholeRequests}.get(policy, OwnQueue).bind()  # type: ignore[attr-defined]


def on_serve(policies: Iterable[str], stand_in: bool) -> Iterator[tuple[str, Any]]:
    """(policy, handle of its running application), one after another."""
    from ray import serve

    from scoreray.cluster.connect.local_ray import connected

    with connected(num_cpus=4):
        serve.start(logging_config={"enable_access_log": False, "log_level": "ERROR"})
        for policy in policies:
            handle = serve.run(deployment(policy, stand_in), name="benchmark", route_prefix=None)
            handle.draw.remote(Asked(0, 2, 4)).result()
            yield policy, handle
            serve.delete("benchmark")
        serve.shutdown()


def part_saturation(arguments: argparse.Namespace, kept: dict[str, Any]) -> None:
    """Capacity is counted in rows that the network was usefully called with, not in requests that ended in the window:
    policies finish requests early or late, and a short window would flatter the early ones."""
    name = "stand-in" if arguments.stand_in else "network"
    capacity = kept.setdefault("capacity", {}).setdefault(name, {})
    mean_steps = statistics.mean(STEPS)
    print("| policy | samples/s | step-level against it | occupancy |\n|---|---|---|---|")
    for policy, handle in on_serve(POLICIES, arguments.stand_in):
        clients = 48  # 216 rows wait on average: several batches
        asked, end = mix(10_000), time.perf_counter() + arguments.seconds

        def client(mine: list[Asked], handle: Any = handle, end: float = end) -> None:
            for one in mine:
                if time.perf_counter() > end:
                    return
                handle.draw.remote(one).result()

        with ThreadPoolExecutor(clients) as pool:
            waiting = [pool.submit(client, asked[i::clients]) for i in range(clients)]
            time.sleep(min(3.0, arguments.seconds / 4))
            (calls, rows), began = handle.counted.remote().result(), time.perf_counter()
            time.sleep(max(0.0, end - time.perf_counter()))
            (more_calls, more_rows), ended = handle.counted.remote().result(), time.perf_counter()
            for one in waiting:
                one.result()
        capacity[policy] = (more_rows - rows) / (ended - began) / mean_steps
        occupancy = (more_rows - rows) / ((more_calls - calls) * MAX_ROWS)
        ratio = capacity["step"] / capacity[policy] if "step" in capacity else float("nan")
        print(f"| {policy} | {capacity[policy]:.1f} | {ratio:.2f} | {occupancy:.0%} |", flush=True)


def part_latency(arguments: argparse.Namespace, kept: dict[str, Any]) -> None:
    capacity = kept["capacity"]["stand-in" if arguments.stand_in else "network"]
    took: dict[tuple[str, str], tuple[float, float]] = {}
    for policy, handle in on_serve(POLICIES, arguments.stand_in):
        for baseline in POLICIES[1:] if policy == "step" else [policy]:
            rate = LOAD * capacity[baseline] / statistics.mean(COUNTS)
            took[policy, baseline] = poisson(handle, mix(int(rate * arguments.seconds), 1, rate))
    print(f"| at {LOAD:.0%} of the capacity of | its p50, p95 | step-level's p50, p95 | ratios |\n|---|---|---|---|")
    for policy in POLICIES[1:]:
        print(row(policy, took[policy, policy], took["step", policy]))


def poisson(handle: Any, asked: list[Asked]) -> tuple[float, float]:
    done, began = dict[int, float](), time.perf_counter()

    def ask(one: Asked) -> None:
        time.sleep(max(0.0, began + one.at - time.perf_counter()))
        handle.draw.remote(one).result()
        done[one.number] = time.perf_counter() - began

    with ThreadPoolExecutor(128) as pool:
        list(pool.map(ask, asked))
    return latencies(asked, done)


def decode_stand_in(z: Tensor) -> Tensor:
    """A decoder that takes as long as an AutoencoderKL of 256x256 pixels does on a GPU, on a stream of its own."""
    time.sleep(5e-3 + 4e-3 * len(z))
    return z


def part_decoding(arguments: argparse.Namespace, kept: dict[str, Any]) -> None:
    """Rows a second of the network's calls with a backlog, while finished samples are decoded by the queue of a
    replica, and while they are not: in turns, in one run."""
    rates: dict[str, list[float]] = {"undecoded": [], "decoded": []}
    for _ in range(3):
        for name, found in rates.items():
            found.append(_rate_of_backlog(name == "decoded", arguments.seconds / 6))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    kept["decoding"] = medians["decoded"] / medians["undecoded"]
    print(", ".join(f"{name} {rate:.0f} rows/s" for name, rate in medians.items()) + f", ratio {kept['decoding']:.3f}")


def _rate_of_backlog(decoded: bool, seconds: float) -> float:
    batcher, queue = StepBatcher(StandIn(), MAX_ROWS).start(), decode_queue(decode_stand_in)
    asked, end = mix(10_000), time.perf_counter() + seconds

    def client(mine: list[Asked]) -> None:
        for one in mine:
            if time.perf_counter() > end:
                return
            samples = batcher.submit(request(range(one.count), SHAPE, one.steps)).result()
            if decoded:
                queue.submit(samples).result()

    with ThreadPoolExecutor(48) as pool:
        waiting = [pool.submit(client, asked[i::48]) for i in range(48)]
        time.sleep(seconds / 4)
        rows, began = batcher.rows, time.perf_counter()
        time.sleep(max(0.0, end - time.perf_counter()))
        rate = (batcher.rows - rows) / (time.perf_counter() - began)
        for one in waiting:
            one.result()
    queue.close()
    batcher.close()
    return rate


class StandInReplica(Replica):
    """A replica whose one model is the stand-in; all else is the service's own: the batcher, encoding, answers."""

    def _build(self, checkpoint: str, ema: str) -> Any:
        batcher = StepBatcher(StandIn(), MAX_ROWS, observe=self._observe).start()
        texts = RowQueue[Any, Any](lambda given: given, "texts")
        return _Model(SimpleNamespace(info=stand_in_info()), batcher, SimpleNamespace(name="stand-in"), texts)  # type: ignore[arg-type]


def stand_in_info() -> ModelInfo:
    sections = {"run": {"name": "mine", "storage": "none"}, "data": {"url": "none", "global_batch_size": 16}}
    return ModelInfo("stand-in", 0, "0.050", SHAPE, (), load_config({**sections, "duration": {"images": 1}}))


def part_few_steps(arguments: argparse.Namespace, kept: dict[str, Any]) -> None:
    """Clients over HTTP on loopback, 16 PNGs a request, in the process of the server: by 2 calls and by 35 in turns,
    then as many of both at once, which share calls."""
    kinds = {"2 calls": {"sampler": "consistency", "steps": 2, "grid": "interior"}, "35 calls": {}}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    with http_service() as (url, replica):
        for _ in range(3):
            for name, found in rates.items():
                found.append(_served_rate(url, [kinds[name]], arguments.seconds / 6))
        calls, rows = _counts(replica)
        mixed = _served_rate(url, list(kinds.values()), arguments.seconds / 6)
        more_calls, more_rows = _counts(replica)
    medians = {name: statistics.median(found) for name, found in rates.items()}
    kept["few-steps"] = medians["2 calls"] / medians["35 calls"]
    occupancy = (more_rows - rows) / ((more_calls - calls) * MAX_ROWS)
    print(", ".join(f"{name} {rate:.0f} samples/s" for name, rate in medians.items()), end=", ")
    print(f"ratio {kept['few-steps']:.1f}; as many requests of each at once {mixed:.0f}, calls {occupancy:.0%} full")


def _counts(replica: Replica) -> tuple[int, int]:
    batchers = [model.batcher for model in replica._models.values()]
    return sum(one.calls for one in batchers), sum(one.rows for one in batchers)


@contextlib.contextmanager
def http_service() -> Iterator[tuple[str, Replica]]:
    """The service on a port of this machine, with the stand-in for a model."""
    limits = Limits(token_requests=10_000, token_rows=1_000_000, max_waiting_rows=100_000, max_wait_s=1e6)
    config = ServeConfig((("mine", "stand-in"),), limits=limits, max_batch=MAX_ROWS)
    replica = StandInReplica(config)
    service = Service(config, LocalBackend(replica))
    service.models["mine"] = ServedModel("mine", "stand-in", stand_in_info(), ("0.050",), follows=False)
    service.ready = True
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", replica
    finally:
        server.should_exit = True
        thread.join()


def _served_rate(url: str, kinds: list[dict[str, Any]], seconds: float) -> float:
    """Samples a second that clients are answered with, after a quarter of the time."""
    end, answered = time.perf_counter() + seconds, list[float]()

    def client(number: int) -> None:
        mine = Client(url)
        while time.perf_counter() < end:
            mine.sample_json(count=16, **kinds[number % len(kinds)])
            answered.append(time.perf_counter())

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(client, range(12)))
    begin = end - 0.75 * seconds
    return 16 * sum(begin <= at < end for at in answered) / (0.75 * seconds)


def part_overhead(arguments: argparse.Namespace, kept: dict[str, Any]) -> None:
    """Everything that a step of the batcher does beside calling the network, at 16 rows."""
    denoiser = network(LARGE, LARGE_SHAPE)
    spent = [0.0]

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        began = time.perf_counter()
        denoised = denoiser(x, sigma)
        spent[0] += time.perf_counter() - began
        return denoised

    print("U-Net of 1.86 M on 3 x 32 x 32, Euler and Heun, 16 rows a step, two threads:\n")
    for name, counts in {"one request of 16": [16], "16 requests of one": [1] * 16}.items():
        for sampler in ("euler", "heun", "edm_sde"):
            shares = []
            for round_ in range(arguments.rounds):
                batcher = StepBatcher(counted, 16)
                for i, count in enumerate(counts):
                    seeds = range(100 * i, 100 * i + count)
                    batcher.submit(SampleRequest(seeds, LARGE_SHAPE, karras(15), sampler))
                batcher.step()
                spent[0], began = 0.0, time.perf_counter()
                for _ in range(10):
                    batcher.step()
                shares += [(time.perf_counter() - began) / spent[0] - 1] if round_ else []
            each = 1e3 * spent[0] / 10
            share = statistics.median(shares)
            print(
                f"{name}, {sampler}: forward {each:.1f} ms, the batcher's own {share:.2%} of it ({share * each:.2f} ms)"
            )


def part_scheduling(arguments: argparse.Namespace, kept: dict[str, Any]) -> None:
    """CPU time, as that of a short step is hardly changed by what else the machine does."""
    best = float("inf")
    for _ in range(25):
        batcher, steps = StepBatcher(lambda x, sigma: 0.5 * x, MAX_ROWS), 0
        for i in range(16):
            sampler = ("heun", "euler", "edm_sde", "ddpm")[i % 4]
            batcher.submit(SampleRequest(range(10 * i, 10 * i + 2), (1, 8, 8), karras(18), sampler))
        began = time.process_time()
        while batcher.step():
            steps += 1
        best = min(best, (time.process_time() - began) / steps)
    print(f"16 requests of two samples by four samplers: {1e6 * best:.0f} us of CPU time a step, best of 25")


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


PARTS: dict[str, Callable[..., Any]] = {
    "curve": part_curve,
    "simulate": part_simulate,
    "saturation": part_saturation,
    "latency": part_latency,
    "overhead": part_overhead,
    "scheduling": part_scheduling,
    "decoding": part_decoding,
    "few-steps": part_few_steps,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each run on Ray Serve")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    file = arguments.out / "serving.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    torch.set_num_threads(2)
    print(f"# {arguments.part}: {platform.machine()} CPU, torch {torch.__version__}\n")
    began = time.perf_counter()
    PARTS[arguments.part](arguments, kept)
    arguments.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"\n{time.perf_counter() - began:.0f} s in all.")


if __name__ == "__main__":
    main()
