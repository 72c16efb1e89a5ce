"""Restricted Boltzmann machines: energies whose conditionals factorise, so that Gibbs sampling moves whole layers.

Both give free_energy(v) = -ln sum_h e^(-E(v, h)), block-Gibbs sweeps, the score of a continuous visible layer, and, for
a few hidden units, the exact ln Z by enumeration: the oracle that approximations are tested against.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.trainer import checks

MOST_ENUMERATED = 20


class _Bipartite(nn.Module):
    """Parameters of both machines, and the sweep that alternates their layers."""

    def __init__(self, num_visible: int, num_hidden: int):
        super().__init__()
        checks.at_least("rbm", 1, num_visible=num_visible, num_hidden=num_hidden)
        self.weight = nn.Parameter(0.01 * torch.randn(num_visible, num_hidden))
        self.visible_bias = nn.Parameter(torch.zeros(num_visible))
        self.hidden_bias = nn.Parameter(torch.zeros(num_hidden))

    def hidden_logits(self, v: Tensor) -> Tensor:
        """ln p(h = 1 | v) / p(h = 0 | v), [B, num_hidden]."""
        raise NotImplementedError

    def sample_hidden(self, v: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """h | v, all units at once, [B, num_hidden] of 0 and 1."""
        return _bernoulli(self.hidden_logits(v), generator)

    def sample_visible(self, h: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """v | h, all units at once, [B, num_visible]."""
        raise NotImplementedError

    def _check(self, v: Tensor) -> None:
        units = len(self.visible_bias)
        if v.ndim != 2 or v.shape[1] != units or v.dtype != self.weight.dtype:
            raise UserError(f"v is {v.dtype} {tuple(v.shape)}: this machine takes {self.weight.dtype} [B, {units}]")

    @torch.no_grad()
    def gibbs(self, v: Tensor, num_sweeps: int, generator: torch.Generator | None = None) -> Tensor:
        """v [B, num_visible] after `num_sweeps` sweeps of block Gibbs: hidden layer, then visible layer."""
        checks.at_least("gibbs", 0, num_sweeps=num_sweeps)
        self._check(v)
        for _ in range(num_sweeps):
            v = self.sample_visible(self.sample_hidden(v, generator), generator)
        return v


class RBM(_Bipartite):
    """Binary units: E(v, h) = -v . b - h . c - v W h, v in {0, 1}^num_visible, h in {0, 1}^num_hidden (Hinton 2002)."""

    def energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v [B, num_visible], h [B, num_hidden]) -> [B]."""
        return -(v @ self.visible_bias) - h @ self.hidden_bias - ((v @ self.weight) * h).sum(1)

    def free_energy(self, v: Tensor) -> Tensor:
        """-ln sum_h e^(-E(v, h)) of v [B, num_visible] -> [B]."""
        self._check(v)
        return -(v @ self.visible_bias) - F.softplus(self.hidden_logits(v)).sum(1)

    def hidden_logits(self, v: Tensor) -> Tensor:
        return v @ self.weight + self.hidden_bias

    def sample_visible(self, h: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """v | h, all units at once, [B, num_visible] of 0 and 1."""
        return _bernoulli(h @ self.weight.T + self.visible_bias, generator)

    def log_partition(self) -> Tensor:
        """ln Z, exactly, by enumerating the smaller layer. Raises UserError above 20 units."""
        if self.weight.shape[0] <= self.weight.shape[1]:
            return torch.logsumexp(-self.free_energy(_states(self.visible_bias)), 0)
        h = _states(self.hidden_bias)
        return torch.logsumexp(h @ self.hidden_bias + F.softplus(h @ self.weight.T + self.visible_bias).sum(1), 0)


class GaussianBernoulliRBM(_Bipartite):
    """Continuous visible units: E(v, h) = |v - b|^2 / (2 s^2) - h . c - v W h / s^2, h in {0, 1}^num_hidden.

    v | h is N(b + W h, s^2 I) (Cho 2011), so p(v) is a mixture of 2^num_hidden Gaussians. std: s, learned.
    """

    def __init__(self, num_visible: int, num_hidden: int, std: float = 1.0):
        super().__init__(num_visible, num_hidden)
        checks.positive("rbm", std=std)
        self.log_std = nn.Parameter(torch.tensor(math.log(std)))

    @property
    def variance(self) -> Tensor:
        return (2 * self.log_std).exp()

    def energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v [B, num_visible], h [B, num_hidden]) -> [B]."""
        quadratic = (v - self.visible_bias).square().sum(1) / (2 * self.variance)
        return quadratic - h @ self.hidden_bias - ((v @ self.weight) * h).sum(1) / self.variance

    def free_energy(self, v: Tensor) -> Tensor:
        """-ln sum_h e^(-E(v, h)) of v [B, num_visible] -> [B]."""
        self._check(v)
        quadratic = (v - self.visible_bias).square().sum(1) / (2 * self.variance)
        return quadratic - F.softplus(self.hidden_logits(v)).sum(1)

    def hidden_logits(self, v: Tensor) -> Tensor:
        return v @ self.weight / self.variance + self.hidden_bias

    def score(self, v: Tensor) -> Tensor:
        """grad_v ln p(v) = (b + W E[h | v] - v) / s^2, [B, num_visible]."""
        mean = self.visible_bias + self.hidden_logits(v).sigmoid() @ self.weight.T
        return (mean - v) / self.variance

    def sample_visible(self, h: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """v | h, all units at once, [B, num_visible]."""
        mean = self.visible_bias + h @ self.weight.T
        z = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + self.log_std.exp() * z

    def log_partition(self) -> Tensor:
        """ln Z, exactly, by enumerating the hidden layer. Raises UserError above 20 units."""
        h = _states(self.hidden_bias)
        shift = h @ self.weight.T
        mean_term = (shift @ self.visible_bias + shift.square().sum(1) / 2) / self.variance
        gaussian = len(self.visible_bias) / 2 * (2 * math.pi * self.variance).log()
        return torch.logsumexp(h @ self.hidden_bias + mean_term, 0) + gaussian


def _bernoulli(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    u = torch.rand(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
    return (u < logits.sigmoid()).to(logits.dtype)


def _states(like: Tensor) -> Tensor:
    """All binary vectors of the length of `like`, [2^n, n]."""
    if len(like) > MOST_ENUMERATED:
        raise UserError(f"ln Z by enumeration of {len(like)} units: {MOST_ENUMERATED} at most, use AIS above that")
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(like))), dtype=like.dtype, device=like.device)
