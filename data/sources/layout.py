"""Which axes of an array are the samples', the channels' and a grid's: `--layout`, or what an array's shape says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from scoreray.data.errors import UserError

Layout = Literal["NC", "NT", "NCT", "NTC", "NHW", "NCHW", "NHWC", "NDHW", "NCDHW", "NDHWC"]
"""A letter an axis: N the samples, C the channels, others a grid. Without C samples get one channel."""
MOST_COLOURS = 4  # grey, grey and alpha, RGB, RGBA: an axis so short that it can hardly be a height or width


def layout_of(shape: Sequence[int]) -> Literal["NCHW", "NHWC"] | None:
    """The layout of samples of this shape (three axes, without N); None where it could be either.

    [C, H, W] if the first axis has 1 to 4 entries or the last two are equal; else [H, W, C] if the last has 1 to 4 or
    the first two are equal and longer; else [C, H, W] if the first is the shortest. 64 x 48 x 5 may be either.
    """
    first, middle, last = shape
    if first <= MOST_COLOURS or middle == last:
        return "NCHW"
    if last <= MOST_COLOURS or first == middle > last:
        return "NHWC"
    return "NCHW" if first < min(middle, last) else None


def is_given(layout: Layout | None, axes: int) -> bool:
    """Whether `--layout` is of samples of so many axes, N not counted."""
    return layout is not None and len(layout) == axes + 1


def order_of(name: str, shape: Sequence[int], given: Layout | None) -> Layout | None:
    """The layout of samples of this shape: `given` where it has as many axes; else what `layout_of` finds of three,
    and None of other numbers of axes, whose first is the channels'. Raises UserError, which begins with `name`, where
    the shape fits several."""
    if is_given(given, len(shape)):
        return given
    if len(shape) != 3:
        return None
    found = layout_of(shape)
    if found is None:
        raise UserError(
            f"{name}: samples of shape {tuple(shape)} may be [C, H, W] or [H, W, C]; say which: --layout NCHW or NHWC"
        )
    return found


def is_of(layout: Layout, shape: Sequence[int]) -> bool:
    """Whether samples [C, ...] of this shape may come of arrays of the layout."""
    return len(shape) == len(layout.replace("C", ""))  # C for N


def has_channels_first(layout: Layout | None) -> bool:
    """Whether arrays of this layout have their channels first already."""
    return layout is None or layout[1] == "C"


def channels_first(arrays: np.ndarray, layout: Layout | None) -> np.ndarray:
    """A view of arrays [N, ...] as [N, C, ...]."""
    if has_channels_first(layout):
        return arrays
    return np.moveaxis(arrays, -1, 1) if _has_channels_last(layout) else arrays[:, None]


def turned(shape: tuple[int, ...], layout: Layout | None) -> tuple[int, ...]:
    """The shape of a sample of `channels_first`."""
    if has_channels_first(layout):
        return shape
    return (shape[-1], *shape[:-1]) if _has_channels_last(layout) else (1, *shape)


def _has_channels_last(layout: Layout | None) -> bool:
    return layout is not None and layout.endswith("C")
