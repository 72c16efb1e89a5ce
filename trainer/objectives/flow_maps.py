"""Flow maps in continuous time: D(x, sigma, rho), with which one Euler step from sigma ends on its path at rho.

On the probability-flow ODE dx/dsigma = v = (x - E[x0|x]) / sigma, D is the average of the denoised estimate over the
way down: x_rho = (rho / sigma) x + (1 - rho / sigma) D(x, sigma, rho). Differentiated along the path, rho fixed:

    r = (rho / sigma) (D - E[x0|x]) + (sigma - rho) dD/dsigma = 0,

at rho = sigma denoising, at rho = 0 that the consistency function D(x, sigma, 0) is constant. r is linear in E[x0|x],
so a clean sample x0 may stand for it (Geng 2025, eq. 10; Lu & Song 2024, eq. 6), or a teacher's estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from scoreray.data import checks
from scoreray.data.units import Count
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.condition import as_condition
from scoreray.trainer.diffusion.denoiser import Denoiser, like
from scoreray.trainer.diffusion.jacobian import path_derivative
from scoreray.trainer.diffusion.levels import TARGET_LEVEL, with_target_level
from scoreray.trainer.diffusion.sigma_sampling import LogNormal
from scoreray.trainer.diffusion.weighting import EDMWeighting
from scoreray.trainer.objectives.base import AnySampling, AnyWeighting, FewStepObjective, Map, NoisedBatch

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class FlowMapObjective(FewStepObjective):
    """What objectives of flow maps share: the residual r, whose gradient is that of |D - sg(D - scale r)|^2."""

    weighting: AnyWeighting = field(default=EDMWeighting())
    sigma_sampling: AnySampling = field(default=LogNormal(-1.0, 1.4))

    def target_level(self, batch: NoisedBatch, sigma_data: float) -> Tensor:
        """rho [B] of each sample."""
        raise NotImplementedError

    def scale(self, squared: Tensor) -> Tensor:
        """What the gradient at a sample is multiplied by [B], from r's mean square in the network's output units."""
        raise NotImplementedError

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """r's mean square [B], with the scaled gradient."""
        x, sigma, rho, given = batch.x, batch.sigma, self.target_level(batch, denoiser.sigma_data), batch.condition
        clean = batch.x0 if batch.teacher is None else batch.teacher.denoise(x, sigma, given)
        known = denoiser.conditions or {}
        if TARGET_LEVEL in known:
            given = with_target_level(as_condition(given, known), rho, x)
        slope = (x - clean) / like(sigma, x)
        derivative = path_derivative(lambda x, sigma: denoiser.denoise(x, sigma, given), x, sigma, slope)
        denoised = denoiser.denoise(x, sigma, given)
        with torch.no_grad():
            residual = residual_of(denoised, derivative, clean, sigma, rho)
            squared = residual.flatten(1).square().mean(1)
            scale = self.scale(squared * (sigma**-2 + denoiser.sigma_data**-2))
        surrogate = 2 * (denoised * residual).flatten(1).mean(1) * scale
        return surrogate + (squared - surrogate).detach()


def residual_of(denoised: Tensor, derivative: Tensor, clean: Tensor, sigma: Tensor, rho: Tensor) -> Tensor:
    """r [B, ...] of D(x, sigma, rho) and its derivative along the path; sigma and rho [B]."""
    return like(rho / sigma, denoised) * (denoised - clean) + like(sigma - rho, denoised) * derivative


@dataclass(frozen=True)
class ContinuousConsistencyObjective(FlowMapObjective):
    """A consistency model in continuous time (sCM; Lu & Song 2024): the network gives D(x, sigma, 0) alone.

    The tangent is normalised: the gradient has r / (|r| + tangent_constant), |r| the root mean square in the network's
    output units.
    tangent_constant: in that formula.  warmup_images: over which r goes from that of rho = sigma, denoising, to that of
    rho = 0.
    """

    tangent_constant: float = 0.1
    warmup_images: Count = 1_000_000
    kind: Literal["continuous_consistency"] = field(default="continuous_consistency", kw_only=True)

    map: ClassVar[Map] = "consistency"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.positive("objective", tangent_constant=self.tangent_constant)
        checks.at_least("objective", 0, warmup_images=self.warmup_images)

    def target_level(self, batch: NoisedBatch, sigma_data: float) -> Tensor:
        assert batch.positions is not None
        left = 1 - (1 + batch.positions.to(torch.float64)) / max(1, self.warmup_images)
        return batch.sigma * left.clamp(min=0).to(batch.sigma)

    def scale(self, squared: Tensor) -> Tensor:
        return 1 / (squared.sqrt() + self.tangent_constant)


@dataclass(frozen=True)
class MeanFlowObjective(FlowMapObjective):
    """A flow map of any pair of levels (MeanFlow; Geng 2025): the network takes rho as its condition `target_level`.

    same_share: of samples with rho = sigma, which train the plain denoiser; None for 0.75, and 0.25 with a teacher.
    end_share: of the others with rho = 0, where every way of sampling ends; the rest have 2/pi atan(rho / sigma_data)
    uniform below sigma's. The gradient has r / (|r|^2 + weight_constant)^weight_power, |r|^2 the mean square in the
    network's output units.
    """

    same_share: float | None = None
    end_share: float = 0.25
    weight_power: float = 0.5
    weight_constant: float = 0.01
    kind: Literal["mean_flow"] = field(default="mean_flow", kw_only=True)

    map: ClassVar[Map] = "flow_map"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.fraction("objective", end_share=self.end_share)
        if self.same_share is not None:
            checks.fraction("objective", same_share=self.same_share)
        checks.between("objective", 0, 2, weight_power=self.weight_power)
        checks.positive("objective", weight_constant=self.weight_constant)

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A number in [0, 1) that chooses rho, [B]: where noise levels are stratified, evenly spread over positions
        by the golden ratio, and so over the pairs too."""
        if not self.sigma_sampling.stratified:
            return noise.uniform(seed, positions, stream=noise.STREAM_TARGET, dtype=torch.float64)
        shift = noise.uniform(seed, torch.zeros_like(positions[:1]), stream=noise.STREAM_TARGET, dtype=torch.float64)
        return (shift + GOLDEN * positions.to(torch.float64)).remainder(1.0)

    def target_level(self, batch: NoisedBatch, sigma_data: float) -> Tensor:
        assert batch.probes is not None, "mean_flow draws pairs"
        same = self.same_share
        if same is None:
            same = 0.75 if batch.teacher is None else 0.25
        u, end = batch.probes, same + (1 - same) * self.end_share
        share = ((u - end) / max(1 - end, 1e-9)).clamp(0, 1)
        rho = (sigma_data * (share * (batch.sigma.to(u) / sigma_data).atan()).tan()).to(batch.sigma)
        return torch.where(u < same, batch.sigma, torch.where(u < end, torch.zeros_like(rho), rho))

    def scale(self, squared: Tensor) -> Tensor:
        return (squared + self.weight_constant) ** -self.weight_power
