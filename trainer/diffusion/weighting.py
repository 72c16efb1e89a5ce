"""How much each noise level counts: lambda(sigma) of the denoising error |D - x_0|^2.

A weight of another error is one of this: |score error|^2 is |D - x_0|^2 / sigma^4, |noise error|^2 is / sigma^2, EDM's
|F error|^2 is / c_out^2, the velocity's is ((1 + sigma) / sigma)^2 times it. sigma is the noise-to-signal ratio.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from pydantic import ConfigDict
from torch import Tensor, nn

from scoreray.data import checks
from scoreray.trainer.diffusion.buffers import ExactBuffers
from scoreray.trainer.diffusion.process import Process


class BaseWeighting:
    """A subclass is a frozen dataclass with a `kind` and `weight`, or `build` where it has parameters or state."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    needs_error: ClassVar[bool] = False
    """It learns from the error's value, so it can't weigh an objective that has the error's gradient alone."""

    def weight(self, sigma: Tensor, process: Process, sigma_data: float) -> Tensor:
        """lambda(sigma), [B] -> [B]."""
        raise NotImplementedError

    def build(self, process: Process, sigma_data: float) -> nn.Module:
        """A module (error [B], sigma [B]) -> loss [B], the weighted error."""
        return FixedWeight(self, process, sigma_data)


@dataclass(frozen=True)
class Sigma2(BaseWeighting):
    """sigma^2 on the score's error, 1 on the noise's: 1 / sigma^2 here (Song 2019; Ho 2020's simple loss)."""

    kind: Literal["sigma2"] = field(default="sigma2", kw_only=True)

    def weight(self, sigma: Tensor, process: Process, sigma_data: float) -> Tensor:
        return sigma**-2


@dataclass(frozen=True)
class Constant(BaseWeighting):
    """1: every noise level's error of the clean image counts as it is."""

    kind: Literal["constant"] = field(default="constant", kw_only=True)

    def weight(self, sigma: Tensor, process: Process, sigma_data: float) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(frozen=True)
class LikelihoodWeighting(BaseWeighting):
    """g(t)^2 on the score's error in the process's frame, which bounds the likelihood when t is uniform (Song 2021b).

    Here it is g^2 / (alpha r^2)^2 with r = sigma / alpha, which equals -d SNR / dt (Kingma 2021).
    """

    kind: Literal["likelihood"] = field(default="likelihood", kw_only=True)

    def weight(self, sigma: Tensor, process: Process, sigma_data: float) -> Tensor:
        ratio = sigma.to(torch.float64)
        t = process.time(ratio)
        return (process.diffusion(t) / (process.alpha(t) * ratio**2)).square().to(sigma.dtype)


@dataclass(frozen=True)
class EDMWeighting(BaseWeighting):
    """(sigma^2 + sd^2) / (sigma sd)^2 = 1 / c_out^2, so that the network's own output errs equally (Karras 2022)."""

    kind: Literal["edm"] = field(default="edm", kw_only=True)

    def weight(self, sigma: Tensor, process: Process, sigma_data: float) -> Tensor:
        return sigma**-2 + sigma_data**-2


@dataclass(frozen=True)
class Velocity(BaseWeighting):
    """((1 + sigma) / sigma)^2: 1 on the error of the velocity z - x_0 (Lipman 2023)."""

    kind: Literal["velocity"] = field(default="velocity", kw_only=True)

    def weight(self, sigma: Tensor, process: Process, sigma_data: float) -> Tensor:
        return (1 + 1 / sigma) ** 2


@dataclass(frozen=True)
class MinSNR(BaseWeighting):
    """min(SNR, gamma), SNR = 1 / sigma^2 (Hang 2023).

    gamma: the largest weight.
    """

    gamma: float = 5.0
    kind: Literal["min_snr"] = field(default="min_snr", kw_only=True)

    def __post_init__(self) -> None:
        checks.positive("weighting", gamma=self.gamma)

    def weight(self, sigma: Tensor, process: Process, sigma_data: float) -> Tensor:
        return (sigma**-2).clamp(max=self.gamma)


@dataclass(frozen=True)
class SoftMinSNR(BaseWeighting):
    """gamma SNR / (SNR + gamma) = 1 / (sigma^2 + 1 / gamma) (Crowson 2024).

    gamma: what the weight tends to where the noise goes.
    """

    gamma: float = 4.0
    kind: Literal["soft_min_snr"] = field(default="soft_min_snr", kw_only=True)

    def __post_init__(self) -> None:
        checks.positive("weighting", gamma=self.gamma)

    def weight(self, sigma: Tensor, process: Process, sigma_data: float) -> Tensor:
        return 1 / (sigma**2 + 1 / self.gamma)


