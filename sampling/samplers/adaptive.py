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


SAFETY = 0.25  # of the tolerance, which the error of a step is held to
FIRST_STEP = 0.25  # radians, of at most pi / 2


def rk45(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    rtol: Annotated[float, Range(1e-14, 1)] = 1e-5,
    atol: Annotated[float, Range(1e-14, 1e6)] = 1e-5,
    max_steps: Annotated[int, Range(1, 1_000_000)] = 10_000,
    sigma_data: Annotated[float, Range(1e-6, 1e6)] = 0.5,
) -> Steps:
    """Dormand-Prince 5(4) on the probability-flow ODE; 6 calls a step of the slowest row, and 2 more.

    The sampler of Song 2021, section 4.3 (tolerances 1e-5), with the step control of Hairer, Norsett & Wanner 1993,
    II.4, in coordinates where Gaussian data of standard deviation `sigma_data` stand still (`integrate`). Of the grid
    it uses the ends, sigmas[0] and the last positive one; a step of Euler to 0 ends it. Every row has its own steps, so
    that its result does not depend on its batch-mates; a row that is done waits, evaluated in place. Raises UserError
    when a row needs more than `max_steps` steps.
    """
    x = yield from integrate(x, sigmas[0], sigmas[-2], sigma_data, rtol, atol, max_steps)
    denoised = yield x, sigmas[-2]
    return denoised


def integrate(
    x: Tensor, begin: float, end: float, sigma_data: float, rtol: float, atol: float, max_steps: int, power: int = 2
) -> Steps:
    """The probability-flow ODE from noise level `begin` to `end`, up or down.

    The state is z = c x with c = sigma_data / sqrt(sigma^2 + sigma_data^2), which stands still for Gaussian data of
    that spread about 0; dz is -F of EDM along the way. Time is the angle t with tan^power t = sigma / sigma_data. Exact
    mixtures take the fewest steps at power 1, where a mean goes along a sine; trained networks, which are even in
    ln sigma, are met in time at 2. A step's error is held to c times a quarter of the tolerance, atol + rtol |z|, as an
    error of z at a large sigma is one of 1 / c in x, which may decide where a sample ends. For the error of steps in ln
    sigma a mixture takes half the calls; a trained U-Net takes as many, and errs by what its tolerance says, where at
    1e-3 steps in ln sigma erred by 40 times it (benchmarks/RESULTS.md).
    """
    at = torch.full((len(x),), _time(begin / sigma_data, power), dtype=torch.float64, device=x.device)
    finish, direction = _time(end / sigma_data, power), math.copysign(1.0, end - begin)
    z = x * math.cos(math.atan(begin / sigma_data))
    size = torch.full_like(at, FIRST_STEP)
    slope = yield from _slope(z, at, sigma_data, power)
    may_grow = torch.full_like(at, 10.0)
    for _ in range(max_steps):
        active = at != finish
        if not bool(active.any()):
            return z / math.cos(math.atan(end / sigma_data))
        size = torch.minimum(size, (finish - at).abs())
        step = direction * size
        slopes = [slope]
        for node, weights in zip(NODES, STAGES, strict=True):
            ahead = z + _rows(step, z) * _weighted(weights, slopes)
            slopes.append((yield from _slope(ahead, at + node * step, sigma_data, power)))
        held_to = SAFETY * _cosine(torch.maximum(at, at + step), power)
        scale = _rows(held_to, z) * (atol + rtol * torch.maximum(z.abs(), ahead.abs()))
        error = (_rows(step, z) * _weighted(ERROR, slopes) / scale).double().square().flatten(1).mean(1).sqrt()
        accepted = active & (error <= 1)
        z = torch.where(_rows(accepted, z), ahead, z)
        slope = torch.where(_rows(accepted, z), slopes[-1], slope)
        landed = torch.where(size >= (finish - at).abs() * (1 - 1e-12), finish, at + step)
        at = torch.where(accepted, landed, at)
        size = size * torch.minimum(0.9 * error.clamp_min(1e-10).pow(-0.2), may_grow).clamp_min(0.2)
        may_grow = torch.where(accepted, 10.0, 1.0)
    if not bool((at != finish).any()):
        return z / math.cos(math.atan(end / sigma_data))
    rows = torch.nonzero(at != finish).flatten().tolist()
    raise UserError(
        f"max_steps = {max_steps}: the adaptive solver was not done by then in rows {rows[:8]}; raise it or the "
        "tolerances, and check that the denoiser's values are finite"
    )


def _time(ratio: float, power: int) -> float:
    """The time of sigma / sigma_data."""
    return math.atan(ratio ** (1 / power))


def _cosine(time: Tensor, power: int) -> Tensor:
    """c = 1 / sqrt(1 + (sigma / sigma_data)^2)."""
    return (1 + time.tan() ** (2 * power)).rsqrt()


def _slope(z: Tensor, time: Tensor, sigma_data: float, power: int) -> Generator[tuple[Tensor, Tensor], Tensor, Tensor]:
    """dz/dt at times [B] float64."""
    tangent, cosine = time.tan(), _rows(_cosine(time, power), z)
    denoised = yield z / cosine, sigma_data * tangent**power
    return (z * cosine - denoised) * cosine * _rows(power * (1 + tangent**2) / tangent, z)


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = slopes[0] * weights[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        total = torch.add(total, slope, alpha=weight) if weight else total
    return total


def _rows(values: Tensor, x: Tensor) -> Tensor:
    """[B] values as [B, 1, ...] in the dtype of x (booleans stay)."""
    values = values if values.dtype == torch.bool else values.to(x.dtype)
    return values.view(-1, *[1] * (x.ndim - 1))
