"""Samplers against each other: how far their samples are from the data, by the number of network calls they took."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import ADAPTIVE, OF_MAPS, SAMPLERS, drive, num_calls, start
from scoreray.sampling.samplers.sigmas import karras
from scoreray.trainer.diffusion.targets import Mixture

BUDGETS = (8, 12, 18, 28, 44, 70, 110, 180)
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
# Of a kind in which a run of a few dozen calls makes sense; Langevin at one noise level has none.
OPTIONS: dict[str, dict[str, Any]] = {
    "ncsn": {"num_steps": 2},
    "ncsnv2": {"num_steps": 2},
    "edm_sde": {"s_churn": 20.0},
}
LEFT_OUT = ("langevin", "sgld", "baoab", "cld", "mala", "hmc", *OF_MAPS)
TOLERANCES = (0.1, 0.03, 1e-2, 1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class Result:
    """One run: `distance`, sliced Wasserstein to exact samples, and `ode_error`, rms to the exact ODE's own ends."""

    sampler: str
    nfe: int
    distance: float
    ode_error: float


def error_against_nfe(
    target: Mixture, *, samplers: Sequence[str] | None = None, budgets: Sequence[int] = BUDGETS, count: int = 2048
) -> tuple[list[Result], float]:
    """Every sampler with the target's exact denoiser at every budget of calls, and the distance of exact samples.

    All begin at the same noise on Karras grids. Runs whose number of calls would go over the budget are left out.
    """
    noise = SampleNoise(range(count))
    begin = SIGMA_MAX * noise.normal((count, *target.means.shape[1:]), torch.float64)
    exact = target.sample(count, torch.Generator().manual_seed(0))
    floor = sliced_wasserstein(exact, target.sample(count, torch.Generator().manual_seed(1)))
    end = drive(start("rk45", begin, karras(18), rtol=1e-8, atol=1e-8), target)[0]
    results = []
    for name in samplers or [name for name in SAMPLERS if name not in LEFT_OUT]:
        for sigmas, options in _settings(name, budgets):
            steps = start(name, begin, sigmas, SampleNoise(range(count), draw=1), **options)
            samples, nfe = drive(steps, target)
            error = (samples - end).square().sum(1).mean().sqrt().item()
            results.append(Result(name, nfe, sliced_wasserstein(samples, exact), error))
    return results, floor


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """Mean 1-Wasserstein distance of the projections of equally many points [N, 2] on evenly spread directions."""
    angles = torch.arange(directions, dtype=a.dtype, device=a.device) * (math.pi / directions)
    lines = torch.stack([angles.cos(), angles.sin()])
    return ((a @ lines).sort(0).values - (b @ lines).sort(0).values).abs().mean().item()


def _settings(name: str, budgets: Sequence[int]) -> list[tuple[Tensor, dict[str, Any]]]:
    """(grid, options) of each run of a sampler: the longest grid that a budget allows, or its tolerances."""
    options = OPTIONS.get(name, {})
    if name in ADAPTIVE:
        return [(karras(18, SIGMA_MIN, SIGMA_MAX), {"rtol": t, "atol": t}) for t in TOLERANCES]
    settings = []
    for budget in budgets:
        counts = range(2, budget + 1)
        fitting = bisect_right(counts, budget, key=lambda n: num_calls(name, karras(n), **options))
        if fitting:
            settings.append((karras(counts[fitting - 1], SIGMA_MIN, SIGMA_MAX), options))
    return settings
