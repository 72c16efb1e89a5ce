"""Restricted Boltzmann machines: energies whose conditionals factorise, so that Gibbs sampling moves whole layers.

Both give free_energy(v) = -ln sum_h e^(-E(v, h)), block-Gibbs sweeps, the score of a continuous visible layer, and, for
a few hidden units, the exact ln Z by enumeration: the oracle that approximations are tested against.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoreray.data import checks
from scoreray.data.errors import UserError
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.condition import Conditions
from scoreray.trainer.diffusion.contrastive import gibbs_divergence
from scoreray.trainer.diffusion.noise import ChainNoise
from scoreray.trainer.networks.base import BaseNetworkConfig

MAX_ENUMERATED = 20

Source = torch.Generator | ChainNoise | None
"""Where a chain's random numbers come from; None is torch's global generator."""


@dataclass(frozen=True)
class RBMConfig(BaseNetworkConfig):
    """A machine of binary units, on data in [-1, 1].

    num_hidden: hidden units.  binarize: how data become 0 and 1: above 0 is 1 ("threshold"), or 1 with the probability
    (x + 1) / 2, drawn again each time that a sample is seen ("sample"; Salakhutdinov & Murray 2008).
    """

    num_hidden: int = 256
    binarize: Literal["threshold", "sample"] = "threshold"
    kind: Literal["rbm"] = field(default="rbm", kw_only=True)

    is_machine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.at_least("network", 1, num_hidden=self.num_hidden)

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> RBM:
        return RBM(math.prod(image_shape), self.num_hidden, self.binarize)


@dataclass(frozen=True)
class GaussianRBMConfig(BaseNetworkConfig):
    """A machine with continuous visible units.

    num_hidden: hidden units.  std: of visible units given the hidden ones, at the start of training.
    stds: one that all share and that is learned ("shared"), one learned for each unit ("each"; Cho 2011), or `std` as
    it is given ("fixed"; Hinton 2010, section 13.2).
    """

    num_hidden: int = 256
    std: float = 0.5
    stds: Literal["shared", "each", "fixed"] = "shared"
    kind: Literal["gaussian_rbm"] = field(default="gaussian_rbm", kw_only=True)

    is_machine: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.at_least("network", 1, num_hidden=self.num_hidden)
        checks.positive("network", std=self.std)

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> GaussianBernoulliRBM:
        return GaussianBernoulliRBM(math.prod(image_shape), self.num_hidden, self.std, self.stds)


class BoltzmannMachine(nn.Module):
    """A restricted Boltzmann machine: a visible unit for each value of a sample, and the sweep that alternates layers.

    A subclass says what the visible units are.
    """

    def __init__(self, num_visible: int, num_hidden: int):
        super().__init__()
        checks.at_least("rbm", 1, num_visible=num_visible, num_hidden=num_hidden)
        self.num_visible, self.num_hidden = num_visible, num_hidden
        self.weight = nn.Parameter(0.01 * torch.randn(num_visible, num_hidden))  # Hinton 2010, section 8
        self.visible_bias = nn.Parameter(torch.zeros(num_visible))
        self.hidden_bias = nn.Parameter(torch.zeros(num_hidden))

    def forward(
        self, v: Tensor, *, start: Tensor | None = None, num_sweeps: int = 0, source: Source = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Contrastive divergence of v [B, num_visible] by chains from `start`: (loss [B], where they end). Without
        `start` the free energies [B].

        What a training step calls, so that an engine that shards parameters has them whole meanwhile. `start` is given
        by name, so that a call with a noise level, as networks take one, is no call.
        """
        return self.free_energy(v) if start is None else gibbs_divergence(self, v, start, num_sweeps, source)

    def free_energy(self, v: Tensor) -> Tensor:
        """-ln sum_h e^(-E(v, h)) of v [B, num_visible] -> [B]."""
        raise NotImplementedError

    def hidden_logits(self, v: Tensor) -> Tensor:
        """ln p(h = 1 | v) / p(h = 0 | v), [B, num_hidden]."""
        raise NotImplementedError

    def sample_hidden(self, v: Tensor, source: Source = None) -> Tensor:
        """h | v, all units at once, [B, num_hidden] of 0 and 1."""
        return _bernoulli(self.hidden_logits(v), source)

    def visible_mean(self, h: Tensor) -> Tensor:
        """E[v | h], [B, num_visible]; of h between 0 and 1, of the layer's probabilities, too."""
        raise NotImplementedError

    def sample_visible(self, h: Tensor, source: Source = None) -> Tensor:
        """v | h, all units at once, [B, num_visible]."""
        raise NotImplementedError

    def visible(self, x: Tensor, seed: int, positions: Tensor) -> Tensor:
        """Data x [B, ...] in [-1, 1] as visible units [B, num_visible]."""
        raise NotImplementedError

    def picture(self, v: Tensor) -> Tensor:
        """Visible units as data in [-1, 1], [B, num_visible]."""
        raise NotImplementedError

    def fresh(self, source: ChainNoise) -> Tensor:
        """Where chains begin that begin at no data, [B, num_visible]; no parameter in it."""
        raise NotImplementedError

    def independent(self, mean: Tensor, std: Tensor, source: ChainNoise) -> Tensor:
        """Units [B, num_visible] that do not know of each other, of the mean and std [num_visible] of data in [-1, 1]:
        the noise of noise-contrastive estimation."""
        raise NotImplementedError

    def log_independent(self, v: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Their log-probability or log-density, [B]."""
        raise NotImplementedError

    @property
    def initial_log_partition(self) -> float:
        """ln Z of the machine without weights and biases."""
        raise NotImplementedError

    def _check(self, v: Tensor) -> None:
        units = self.num_visible
        if v.ndim != 2 or v.shape[1] != units or v.dtype != self.dtype:
            raise UserError(f"v is {v.dtype} {tuple(v.shape)}: this machine takes {self.dtype} [B, {units}]")

    @property
    def dtype(self) -> torch.dtype:
        """Of the units and of all arithmetic: that of the parameters, float32 where they are narrower.

        Differences of free energies are what is learnt from, and bfloat16 has no digits left in them.
        """
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def _wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, visible and hidden bias in `dtype`."""
        return self.weight.to(self.dtype), self.visible_bias.to(self.dtype), self.hidden_bias.to(self.dtype)

    @torch.no_grad()
    def gibbs(self, v: Tensor, num_sweeps: int, source: Source = None) -> Tensor:
        """v [B, num_visible] after `num_sweeps` sweeps of block Gibbs: hidden layer, then visible layer."""
        checks.at_least("gibbs", 0, num_sweeps=num_sweeps)
        self._check(v)
        for _ in range(num_sweeps):
            v = self.sample_visible(self.sample_hidden(v, source), source)
        return v


class RBM(BoltzmannMachine):
    """Binary units: E(v, h) = -v . b - h . c - v W h, v in {0, 1}^num_visible, h in {0, 1}^num_hidden (Hinton 2002)."""

    def __init__(self, num_visible: int, num_hidden: int, binarize: str = RBMConfig.binarize):
        super().__init__(num_visible, num_hidden)
        self.binarize = binarize

    def energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v [B, num_visible], h [B, num_hidden]) -> [B]."""
        weight, visible_bias, hidden_bias = self._wide
        return -(v @ visible_bias) - h @ hidden_bias - ((v @ weight) * h).sum(1)

    def free_energy(self, v: Tensor) -> Tensor:
        """-ln sum_h e^(-E(v, h)) of v [B, num_visible] -> [B]."""
        self._check(v)
        return -(v @ self._wide[1]) - F.softplus(self.hidden_logits(v)).sum(1)

    def hidden_logits(self, v: Tensor) -> Tensor:
        weight, _, hidden_bias = self._wide
        return v @ weight + hidden_bias

    def sample_visible(self, h: Tensor, source: Source = None) -> Tensor:
        """v | h, all units at once, [B, num_visible] of 0 and 1."""
        return _bernoulli(self._visible_logits(h), source)

    def visible_mean(self, h: Tensor) -> Tensor:
        return self._visible_logits(h).sigmoid()

    def _visible_logits(self, h: Tensor) -> Tensor:
        weight, visible_bias, _ = self._wide
        return h @ weight.T + visible_bias

    def visible(self, x: Tensor, seed: int, positions: Tensor) -> Tensor:
        """Data x [B, ...] in [-1, 1] as 0 and 1, [B, num_visible]: by `binarize` of RBMConfig."""
        x = x.flatten(1).to(self.dtype)
        if self.binarize == "threshold":
            return (x > 0).to(self.dtype)
        u = noise.uniform(seed, positions, tuple(x.shape[1:]), stream=noise.STREAM_BINARIZE, dtype=x.dtype)
        return (u < (x + 1) / 2).to(self.dtype)

    def picture(self, v: Tensor) -> Tensor:
        return 2 * v - 1

    def fresh(self, source: ChainNoise) -> Tensor:
        """Units that are 0 or 1 with equal probability."""
        u = source.uniform((self.num_visible,), self.dtype)
        return (u < 0.5).to(self.dtype)

    def independent(self, mean: Tensor, std: Tensor, source: ChainNoise) -> Tensor:
        u = source.uniform((self.num_visible,), self.dtype)
        return (u < _shares(mean).to(self.dtype)).to(self.dtype)

    def log_independent(self, v: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        shares = _shares(mean).to(self.dtype)
        return v @ shares.logit() + (-shares).log1p().sum()

    @property
    def initial_log_partition(self) -> float:
        return (self.num_visible + self.num_hidden) * math.log(2)

    def log_partition(self) -> Tensor:
        """ln Z, exactly, by enumerating the smaller layer. Raises UserError above 20 units."""
        weight, visible_bias, hidden_bias = self._wide
        if weight.shape[0] <= weight.shape[1]:
            return torch.logsumexp(-self.free_energy(_states(visible_bias)), 0)
        h = _states(hidden_bias)
        return torch.logsumexp(h @ hidden_bias + F.softplus(h @ weight.T + visible_bias).sum(1), 0)


class GaussianBernoulliRBM(BoltzmannMachine):
    """Continuous visible units: E(v, h) = sum_i (v_i - b_i)^2 / (2 s_i^2) - h . c - sum_ij v_i W_ij h_j / s_i^2,
    h in {0, 1}^num_hidden.

    v | h is N(b + W h, diag(s^2)) (Cho 2011, who learn ln s^2), so p(v) is a mixture of 2^num_hidden Gaussians. stds:
    as of GaussianRBMConfig.
    """

    def __init__(self, num_visible: int, num_hidden: int, std: float = 1.0, stds: str = GaussianRBMConfig.stds):
        super().__init__(num_visible, num_hidden)
        checks.positive("rbm", std=std)
        self.initial_std = std
        # [1] where all share it: DeepSpeed can't share out a scalar
        log_std = torch.full((num_visible if stds == "each" else 1,), math.log(std))
        self.log_std = nn.Parameter(log_std, requires_grad=stds != "fixed")

    @property
    def variance(self) -> Tensor:
        """s^2, [] where all units share it, else [num_visible]."""
        variance = (2 * self.log_std.to(self.dtype)).exp()
        return variance.squeeze(0) if len(variance) == 1 else variance

    def quadratic(self, v: Tensor) -> Tensor:
        """sum_i (v_i - b_i)^2 / (2 s_i^2) of v [B, num_visible] -> [B]."""
        squares = (v - self._wide[1]).square()
        return squares.sum(1) / (2 * self.variance) if self._is_shared else (squares / (2 * self.variance)).sum(1)

    @property
    def log_gaussian(self) -> Tensor:
        """ln of the integral of exp(-quadratic(v))."""
        logs = (2 * math.pi * self.variance).log()
        return self.num_visible / 2 * logs if self._is_shared else logs.sum() / 2

    @property
    def _is_shared(self) -> bool:
        """Sums over units are then divided once, as they were before units could differ: the same bits."""
        return len(self.log_std) == 1

    def energy(self, v: Tensor, h: Tensor) -> Tensor:
        """E(v [B, num_visible], h [B, num_hidden]) -> [B]."""
        return self.quadratic(v) - h @ self._wide[2] - (self._hidden_input(v) * h).sum(1)

    def free_energy(self, v: Tensor) -> Tensor:
        """-ln sum_h e^(-E(v, h)) of v [B, num_visible] -> [B]."""
        self._check(v)
        return self.quadratic(v) - F.softplus(self.hidden_logits(v)).sum(1)

    def hidden_logits(self, v: Tensor) -> Tensor:
        return self._hidden_input(v) + self._wide[2]

    def _hidden_input(self, v: Tensor) -> Tensor:
        """sum_i v_i W_ij / s_i^2, [B, num_hidden]."""
        weight = self._wide[0]
        return v @ weight / self.variance if self._is_shared else (v / self.variance) @ weight

    def score(self, v: Tensor) -> Tensor:
        """grad_v ln p(v) = (b + W E[h | v] - v) / s^2, [B, num_visible]."""
        weight, visible_bias, _ = self._wide
        mean = visible_bias + self.hidden_logits(v).sigmoid() @ weight.T
        return (mean - v) / self.variance

    def sample_visible(self, h: Tensor, source: Source = None) -> Tensor:
        """v | h, all units at once, [B, num_visible]."""
        mean = self.visible_mean(h)
        if isinstance(source, ChainNoise):
            z = source.normal(tuple(mean.shape[1:]), mean.dtype)
        else:
            z = torch.randn(mean.shape, generator=source, dtype=mean.dtype, device=mean.device)
        return mean + self.variance.sqrt() * z

    def visible_mean(self, h: Tensor) -> Tensor:
        weight, visible_bias, _ = self._wide
        return visible_bias + h @ weight.T

    def visible(self, x: Tensor, seed: int, positions: Tensor) -> Tensor:
        """Data x [B, ...] as they are, [B, num_visible]."""
        return x.flatten(1).to(self.dtype)

    def picture(self, v: Tensor) -> Tensor:
        return v

    def fresh(self, source: ChainNoise) -> Tensor:
        """Standard normal numbers."""
        return source.normal((self.num_visible,), self.dtype)

    def independent(self, mean: Tensor, std: Tensor, source: ChainNoise) -> Tensor:
        return mean.to(self.dtype) + std.to(self.dtype) * source.normal((self.num_visible,), self.dtype)

    def log_independent(self, v: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        wide = std.to(self.dtype)
        scaled = (v - mean.to(self.dtype)) / wide
        return -(scaled.square() / 2 + wide.log() + math.log(2 * math.pi) / 2).sum(1)

    @property
    def initial_log_partition(self) -> float:
        return self.num_hidden * math.log(2) + self.num_visible / 2 * math.log(2 * math.pi * self.initial_std**2)

    def log_partition(self) -> Tensor:
        """ln Z, exactly, by enumerating the hidden layer. Raises UserError above 20 units."""
        weight, visible_bias, hidden_bias = self._wide
        h = _states(hidden_bias)
        shift = h @ weight.T
        if self._is_shared:
            mean_term = (shift @ visible_bias + shift.square().sum(1) / 2) / self.variance
        else:
            mean_term = ((shift * visible_bias + shift.square() / 2) / self.variance).sum(1)
        return torch.logsumexp(h @ hidden_bias + mean_term, 0) + self.log_gaussian


def _bernoulli(logits: Tensor, source: Source) -> Tensor:
    if isinstance(source, ChainNoise):
        u = source.uniform(tuple(logits.shape[1:]), logits.dtype)
    else:
        u = torch.rand(logits.shape, generator=source, dtype=logits.dtype, device=logits.device)
    return (u < logits.sigmoid()).to(logits.dtype)


def _shares(mean: Tensor) -> Tensor:
    """Of units that are 1, of data in [-1, 1] with this mean; none so rare that its log-probability leads."""
    return ((mean + 1) / 2).clamp(0.02, 0.98)


def _states(like: Tensor) -> Tensor:
    """All binary vectors of the length of `like`, [2^n, n]."""
    if len(like) > MAX_ENUMERATED:
        raise UserError(f"ln Z by enumeration of {len(like)} units: {MAX_ENUMERATED} at most, use AIS above that")
    # 2^20 states of 20 units take 80 MiB in float32.
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(like))), dtype=like.dtype, device=like.device)
