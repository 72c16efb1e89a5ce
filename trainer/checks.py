"""Checks of values that people write: every message names the value, the constraint and the mend."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from scoreray.data.errors import UserError, nearest

T = TypeVar("T")


def choose(what: str, name: str, accepted: Mapping[str, T]) -> T:
    """What `name` stands for in `accepted`. Raises UserError with the nearest name when it stands for nothing."""
    if name not in accepted:
        raise UserError(f"{what} '{name}' is unknown: {nearest(str(name), accepted)}")
    return accepted[name]


def positive(owner: str, **values: float) -> None:
    """Raises UserError unless every value is a finite number above 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{owner}.{name} is {value}: give a finite number above 0")


def finite(owner: str, **values: float) -> None:
    """Raises UserError unless every value is a finite number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{owner}.{name} is {value}: give a finite number")


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
    """Raises UserError unless every value lies in [0, 1]."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{owner}.{name} is {value}: give a number between 0 and 1")
