"""Langevin samplers: plain, with decreasing steps, and annealed down a ladder of noise levels.

The shape of a sampler is described in `ode.py`. With score = (D - x) / sigma^2, a step of relative size
a = eps / sigma^2 moves x by the fraction a of its way to D.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.samplers.noise import Noise
from scoreray.sampling.samplers.ode import Levels, Steps, heun
from scoreray.sampling.samplers.options import Range
from scoreray.trainer.networks import ladder

COUNT = Range(1, 10_000_000)
STEP_SIZE = Range(0, 1e30, open_low=True)
LARGEST_RELATIVE = 1e36  # of a step: float32 ends at 3.4e38


def langevin(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    step_size: Annotated[float | None, STEP_SIZE] = None,
    num_steps: Annotated[int | None, COUNT] = None,
    denoise: bool = False,
    warm_start: bool = False,
) -> Steps:
    """Unadjusted Langevin, x + eps score + sqrt(2 eps) z, at the grid's smallest positive sigma; num_steps calls.

    Roberts & Tweedie 1996. `step_size` is eps (default sigma^2 / 2), `num_steps` the grid's n by default. For data
    N(m, s^2) its stationary variance is v / (1 - eps / (2 v)) with v = s^2 + sigma^2. `denoise` ends in one more call.
    `warm_start`: x is at sigmas[0], and Heun's steps take it down the grid first, 2 n - 2 more calls; without, x is
    where the chain starts. From noise alone a chain at a small sigma does not reach the data (Song & Ermon 2019, 3.2).
    """
    sigma = sigmas[-2]
    relative = 0.5 if step_size is None else relative_step("step_size", step_size, sigma)
    if warm_start:
        x = yield from heun(x, sigmas[:-1], noise)
    for _ in range(len(sigmas) - 1 if num_steps is None else num_steps):
        denoised = yield x, sigma
        x = torch.lerp(x, denoised, relative).add_(noise.like(x), alpha=sigma * math.sqrt(2 * relative))
    if denoise:
        x = yield x, sigma
    return x


def sgld(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    step_size: Annotated[float | None, STEP_SIZE] = None,
    offset: Annotated[float, Range(0, 1e12, open_low=True)] = 10.0,
    decay: Annotated[float, Range(0.5, 1, open_low=True)] = 0.55,
    num_steps: Annotated[int | None, COUNT] = None,
    warm_start: bool = False,
) -> Steps:
    """Stochastic-gradient Langevin dynamics, x + eps_k / 2 score + sqrt(eps_k) z; num_steps calls.

    Welling & Teh 2011, eq. 4, eps_k = step_size (1 + k / offset)^-decay: its sum diverges and the sum of its squares
    does not, so that a noisy score (a minibatch's) is averaged out. At the grid's smallest positive sigma; `step_size`
    defaults to sigma^2. `warm_start`: as of `langevin`.
    """
    sigma = sigmas[-2]
    first = 1.0 if step_size is None else relative_step("step_size", step_size, sigma)
    if warm_start:
        x = yield from heun(x, sigmas[:-1], noise)
    for k in range(len(sigmas) - 1 if num_steps is None else num_steps):
        denoised = yield x, sigma
        relative = first * (1 + k / offset) ** -decay
        x = torch.lerp(x, denoised, relative / 2).add_(noise.like(x), alpha=sigma * math.sqrt(relative))
    return x


def ncsn(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    epsilon: Annotated[float | None, STEP_SIZE] = None,
    num_steps: Annotated[int, COUNT] = 100,
    denoise: bool = False,
) -> Steps:
    """Annealed Langevin dynamics: `num_steps` (T) steps at every level; n T calls, one more with `denoise`.

    Song & Ermon 2019, Alg. 1: step a_i = epsilon sigma_i^2 / sigma_L^2, x + a_i / 2 score + sqrt(a_i) z. `epsilon` is
    the step at the smallest level; by default 0.2 sigma_L^2, the paper's 2e-5 at sigma_L 0.01.
    """
    relative = 0.2 if epsilon is None else relative_step("epsilon", epsilon, sigmas[-2])
    return (yield from _annealed(x, sigmas, noise, relative / 2, num_steps, denoise))


def ncsnv2(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    epsilon: Annotated[float | None, STEP_SIZE] = None,
    num_steps: Annotated[int, COUNT] = 5,
    denoise: bool = True,
) -> Steps:
    """Annealed Langevin dynamics of NCSNv2, which ends in a denoising call; n T + 1 calls.

    Song & Ermon 2020, Alg. 1: step a_i = epsilon sigma_i^2 / sigma_L^2, x + a_i score + sqrt(2 a_i) z, then
    x + sigma_L^2 score. `epsilon` by default from the paper's technique 4 for a ladder of this length and these ends.
    """
    if epsilon is None:
        levels = len(sigmas) - 1
        ratio = (sigmas[0] / sigmas[-2]) ** (1 / (levels - 1)) if levels > 1 else 1.0
        epsilon = ladder.step_size(sigmas[-2], ratio, num_steps)
    return (yield from _annealed(x, sigmas, noise, relative_step("epsilon", epsilon, sigmas[-2]), num_steps, denoise))


def relative_step(name: str, step: float, sigma: float) -> float:
    """step / sigma^2. Raises UserError where float32 can't hold it."""
    if step >= LARGEST_RELATIVE * sigma**2:
        raise UserError(
            f"{name} = {step:g}: at noise level {sigma:g} this leads to numbers that are not finite; give less than "
            f"{LARGEST_RELATIVE * sigma**2:g}"
        )
    return step / sigma**2


def _annealed(x: Tensor, sigmas: Levels, noise: Noise, relative: float, num_steps: int, denoise: bool) -> Steps:
    for sigma in sigmas[:-1]:
        for _ in range(num_steps):
            denoised = yield x, sigma
            x = torch.lerp(x, denoised, relative).add_(noise.like(x), alpha=sigma * math.sqrt(2 * relative))
    if denoise:
        x = yield x, sigmas[-2]
    return x
