"""Samplers of models of few steps, whose network gives more of the probability-flow ODE's path than its direction.

The shape of a sampler is described in `ode.py`. Such a network answers D(x, sigma, rho) so that the path through x is
at (rho / sigma) x + (1 - rho / sigma) D at the target level rho <= sigma: exact steps, however long.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

from torch import Tensor

from scoreray.sampling.samplers.noise import Noise
from scoreray.sampling.samplers.ode import DenoiserCall, Levels, Steps
from scoreray.sampling.samplers.options import Range


def consistency(x: Tensor, sigmas: Levels, noise: Noise, *, target: bool = False) -> Steps:
    """Multistep consistency sampling: to the path's end, then up to the next level with new noise; n calls.

    Song 2023, "Consistency models", Alg. 1. On a plain denoiser, whose estimate is a mean and no path's end, it is DDIM
    that forgets its noise at every step: samples are too narrow, of Gaussian data by half the variance in many steps.
    `target`: the network takes the level that it is to reach, 0 at every call; requests set it for flow maps.
    """
    for sigma, after in pairwise(sigmas):
        denoised = yield DenoiserCall(x, sigma, 0.0 if target else None)
        if after == 0:
            return denoised
        x = denoised.add(noise.like(x), alpha=after)
    return x


def flow_map(x: Tensor, sigmas: Levels, noise: Noise, *, gamma: Annotated[float, Range(0, 1)] = 0.0) -> Steps:
    """Steps of a flow map from each level to the next; exact for an exact network, n calls (Geng 2025, "Mean flows").

    `gamma` 0 is deterministic. Above it each step goes down to sqrt(1 - gamma^2) of the next level and up to it by new
    noise, which forgets errors of earlier steps; 1 is multistep consistency sampling (Kim 2023, "Consistency
    trajectory models", Alg. 3).
    """
    for sigma, after in pairwise(sigmas):
        reached = after * math.sqrt(1 - gamma**2)
        denoised = yield DenoiserCall(x, sigma, reached)
        if after == 0:
            return denoised
        x = denoised.lerp(x, reached / sigma)
        if gamma > 0:
            x.add_(noise.like(x), alpha=gamma * after)
    return x
