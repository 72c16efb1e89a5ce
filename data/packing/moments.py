"""Mean and standard deviation of each channel, from sums that are added up shard by shard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ChannelMoments:
    """Sums of the values of each channel and of their squares: the last axis of images [H, W, C], the first of arrays.

    Those of bytes are exact in float64, so statistics do not depend on how the samples are put into shards.
    """

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        self._others = (0, 1) if dtype == "uint8" else tuple(range(1, len(shape)))
        self.sums, self.squares = np.zeros(shape[0]), np.zeros(shape[0])

    def add(self, array: np.ndarray) -> None:
        values = array.astype(np.float64)
        self.sums += values.sum(self._others)
        self.squares += np.square(values).sum(self._others)


def statistics(
    sums: np.ndarray, squares: np.ndarray, num_values: int, dtype: str
) -> tuple[list[float], list[float], float]:
    """(mean of each channel, standard deviation of each, standard deviation of all values) in the model's range."""
    mean, std = _mean_and_std(sums, squares, num_values / len(sums))
    _, overall = _mean_and_std(sums.sum(), squares.sum(), num_values)
    if dtype == "uint8":
        return (mean / 127.5 - 1).tolist(), (std / 127.5).tolist(), float(overall / 127.5)
    return mean.tolist(), std.tolist(), float(overall)


def _mean_and_std(sums: np.ndarray, squares: np.ndarray, count: float) -> tuple[np.ndarray, np.ndarray]:
    mean = sums / count
    variance = squares / count - mean**2
    # A variance below float32's resolution is rounding of a constant, e.g. a channel that is 1000 everywhere.
    return mean, np.sqrt(np.where(variance > 1e-14 * mean**2, variance, 0.0))
