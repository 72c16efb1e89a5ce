"""Objectives of energies: contrastive divergence, noise-contrastive estimation, recovery likelihood."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from scoreray.data import checks
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.contrastive import denoiser_divergence
from scoreray.trainer.diffusion.denoiser import Denoiser, like
from scoreray.trainer.diffusion.weighting import (
    Constant,
    LevelFunction,
)
from scoreray.trainer.energies.langevin import recovery_chain
from scoreray.trainer.energies.nce import noise_contrastive_loss
from scoreray.trainer.objectives.base import AnyWeighting, BaseObjective, NoisedBatch

NORMALISER_FEATURES = 64  # harmonics of ln sigma, as many as the learned weighting has by default


class EnergyObjective(BaseObjective):
    """Objectives that need an energy, and whose loss is not the denoising error, though it has its minimum."""


@dataclass(frozen=True)
class ContrastiveObjective(EnergyObjective):
    """Contrastive divergence of an energy by short chains (Hinton 2002).

    `chain`: "langevin" for an energy parameterization, at each noise level; "gibbs" for the machines of `network.kind`
    rbm and gaussian_rbm: block-Gibbs sweeps, without noise levels and weighting.
    `num_steps`: Langevin steps, or sweeps.  `step_size`: of a Langevin step, in units of sigma^2.  `noise_scale`: times
    Langevin's noise.
    `start`: where chains begin: at the (noised) sample ("data"), at noise ("noise"; Nijkamp 2019), or where they ended
    last ("persistent"; Tieleman 2008; Du 2019).
    `num_chains`: persistent ones, each at a noise level of its own, that its samples share; None for one a sample of
    the global batch.  `restart`: probability with which such a chain begins again.
    """

    num_steps: int = 1
    step_size: float = 0.1
    start: Literal["data", "noise", "persistent"] = "data"
    chain: Literal["langevin", "gibbs"] = "langevin"
    noise_scale: float = 1.0
    num_chains: int | None = None
    restart: float = 0.0
    kind: Literal["contrastive"] = field(default="contrastive", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, num_steps=self.num_steps)
        checks.positive("objective", step_size=self.step_size, noise_scale=self.noise_scale)
        checks.fraction("objective", restart=self.restart)
        if self.num_chains is not None:
            checks.at_least("objective", 1, num_chains=self.num_chains)

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = self.num_steps + (self.start != "data")
        return noise.normal(seed, positions, (count, *shape), stream=noise.STREAM_CHAIN, dtype=dtype)

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """What has the gradient of the error, and not its value (`contrastive.denoiser_divergence`)."""
        x, sigma, probes, positions, chains = batch.x, batch.sigma, batch.probes, batch.positions, batch.chains
        assert probes is not None, "contrastive divergence needs probes"
        start = None
        if self.start != "data":
            width = (sigma**2 + denoiser.sigma_data**2).sqrt()
            start, probes = like(width, x) * probes[:, -1], probes[:, :-1]
        if chains is not None and start is not None and positions is not None:
            start = chains.take(positions, start)
        scale = self.noise_scale
        error, ends = denoiser_divergence(
            denoiser, x, sigma, batch.condition, probes, step_size=self.step_size, noise_scale=scale, start=start
        )
        if chains is not None and positions is not None and chains.training:
            chains.put(positions, ends)
        return error


@dataclass(frozen=True)
class NoiseContrastiveObjective(EnergyObjective):
    """Noise-contrastive estimation of an energy and of its log-normaliser (Gutmann & Hyvarinen 2010).

    Each sample is classified against `num_noise` values of noise. Of an energy parameterization: at each noise level,
    from N(0, width^2 (sigma^2 + sigma_data^2) I), width 1 being the Gaussian of the noised data's own variance; of the
    machines of `network.kind` rbm and gaussian_rbm: from independent units of the data's mean and variance.
    num_noise: values of noise for each sample.  width: of that Gaussian, relative.
    Data that this noise hardly resembles (many dimensions) teach little.
    """

    weighting: AnyWeighting = field(default=Constant())
    num_noise: int = 1
    width: float = 1.0
    kind: Literal["noise_contrastive"] = field(default="noise_contrastive", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, num_noise=self.num_noise)
        checks.positive("objective", width=self.width)

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return noise.normal(seed, positions, (self.num_noise, *shape), stream=noise.STREAM_CHAIN, dtype=dtype)

    def build_log_partition(self) -> LevelFunction:
        """Of ln Z - d/2 ln(2 pi (sigma^2 + sigma_data^2)): 0 where the energy is the quadratic alone."""
        return LevelFunction(NORMALISER_FEATURES)

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """The logistic loss [B], whose gradient for many values of noise is that of the log-likelihood."""
        assert batch.probes is not None, "noise-contrastive estimation draws noise"
        assert batch.log_partition is not None, "noise-contrastive estimation learns a log-normaliser"
        variance = batch.sigma**2 + denoiser.sigma_data**2
        log_z = batch.log_partition.at(batch.sigma)

        def log_ratio(x: Tensor) -> Tensor:
            """ln p_model - ln p_noise; the Gaussians' d/2 ln(2 pi variance) cancels."""
            squared = x.flatten(1).square().sum(1) / (2 * self.width**2 * variance)
            energy = denoiser.energy(x, batch.sigma, batch.condition)
            return squared + x[0].numel() * math.log(self.width) - energy - log_z

        drawn = self.width * like(variance.sqrt(), batch.x)[:, None] * batch.probes
        return noise_contrastive_loss(log_ratio(batch.x), torch.stack([log_ratio(y) for y in drawn.unbind(1)], 1))


@dataclass(frozen=True)
class RecoveryLikelihoodObjective(EnergyObjective):
    """Diffusion recovery likelihood of an energy: of a noised sample x given a noisier one (Gao 2021).

    With x~ = x + s z, s^2 = (ratio^2 - 1) sigma^2, so that x~ is at noise level ratio sigma, p(x | x~) has the energy
    E(x; sigma) + |x~ - x|^2 / (2 s^2): nearly a Gaussian where the ratio is near 1, which num_steps of Langevin
    dynamics from x~ sample, each over a time of step_size s^2 (`recovery_chain`).
    ratio: of the two noise levels, above 1.  num_steps: of Langevin dynamics.  step_size: of one, in units of s^2.
    """

    ratio: float = 1.2
    num_steps: int = 20
    step_size: float = 0.1
    kind: Literal["recovery_likelihood"] = field(default="recovery_likelihood", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, num_steps=self.num_steps)
        checks.positive("objective", step_size=self.step_size)
        checks.between("objective", 1.001, 1000, ratio=self.ratio)

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return noise.normal(seed, positions, (1 + self.num_steps, *shape), stream=noise.STREAM_CHAIN, dtype=dtype)

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """E(x) - E(sample of p(x | x~)), times 2 sigma^4 / (s^2 d): for a ratio near 1 it has the gradient of the
        denoising error at x~, for any of -ln p(x | x~)."""
        x, sigma, condition, probes = batch.x, batch.sigma, batch.condition, batch.probes
        assert probes is not None, "recovery likelihood needs probes"
        growth = self.ratio**2 - 1
        with torch.no_grad():
            added = math.sqrt(growth) * like(sigma, x)
            score = lambda y: denoiser.score(y, sigma, condition)  # noqa: E731
            recovered = recovery_chain(score, x + added * probes[:, 0], added, self.step_size, probes[:, 1:])
        difference = denoiser.energy(x, sigma, condition) - denoiser.energy(recovered, sigma, condition)
        return difference * 2 * sigma**2 / (growth * x[0].numel())
