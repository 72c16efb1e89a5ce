"""A sampler: a generator that yields (x, sigma) where it needs the network, and is sent the denoised batch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

from torch import Tensor

from scoreray.sampling.samplers.noise import Noise
from scoreray.sampling.samplers.ode import Levels, Steps
from scoreray.sampling.samplers.options import Range


def midpoint(x: Tensor, sigmas: Levels, noise: Noise, *, where: Annotated[float, Range(0.1, 0.9)] = 0.5) -> Steps:
    """A step through the level that is `where` of the way down in ln sigma; Euler's for the last one."""
    for sigma, after in pairwise(sigmas):
        denoised = yield x, sigma
        if after == 0:
            return denoised
        middle = math.exp(math.log(sigma) + where * (math.log(after) - math.log(sigma)))
        halfway = denoised + (x - denoised) * (middle / sigma)
        denoised = yield halfway, middle
        x = x + (halfway - denoised) * ((after - sigma) / middle)
    return x
