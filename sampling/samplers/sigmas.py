"""Noise grids: the decreasing noise levels that a sampler walks down.

Every grid is a float64 CPU tensor [n + 1], strictly descending, whose last entry is 0; a sampler makes n steps on it.
A last step goes from the smallest positive level to 0.
Grids know nothing of samplers: any grid goes with any sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from scoreray.data.errors import UserError, nearest, shortened
from scoreray.trainer.diffusion.process import GaussianProcess
from scoreray.trainer.objectives.progressive import interior_levels

MAX_STEPS = 1_000_000
LOWEST, HIGHEST = 1e-9, 1e9  # of a caller's own levels: float32 holds their squares

Grid = str | Sequence[float]
"""How a caller names noise levels: a word of GRIDS, or the levels themselves, descending (`parse_grid`)."""


def karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Levels evenly spaced in sigma^(1/rho): more of them where sigma is small (Karras 2022, eq. 5).

    rho 1 is a linear grid, a large rho comes near the geometric one. Returns float64 [n + 1]; raises UserError.
    """
    _check(n, sigma_min, sigma_max)
    if not (math.isfinite(rho) and rho > 0):
        raise UserError(f"rho = {rho}: must be a positive number (7 in Karras 2022)")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _finish((high + _ramp(n) * (low - high)) ** rho, sigma_min, sigma_max)


