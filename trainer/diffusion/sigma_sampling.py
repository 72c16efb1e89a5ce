"""Which noise levels training sees: each a quantile function of a uniform number.

So a sample's sigma is a pure function of its place in the run, and any of them can be stratified: the uniforms of one
global batch are then spread evenly over (0, 1), shifted together by one random number (Kingma 2021, appendix I.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from pydantic import ConfigDict
from torch import Tensor

from scoreray.data import checks
from scoreray.trainer.diffusion.noise import STREAM_SIGMA, uniform
from scoreray.trainer.diffusion.process import Process

MAX_LOGIT = 50.0  # beyond it, on either side, t is one of its ends
MAX_P_STD = 5.0  # of ln sigma: 1% of the noise levels are then more than a factor of 4e5 from the middle


class BaseSigmaSampling:
    """A subclass is a frozen dataclass with a `kind` and `quantile`, and `stratified` where a person may choose it.

    `stratified`: the noise levels of one batch are spread evenly over their law, which keeps it and varies less.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    stratified = False

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        """The noise levels at which the distribution function is u: float64 [B] in (0, 1) -> [B]."""
        raise NotImplementedError

    def importance(self, sigma: Tensor, process: Process) -> Tensor | None:
        """What the loss at sigma [B] is multiplied by, [B]; None where the law itself is what a loss is a mean over."""
        return None


@dataclass(frozen=True)
class LogNormal(BaseSigmaSampling):
    """ln sigma is normal (Karras 2022, table 1).

    P_mean: its mean.  P_std: its standard deviation.
    """

    P_mean: float = -1.2
    P_std: float = 1.2
    stratified: bool = False
    kind: Literal["log_normal"] = field(default="log_normal", kw_only=True)

    def __post_init__(self) -> None:
        checks.between("sigma_sampling", *map(math.log, checks.NOISE_LEVELS), P_mean=self.P_mean)
        checks.positive("sigma_sampling", P_std=self.P_std)
        checks.between("sigma_sampling", 0, MAX_P_STD, P_std=self.P_std)

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        return (self.P_mean + self.P_std * torch.special.ndtri(u)).exp()


@dataclass(frozen=True)
class LogUniform(BaseSigmaSampling):
    """ln sigma is uniform.

    sigma_min, sigma_max: between which; None: the process's own end.
    """

    sigma_min: float | None = None
    sigma_max: float | None = None
    stratified: bool = False
    kind: Literal["log_uniform"] = field(default="log_uniform", kw_only=True)

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("sigma_min", "sigma_max") if getattr(self, name) is not None}
        checks.noise_level("sigma_sampling", **given)
        if len(given) == 2:
            checks.ordered("sigma_sampling", "sigma_min", "sigma_max", given["sigma_min"], given["sigma_max"])

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        low, high = process.sigma_range()
        low, high = self.sigma_min or low, self.sigma_max or high
        return low * (u * math.log(high / low)).exp()


@dataclass(frozen=True)
class UniformT(BaseSigmaSampling):
    """t is uniform over the process's [t_min, t_max] (Song 2021)."""

    stratified: bool = False
    kind: Literal["uniform_t"] = field(default="uniform_t", kw_only=True)

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        return process.noise_to_signal(_between(u, process))


@dataclass(frozen=True)
class LogitNormal(BaseSigmaSampling):
    """The logit of t, scaled to [0, 1], is normal: the middle of the way is seen most (Esser 2024, eq. 19).

    mean: of the logit.  std: its standard deviation.
    """

    mean: float = 0.0
    std: float = 1.0
    stratified: bool = False
    kind: Literal["logit_normal"] = field(default="logit_normal", kw_only=True)

    def __post_init__(self) -> None:
        checks.between("sigma_sampling", -MAX_LOGIT, MAX_LOGIT, mean=self.mean)
        checks.positive("sigma_sampling", std=self.std)
        checks.between("sigma_sampling", 0, MAX_LOGIT, std=self.std)

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        # Not torch.sigmoid, whose last bit depends on a value's place in the tensor.
        fraction = 1 / (1 + (-self.mean - self.std * torch.special.ndtri(u)).exp())
        return process.noise_to_signal(_between(fraction, process))


@dataclass(frozen=True)
class LadderUniform(BaseSigmaSampling):
    """Each noise level of the process's ladder, even in t, equally often.

    num_levels: rungs of the ladder.
    With VE it is NCSN's geometric ladder, with DDPM(num_steps=num_levels) the DDPM's steps (Song 2019; Ho 2020).
    """

    num_levels: int = 1000
    stratified: bool = False
    kind: Literal["ladder"] = field(default="ladder", kw_only=True)

    def __post_init__(self) -> None:
        checks.at_least("sigma_sampling", 2, num_levels=self.num_levels)

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        step = (u * self.num_levels).floor().clamp(max=self.num_levels - 1)  # u may round to 1
        return process.noise_to_signal(_between(step / (self.num_levels - 1), process))


@dataclass(frozen=True)
class LikelihoodSampling(BaseSigmaSampling):
    """t in proportion to g^2 / s^2, s the process's own sigma(t): importance sampling for `weighting: likelihood`
    (Song 2021b, section 4.3).

    g^2 / s^2 = 2 (s' / s - alpha' / alpha) = 2 d ln(s / alpha) / dt, so under every process s / alpha is log-uniform
    over the process's range. Losses are divided by this density and multiplied by that of uniform t: of any
    weighting they have the mean that they have under `uniform_t`. Under `likelihood`, where only the noise's error is
    left, times a constant, they vary far less.
    """

    stratified: bool = False
    kind: Literal["likelihood"] = field(default="likelihood", kw_only=True)

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        return LogUniform().quantile(u, process)

    def importance(self, sigma: Tensor, process: Process) -> Tensor:
        low, high = process.sigma_range()
        t = process.time(sigma.to(torch.float64))
        rate = (process.diffusion(t) / process.sigma(t)).square()
        return (2 * math.log(high / low) / (process.t_max - process.t_min) / rate).to(sigma.dtype)


SigmaSampling = LogNormal | LogUniform | UniformT | LogitNormal | LadderUniform | LikelihoodSampling

SIGMA_SAMPLINGS: dict[str, type[SigmaSampling]] = {config.kind: config for config in get_args(SigmaSampling)}


def sample_sigma(
    sampling: BaseSigmaSampling,
    process: Process,
    seed: int,
    positions: Tensor,
    global_batch_size: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The noise level of each position [B]: a function of (seed, position) alone, computed in float64.

    Stratified ones also need `global_batch_size`: positions [k n, (k + 1) n) are the k-th batch.
    """
    if not sampling.stratified:
        u = uniform(seed, positions, stream=STREAM_SIGMA, dtype=torch.float64)
    else:
        batch = torch.div(positions, global_batch_size, rounding_mode="floor")
        shift = uniform(seed, batch, stream=STREAM_SIGMA, dtype=torch.float64)
        place = (positions - batch * global_batch_size).to(torch.float64) / global_batch_size
        u = (shift + place).remainder(1.0).clamp(min=2.0**-53)  # 0 is a normal quantile of minus infinity
    return sampling.quantile(u, process).to(dtype)


def _between(fraction: Tensor, process: Process) -> Tensor:
    return process.t_min + fraction * (process.t_max - process.t_min)
