"""Exponential moving averages of the weights: which lengths a run tracks, and each one's decay at a step.

The averages themselves are optimizer state (see `optimizer.py`). Power-function EMA: Karras 2024, "Analyzing and
Improving the Training Dynamics of Diffusion Models", section 3 and appendix C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from pydantic import ConfigDict

from scoreray.data.errors import UserError, nearest
from scoreray.trainer.units import CountOrZero


@dataclass(frozen=True)
class EMAConfig:
    """Lengths that a run averages its weights over; each costs 4 bytes per parameter, sharded like the moments.

    `stds`: power-function lengths, each the profile's relative standard deviation (0.05 averages about the last 10 to
    15% of the run so far). `half_life_images`: plain EMA, 0 for none; its half-life is at most `ramp_up` of the images
    seen, so that a short run is not held back by its random start.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    stds: tuple[float, ...] = (0.05, 0.10)
    half_life_images: CountOrZero = 0
    ramp_up: float = 0.05

    def __post_init__(self) -> None:
        for std in self.stds:
            if not 0.005 <= std <= 0.28:
                raise UserError(f"ema.stds: {std} is outside [0.005, 0.28], where a power-function profile exists")
        if len(set(map(name_of_std, self.stds))) != len(self.stds):
            raise UserError(f"ema.stds: {list(self.stds)} names a length twice")
        if not 0 < self.ramp_up <= 1:
            raise UserError(f"ema.ramp_up: {self.ramp_up} must be in (0, 1]")
        if not self.stds and not self.half_life_images:
            raise UserError("ema: no length is tracked; give stds or half_life_images")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tracked lengths, as checkpoints and `--ema` use them; the first is the default."""
        plain = ("half-life",) if self.half_life_images else ()
        return tuple(name_of_std(std) for std in self.stds) + plain

    def decays(self, step: int, batch_size: int) -> list[float]:
        """Factor of the old average at optimizer step `step` (counted from 1), for each of `names`.

        Step 1 has factor 0 under a power function: the average starts as the first step's weights.
        """
        decays = [(1.0 - 1.0 / step) ** (power_of_std(std) + 1.0) for std in self.stds]
        if self.half_life_images:
            half_life = min(self.half_life_images, step * batch_size * self.ramp_up)
            decays.append(0.5 ** (batch_size / max(half_life, 1e-8)))
        return decays

    def choose(self, name: str | None) -> str:
        """The tracked length called `name` (a name or a number such as 0.1), the first when None."""
        if name is None:
            return self.names[0]
        try:
            wanted = name_of_std(float(name))
        except ValueError:
            wanted = name
        if wanted not in self.names:
            raise UserError(f"EMA length '{name}' was not tracked by this run; {nearest(wanted, self.names)}")
        return wanted


def name_of_std(std: float) -> str:
    return f"{std:.3f}"


@lru_cache
def power_of_std(std: float) -> float:
    """gamma of the power function t^gamma whose averaging profile has relative standard deviation `std`.

    Inverse of `std_of_power`: the largest real root of std^-2 (gamma + 1) = (gamma + 2)^2 (gamma + 3)
    (Karras 2024, eq. 126); 0.05 gives 16.97, 0.10 gives 6.94.
    """
    low, high = 0.0, 1.0
    while std_of_power(high) > std:
        high *= 2.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if std_of_power(middle) > std else (low, middle)
    return 0.5 * (low + high)


def std_of_power(gamma: float) -> float:
    """Relative standard deviation of the profile of a power-function EMA (Karras 2024, eq. 123)."""
    return math.sqrt((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0)))
