"""Densities whose score is known: mixtures of Gaussians at every noise level, and 2-D targets to look at.

A mixture with std 0 is a finite data set, whose denoiser is the softmax posterior mean over the data (what a network of
infinite capacity would learn); with std h it is a Parzen window. One component is a Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scoreray.data import checks
from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.buffers import ExactBuffers
from scoreray.trainer.diffusion.denoiser import tweedie


class Mixture(ExactBuffers):
    """sum_k w_k N(means_k, std^2 I), and its exact denoiser at any noise level.

    mixture(x [B, ...], sigma [B] or a number, class_labels int64 [B] or None) -> E[x_0 | x] [B, ...], in x's dtype,
    computed in float64. means: [K, ...]; weights: [K], equal by default; component_labels: int64 [K], so that a class
    label restricts the mixture to its own components (-1: to all). Raises UserError on impossible arguments.
    """

    means: Tensor
    log_weights: Tensor
    component_labels: Tensor

    def __init__(
        self, means: Tensor, std: float = 0.0, weights: Tensor | None = None, component_labels: Tensor | None = None
    ):
        super().__init__()
        if not (math.isfinite(std) and std >= 0):
            raise UserError(f"std is {std}: give a finite number, 0 or above")
        count = len(means)
        weights = torch.ones(count) if weights is None else weights
        if weights.shape != (count,) or not bool((weights > 0).all()):
            raise UserError(f"weights {tuple(weights.shape)} for {count} means: give one number above 0 for each")
        self.std = std
        self.register_buffer("means", means.to(torch.float64))
        self.register_buffer("log_weights", weights.to(torch.float64).log().log_softmax(0))
        labels = torch.zeros(count, dtype=torch.long) if component_labels is None else component_labels
        self.register_buffer("component_labels", labels)

    def forward(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        flat, sigma = self._wide(x, sigma)
        posterior = self._log_joint(flat, sigma, class_labels).softmax(1)
        nearest = posterior @ self.means.flatten(1)
        kept = (self.std**2 / (self.std**2 + sigma**2))[:, None]
        return (nearest + kept * (flat - nearest)).view(x.shape).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """grad ln p(x; sigma), [B, ...] like x."""
        wide = x.to(torch.float64)
        level = self._wide(x, sigma)[1]
        return tweedie(self(wide, level, class_labels), wide, level).to(x.dtype)

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0, class_labels: Tensor | None = None) -> Tensor:
        """ln p(x; sigma) in nats, [B]; sigma 0 is the mixture itself (std must then be above 0)."""
        flat, sigma = self._wide(x, sigma)
        joint = self._log_joint(flat, sigma, class_labels)
        own = self._log_prior(class_labels, len(x)).logsumexp(1)
        variance = self.std**2 + sigma**2
        constant = flat.shape[1] / 2 * (2 * math.pi * variance).log()
        return (joint.logsumexp(1) - own - constant).to(x.dtype)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """[count, ...] exact samples, float64, on the generator's device (the CPU without one)."""
        component = torch.multinomial(self.log_weights.exp(), count, replacement=True, generator=generator)
        means = self.means[component]
        return means + self.std * torch.randn(means.shape, generator=generator, dtype=means.dtype, device=means.device)

    def _wide(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """x as [B, d] and sigma as [B], both float64."""
        if x.shape[1:] != self.means.shape[1:]:
            raise UserError(f"x has shape {tuple(x.shape)}: this mixture's samples are {tuple(self.means.shape[1:])}")
        level = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)
        return x.to(torch.float64).flatten(1), level.expand(len(x))

    def _log_joint(self, flat: Tensor, sigma: Tensor, class_labels: Tensor | None) -> Tensor:
        """ln w_k - |x - mean_k|^2 / (2 (std^2 + sigma^2)), [B, K]."""
        means = self.means.flatten(1)
        # Distances from the batch's own mean: far from the origin the expanded square would cancel.
        center = flat.mean(0)
        a, b = flat - center, means - center
        squares = a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)
        variance = (self.std**2 + sigma**2)[:, None]
        return self._log_prior(class_labels, len(flat)) - squares.clamp(min=0) / (2 * variance)

    def _log_prior(self, class_labels: Tensor | None, count: int) -> Tensor:
        if class_labels is None:
            return self.log_weights.expand(count, -1)
        other = (class_labels[:, None] >= 0) & (class_labels[:, None] != self.component_labels)
        return self.log_weights.masked_fill(other, -torch.inf)


def ring(num_modes: int = 8, radius: float = math.sqrt(0.5), std: float = 0.05) -> Mixture:
    """`num_modes` Gaussians on a circle, a class each; the default has standard deviation 0.5 a dimension."""
    angle = torch.arange(num_modes, dtype=torch.float64) * (2 * math.pi / num_modes)
    means = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
    return Mixture(means, std, component_labels=torch.arange(num_modes))


def spirals(count: int, generator: torch.Generator | None = None) -> Tensor:
    """[count, 2] points of two interleaved spiral arms with a little noise, standard deviation about 0.5."""
    u = torch.rand(count, generator=generator, dtype=torch.float64).sqrt()
    arm = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    angle = 3 * math.pi * u
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * (u * arm)[:, None]
    return points + 0.02 * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def checkerboard(count: int, generator: torch.Generator | None = None) -> Tensor:
    """[count, 2] points uniform on the dark squares of a 4 x 4 board of standard deviation 0.5."""
    row, pair = torch.randint(0, 4, (count,), generator=generator), torch.randint(0, 2, (count,), generator=generator)
    corner = torch.stack([2 * pair + row % 2, row], dim=1)
    points = corner + torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return (points / 2 - 1) * math.sqrt(0.75)


def mixture(count: int, generator: torch.Generator | None = None) -> Tensor:
    """[count, 2] points of `ring()`."""
    return ring().sample(count, generator)


TARGETS: dict[str, Callable[[int, torch.Generator | None], Tensor]] = {
    "mixture": mixture,
    "spirals": spirals,
    "checkerboard": checkerboard,
}


def sample_target(name: str, count: int, seed: int = 0) -> Tensor:
    """[count, 2] float32 points of a named target, a function of the seed. Raises UserError on an unknown name."""
    return checks.choose("target", name, TARGETS)(count, torch.Generator().manual_seed(seed)).float()
