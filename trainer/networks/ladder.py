"""NCSN's ladder of noise levels: NCSNv2's techniques that choose it from data, and networks that know its rungs only.

A ladder is geometric, sigma_1 > ... > sigma_L. `VE(sigma_min, sigma_max)` with `sigma_sampling: {kind: ladder,
num_levels: L}` trains on it. Techniques 1, 2 and 4 are of Song & Ermon 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from scoreray.data import checks
from scoreray.data.distances import largest_distance
from scoreray.data.errors import UserError, shortened
from scoreray.trainer.diffusion.buffers import ExactBuffers
from scoreray.trainer.diffusion.condition import AnyCondition, Condition, Conditions, encoded

LARGEST_RATIO = 1.3  # of neighbouring levels; see `ladder_ratio`
Conditioning = Literal["learned", "none"]


@dataclass(frozen=True)
class Ladder:
    """Noise levels and the Langevin step size of annealed Langevin dynamics, a_i = step_size sigma_i^2 / sigma_L^2."""

    sigma_max: float
    sigma_min: float
    num_levels: int
    steps_per_level: int
    step_size: float

    def sigmas(self) -> Tensor:
        """[num_levels], descending, float64."""
        return geometric_ladder(self.sigma_max, self.sigma_min, self.num_levels)


def suggest_ladder(data: Tensor, sigma_min: float = 0.02, steps_per_level: int = 5) -> Ladder:
    """The ladder that NCSNv2 would choose for data [N, ...]. Raises UserError where the data has no spread.

    The cost is that of all pairwise distances, N^2 d: give some thousand samples, not millions.
    """
    checks.positive("ladder", sigma_min=sigma_min)
    checks.at_least("ladder", 1, steps_per_level=steps_per_level)
    sigma_max = largest_distance(data)
    if sigma_max <= sigma_min:
        raise UserError(f"the largest distance in the data is {sigma_max}: it must be above sigma_min {sigma_min}")
    num_levels = levels_needed(sigma_max, sigma_min, math.prod(data.shape[1:]))
    ratio = (sigma_max / sigma_min) ** (1 / (num_levels - 1))
    return Ladder(sigma_max, sigma_min, num_levels, steps_per_level, step_size(sigma_min, ratio, steps_per_level))


def ladder_ratio(dimension: int) -> float:
    """Technique 2: the ratio of neighbouring levels at which the shells that they fill overlap by a half.

    Solves Phi(sqrt(2 d)(g - 1) + 3 g) - Phi(sqrt(2 d)(g - 1) - 3 g) = 0.5 for g, up to 1.3. In few dimensions shells
    are no shells: the root is 2.1 for d = 16, 7.5 for 6, and none for 4 or less. On mixtures of 1 to 50 dimensions
    NCSNv2's 5 steps a level leave modes 1.3 to 1.8 times too wide at a ratio of 4, and within a sixth at 1.3.
    """
    checks.at_least("ladder", 1, dimension=dimension)
    if overlap(LARGEST_RATIO, dimension) >= 0.5:
        return LARGEST_RATIO
    return _bisect(lambda ratio: overlap(ratio, dimension) - 0.5, 1.0, LARGEST_RATIO)


def overlap(ratio: float, dimension: int) -> float:
    """How far the shell of one level lies inside three standard deviations of the next one's (technique 2)."""
    shift = math.sqrt(2 * dimension) * (ratio - 1)
    below = lambda z: math.erfc(-z / math.sqrt(2)) / 2  # noqa: E731
    return below(shift + 3 * ratio) - below(shift - 3 * ratio)


def levels_needed(sigma_max: float, sigma_min: float, dimension: int) -> int:
    """The least L whose neighbours are within `ladder_ratio`. CIFAR-10 (50, 0.01, 3072): 220; printed: 232."""
    return max(2, 1 + math.ceil(math.log(sigma_max / sigma_min) / math.log(ladder_ratio(dimension))))


