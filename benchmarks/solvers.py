"""Errors of solvers: the adaptive one's by its calls, both curvatures of dpmpp_3m_sde, and all at budgets of calls.

    python benchmarks/solvers.py

On mixtures of Gaussians, whose denoiser and density are exact, scaled to a standard deviation of 0.5; float64. Errors
of samples are root mean squares against the ODE's ends at a tolerance of 1e-11, of likelihoods the largest of the rows,
in nats. It takes 20 s, and runs on older versions too, for comparisons (their dpmpp_3m_sde is `exact` alone).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoreray.sampling.measures.likelihood import log_likelihood
from scoreray.sampling.samplers.budget import most_steps
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.options import options_of
from scoreray.sampling.samplers.sample import SAMPLERS, drive, num_calls, sample, start
from scoreray.sampling.samplers.sigmas import GRIDS, karras
from scoreray.trainer.diffusion.targets import Mixture

ROWS = 16
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
STEPS = (8, 10, 15, 20, 30, 40, 80)
BUDGETS = (2, 3, 5, 7, 9, 13, 21, 29, 35, 41, 63, 99)
ENDS = [80.0, 0.002, 0.0]
SIGMA_MAX = 2000.0  # of likelihoods, so that the error is the solver's and not that of a normal prior at 80


def mixture(dims: int, modes: int, std: float) -> Mixture:
    """Of a standard deviation of 0.5 in all, about 0."""
    means = torch.randn(modes, dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = means - means.mean(0)
    spread = math.sqrt(0.25 - std**2) / means.square().mean().sqrt().clamp_min(1e-9)
    return Mixture(means * spread, std)


TARGETS = {
    "a Gaussian, 8 dimensions": mixture(8, 1, 0.5),
    "3 modes of 0.3, 2": mixture(2, 3, 0.3),
    "3 modes of 0.15, 2": mixture(2, 3, 0.15),
    "5 modes of 0.1, 8": mixture(8, 5, 0.1),
    "10 modes of 0.05, 64": mixture(64, 10, 0.05),
    "20 modes of 0.2, 256": mixture(256, 20, 0.2),
}


def main() -> None:
    torch.set_num_threads(1)
    print(f"| mixture | | {' | '.join(f'{t:g}' for t in TOLERANCES)} |")
    for name, target in TARGETS.items():
        begin = _noise(target)
        end = sample(target, begin, ENDS, sampler="rk45", rtol=1e-11, atol=1e-11)
        found = [drive(start("rk45", begin, karras(18), rtol=t, atol=t), target) for t in TOLERANCES]
        _row(name, "rk45", [f"{calls}: {_error(samples, end):.1e}" for samples, calls in found])
        if target.means[0].numel() <= 64:
            x = target.sample(ROWS, torch.Generator().manual_seed(0))
            nats = target.log_density(x, ENDS[1])
            settings = {"trace": "exact", "sigma_max": SIGMA_MAX, "data_std": 0.5}
            likelihoods = [log_likelihood(target, x, rtol=t, atol=t, **settings) for t in TOLERANCES]
            _row(name, "nats", [f"{one.nfe}: {float((one.nats - nats).abs().max()):.1e}" for one in likelihoods])
    print(f"\n| mixture | | {' | '.join(map(str, STEPS))} steps |")
    choices = options_of(SAMPLERS["dpmpp_3m_sde"]).get("curvature")
    for name, target in TARGETS.items():
        begin = _noise(target)
        end = sample(target, begin, ENDS, sampler="rk45", rtol=1e-11, atol=1e-11)
        for choice in choices.choices if choices else ("exact",):
            options = {"eta": 0.0, "curvature": choice} if choices else {"eta": 0.0}
            drawn = [sample(target, begin, karras(n), sampler="dpmpp_3m_sde", **options) for n in STEPS]
            _row(name, choice, [f"{_error(samples, end):.1e}" for samples in drawn])
    _budgets()


def _budgets() -> None:
    """What `sampling/samplers/budget.py` chooses by: errors at so many calls, geometric means over the mixtures."""
    print(f"\n| sampler | grid | {' | '.join(map(str, BUDGETS))} calls |")
    ends = {name: sample(target, _noise(target), ENDS, sampler="rk45", rtol=1e-9, atol=1e-9)
            for name, target in TARGETS.items()}  # fmt: skip
    for sampler in ("euler", "dpmpp_2m", "unipc", "heun", "dpm2"):
        for grid in ("karras", "interior"):
            cells = []
            for budget in BUDGETS:
                steps = most_steps(budget, lambda n: num_calls(sampler, karras(n)))  # noqa: B023
                levels = GRIDS[grid](steps, ENDS[1], ENDS[0])
                errors = [_error(sample(target, _noise(target), levels, sampler=sampler), ends[name])
                          for name, target in TARGETS.items()]  # fmt: skip
                cells.append(f"{math.exp(sum(map(math.log, errors)) / len(errors)):.1e}")
            _row(sampler, grid, cells)


def _noise(target: Mixture) -> Tensor:
    return ENDS[0] * SampleNoise(range(ROWS)).normal((ROWS, *target.means.shape[1:]), torch.float64)


def _error(samples: Tensor, end: Tensor) -> float:
    return float((samples - end).square().mean().sqrt())


def _row(*cells: str | list[str]) -> None:
    print(f"| {' | '.join(cell if isinstance(cell, str) else ' | '.join(cell) for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
