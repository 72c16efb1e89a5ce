"""Samplers with velocities, and samplers that accept or reject: underdamped Langevin dynamics, MALA and HMC.

The shape of a sampler is described in `ode.py`. Each works at the grid's smallest noise level, or with `anneal` at
every level on the way down to it. Lengths are in units of the level's sigma and velocities v are standard normal, so
that the dynamics of the potential -ln p_sigma are dx = sigma v dt, dv = (D - x) / sigma dt + friction and noise. In
these units the potential's curvature is at most 1, whatever the data are (it is 1 - Var[x0 | x] / sigma^2), so a
`time_step` below 2 is stable at every level, and friction 2 is critical for the fastest direction.

MALA and HMC need ln p(y) - ln p(x), and a denoiser knows the score alone. The difference is the score's integral along
the way from x to y, by Gauss-Lobatto's rule on each of its pieces: both ends, where the score is known anyway, and
`line_calls` calls of the network between them. With k of these it is exact for scores that are polynomials of degree
2 k + 1 on the way: any k is exact for Gaussian data. Elsewhere k = 0 (the trapezoidal rule) errs in the order of what
acceptance corrects, k = 1 (Simpson's) two orders below. A score that is no gradient has no such difference; an energy's
score is one, and needs no other way.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Annotated

import torch
from torch import Tensor

from scoreray.sampling.samplers.langevin import COUNT, STEP_SIZE, relative_step
from scoreray.sampling.samplers.noise import Noise, acceptance_of
from scoreray.sampling.samplers.ode import Levels, Steps, Yielded, heun
from scoreray.sampling.samplers.options import Range

TIME_STEP = Range(1e-3, 2)
LINE_CALLS = Range(0, 3)
ANNEALED_STEPS = 5  # at each level, where num_steps is left out

# Gauss-Lobatto on [0, 1] with 0 to 3 inner nodes: (inner nodes, weight of either end, weights of the inner ones).
LOBATTO: tuple[tuple[tuple[float, ...], float, tuple[float, ...]], ...] = (
    ((), 1 / 2, ()),
    ((0.5,), 1 / 6, (2 / 3,)),
    ((0.5 - 0.5 / math.sqrt(5), 0.5 + 0.5 / math.sqrt(5)), 1 / 12, (5 / 12, 5 / 12)),
    ((0.5 - 0.5 * math.sqrt(3 / 7), 0.5, 0.5 + 0.5 * math.sqrt(3 / 7)), 1 / 20, (49 / 180, 16 / 45, 49 / 180)),
)

Asking = Generator[Yielded, Tensor, tuple[Tensor, Tensor]]
"""A part of a sampler that yields as all do, and ends in two tensors."""


def baoab(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    time_step: Annotated[float, TIME_STEP] = 1.0,
    friction: Annotated[float, Range(0, 1e6)] = 1.0,
    num_steps: Annotated[int | None, COUNT] = None,
    anneal: bool = False,
    denoise: bool = False,
    warm_start: bool = False,
) -> Steps:
    """Underdamped Langevin, dv = (D - x) / sigma dt - friction v dt + sqrt(2 friction) dw; num_steps + 1 calls a level.

    Leimkuhler & Matthews 2013: half a kick (B), half a drift (A), the friction and noise of the whole step, exactly
    (O), A, B. Its positions are exact for Gaussian data at any `time_step` below 2; elsewhere their error is of order
    2. `num_steps`, `denoise` (no more calls here) and `warm_start` as of `langevin`; with `anneal`, num_steps (5) at
    every level, from noise at sigmas[0].
    """
    half, keep = time_step / 2, math.exp(-friction * time_step)
    spread = math.sqrt(-math.expm1(-2 * friction * time_step))
    x, v = yield from _begin(x, sigmas, noise, anneal, warm_start)
    denoised = x
    for sigma in _levels(sigmas, anneal):
        denoised = yield x, sigma
        for _ in range(_steps(sigmas, anneal, num_steps)):
            v = v.add(denoised - x, alpha=half / sigma)
            x = x.add(v, alpha=half * sigma)
            v = v.mul(keep).add_(noise.like(x), alpha=spread)
            x = x.add(v, alpha=half * sigma)
            denoised = yield x, sigma
            v = v.add(denoised - x, alpha=half / sigma)
    return denoised if denoise else x


def cld(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    time_step: Annotated[float, TIME_STEP] = 0.5,
    num_steps: Annotated[int | None, COUNT] = None,
    anneal: bool = False,
    denoise: bool = False,
    warm_start: bool = False,
) -> Steps:
    """Critically damped Langevin: dv = (D - x) / sigma dt - 2 v dt + 2 dw; num_steps calls a level, 1 more to denoise.

    The dynamics of Dockhorn 2022 as a sampler of p_sigma. Their diffusion, run backward, needs the score of x and v
    together, which a denoiser of x alone was not trained for. Run forward, with the force of the level's own score, it
    needs that score alone and leaves p_sigma as it is. A step is the paper's symmetric splitting: half of the linear
    part, an oscillator at critical damping about a centre c with its noise, exactly; the rest of the force, D - c; half
    of the linear part. c is the step before's D, so that a step is exact where D does not change; else its order is 2.
    Options as of `baoab`.
    """
    x, v = yield from _begin(x, sigmas, noise, anneal, warm_start)
    flow, centre = _Oscillator(time_step / 2), x
    for sigma in _levels(sigmas, anneal):
        for _ in range(_steps(sigmas, anneal, num_steps)):
            x, v = flow(x, v, centre, sigma, noise)
            denoised = yield x, sigma
            v = v.add(denoised - centre, alpha=time_step / sigma)
            x, v = flow(x, v, centre, sigma, noise)
            centre = denoised
    if denoise:
        x = yield x, sigmas[-2]
    return x


def mala(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    step_size: Annotated[float | None, STEP_SIZE] = None,
    line_calls: Annotated[int, LINE_CALLS] = 1,
    num_steps: Annotated[int | None, COUNT] = None,
    anneal: bool = False,
    denoise: bool = False,
    warm_start: bool = False,
) -> Steps:
    """Metropolis-adjusted Langevin: `langevin`'s step as a proposal; num_steps (1 + line_calls) + 1 calls a level.

    Roberts & Tweedie 1996. `step_size` is eps at the smallest level, in proportion to sigma^2 at others; by default
    sigma^2 d^(-1/3) for d dimensions, as Roberts & Rosenthal 1998 scale it. Each row accepts by its own numbers. The
    step is HMC's with one leapfrog of time step sqrt(2 eps) / sigma. Other options as of `baoab`.
    """
    relative = x[0].numel() ** (-1 / 3) if step_size is None else relative_step("step_size", step_size, sigmas[-2])
    x, _ = yield from _begin(x, sigmas, noise, anneal, warm_start, draw=False)
    x, denoised = yield from _metropolis(
        x, _levels(sigmas, anneal), noise, _steps(sigmas, anneal, num_steps), math.sqrt(2 * relative), 1, line_calls
    )
    return denoised if denoise else x


def hmc(
    x: Tensor,
    sigmas: Levels,
    noise: Noise,
    *,
    time_step: Annotated[float | None, TIME_STEP] = None,
    num_leapfrogs: Annotated[int, Range(1, 100_000)] = 5,
    line_calls: Annotated[int, LINE_CALLS] = 1,
    num_steps: Annotated[int | None, COUNT] = None,
    anneal: bool = False,
    denoise: bool = False,
    warm_start: bool = False,
) -> Steps:
    """Hamiltonian Monte Carlo; num_steps num_leapfrogs (1 + line_calls) + 1 calls a level.

    Duane 1987; Neal 2011, fig. 2: fresh velocities, `num_leapfrogs` leapfrogs, and the end is accepted with the
    probability min(1, exp(-change of energy)), by each row's own numbers. `time_step` is 1.3 d^(-1/4) by default, as
    Beskos 2013 scales it for d dimensions. Other options as of `baoab`.
    """
    h = 1.3 * x[0].numel() ** (-1 / 4) if time_step is None else time_step
    x, _ = yield from _begin(x, sigmas, noise, anneal, warm_start, draw=False)
    x, denoised = yield from _metropolis(
        x, _levels(sigmas, anneal), noise, _steps(sigmas, anneal, num_steps), h, num_leapfrogs, line_calls
    )
    return denoised if denoise else x


def _begin(x: Tensor, sigmas: Levels, noise: Noise, anneal: bool, warm_start: bool, draw: bool = True) -> Asking:
    """(where the chain starts, its velocity)."""
    if warm_start and not anneal:
        x = yield from heun(x, sigmas[:-1], noise)
    return x, noise.like(x) if draw else x


def _levels(sigmas: Levels, anneal: bool) -> Levels:
    return sigmas[:-1] if anneal else sigmas[-2:-1]


def _steps(sigmas: Levels, anneal: bool, num_steps: int | None) -> int:
    """At each level."""
    if num_steps is not None:
        return num_steps
    return ANNEALED_STEPS if anneal else len(sigmas) - 1


class _Oscillator:
    """dx = sigma v dt, dv = (c - x) / sigma dt - 2 v dt + 2 dw over the time t, exactly: its mean is exp(A t) of where
    it was, A = [[0, 1], [-1, -2]], and its covariance 1 - exp(A t) exp(A t)^T."""

    def __init__(self, t: float) -> None:
        decay, square = math.exp(-t), math.exp(-2 * t)
        self.xx, self.xv, self.vx, self.vv = decay * (1 + t), decay * t, -decay * t, decay * (1 - t)
        # Cholesky's factor of the covariance. The first is near 4 t^3 / 3: a t of 5e-4, the least, keeps six digits.
        self.root = math.sqrt(1 - square * (1 + 2 * t + 2 * t**2))
        self.cross = square * 2 * t**2 / self.root
        self.rest = math.sqrt(1 - square * (1 - 2 * t + 2 * t**2) - self.cross**2)

    def __call__(self, x: Tensor, v: Tensor, centre: Tensor, sigma: float, noise: Noise) -> tuple[Tensor, Tensor]:
        away, first = x - centre, noise.like(x)
        ahead = torch.add(centre, away, alpha=self.xx).add_(v, alpha=self.xv * sigma)
        ahead.add_(first, alpha=self.root * sigma)
        v = v.mul(self.vv).add_(away, alpha=self.vx / sigma).add_(first, alpha=self.cross)
        return ahead, v.add_(noise.like(x), alpha=self.rest)


def _metropolis(
    x: Tensor, levels: Sequence[float], noise: Noise, num_steps: int, h: float, num_leapfrogs: int, line_calls: int
) -> Asking:
    """(state, its denoised batch) after `num_steps` proposals at each level, each of `num_leapfrogs` leapfrogs.

    With pull = D - x, sigma^2 times the score, and line integrals by the trapezoidal rule, a leapfrog changes the
    energy by exactly h^2 / 8 (|pull'|^2 - |pull|^2) / sigma^2, and the sum of these is the ends' difference. What the
    line integrals differ from the trapezoidal rule's is added to it.
    """
    acceptance = acceptance_of(noise)
    pull = x
    for sigma in levels:
        pull = (yield x, sigma) - x
        for _ in range(num_steps):
            # One draw, velocities and the number that decides, so that all have one shape and are drawn ahead.
            drawn = noise.like(x.new_empty(len(x), x[0].numel() + 1))
            v, y, ahead_pull = drawn[:, :-1].reshape(x.shape), x, pull
            work = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            for _ in range(num_leapfrogs):
                v = v.add(ahead_pull, alpha=h / (2 * sigma))
                before, pull_before, y = y, ahead_pull, y.add(v, alpha=h * sigma)
                ahead_pull, mean = yield from _line(before, pull_before, y, sigma, line_calls)
                work += _dot(y - before, mean - (pull_before + ahead_pull) / 2)
                v = v.add(ahead_pull, alpha=h / (2 * sigma))
            shadow = h**2 / 8 * (_dot(pull, pull) - _dot(ahead_pull, ahead_pull))
            accepted = acceptance.decide((work + shadow) / sigma**2, drawn[:, -1]).view(-1, *[1] * (x.ndim - 1))
            x, pull = torch.where(accepted, y, x), torch.where(accepted, ahead_pull, pull)
    # A proposal that is not finite is rejected; a network that gives NaN for the state itself must not pass for one.
    return x.add(pull, alpha=0), x + pull


def _line(x: Tensor, pull: Tensor, y: Tensor, sigma: float, line_calls: int) -> Asking:
    """(pull at y, mean of pull over the line from x to y)."""
    nodes, end, weights = LOBATTO[line_calls]
    mean = pull * end
    for node, weight in zip(nodes, weights, strict=True):
        between = torch.lerp(x, y, node)
        mean = mean.add((yield between, sigma) - between, alpha=weight)
    ahead_pull = (yield y, sigma) - y
    return ahead_pull, mean.add(ahead_pull, alpha=end)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[B], in float64: of a picture's thousands of terms the sum's rounding would be of the size of a decision."""
    return (a.double() * b.double()).reshape(len(a), -1).sum(1)
