"""Parallel in time: latency and rows of one sample, as ratios to the sequential sampler, by how a call's time grows.

    nice -n 10 python benchmarks/parallel.py [--call-ms 8] [--seeds 16]

The network is a stand-in: the exact denoiser of a mixture of Gaussians in 64 dimensions, whose call of b rows counts
t(b) = t0 (1 + slope (b - 1)). slope 0 is a device that one sample does not fill, 1 one whose time is that of its rows.
The latency is the calls' t(b) and the CPU time that the driver takes between them, which it measures: what else runs on
the machine is not in it, and neither is what the mixture's own arithmetic takes in place of the network's.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.parallel import Parallel
from scoreray.sampling.samplers.sample import drive, start
from scoreray.sampling.samplers.sigmas import karras
from scoreray.trainer.diffusion.targets import Mixture

DIMS, MODES, STD = 64, 10, 0.05
SAMPLERS = ("euler", "heun", "dpmpp_2m", "ddpm")
STEPS = (18, 50, 100)
SLOPES = (0.0, 0.02, 0.1, 1.0)


@dataclass
class StandIn:
    """The mixture's denoiser: counts calls, their rows, and the CPU time that it takes itself."""

    target: Mixture
    calls: int = 0
    rows: int = 0
    cpu_s: float = 0.0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        began = time.thread_time()
        denoised = self.target(x, sigma)
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        self.cpu_s += time.thread_time() - began
        return denoised


@dataclass(frozen=True)
class Drawn:
    """One sample, and what it cost; driver_s: CPU time beside the network's calls."""

    sample: Tensor
    driver_s: float
    calls: int
    rows: int

    def latency_s(self, call_s: float, slope: float) -> float:
        return self.driver_s + call_s * (self.calls + slope * (self.rows - self.calls))


def draw(target: Mixture, sampler: str, steps: int, seed: int, parallel: Parallel | None) -> Drawn:
    network, grid, noise = StandIn(target), karras(steps), SampleNoise([seed])
    begin = float(grid[0]) * noise.normal((1, DIMS), torch.float32)
    began = time.thread_time()
    sample, _ = drive(start(sampler, begin, grid, noise, parallel=parallel), network)
    return Drawn(sample, time.thread_time() - began - network.cpu_s, network.calls, network.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call-ms", type=float, default=8.0, help="of one row")
    parser.add_argument("--seeds", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    target, slopes = mixture(), " | ".join(f"latency, slope {slope:g}" for slope in SLOPES)
    print(f"| sampler | steps | calls | in parallel | rows | error (largest) | driver, ms a call | {slopes} |")
    print("|---" * (7 + len(SLOPES)) + "|")
    draw(target, "euler", 18, 0, Parallel())  # what a first call sets up is in no line
    for sampler in SAMPLERS:
        for steps in STEPS:
            print(row(target, sampler, steps, args.call_ms / 1000, args.seeds), flush=True)


def row(target: Mixture, sampler: str, steps: int, call_s: float, seeds: int) -> str:
    """A line of the table: means over seeds; of the samples' errors (root mean square) the median and the largest."""
    before, after = (
        [draw(target, sampler, steps, seed, parallel) for seed in range(seeds)] for parallel in (None, Parallel())
    )
    errors = [float((a.sample - b.sample).square().mean().sqrt()) for a, b in zip(before, after, strict=True)]
    driver = mean(one.driver_s for one in after) / mean(one.calls for one in after)
    cells = [
        sampler,
        str(steps),
        f"{mean(one.calls for one in before):g}",
        f"{mean(one.calls for one in after):.1f}",
        f"{mean(one.rows for one in after) / mean(one.rows for one in before):.2f}",
        f"{statistics.median(errors):.0e} ({max(errors):.0e})",
        f"{1000 * driver:.2f}",
    ]
    for slope in SLOPES:
        ratio = mean(one.latency_s(call_s, slope) for one in after) / mean(
            one.latency_s(call_s, slope) for one in before
        )
        cells.append(f"{ratio:.2f}")
    return f"| {' | '.join(cells)} |"


def mixture() -> Mixture:
    """Of a standard deviation of 0.5 in all, about 0."""
    means = torch.randn(MODES, DIMS, generator=torch.Generator().manual_seed(0))
    means = means - means.mean(0)
    return Mixture(means * math.sqrt(0.25 - STD**2) / means.square().mean().sqrt(), STD)


if __name__ == "__main__":
    main()
