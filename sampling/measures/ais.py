"""Annealed importance sampling (Neal 2001): the normaliser of an energy model, so its log-likelihood too.

A path leads from a base density that can be drawn and is normalised (beta 0) to exp(-E) (beta 1). Chains walk it with
transitions that leave each density on the way invariant; their weights are unbiased for Z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from scoreray.data.errors import UserError
from scoreray.sampling.measures.importance import effective_samples
from scoreray.sampling.samplers.noise import SAMPLING_SEED
from scoreray.trainer.diffusion import noise as counter
from scoreray.trainer.networks.rbm import RBM, GaussianBernoulliRBM


class Path(Protocol):
    """Unnormalised densities f_beta from a base to the target."""

    def draw(self, seeds: Tensor) -> Tensor:
        """One exact sample of f_0 / Z_0 for each seed, [M, ...]."""

    def log_density(self, x: Tensor, beta: float) -> Tensor:
        """ln f_beta(x) [M], with Z_0 = 1 at beta 0."""

    def step(self, x: Tensor, beta: float, seeds: Tensor, number: int) -> Tensor:
        """A transition that leaves f_beta invariant; `number` counts the steps of a chain, for its random numbers."""


@dataclass(frozen=True)
class PartitionEstimate:
    """`log_z` in nats, `log_weights` [M] of the chains, and their end points `x` [M, ...]."""

    log_z: float
    log_weights: Tensor
    x: Tensor

    @property
    def effective_samples(self) -> float:
        """(sum w)^2 / sum w^2: as many equal weights would vary as much."""
        return float(effective_samples(self.log_weights))

    @property
    def std_error(self) -> float:
        """Standard error of log_z by the delta method; trust it where many samples are effective."""
        weights = (self.log_weights - self.log_weights.max()).exp()
        return float(weights.std() / weights.mean() / math.sqrt(len(weights)))


def ais(path: Path, betas: Tensor | Sequence[float], seeds: Tensor | Sequence[int]) -> PartitionEstimate:
    """Runs one chain per seed along `betas` [T + 1], from 0 up to 1, with one step of the path at each (Neal 2001).

    log_z is the log of the mean weight: exp(log_z) is unbiased, so log_z on average a little low. Each chain depends on
    its seed alone; they stay on the device where `path` draws them (GaussianPath: that of the seeds). Raises UserError
    unless the betas ascend from 0 to 1.
    """
    levels = torch.as_tensor(betas, dtype=torch.float64).tolist()
    if len(levels) < 2 or levels[0] != 0 or levels[-1] != 1 or any(a >= b for a, b in pairwise(levels)):
        raise UserError(f"betas {levels[:3]} ... {levels[-1:]}: must ascend strictly from 0 to 1")
    positions = torch.as_tensor(seeds, dtype=torch.int64)
    with torch.no_grad():
        x = path.draw(positions)
        positions = positions.to(x.device)
        log_weights = torch.zeros(len(positions), dtype=torch.float64, device=x.device)
        for number, (before, beta) in enumerate(pairwise(levels)):
            log_weights += (path.log_density(x, beta) - path.log_density(x, before)).double()
            if beta < 1:
                x = path.step(x, beta, positions, number)
    return PartitionEstimate(float(log_weights.logsumexp(0)) - math.log(len(positions)), log_weights, x)


@dataclass(frozen=True)
class GaussianPath:
    """From N(0, std^2 I) to exp(-energy) over vectors [M, d], through f_0^(1 - beta) f_1^beta; steps of MALA.

    energy: `x [M, d] -> [M]`, differentiable. step_size: eps of x + eps score + sqrt(2 eps) z before the accept-reject
    of Roberts & Tweedie 1996, which makes it leave f_beta exactly invariant; `num_steps` of them at each beta.
    """

    energy: Callable[[Tensor], Tensor]
    dims: int
    std: float = 1.0
    step_size: float = 0.1
    num_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("std", "step_size", "num_steps", "dims"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"{name} = {getattr(self, name)}: must be a positive number")

    def draw(self, seeds: Tensor) -> Tensor:
        return self.std * counter.normal(SAMPLING_SEED, seeds, (self.dims,), dtype=torch.float64)

    def log_density(self, x: Tensor, beta: float) -> Tensor:
        base = -0.5 * ((x / self.std).square() + math.log(2 * math.pi * self.std**2)).sum(1)
        return (1 - beta) * base - (beta * self.energy(x) if beta > 0 else 0.0)

    def step(self, x: Tensor, beta: float, seeds: Tensor, number: int) -> Tensor:
        for k in range(self.num_steps):
            stream = 1 + 2 * (number * self.num_steps + k)
            z = counter.normal(SAMPLING_SEED, seeds, (self.dims,), stream=stream, dtype=x.dtype)
            u = counter.uniform(SAMPLING_SEED, seeds, stream=stream + 1, dtype=x.dtype)
            x = self._mala(x, beta, z, u)
        return x

    def _mala(self, x: Tensor, beta: float, z: Tensor, u: Tensor) -> Tensor:
        eps = self.step_size
        density, score = self._density_and_score(x, beta)
        proposal = x + eps * score + math.sqrt(2 * eps) * z
        proposed, proposed_score = self._density_and_score(proposal, beta)
        # -ln q of the Gaussian move from the proposal back to x, and of the one that was made, without their constant
        backward = (x - proposal - eps * proposed_score).square().sum(1) / (4 * eps)
        forward = z.square().sum(1) / 2
        accepted = u.log() < proposed - density + forward - backward
        return torch.where(accepted[:, None], proposal, x)

    def _density_and_score(self, x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            value = self.log_density(leaf, beta)
            (score,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), score


@dataclass(frozen=True)
class RBMPath:
    """From independent units of bias `base_bias` [num_visible] to an RBM, by block Gibbs (Salakhutdinov & Murray 2008).

    f_beta(v) = e^((1 - beta) v . base_bias) sum_h e^(-beta E(v, h)), whose conditionals factorise at every beta. The
    bias of the data's own frequencies, ln(p / (1 - p)), makes a good base; by default the machine's own.
    """

    rbm: RBM
    base_bias: Tensor | None = None

    def draw(self, seeds: Tensor) -> Tensor:
        return _bernoulli(self._bias.expand(len(seeds), -1), seeds, 0)

    def log_density(self, x: Tensor, beta: float) -> Tensor:
        units = self.rbm.weight.shape[1]
        base = x @ self._bias - softplus(self._bias).sum() - units * math.log(2)
        hidden = softplus(beta * self.rbm.hidden_logits(x)).sum(1)
        return (1 - beta) * base + beta * (x @ self.rbm.visible_bias) + hidden

    def step(self, x: Tensor, beta: float, seeds: Tensor, number: int) -> Tensor:
        logits = beta * self.rbm.hidden_logits(x)
        h = _bernoulli(logits, seeds, 2 * number + 1)
        logits = (1 - beta) * self._bias + beta * (h @ self.rbm.weight.T + self.rbm.visible_bias)
        return _bernoulli(logits, seeds, 2 * number + 2)

    @property
    def _bias(self) -> Tensor:
        return self.rbm.visible_bias if self.base_bias is None else self.base_bias


@dataclass(frozen=True)
class GaussianRBMPath:
    """From the visible layer's own Gaussian to a Gaussian-Bernoulli RBM, by block Gibbs: its weights grow with beta."""

    rbm: GaussianBernoulliRBM

    def draw(self, seeds: Tensor) -> Tensor:
        return self._visible(self.rbm.visible_bias.expand(len(seeds), -1), seeds, 0)

    def log_density(self, x: Tensor, beta: float) -> Tensor:
        base = self.rbm.num_hidden * math.log(2) + self.rbm.log_gaussian
        return softplus(beta * self.rbm.hidden_logits(x)).sum(1) - self.rbm.quadratic(x) - (1 - beta) * base

    def step(self, x: Tensor, beta: float, seeds: Tensor, number: int) -> Tensor:
        h = _bernoulli(beta * self.rbm.hidden_logits(x), seeds, 2 * number + 1)
        return self._visible(self.rbm.visible_bias + beta * (h @ self.rbm.weight.T), seeds, 2 * number + 2)

    def _visible(self, mean: Tensor, seeds: Tensor, stream: int) -> Tensor:
        shape, device = tuple(mean.shape[1:]), mean.device
        z = counter.normal(SAMPLING_SEED, seeds, shape, stream=stream, dtype=mean.dtype, device=device)
        return mean + self.rbm.log_std.exp() * z


def machine_path(machine: RBM | GaussianBernoulliRBM) -> RBMPath | GaussianRBMPath:
    """The path to a machine."""
    return RBMPath(machine) if isinstance(machine, RBM) else GaussianRBMPath(machine)


def _bernoulli(logits: Tensor, seeds: Tensor, stream: int) -> Tensor:
    shape, device = tuple(logits.shape[1:]), logits.device
    u = counter.uniform(SAMPLING_SEED, seeds, shape, stream=stream, dtype=logits.dtype, device=device)
    return (u < logits.sigmoid()).to(logits.dtype)
