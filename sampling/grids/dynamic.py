"""Of all grids whose levels are fine levels of the reference, the one whose steps' errors sum to the least.

Each step is taken from the reference trajectory, so that its error is its own, and counts by how much of it is left at
the end (`ReferencePaths.gains`). Dynamic programming finds the least sum over all grids of n levels: the error of a
step of a one-step sampler depends on two levels, of DPM-Solver++(2M) on three.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scoreray.sampling.grids.reference import ReferencePaths

ONE_STEP = frozenset({"euler", "ddim"})
"""Samplers whose step is Euler's; the errors of all others are taken as those of DPM-Solver++(2M), which is exact for
it alone, and for the others of second order a grid to begin from."""


def step_errors(reference: ReferencePaths, sampler: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the steps between fine levels add to the error at the end, root mean square.

    Returns those of the first step, to each level [F]; of a step to level j from i where k was the level before i,
    [F, F, F] by k, i, j; and of the last, from each level to 0, [F]. Infinite where the levels do not descend.
    """
    count, products = reference.num_fine, reference.products
    sigmas = reference.sigmas[:-1].numpy()
    k, i, j = np.ogrid[:count, :count, :count]
    with np.errstate(all="ignore"):
        ratio = sigmas[j] / sigmas[i]
        extrapolated = np.zeros((count, 1, 1)) if sampler in ONE_STEP else (
            np.log(ratio) / (2 * np.log(sigmas[i] / sigmas[k])))  # fmt: skip
        between = _root_mean_square(products, [(ratio, i), (-1.0, j), ((1 - ratio) * (1 + extrapolated), count + i),
                                               (-(1 - ratio) * extrapolated, count + k)])  # fmt: skip
        between = np.where((k < i) & (i < j), reference.gains[j] * between, np.inf)
    to = np.arange(count)
    ratio = sigmas / sigmas[0]
    first = reference.gains * _root_mean_square(
        products, [(ratio, np.zeros_like(to)), (-1.0, to), (1 - ratio, count + 0 * to)]
    )
    last = _root_mean_square(products, [(1.0, count + to), (-1.0, np.full_like(to, 2 * count))])
    first[0] = np.inf
    return first, between, last


def best_levels(reference: ReferencePaths, sampler: str, n: int) -> Tensor:
    """The grid [n + 1] of n fine levels, the first of them the first, whose steps add the least. Needs n <= F."""
    first, between, last = step_errors(reference, sampler)
    if n == 1:
        return torch.stack([reference.sigmas[0], torch.zeros((), dtype=torch.float64)])
    total = np.full_like(between[0], np.inf)  # by the last two levels
    total[0] = first
    came = list[np.ndarray]()
    for _ in range(n - 2):
        sums = total[:, :, None] + between
        came.append(sums.argmin(0))
        total = sums.min(0)
    k, i = np.unravel_index((total + last).argmin(), total.shape)
    path = [int(i), int(k)]
    for before in reversed(came):
        path.append(int(before[path[-1], path[-2]]))
    return torch.cat([reference.sigmas[path[::-1]], reference.sigmas.new_zeros(1)])


def _root_mean_square(products: np.ndarray, terms: list[tuple[np.ndarray | float, np.ndarray]]) -> np.ndarray:
    """Of sum_a c_a v_a over (c, index of v) terms, by the products of the vectors; the terms broadcast."""
    square = sum(c * d * products[a, b] for c, a in terms for d, b in terms)
    return np.sqrt(np.maximum(square, 0.0))
