"""Levels moved until the samples themselves are nearest to the reference's: nonlinear least squares on the ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST_GAP = 0.05  # in ln sigma, of a grid to begin from: what ends at sigma_min leaves no gap below it
MOST = 8.0  # the largest parameter: gaps of which one is exp(8) = 3000 times the other
STEP = 0.02  # of the finite differences, in units of the parameters: far above the rounding of a float32 network
TOLERANCE = 1e-3  # relative change of the squared error, or of the parameters, that ends it

Ends = Callable[[Tensor], Tensor]
"""A grid [n + 1] -> samples of fixed noise [B, ...]."""


def to_parameters(sigmas: Tensor, sigma_min: float) -> np.ndarray:
    """Of a grid [n + 1], one number for each of its n - 1 levels between the first and 0.

    In ln sigma the way from the first level to sigma_min is cut into n gaps, one above each level and one below the
    last; a number is the logarithm of a gap, over that of the lowest one. So whatever the numbers, the levels descend
    strictly and stay above sigma_min.
    """
    logs = np.append(np.log(sigmas[:-1].numpy()), math.log(sigma_min))
    gaps = np.log(np.maximum(-np.diff(logs), SMALLEST_GAP))
    return np.clip(gaps[:-1] - gaps[-1], -MOST, MOST)


def to_levels(parameters: np.ndarray, sigma_max: float, sigma_min: float) -> Tensor:
    """The grid [n + 1] of the parameters of its n - 1 levels between `sigma_max` and 0."""
    from scipy.special import softmax

    shares = np.cumsum(softmax([*parameters, 0.0]))[:-1]
    logs = math.log(sigma_max) + math.log(sigma_min / sigma_max) * np.append(0.0, shares)
    levels = torch.from_numpy(np.append(np.exp(logs), 0.0))
    levels[0] = sigma_max  # exp(log) rounds
    return levels


def refine(start: Tensor, sigma_min: float, ends: Ends, reference: Tensor, budget: int) -> Tensor:
    """The grid [n + 1] near `start`, of the same first level, whose samples are nearest to `reference` [B, ...].

    A Gauss-Newton method with a trust region (scipy's `least_squares`) whose Jacobian is of finite differences: n grids
    an iteration. budget: how many grids may be tried, n where it is less; it ends earlier where the error no longer
    falls.
    """
    if len(start) == 2:
        return start
    from scipy.optimize import least_squares

    sigma_max = float(start[0])

    last: list[Any] = [None, None]  # scipy wants the Jacobian where it has just had the residuals

    def residuals(parameters: np.ndarray) -> np.ndarray:
        difference = ends(to_levels(parameters, sigma_max, sigma_min)) - reference
        last[:] = parameters.copy(), difference.double().flatten().cpu().numpy()
        return last[1]  # type: ignore[no-any-return]

    def jacobian(parameters: np.ndarray) -> np.ndarray:
        at = last[1] if np.array_equal(last[0], parameters) else residuals(parameters)
        moved = parameters + STEP * np.eye(len(parameters))
        return np.stack([residuals(one) - at for one in moved], 1) / STEP

    found = least_squares(
        residuals, to_parameters(start, sigma_min), jacobian, (-MOST, MOST), ftol=TOLERANCE, xtol=TOLERANCE,
        gtol=None, max_nfev=max(1, budget // (len(start) - 1)),
    )  # fmt: skip
    return to_levels(found.x, sigma_max, sigma_min)
