"""What samplers cost and what they give.

    python benchmarks/sampling.py [--out DIR] [--batch 16 64] [--compile] [--skip-error]

1. Overhead: the time that a sampler and its driver add to the network's calls, with a U-Net of 1.7 M parameters on
   32 x 32 x 3, at each batch size. The driver's own time is measured with a network that does nothing and set against
   the network's time, which is less at the mercy of a busy machine than the difference of two long runs; for some
   samplers that difference is shown too, as the median over interleaved pairs.
2. Error against nfe: every sampler on a mixture of Gaussians with its exact denoiser; a table and a picture.

Writes sampling.json, sampling.md and sampling.png to DIR.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from scoreray.sampling.compare import error_against_nfe
from scoreray.sampling.noise import SampleNoise
from scoreray.sampling.pictures import draw_error_against_nfe
from scoreray.sampling.samplers import ADAPTIVE, SAMPLERS, drive, num_calls, start
from scoreray.sampling.sigmas import karras
from scoreray.trainer.denoiser import Denoiser
from scoreray.trainer.network import build_network, num_parameters
from scoreray.trainer.targets import ring
from scoreray.trainer.unet import UNetConfig

SHAPE = (3, 32, 32)
NULL_STEPS = 100
REAL_STEPS = 6
PAIRED = ("euler", "heun", "dpmpp_2m", "ddpm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--compile", action="store_true", help="time a torch.compile'd network too")
    parser.add_argument("--skip-error", action="store_true", help="only the overhead")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    )
    title = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [f"# Samplers: cost and error ({title})", ""]
    record: dict[str, object] = {"machine": title}
    for compiled in [False, True] if arguments.compile else [False]:
        rows = [row for batch in arguments.batch for row in overhead(batch, device, compiled, arguments.repeats)]
        record["overhead_compiled" if compiled else "overhead"] = rows
        lines += overhead_table(rows, compiled)
    if not arguments.skip_error:
        results, floor = error_against_nfe(ring())
        record["error"] = {"floor": floor, "runs": [vars(result) for result in results]}
        lines += error_table(results, floor)
        draw_error_against_nfe(results, floor).savefig(arguments.out / "sampling.png", dpi=130)
    (arguments.out / "sampling.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / "sampling.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def overhead(batch: int, device: torch.device, compiled: bool, repeats: int) -> list[dict[str, object]]:
    """For each sampler: us of its own per call, and what that is of a network call, in percent."""
    torch.manual_seed(0)
    network = build_network(UNetConfig(model_channels=32, channel_mult=(1, 2, 2), head_channels=32), SHAPE)
    parameters = num_parameters(network)
    network = network.to(device).eval().requires_grad_(False)
    denoiser = Denoiser(torch.compile(network) if compiled else network)
    x = 80 * SampleNoise(range(batch)).normal((batch, *SHAPE)).to(device)
    bare = bare_call_s(denoiser, x, repeats)
    rows = []
    for sampler in SAMPLERS:
        if sampler in ADAPTIVE:
            continue
        own = own_cost_s(sampler, x, repeats)
        pairs = [pair_s(sampler, denoiser, x) for _ in range(repeats if sampler in PAIRED else 0)]
        rows.append(
            {
                "sampler": sampler,
                "batch": batch,
                "parameters": parameters,
                "network_ms": bare * 1e3,
                "own_us": own * 1e6,
                "own_percent": 100 * own / bare,
                "difference_percent": 100 * (statistics.median(a / b for a, b in pairs) - 1) if pairs else None,
            }
        )
    return rows


def bare_call_s(denoiser: Denoiser, x: torch.Tensor, repeats: int) -> float:
    sigma = torch.full((len(x),), 1.0, device=x.device)
    with torch.no_grad():
        denoiser(x, sigma)
        return min(timed(lambda: denoiser(x, sigma), x.device) for _ in range(2 * repeats))


def own_cost_s(sampler: str, x: torch.Tensor, repeats: int) -> float:
    """Seconds per call that sampler and driver take with a denoiser that only hands out a tensor made before."""
    denoised, sigmas = torch.zeros_like(x), karras(NULL_STEPS)
    options = {"num_steps": 1} if sampler.startswith("ncsn") else {}
    seeds = torch.arange(len(x))
    calls = num_calls(sampler, sigmas, **options)
    run = lambda: drive(start(sampler, x, sigmas, seeds, **options), lambda x, sigma: denoised)  # noqa: E731
    run()
    return min(timed(run, x.device) for _ in range(max(3, repeats // 2))) / calls


def pair_s(sampler: str, denoiser: Denoiser, x: torch.Tensor) -> tuple[float, float]:
    """Seconds of one sampling run, and of a bare loop of as many calls right after it."""
    sigmas, seeds = karras(REAL_STEPS), torch.arange(len(x))
    options = {"num_steps": 1} if sampler.startswith("ncsn") else {}
    calls = num_calls(sampler, sigmas, **options)
    levels = [torch.full((len(x),), 1.0, device=x.device) for _ in range(calls)]

    def bare() -> None:
        with torch.no_grad():
            for sigma in levels:
                denoiser(x, sigma)

    sampled = timed(lambda: drive(start(sampler, x, sigmas, seeds, **options), denoiser), x.device)
    return sampled, timed(bare, x.device)


def timed(run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def overhead_table(rows: list[dict[str, object]], compiled: bool) -> list[str]:
    first = rows[0]
    lines = [
        f"## Overhead, {'compiled' if compiled else 'eager'} U-Net of {first['parameters'] / 1e6:.2f} M on 32 x 32 x 3",
        "",
        "| sampler | batch | network ms a call | sampler's own us a call | of the network | long runs' difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = "" if row["difference_percent"] is None else f"{row['difference_percent']:+.1f}%"
        lines.append(
            f"| {row['sampler']} | {row['batch']} | {row['network_ms']:.1f} | {row['own_us']:.0f} "
            f"| {row['own_percent']:.2f}% | {difference} |"
        )
    return [*lines, ""]


def error_table(results, floor: float) -> list[str]:
    lines = [
        "## Error against nfe: ring of 8 Gaussians, exact denoiser, Karras grid",
        "",
        f"Sliced Wasserstein distance of 2,048 samples to as many exact ones; two exact sets are {floor:.4f} apart. In",
        "brackets the rms distance to the probability-flow ODE's exact ends, for deterministic samplers.",
        "",
        "| sampler | " + " | ".join("nfe: distance (ode error)" for _ in range(3)) + " |",
        "|---|---|---|---|",
    ]
    deterministic = {"euler", "ddim", "heun", "dpm2", "dpmpp_2m", "unipc", "rk45"}
    for sampler in dict.fromkeys(result.sampler for result in results):
        own = [result for result in results if result.sampler == sampler]
        shown = [own[0], own[len(own) // 2], own[-1]]
        cells = [
            f"{r.nfe}: {r.distance:.4f}" + (f" ({r.ode_error:.1e})" if sampler in deterministic else "") for r in shown
        ]
        lines.append(f"| {sampler} | " + " | ".join(cells) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
