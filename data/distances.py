"""The largest distance in a data set: noise of this size makes any sample reachable from any other."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def largest_distance(data: Tensor, chunk: int = 1024) -> float:
    """The largest Euclidean distance between any two samples of data [N, ...], 0 for less than two (Song & Ermon 2020,
    technique 1). The cost is that of all pairwise distances, N^2 d: give some thousand samples, not millions."""
    flat = data.flatten(1).to(torch.promote_types(data.dtype, torch.float32))
    if not len(flat):
        return 0.0
    # In units of a power of two and from the first sample: squares of large values are beyond float32, and distances
    # between values far from 0 would lose their digits.
    unit = 2.0 ** max(-126, math.frexp(float(flat.abs().max()))[1] - 1)
    flat = flat / unit
    flat = flat - flat[:1]
    return unit * max(float(torch.cdist(part, flat).max()) for part in flat.split(chunk))
