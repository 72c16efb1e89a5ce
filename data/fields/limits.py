"""Limits of a data set's samples, checked before anything is allocated: axes, values, classes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scoreray.data.errors import UserError
from scoreray.data.fields.field import MAX_CLASSES

MAX_AXES, MAX_AXIS = 6, 1 << 20  # of a sample's shape
MAX_VALUES = 1 << 28  # of one sample


def check_shape(name: str, shape: Sequence[int]) -> None:
    """Raises UserError where no sample can have this shape."""
    axes, shown = len(shape), " x ".join(map(str, shape))
    if not 1 <= axes <= MAX_AXES:
        raise UserError(f"{name}: samples of {axes} axes ({shown}); 1 to {MAX_AXES} are accepted: reshape them")
    if not all(1 <= length <= MAX_AXIS for length in shape):
        raise UserError(
            f"{name}: samples of {shown}; each axis may have 1 to {MAX_AXIS:,} entries: reshape or cut them"
        )
    if math.prod(shape) > MAX_VALUES:
        raise UserError(
            f"{name}: samples of {math.prod(shape):,} values ({shown}), the limit is {MAX_VALUES:,}: cut them"
        )


def is_picture(shape: Sequence[int]) -> bool:
    """Whether samples of a shape are pictures: [C, H, W] with one channel or three."""
    return len(shape) == 3 and shape[0] in (1, 3)


def check_label(label: int, name: str) -> None:
    """Raises UserError where a class has a number that no data set can have: each below it takes a name."""
    if label >= MAX_CLASSES:
        raise UserError(
            f"{name}: class {label}, the limit is {MAX_CLASSES - 1}; number the classes from 0 without gaps"
        )
