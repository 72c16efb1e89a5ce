"""Which axis of an array of four is the channels': [N, C, H, W] or [N, H, W, C]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from scoreray.data.errors import UserError

Layout = Literal["NCHW", "NHWC"]
MOST_COLOURS = 4  # grey, grey and alpha, RGB, RGBA: an axis so short that it can hardly be a height or width


def layout_of(shape: Sequence[int]) -> Layout | None:
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


def checked_layout(name: str, shape: Sequence[int], given: Layout | None) -> Layout:
    """`given`, or what `layout_of` finds. Raises UserError, which begins with `name`, where the shape fits both."""
    found = given or layout_of(shape)
    if found is None:
        raise UserError(
            f"{name}: samples of shape {tuple(shape)} may be [C, H, W] or [H, W, C]; say which: --layout NCHW or NHWC"
        )
    return found
