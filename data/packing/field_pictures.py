"""Arrays of any dimensions as pictures: grids by a colour map, signals as curves, volumes by their middle slice."""

from __future__ import annotations

import numpy as np
import torch

CURVE_HEIGHT, CURVE_WIDTH = 48, 256  # of one channel's curve; longer signals are drawn by the range in each column
PAPER, INK, MIDDLE = (250, 250, 250), (31, 73, 125), (205, 205, 205)


def field_pictures(values: torch.Tensor | np.ndarray) -> np.ndarray:
    """Arrays [N, C, *grid] of any units as uint8 [N, 3, H, W]: a channel's mean over all N is white, its least value
    blue and its greatest red (matplotlib's RdBu), on a scale that is the same to both sides; what is not finite is
    white. Channels stand side by side. Of a volume the middle slice is shown; a signal [N, C, L] is a curve for each
    channel, one above the other.

    Raises ValueError for arrays without a grid.
    """
    import matplotlib  # half a second, which pictures need not wait for

    array = np.asarray(values.detach().cpu().double() if isinstance(values, torch.Tensor) else values, np.float64)
    if array.ndim < 3 or not array.size:
        raise ValueError(f"arrays of shape {array.shape}: [N, C, ...] with a grid is needed")
    while array.ndim > 4:
        array = array[:, :, array.shape[2] // 2]
    n, axes = len(array), (0, *range(2, array.ndim))
    finite = np.isfinite(array)
    middle = np.mean(array, axes, keepdims=True, where=finite) if finite.any() else np.zeros(1)
    apart = np.where(finite, array - np.nan_to_num(middle), 0)
    largest = np.abs(apart).max(axes, keepdims=True)
    shares = 0.5 + apart / np.where(largest > 0, 2 * largest, 1)
    if array.ndim == 3:
        return np.stack([np.concatenate([_curve(one) for one in sample]) for sample in shares]).transpose(0, 3, 1, 2)
    table = np.rint(255 * matplotlib.colormaps["RdBu_r"](np.linspace(0, 1, 257))[:, :3]).astype(np.uint8)
    coloured = table[np.rint(256 * shares).astype(np.int64)]  # [N, C, H, W, 3]
    return coloured.transpose(0, 4, 2, 1, 3).reshape(n, 3, coloured.shape[2], -1)


def _curve(shares: np.ndarray) -> np.ndarray:
    """uint8 [CURVE_HEIGHT, W, 3] of a signal [L] of values from 0 (bottom) to 1."""
    rows = np.rint((1 - shares) * (CURVE_HEIGHT - 1)).astype(np.int64)
    width = min(len(rows), CURVE_WIDTH)
    if width == 1:
        rows, width = rows.repeat(2), 2
    starts = np.arange(width) * len(rows) // width
    top, bottom = np.minimum.reduceat(rows, starts), np.maximum.reduceat(rows, starts)
    top[1:], bottom[1:] = np.minimum(top[1:], rows[starts[1:] - 1]), np.maximum(bottom[1:], rows[starts[1:] - 1])
    picture = np.full((CURVE_HEIGHT, width, 3), PAPER, np.uint8)
    picture[CURVE_HEIGHT // 2] = MIDDLE
    y = np.arange(CURVE_HEIGHT)[:, None]
    picture[(y >= top) & (y <= bottom)] = INK
    return picture