def geometric(n: int, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Tensor:
    """Levels of constant ratio: the ladder of NCSN and of the VE process, uniform in log sigma (Song & Ermon 2019, 4).

    Returns float64 [n + 1]; raises UserError.
    """
    _check(n, sigma_min, sigma_max)
    low, high = math.log(sigma_min), math.log(sigma_max)
    return _finish(torch.exp(high + _ramp(n) * (low - high)), sigma_min, sigma_max)


def linear(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Levels evenly spaced in sigma. Returns float64 [n + 1]; raises UserError."""
    _check(n, sigma_min, sigma_max)
    return _finish(sigma_max + _ramp(n) * (sigma_min - sigma_max), sigma_min, sigma_max)


def interior(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    """Karras' n + 1 levels without the smallest: for models of few steps, every call of which reaches noise level 0.

    One step goes from sigma_max straight to 0, two by way of a level between the ends (2.5 for 0.002 and 80).
    Returns float64 [n + 1]; raises UserError.
    """
    _check(n, sigma_min, sigma_max)
    return as_grid(interior_levels(n, sigma_min, sigma_max))


def from_process(process: GaussianProcess, n: int, *, t_min: float | None = None, t_max: float | None = None) -> Tensor:
    """Noise-to-signal ratios of a process at n times evenly spaced from `t_max` down to `t_min`.

    What a sampler of Song 2021 does that steps uniformly in t; by default between the process's ends for sampling.
    Returns float64 [n + 1]; raises UserError.
    """
    _check_count(n)
    last = process.sampling_t_min if t_min is None else t_min
    first = process.t_max if t_max is None else t_max
    if not process.t_min <= last < first <= process.t_max:
        raise UserError(
            f"t_min = {last}, t_max = {first}: must be {process.t_min:g} <= t_min < t_max <= {process.t_max:g}, "
            f"the range of process {process}"
        )
    levels = process.noise_to_signal(first + _ramp(n) * (last - first))
    return as_grid(torch.cat([levels, levels.new_zeros(1)]))


GRIDS: dict[str, Callable[..., Tensor]] = {
    "karras": karras,
    "geometric": geometric,
    "linear": linear,
    "interior": interior,
}
"""Grids by name, each `(n, sigma_min, sigma_max) -> [n + 1]`; a process's own grid is `from_process`."""


def grid(given: Grid, n: int, sigma_min: float, sigma_max: float) -> Tensor:
    """The grid of `n` steps of this name in GRIDS; of levels, these, whatever their number. Raises UserError, naming
    the nearest, on an unknown name."""
    found = parse_grid(given)
    if not isinstance(found, str):
        return as_grid([*found, 0.0])
    if found not in GRIDS:
        raise UserError(f"unknown noise grid '{found}': {nearest(found, GRIDS)}")
    return GRIDS[found](n, sigma_min, sigma_max)


def parse_grid(given: Grid) -> str | tuple[float, ...]:
    """A grid as a command line, JSON or a config gives it: `80,0.8` and [80, 0.8] are levels, without the 0 that ends
    every grid (they may have it too); any other text is a name, which is for the caller to know. Raises UserError."""
    if isinstance(given, str):
        words = given.split(",")
        try:
            given = [float(word) for word in words]
        except ValueError:
            if len(words) == 1:
                return words[0]
            raise UserError(f"grid {shortened(','.join(words))}: write a name, or noise levels as 80,0.8") from None
    numbers = [level for level in given if isinstance(level, int | float) and not isinstance(level, bool)]
    if not given or len(numbers) != len(given):
        raise UserError(f"grid {shortened(str(list(given)))}: must be noise levels, such as [80, 0.8]")
    if len(numbers) > 1 and numbers[-1] == 0:
        numbers = numbers[:-1]
    if wrong := [level for level in numbers if not LOWEST <= level <= HIGHEST]:
        shown = f"{shortened(grid_text(given))}: noise level {shortened(str(wrong[0]))}"
        raise UserError(f"grid {shown} must be from {LOWEST:g} to {HIGHEST:g}")
    if rising := [pair for pair in pairwise(numbers) if pair[0] <= pair[1]]:
        shown = f"{shortened(grid_text(given))}: {rising[0][0]:g} is followed by {rising[0][1]:g}"
        raise UserError(f"grid {shown}, but noise levels must descend")
    return tuple(map(float, numbers))


def grid_text(given: Grid) -> str:
    """A grid as a command line takes it."""
    return given if isinstance(given, str) else ",".join(map(str, given))


def as_grid(sigmas: Tensor | Sequence[float]) -> Tensor:
    """A caller's own levels as a float64 CPU grid [n + 1]; raises UserError unless they descend strictly to 0."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").detach()
    if levels.ndim != 1 or len(levels) < 2:
        raise UserError(f"sigmas of shape {list(levels.shape)}: must be one-dimensional, at least two entries (n + 1)")
    if not bool(torch.isfinite(levels).all()):
        raise UserError(f"sigmas hold {levels[~torch.isfinite(levels)][0].item()}: every noise level must be finite")
    if levels[-1] != 0:
        raise UserError(f"sigmas end in {levels[-1].item():g}: must end in 0; append a 0")
    if not bool((levels[:-1] > 0).all()):
        raise UserError(f"sigmas hold {levels[:-1].min().item():g} before the end: every noise level must be positive")
    rising = torch.nonzero(levels[1:] >= levels[:-1])
    if len(rising):
        at = int(rising[0])
        raise UserError(
            f"sigmas[{at}] = {levels[at].item():g} is followed by {levels[at + 1].item():g}: "
            "a grid must descend strictly, from the largest noise level to 0"
        )
    return levels


def _ramp(n: int) -> Tensor:
    return torch.linspace(0, 1, n, dtype=torch.float64)


def _finish(levels: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Puts the exact ends in (powers and exponentials round) and appends 0."""
    if len(levels) > 1:
        levels[-1] = sigma_min
    levels[0] = sigma_max
    return as_grid(torch.cat([levels, levels.new_zeros(1)]))


def _check_count(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_STEPS:
        raise UserError(f"n = {n!r}: the number of steps must be an integer in [1, {MAX_STEPS:,}]")


def _check(n: int, sigma_min: float, sigma_max: float) -> None:
    _check_count(n)
    if not (math.isfinite(sigma_min) and math.isfinite(sigma_max) and 0 < sigma_min < sigma_max):
        raise UserError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}: must be 0 < sigma_min < sigma_max, finite")
