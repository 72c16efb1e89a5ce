"""Checks of values that people write: every message names the value, the constraint and the fix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from scoreray.data.errors import UserError, nearest

T = TypeVar("T")

LARGEST = 1e18
NOISE_LEVELS = (1e-9, 1e9)  # the square of any ratio of two of them is below the largest number of float32, 3.4e38


def choose(what: str, name: str, accepted: Mapping[str, T]) -> T:
    """What `name` stands for in `accepted`. Raises UserError with the nearest name when it stands for nothing."""
    if name not in accepted:
        raise UserError(f"{what} '{name}' is unknown: {nearest(str(name), accepted)}")
    return accepted[name]


def positive(owner: str, **values: float) -> None:
    """Raises UserError unless every value is a number above 0 whose square float32 holds."""
    for name, value in values.items():
        if not 0 < value <= LARGEST:  # NaN is not
            beyond = LARGEST < value < math.inf
            accepted = f"a number above 0, at most {LARGEST:g}" if beyond else "a finite number above 0"
            raise UserError(f"{owner}.{name} is {value}: give {accepted}")


def at_least(owner: str, smallest: int, **values: int) -> None:
    """Raises UserError unless every value is `smallest` or more."""
    for name, value in values.items():
        if value < smallest:
            raise UserError(f"{owner}.{name} is {value}: give {smallest} or more")


def ordered(owner: str, low: str, high: str, low_value: float, high_value: float) -> None:
    """Raises UserError unless the value called `low` is below the one called `high`."""
    if not low_value < high_value:
        raise UserError(f"{owner}.{low} is {low_value} and {high} is {high_value}: {low} must be below {high}")


def fraction(owner: str, **values: float) -> None:
    """Raises UserError unless every value is in [0, 1]."""
    between(owner, 0, 1, **values)


def noise_level(owner: str, **values: float) -> None:
    """Raises UserError unless every value is a noise level, or a standard deviation of data, that float32 allows."""
    positive(owner, **values)
    between(owner, *NOISE_LEVELS, **values)


def between(owner: str, low: float, high: float, **values: float) -> None:
    """Raises UserError unless every value is in [low, high]."""
    for name, value in values.items():
        if not low <= value <= high:  # NaN does not
            raise UserError(f"{owner}.{name} is {value}: give a number between {low:g} and {high:g}")
