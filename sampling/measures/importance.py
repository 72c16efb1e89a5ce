"""Importance sampling of p(x) for models with latent variables: ln of a mean weight, and how many samples carry it.

p(x) = E p(x, z) / q(z | x) over a proposal q. The log of a mean of K weights is below ln p(x) in expectation, and
tighter with every sample more (Burda 2016, theorem 1); at K = 1 it is the evidence lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from scoreray.sampling.samplers.noise import SAMPLING_SEED
from scoreray.trainer.diffusion import noise
from scoreray.trainer.networks.rbm import RBM, GaussianBernoulliRBM

IMPORTANCE_STREAM = 1 << 23  # far from a sampler's draws, and from those of the denoising error

Proposal = Literal["posterior", "prior"]
"""The model's own q(z | x), or what knows nothing of x."""


class LatentVariableModel(Protocol):
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    def decode(self, z: Tensor) -> Tensor: ...


def log_mean_weight(log_weights: Tensor) -> Tensor:
    """ln of the mean of weights [..., K] -> [...]: the bound of Burda 2016, eq. 8."""
    return log_weights.logsumexp(-1) - math.log(log_weights.shape[-1])


def effective_samples(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 of weights [..., K] -> [...]: as many equal weights would vary as much."""
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()


def log_gaussian(x: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """ln N(x; mean, std^2) of independent values [B, ...], summed: [B]."""
    width = torch.as_tensor(std, dtype=x.dtype, device=x.device)
    logs = -((x - mean) / width).square() / 2 - width.log() - math.log(2 * math.pi) / 2
    return logs.flatten(1).sum(1)


def log_laplace(x: Tensor, mean: Tensor, scale: float) -> Tensor:
    """ln of independent Laplace densities e^(-|x - mean| / scale) / (2 scale) [B, ...], summed: [B]."""
    return (-(x - mean).abs() / scale - math.log(2 * scale)).flatten(1).sum(1)


@torch.no_grad()
def autoencoder_log_weights(
    model: LatentVariableModel,
    x: Tensor,
    numbers: Tensor,
    num_samples: int,
    log_likelihood: Callable[[Tensor, Tensor], Tensor],
    proposal: Proposal = "posterior",
) -> Tensor:
    """ln p(x | z) N(z; 0, I) / q(z | x) of latents z drawn for x [n, ...]: [n, num_samples] float64.

    log_likelihood: (x, decoded) -> [n], as `log_gaussian` at the decoder's std. numbers: int64 [n], the keys of draws.
    """
    mean, std = model.encode(x)
    if proposal == "prior":
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    found = []
    for number in range(num_samples):
        z = noise.normal(
            SAMPLING_SEED, numbers, tuple(mean.shape[1:]), stream=IMPORTANCE_STREAM + number, dtype=mean.dtype
        )
        z = mean + std * z.to(mean.device)
        of_latent = log_gaussian(z.double(), torch.zeros_like(z).double(), 1.0)
        of_proposal = log_gaussian(z.double(), mean.double(), std.double())
        found.append(log_likelihood(x.double(), model.decode(z).double()) + of_latent - of_proposal)
    return torch.stack(found, 1)


@torch.no_grad()
def machine_log_weights(
    machine: RBM | GaussianBernoulliRBM, v: Tensor, numbers: Tensor, num_samples: int, proposal: Proposal = "posterior"
) -> Tensor:
    """ln e^(-E(v, h)) / q(h | v) of hidden units drawn for v [n, num_visible]: [n, num_samples] float64.

    The mean weight is e^(-free energy), without 1 / Z. An RBM's p(h | v) factorises, so its mean-field posterior is
    exact and every weight equal; "prior" draws each unit as at weights of 0.
    """
    logits = machine.hidden_logits(v)
    if proposal == "prior":
        logits = machine.hidden_bias.to(logits).expand_as(logits)
    found = []
    for number in range(num_samples):
        u = noise.uniform(
            SAMPLING_SEED, numbers, tuple(logits.shape[1:]), stream=IMPORTANCE_STREAM + number, dtype=logits.dtype
        )
        h = (u.to(logits.device) < logits.sigmoid()).to(logits.dtype)
        of_proposal = logsigmoid(torch.where(h > 0, logits, -logits)).double().sum(1)
        found.append(-machine.energy(v, h).double() - of_proposal)
    return torch.stack(found, 1)