def step_size(sigma_min: float, ratio: float, steps_per_level: int) -> float:
    """Technique 4: the epsilon that brings s_T^2 / sigma^2 nearest 1. CIFAR-10 (0.01, L = 232, T = 5): 6.2e-6.

    s_T^2 is the variance at the end of a level's T Langevin steps, begun at the level before. Where several
    epsilons do equally well it is the smallest.
    """
    excess = lambda log_eps: variance_ratio(math.exp(log_eps), sigma_min, ratio, steps_per_level) - 1  # noqa: E731
    # The ratio falls from gamma^2 at epsilon 0 to one minimum and rises again until Langevin is unstable, at 2 sigma^2.
    low, high = math.log(1e-9 * sigma_min**2), math.log(1.999 * sigma_min**2)
    a, b = low, high
    while b - a > 1e-10:
        left, right = a + (b - a) / 3, b - (b - a) / 3
        a, b = (a, right) if excess(left) < excess(right) else (left, b)
    return math.exp(a if excess(a) >= 0 else _bisect(excess, low, a))


def variance_ratio(epsilon: float, sigma_min: float, ratio: float, steps_per_level: int) -> float:
    """s_T^2 / sigma^2 of technique 4: (1 - e / sL^2)^(2T) (g^2 - b) + b, b = 2 e / (sL^2 - sL^2 (1 - e / sL^2)^2)."""
    kept = 1 - epsilon / sigma_min**2
    stationary = 2 * epsilon / (sigma_min**2 * (1 - kept**2))
    return kept ** (2 * steps_per_level) * (ratio**2 - stationary) + stationary


class OnLadder(ExactBuffers):
    """A network of the usual signature that knows the ladder's rungs only: any sigma is taken for the nearest one.

    conditioning "learned": each rung has a learned code (begun at ln(sigma) / 4), as NCSN has per-level parameters.
    "none": the network does not see the level; with the "score" parameterization this is NCSNv2's s = f / sigma.
    sigmas: L numbers (or a tensor [L] that holds numbers), in any order.
    """

    log_sigmas: Tensor

    def __init__(self, network: nn.Module, sigmas: Sequence[float] | Tensor, conditioning: Conditioning = "learned"):
        super().__init__()
        checks.choose("ladder conditioning", conditioning, dict.fromkeys(get_args(Conditioning)))
        levels = sigmas.tolist() if isinstance(sigmas, Tensor) else list(sigmas)
        # Numbers are checked, not tensors: a module that is built on the meta device, as shapes alone, has none.
        if not levels or not all(isinstance(level, float) and 0 < level < math.inf for level in levels):
            raise UserError(f"sigmas {shortened(str(levels))}: a ladder is a list of noise levels above 0")
        self.network, self.num_classes = network, getattr(network, "num_classes", 0)
        self.conditions: Conditions = getattr(network, "conditions", {})
        logs = torch.tensor(levels, dtype=torch.float64).log().sort().values.float()
        self.register_buffer("log_sigmas", logs, persistent=False)
        self.codes = nn.Embedding(len(logs), 1) if conditioning == "learned" else None
        if self.codes is not None:
            self.codes.weight.data.copy_(logs[:, None] / 4)

    def rung(self, c_noise: Tensor) -> Tensor:
        """The index, in ascending order of sigma, of the rung nearest to c_noise = ln(sigma) / 4 [B]."""
        edges = (self.log_sigmas[1:] + self.log_sigmas[:-1]) / 2
        return torch.bucketize(4 * c_noise.float(), edges)

    def encode(self, condition: Condition) -> Condition:
        return encoded(self.network, condition)

    def forward(self, x: Tensor, c_noise: Tensor, condition: AnyCondition = None) -> Tensor:
        if self.codes is None:
            return self.network(x, torch.zeros_like(c_noise), condition)
        return self.network(x, self.codes(self.rung(c_noise)).squeeze(1), condition)


def geometric_ladder(sigma_max: float, sigma_min: float, num_levels: int) -> Tensor:
    """On the CPU whatever the default device is: on the meta device a level would have no value."""
    ends = math.log10(sigma_max), math.log10(sigma_min)
    return torch.logspace(*ends, num_levels, dtype=torch.float64, device="cpu")


def _bisect(falling: Callable[[float], float], low: float, high: float) -> float:
    """The root between `low`, where the function is above 0, and `high`, where it is below."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2
