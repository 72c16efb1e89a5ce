"""Whether a denoiser is the posterior mean of held-out data at each noise level, without knowing that mean.

Its residual R = x_0 - D(x) has E[R . h(x)] = E[(D* - D)(x) . h(x)] for every function h, D* the posterior mean: so all
of these are 0 if D is D*, and each that is not proves a difference of at least E[R . h]^2 / E|h|^2 <= E|D - D*|^2 =
sigma^4 times the Fisher divergence (Vincent 2011). `FUNCTIONS` are a few h: constants, the input, the noise that D
sees, a curve of the input, waves. What no combination of them shows stays unseen: no finding is no proof of D*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreray.sampling.measures.held_out import Denoise, HeldOut, noisy_batches
from scoreray.trainer.diffusion import noise

WAVES = 6
WAVE_SEED = 0xCA11
FUNCTIONS = ("mean", "input", "noise", "curve", *(f"wave {i + 1}" for i in range(WAVES)))
LEAST = 1e-6  # of the largest eigenvalue of the functions' covariance: what is below is one that others hold


@dataclass(frozen=True)
class ResidualProducts:
    """Of n samples at some noise levels, per dimension: `with_residual` [n, levels, K] is R . h_k / d and `among`
    [n, levels, K, K] h_j . h_k / d, float64; K the number of FUNCTIONS."""

    with_residual: Tensor
    among: Tensor


@dataclass(frozen=True)
class LevelCalibration:
    """At one noise level: z-scores by function, the p-value of all of them together (Hotelling's T^2), and `removed`
    [n], the squared error per dimension that a combination of the functions removes, fitted on the other samples' half.
    """

    z_scores: list[float]
    p_value: float
    removed: Tensor


@torch.no_grad()
def residual_products(
    denoiser: Denoise, held: HeldOut, sigmas: Sequence[float], sigma_data: float, batch_size: int,
    device: torch.device | str = "cpu",
) -> ResidualProducts:  # fmt: skip
    """The same noisy samples as of `denoising_errors`."""
    found, gram = [], []
    for clean, z, given in noisy_batches(denoiser, held, batch_size, device):
        products, grams = [], []
        for sigma in sigmas:
            noisy = clean + sigma * z
            denoised = denoiser(noisy, torch.full((len(clean),), sigma, device=device), given)
            h = functions(noisy - held.mean.to(device), (noisy - denoised) / sigma, math.hypot(sigma, sigma_data))
            residual = (clean - denoised).double().flatten(1)
            products.append((h @ residual[..., None]).squeeze(-1) / residual.shape[1])
            grams.append(h @ h.transpose(1, 2) / residual.shape[1])
        found.append(torch.stack(products, 1).cpu())
        gram.append(torch.stack(grams, 1).cpu())
    return ResidualProducts(torch.cat(found), torch.cat(gram))


def functions(centered: Tensor, seen_noise: Tensor, scale: float) -> Tensor:
    """FUNCTIONS at noisy samples, float64 [B, K, d]: of x - mean, of (x - D) / sigma, and of the scale of x."""
    x = centered.double().flatten(1) / scale
    dims = x.shape[1]
    numbers = torch.arange(2 * WAVES, device=x.device)
    lines = noise.normal(WAVE_SEED, numbers, (dims,), dtype=torch.float64)
    along, across = lines[:WAVES] * (2 / math.sqrt(dims)), lines[WAVES:]
    phases = torch.arange(WAVES, dtype=torch.float64, device=x.device)
    waves = (x @ along.T + phases).cos()[..., None] * across
    return torch.cat([torch.stack([torch.ones_like(x), x, seen_noise.double().flatten(1), (2 * x).sin()], 1), waves], 1)


def calibration(with_residual: Tensor, among: Tensor) -> LevelCalibration:
    """What the products [n, K] and [n, K, K] of one noise level say, n some times K."""
    error = with_residual.std(0) / math.sqrt(len(with_residual))
    z = with_residual.mean(0) / error.clamp_min(1e-300)
    return LevelCalibration(z.tolist(), _hotelling(with_residual), _removed(with_residual, among))


def _removed(b: Tensor, gram: Tensor) -> Tensor:
    """|R|^2 - |R - beta h|^2 = 2 beta b - beta^T gram beta of each sample, beta the least squares of the other half.

    Its mean is E|D - D*|^2 - E|D + beta h - D*|^2: below E|D - D*|^2 whatever beta is, and 0 or less on average where
    there is nothing to find.
    """
    even = torch.arange(len(b)) % 2 == 0
    removed = torch.empty(len(b), dtype=torch.float64)
    for here in (even, ~even):
        beta = torch.linalg.lstsq(gram[~here].mean(0), b[~here].mean(0)[:, None], driver="gelsd", rcond=LEAST).solution[
            :, 0
        ]
        removed[here] = 2 * b[here] @ beta - torch.einsum("j,njk,k->n", beta, gram[here], beta)
    return removed


def _hotelling(b: Tensor) -> float:
    """The p-value of E b = 0 for rows b [n, K], by Hotelling's T^2 over the directions in which they vary."""
    from scipy.stats import f

    scaled = b / b.square().mean(0).sqrt().clamp_min(1e-300)
    n, mean = len(b), scaled.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(scaled.T))
    kept = values > LEAST * values[-1]
    rank = int(kept.sum())
    squared = n * float(((vectors.T @ mean)[kept].square() / values[kept]).sum())
    return float(f.sf(squared * (n - rank) / (rank * (n - 1)), rank, n - rank))
