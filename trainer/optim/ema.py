"""Exponential moving averages of the weights: which lengths a run tracks, and each one's decay at a step.

The averages themselves are optimizer state (see `optimizer.py`). Power-function EMA: Karras 2024, "Analyzing and
Improving the Training Dynamics of Diffusion Models", section 3 and appendix C.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from pydantic import ConfigDict

from scoreray.data.errors import UserError, nearest, shortened
from scoreray.data.units import CountOrZero
from scoreray.trainer.optim.fragments import MASTER

RAW = "none"  # the name of the weights without averaging
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class EMAConfig:
    """Lengths that a run averages its weights over; each costs 4 bytes per parameter, sharded like the moments.

    `stds`: power-function lengths, each the profile's relative standard deviation (0.05 averages about the last 10 to
    15% of the run so far). `half_life_images`: plain EMA of this half-life, 0 for none.  `ramp_up`: its half-life is at
    most this share of the images seen, so that a short run is not held back by its random start.
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
        # Karras 2024, section 3.1: with this factor at step t the average weighs each past step k by k^gamma.
        decays = [(1.0 - 1.0 / step) ** (power_of_std(std) + 1.0) for std in self.stds]
        if self.half_life_images:
            half_life = min(self.half_life_images, step * batch_size * self.ramp_up)
            decays.append(0.5 ** (batch_size / max(half_life, 1e-8)))
        return decays


def name_of_std(std: float) -> str:
    """The name of a power-function length in checkpoints, records and messages: its std to three decimals."""
    return f"{std:.3f}"


def described_length(length: str) -> str:
    """As a person reads it."""
    return "without averaging" if length == RAW else f"EMA {length}"


def state_key(length: str) -> str:
    """Under which key a checkpoint stores the weights at a length."""
    return MASTER if length == RAW else f"ema_{length}"


def length_of_key(key: str) -> str | None:
    """The length whose average is stored under a checkpoint's state key; None for a key of something else."""
    return key.removeprefix("ema_") if key.startswith("ema_") else None


def lengths_stored(state_keys: Iterable[str]) -> list[str]:
    """The lengths whose averages are stored under a checkpoint's state keys."""
    return [length for key in state_keys if (length := length_of_key(key)) is not None]


def is_power_length(length: str) -> bool:
    """Whether a length's name is a number: a power function's, not a half-life's or the raw weights'."""
    return NUMBER.fullmatch(length) is not None


def length_name(text: str, stds: Iterable[float] = ()) -> str:
    """The name of a length as a user wrote it: 0.05, .05, 0.050 and 5e-2 are all "0.050"; words stay as they are.

    stds: those that a run was configured with, which may have more decimals than names show. Raises UserError for
    another number of more than three decimals: it would be taken for its neighbour.
    """
    text = text.strip()
    if not is_power_length(text):
        return text
    std = float(text)
    name = name_of_std(std)
    if abs(std - float(name)) > 1e-9 and not any(math.isclose(std, known, rel_tol=1e-6) for known in stds):
        raise UserError(f"EMA length '{shortened(text)}': lengths have three decimals; the nearest is {name}")
    return name


def choose_length(wanted: str | None, lengths: Sequence[str], where: str, stds: Iterable[float] = ()) -> str:
    """Which of `lengths` the user means; the first when None. Raises UserError naming those that `where` holds."""
    if wanted is None:
        return lengths[0]
    name = length_name(wanted, stds)
    if name not in lengths:
        known_as = f" ('{shortened(name)}')" if name != wanted and is_power_length(name) else ""
        raise UserError(f"EMA length '{shortened(wanted)}'{known_as} is not in {where}: {nearest(name, lengths)}")
    return name


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
