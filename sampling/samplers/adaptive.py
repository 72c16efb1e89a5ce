"""The probability-flow ODE with adaptive steps, each row of a batch at its own pace."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Annotated

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.samplers.noise import Noise
from scoreray.sampling.samplers.ode import Levels, Steps
from scoreray.sampling.samplers.options import Range

# Dormand & Prince 1980: nodes, stages, and the fifth-order weights less the fourth-order ones.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def rk45(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    rtol: Annotated[float, Range(1e-14, 1)] = 1e-5,
    atol: Annotated[float, Range(1e-14, 1e6)] = 1e-5,
    max_steps: Annotated[int, Range(1, 1_000_000)] = 10_000,
) -> Steps:
    """Dormand-Prince 5(4) on the probability-flow ODE; 6 calls a step of the slowest row, and 2 more.

    The sampler of Song 2021, section 4.3 (tolerances 1e-5), with the step control of Hairer, Norsett & Wanner 1993,
    II.4, in the variable ln sigma, where it needs a quarter fewer calls than in sigma and keeps its tolerance. Of the
    grid it uses the ends, sigmas[0] and the last positive one, and takes the first interval as its first step; a step
    of Euler to 0 ends it. Every row has its own steps, so that its result does not depend on its batch-mates; a row
    that is done waits, evaluated in place. Raises UserError when a row needs more than `max_steps` steps.
    """
    first_step = math.log(sigmas[0] / max(sigmas[1], sigmas[-2]))
    x = yield from integrate(x, sigmas[0], sigmas[-2], first_step, rtol, atol, max_steps)
    denoised = yield x, sigmas[-2]
    return denoised


def integrate(
    x: Tensor, begin: float, end: float, first_step: float, rtol: float, atol: float, max_steps: int
) -> Steps:
    """The probability-flow ODE from noise level `begin` to `end`, up or down; `first_step` in ln sigma, positive."""
    at = torch.full((len(x),), math.log(begin), dtype=torch.float64, device=x.device)
    finish, direction = math.log(end), math.copysign(1.0, end - begin)
    size = torch.full_like(at, first_step)
    slope = yield from _slope(x, at)
    may_grow = torch.full_like(at, 10.0)
    for _ in range(max_steps):
        active = at != finish
        if not bool(active.any()):
            return x
        size = torch.minimum(size, (finish - at).abs())
        step = direction * size
        slopes = [slope]
        for node, weights in zip(NODES, STAGES, strict=True):
            ahead = x + _rows(step, x) * _weighted(weights, slopes)
            slopes.append((yield from _slope(ahead, at + node * step)))
        scale = atol + rtol * torch.maximum(x.abs(), ahead.abs())
        error = (_rows(step, x) * _weighted(ERROR, slopes) / scale).double().square().flatten(1).mean(1).sqrt()
        accepted = active & (error <= 1)
        x = torch.where(_rows(accepted, x), ahead, x)
        slope = torch.where(_rows(accepted, x), slopes[-1], slope)
        landed = torch.where(size >= (finish - at).abs() - 1e-12, finish, at + step)
        at = torch.where(accepted, landed, at)
        size = size * torch.minimum(0.9 * error.clamp_min(1e-10).pow(-0.2), may_grow).clamp_min(0.2)
        may_grow = torch.where(accepted, 10.0, 1.0)
    if not bool((at != finish).any()):
        return x
    rows = torch.nonzero(at != finish).flatten().tolist()
    raise UserError(
        f"max_steps = {max_steps}: the adaptive solver was not done by then in rows {rows[:8]}; raise it or the "
        "tolerances, and check that the denoiser's values are finite"
    )


def _slope(x: Tensor, log_sigma: Tensor) -> Generator[tuple[Tensor, Tensor], Tensor, Tensor]:
    """dx / d ln sigma = x - D(x; sigma)."""
    denoised = yield x, log_sigma.exp()
    return x - denoised


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = slopes[0] * weights[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        total = torch.add(total, slope, alpha=weight) if weight else total
    return total


def _rows(values: Tensor, x: Tensor) -> Tensor:
    """[B] values as [B, 1, ...] in the dtype of x (booleans stay)."""
    values = values if values.dtype == torch.bool else values.to(x.dtype)
    return values.view(-1, *[1] * (x.ndim - 1))