@dataclass(frozen=True)
class Adaptive(BaseWeighting):
    """1 / E(sigma), E the running mean of the error in bins of ln sigma, so that every noise level's loss is about 1.

    num_bins: of ln sigma.  half_life: samples of a bin after which an old error counts half.
    """

    num_bins: int = 64
    half_life: float = 1000.0
    kind: Literal["adaptive"] = field(default="adaptive", kw_only=True)

    needs_error: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.at_least("weighting", 1, num_bins=self.num_bins)
        checks.positive("weighting", half_life=self.half_life)

    def build(self, process: Process, sigma_data: float) -> nn.Module:
        return AdaptiveWeight(self, sigma_data)


@dataclass(frozen=True)
class Learned(BaseWeighting):
    """EDM's lambda / e^u(sigma), plus u(sigma): u is trained with the network (Karras 2024, eq. 14).

    num_features: of ln sigma, which u is made from.
    """

    num_features: int = 64
    kind: Literal["learned"] = field(default="learned", kw_only=True)

    needs_error: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.at_least("weighting", 2, num_features=self.num_features)

    def build(self, process: Process, sigma_data: float) -> nn.Module:
        return LearnedWeight(self, sigma_data)


Weighting = Sigma2 | Constant | LikelihoodWeighting | EDMWeighting | Velocity | MinSNR | SoftMinSNR | Adaptive | Learned

WEIGHTINGS: dict[str, type[Weighting]] = {config.kind: config for config in get_args(Weighting)}


class FixedWeight(nn.Module):
    """loss = lambda(sigma) error."""

    def __init__(self, config: BaseWeighting, process: Process, sigma_data: float):
        super().__init__()
        self.config, self.process, self.sigma_data = config, process, sigma_data

    def forward(self, error: Tensor, sigma: Tensor) -> Tensor:
        return self.config.weight(sigma, self.process, self.sigma_data) * error


class LevelFunction(nn.Module):
    """A learned function of the noise level, linear in harmonics of ln sigma and 0 at the start."""

    def __init__(self, num_features: int):
        super().__init__()
        self.linear = nn.Linear(2 * (num_features // 2), 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def at(self, sigma: Tensor) -> Tensor:
        """[B] -> [B], float32."""
        half = self.linear.in_features // 2
        # ln(sigma) / 4 spans about 3; frequencies up to 4 pi resolve a factor e in sigma.
        frequencies = torch.arange(1, half + 1, device=sigma.device) * (4 * math.pi / half)
        phases = sigma.float().log()[:, None] / 4 * frequencies
        features = torch.cat([phases.cos(), phases.sin()], dim=1) * half**-0.5
        return self.linear(features.to(self.linear.weight.dtype)).float().squeeze(1)


class LearnedWeight(LevelFunction):
    """loss = lambda / e^u error + u, u(sigma) a `LevelFunction` (Karras 2024, eq. 14).

    At a fixed sigma it is smallest at u = ln(lambda E), so u is the log of the expected loss.
    """

    def __init__(self, config: Learned, sigma_data: float):
        super().__init__(config.num_features)
        self.sigma_data = sigma_data

    def forward(self, error: Tensor, sigma: Tensor) -> Tensor:
        u = self.at(sigma)
        return (sigma**-2 + self.sigma_data**-2) * error * (-u).exp() + u


class AdaptiveWeight(ExactBuffers):
    """loss = error / E(sigma). E starts at c_out^2, the error of an EDM network that outputs 0.

    In training mode each call updates E after using it, with the samples of all ranks, so that all hold the same E.
    """

    LN_SIGMA = (math.log(1e-3), math.log(1e3))  # range of the bins; levels outside it share the first or last one
    ratio: Tensor

    def __init__(self, config: Adaptive, sigma_data: float):
        super().__init__()
        self.sigma_data, self.num_bins, self.half_life = sigma_data, config.num_bins, config.half_life
        self.register_buffer("ratio", torch.ones(config.num_bins))  # E / c_out^2, smooth where E is not

    def forward(self, error: Tensor, sigma: Tensor) -> Tensor:
        low, high = self.LN_SIGMA
        place = (sigma.float().log() - low) / (high - low) * self.num_bins
        bins = place.to(torch.int64).clamp(0, self.num_bins - 1)
        relative = (sigma**-2 + self.sigma_data**-2) * error
        # A bin whose samples are all predicted exactly has E = 0; its weight stays finite.
        loss = relative / self.ratio[bins].clamp(min=1e-6)
        if self.training:
            self._observe(bins, relative.detach().float())
        return loss

    @torch.no_grad()
    def _observe(self, bins: Tensor, relative: Tensor) -> None:
        finite = relative.isfinite()  # a sample that stops the run must not spoil E first
        sums = torch.zeros(2, self.num_bins, device=bins.device)
        sums[0].index_add_(0, bins, relative.where(finite, 0.0))
        sums[1].index_add_(0, bins, finite.float())
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        total, count = sums
        # A bin decays with its own samples, not with steps: rare noise levels keep what little they have seen.
        keep = 0.5 ** (count / self.half_life)
        self.ratio.mul_(keep).add_((1 - keep) * total / count.clamp(min=1))
