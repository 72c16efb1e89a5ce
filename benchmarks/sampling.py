"""What samplers cost and what they give; under 4 minutes on 2 cores.

    PYTHONPATH=docs/tools python benchmarks/sampling.py [--out DIR] [--batch 16 64]
                                                        [--only overhead error compile schedulers]

1. overhead: the time that a sampler and its driver add to the network's calls, with a U-Net of 1.9 M parameters on
   32 x 32 x 3. Their own time is taken with a denoiser that does nothing and set against one call of the real one: the
   difference of two long runs would drown in a busy machine's noise. For two samplers it is shown too, as the median
   over interleaved pairs.
2. error: every sampler on a mixture of Gaussians with its exact denoiser, at growing numbers of calls.
3. compile: a U-Net's and a DiT's forward pass eager and under torch.compile (inductor), the best of alternating calls.
4. schedulers: a step of a sampler and its driver against one of diffusers' scheduler, with a network that does
   nothing, at the first batch: CPU time of one thread in turns, so that other load counts little.

Prints tables, and writes sampling.json and sampling.png to DIR.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare import error_against_nfe
from gallery import save_small
from pictures import DETERMINISTIC, draw_error_against_nfe

from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import ADAPTIVE, OF_MAPS, SAMPLERS, drive, num_calls, start
from scoreray.sampling.samplers.sigmas import karras
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.targets import ring
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.network import num_parameters
from scoreray.trainer.networks.unet import UNetConfig

SHAPE = (3, 32, 32)
NULL_STEPS = 40
PAIRED = {"dpmpp_2m": 4, "ddpm": 4}  # steps of each
NUM_PAIRS = 9
BUDGETS = (8, 12, 18, 32, 64, 128)
SCHEDULERS = {
    "euler": "EulerDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "ddpm": "DDPMScheduler",
}
NUM_TURNS = 21
COMPILED = {
    "U-Net": (UNetConfig(model_channels=32, channel_mult=(1, 2), num_blocks=1, patch_size=2), SHAPE),
    "DiT": (DiTConfig(patch_size=4, hidden_size=128, depth=4, num_heads=4), SHAPE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    title = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    record: dict[str, object] = {"machine": title}
    print(f"# Samplers: cost and error ({title})\n")
    for part in arguments.only:
        record[part], table = PARTS[part](arguments, device)
        print("\n".join([*table, ""]), flush=True)
    print(f"{time.perf_counter() - began:.0f} s in all.")
    (arguments.out / "sampling.json").write_text(json.dumps(record, indent=1) + "\n")


def overhead(arguments: argparse.Namespace, device: torch.device) -> tuple[object, list[str]]:
    """For each sampler and batch: milliseconds of its own per call, and what that is of a network call in percent."""
    torch.manual_seed(0)
    network = UNetConfig(model_channels=32, channel_mult=(1, 2, 2), head_channels=32).build(SHAPE)
    parameters = num_parameters(network)
    denoiser = Denoiser(network.to(device).eval().requires_grad_(False))
    rows: dict[str, dict[str, object]] = {name: {} for name in SAMPLERS if name not in ADAPTIVE | OF_MAPS}
    network_ms, pairs = {}, []
    for batch in arguments.batch:
        x = 80 * SampleNoise(range(batch)).normal((batch, *SHAPE)).to(device)
        sigma = torch.ones(batch, device=device)
        network_ms[batch] = 1e3 * best(lambda: denoiser(x, sigma), device, 6)  # noqa: B023
        for name, row in rows.items():
            row[str(batch)] = 1e3 * own_cost_s(name, x)
        for name, steps in PAIRED.items() if batch == min(arguments.batch) else ():
            ratios = [difference(name, steps, denoiser, x) for _ in range(NUM_PAIRS)]
            low, middle, high = (100 * (f(ratios) - 1) for f in (min, statistics.median, max))
            pairs.append(f"{name} at batch {batch} {middle:+.1f}% ({low:+.1f} to {high:+.1f})")
    heads = [f"batch {batch}: own ms | of a network call" for batch in arguments.batch]
    table = [
        f"## Overhead per call, U-Net of {parameters / 1e6:.2f} M on 32 x 32 x 3",
        "",
        "A network call takes " + ", ".join(f"{ms:.0f} ms at batch {batch}" for batch, ms in network_ms.items()) + ".",
        "",
        "| sampler | " + " | ".join(heads) + " |",
        "|---" * (1 + 2 * len(heads)) + "|",
    ]
    for name, row in rows.items():
        cells = [f"{row[str(b)]:.2f} | {100 * row[str(b)] / network_ms[b]:.2f}%" for b in arguments.batch]  # type: ignore[operator]
        table.append(f"| {name} | " + " | ".join(cells) + " |")
    table += ["", f"Whole runs against bare loops, median (range) of {NUM_PAIRS} pairs: " + "; ".join(pairs) + "."]
    return {"network_ms": network_ms, "own_ms": rows, "pairs": pairs}, table


def own_cost_s(sampler: str, x: torch.Tensor) -> float:
    """Seconds per call that sampler and driver take with a denoiser that only hands out a tensor made before."""
    denoised, sigmas, seeds = torch.zeros_like(x), karras(NULL_STEPS), torch.arange(len(x))
    options = options_of(sampler)
    calls = num_calls(sampler, sigmas, **options)
    run = lambda: drive(start(sampler, x, sigmas, seeds, **options), lambda x, sigma: denoised)  # noqa: E731
    return best(run, x.device, 3) / calls


def difference(sampler: str, num_steps: int, denoiser: Denoiser, x: torch.Tensor) -> float:
    """The time of one sampling run over that of a bare loop of as many calls right after it."""
    sigmas, seeds = karras(num_steps), torch.arange(len(x))
    sigma, calls = torch.ones(len(x), device=x.device), num_calls(sampler, sigmas)

    def bare() -> None:
        for _ in range(calls):
            denoiser(x, sigma)

    sampled = timed(lambda: drive(start(sampler, x, sigmas, seeds), denoiser), x.device)
    return sampled / timed(bare, x.device)


def error(arguments: argparse.Namespace, device: torch.device) -> tuple[object, list[str]]:
    """Distance to the data, and to the ODE's exact ends, by the number of network calls."""
    results, floor = error_against_nfe(ring(), budgets=BUDGETS, count=1024)
    save_small(draw_error_against_nfe(results, floor), arguments.out / "sampling.png")
    table = [
        "## Error against nfe: ring of 8 Gaussians, exact denoiser, Karras grid",
        "",
        "nfe: sliced Wasserstein distance of 1,024 samples to as many exact ones (two exact sets are "
        f"{floor:.4f} apart); in brackets, for deterministic samplers, the rms distance to the ODE's exact ends.",
        "",
        "| sampler | few calls | more | many |",
        "|---|---|---|---|",
    ]
    for sampler in dict.fromkeys(result.sampler for result in results):
        own = [result for result in results if result.sampler == sampler]
        exact = sampler in DETERMINISTIC or sampler == "ddim"
        cells = [
            f"{r.nfe}: {r.distance:.3f}" + (f" ({r.ode_error:.1e})" if exact else "")
            for r in (own[0], own[len(own) // 2], own[-1])
        ]
        table.append(f"| {sampler} | " + " | ".join(cells) + " |")
    return {"floor": floor, "runs": [vars(result) for result in results]}, table


def compiled(arguments: argparse.Namespace, device: torch.device) -> tuple[object, list[str]]:
    """Forward passes eager and under torch.compile, and how far apart their outputs are."""
    batch = arguments.batch[0]
    table = [
        f"## torch.compile (inductor, no graph breaks allowed), forward pass, batch {batch} of 32 x 32 x 3",
        "",
        "| network | parameters | eager ms | compiled ms | speed-up | largest difference | compiling s |",
        "|---|---|---|---|---|---|---|",
    ]
    record = {}
    for name, (config, shape) in COMPILED.items():
        torch.manual_seed(0)
        network = config.build(shape)
        for parameter in network.parameters():  # a new network gives 0 whatever its input
            parameter.data += 0.05 * torch.randn_like(parameter)
        network = network.to(device).eval().requires_grad_(False)
        x, c_noise = torch.randn(batch, *shape, device=device), torch.linspace(-1.5, 1, batch, device=device)
        fast = torch.compile(network, fullgraph=True)
        began = time.perf_counter()
        output = fast(x, c_noise)
        compiling = time.perf_counter() - began
        expected = network(x, c_noise)
        off = float((output - expected).abs().max() / expected.abs().max())
        rounds = [[timed(lambda n=n: n(x, c_noise), device) for n in (network, fast)] for _ in range(25)]  # noqa: B023
        eager, quick = (1e3 * min(times) for times in zip(*rounds, strict=True))
        record[name] = {"eager_ms": eager, "compiled_ms": quick, "relative_difference": off, "compiling_s": compiling}
        table.append(
            f"| {name} | {num_parameters(config.build(shape)) / 1e6:.2f} M | {eager:.1f} | {quick:.1f} "
            f"| {eager / quick:.2f} | {off:.0e} of the largest output | {compiling:.0f} |"
        )
    return record, table


def schedulers(arguments: argparse.Namespace, device: torch.device) -> tuple[object, list[str]]:
    """Microseconds of a step with a null network, ours and diffusers', and of the noise that a step of DDPM draws."""
    import diffusers

    batch, threads = arguments.batch[0], torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.randn(batch, *SHAPE)
    noise, generator = SampleNoise(range(batch)), torch.Generator().manual_seed(0)
    table = [
        f"## A step with a null network, batch {batch} of 32 x 32 x 3, us of one CPU thread, diffusers "
        f"{diffusers.__version__}",
        "",
        "| sampler | scoreray | diffusers | ratio, median (least to most) |",
        "|---|---|---|---|",
    ]
    turns: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {}
    for name, peer in SCHEDULERS.items():
        scheduler = getattr(diffusers, peer)()
        turns[name] = (lambda name=name: own_run(name, x), lambda s=scheduler: peer_run(s, x, generator), NULL_STEPS)  # type: ignore[misc]
    turns["noise alone"] = (lambda: noise.like(x), lambda: torch.randn(x.shape, generator=generator), 1)
    record = {}
    with torch.no_grad():
        for name, (ours, theirs, steps) in turns.items():
            pairs = [[1e6 * cpu_s(run) / steps for run in (ours, theirs)] for _ in range(NUM_TURNS + 1)][1:]
            own, peers = (statistics.median(times) for times in zip(*pairs, strict=True))
            ratios = sorted(a / b for a, b in pairs)
            record[name] = {"own_us": own, "diffusers_us": peers, "ratios": ratios}
            low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
            table.append(f"| {name} | {own:.0f} | {peers:.0f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    torch.set_num_threads(threads)
    return record, table


def own_run(sampler: str, x: torch.Tensor) -> None:
    denoised = torch.zeros_like(x)
    drive(start(sampler, x, karras(NULL_STEPS), torch.arange(len(x))), lambda x, sigma: denoised)


def peer_run(scheduler: Any, x: torch.Tensor, generator: torch.Generator) -> None:
    predicted = torch.zeros_like(x)
    scheduler.set_timesteps(NULL_STEPS)
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(predicted, t, x, generator=generator).prev_sample


def options_of(sampler: str) -> dict[str, int]:
    return {"num_steps": 1} if sampler.startswith("ncsn") else {}


def best(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    run()
    with torch.no_grad():
        return min(timed(run, device) for _ in range(repeats))


def timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def cpu_s(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


PARTS = {"overhead": overhead, "error": error, "compile": compiled, "schedulers": schedulers}


if __name__ == "__main__":
    main()
