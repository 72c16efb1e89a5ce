"""The diffusion bound on log-likelihood as a number: prior, diffusion and reconstruction terms (Kingma 2021, eq. 11).

    -ln p(x) <= KL(q(z_max | x) | p(z_max)) + 1/2 E int |x - D|^2 d SNR + E[-ln p(x | z_min)],     SNR = 1 / sigma^2.

It takes forward passes only, and with the exact denoiser it is the log-likelihood itself. In ln sigma the diffusion
term is E |x - D|^2 / sigma^2: that is t in proportion to g^2 / sigma(t)^2 under any process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreray.sampling.samplers.noise import SAMPLING_SEED
from scoreray.trainer.diffusion import noise as counter
from scoreray.trainer.diffusion.condition import AnyCondition, encoded
from scoreray.trainer.diffusion.denoiser import like

Times = Literal["low_discrepancy", "importance"]
Denoise = Callable[..., Tensor]

STREAM_TIMES = 1 << 23  # and the streams after it, one for each noise level of a sample
NEAR = 0.1  # of sigma_min, see `_AtLevel`


@dataclass(frozen=True)
class DiffusionBound:
    """The three terms [B] in nats, float64, of each row; `nfe` calls of the denoiser for each."""

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    nfe: int

    @property
    def nats(self) -> Tensor:
        """The bound below ln p(x), [B]."""
        return -(self.prior + self.diffusion + self.reconstruction)


@torch.no_grad()
def diffusion_bound(
    denoiser: Denoise,
    x: Tensor,
    *,
    sigma_min: float,
    sigma_max: float,
    levels: Annotated[int, Field(ge=1)] = 64,
    times: Times = "low_discrepancy",
    grid_step: float | None = None,
    seeds: Tensor | Sequence[int] | None = None,
    data_mean: Tensor | float = 0.0,
    data_std: float | None = None,
    condition: AnyCondition = None,
) -> DiffusionBound:
    """A bound below ln p(x; sigma_min) of each row of x [B, ...], the density that `likelihood.log_likelihood` gives.

    levels: noise levels of each sample, ln sigma uniform: independent ones ("importance"), or one in each stratum,
    shifted together by a number of the sample's own ("low_discrepancy"; Kingma 2021, appendix I.1).
    grid_step: of data that are exactly on a grid of 256 values from -1 to 1, as 8-bit pictures are. The bound is then
    on ln P(x) of the discrete values and the last term a softmax over them (Kingma 2021, eq. 8); None for densities.
    seeds: one integer a row, which keys its noise. data_mean, data_std: as of `log_likelihood`, whose prior this is.
    """
    if data_std is None:
        data_std = float(getattr(denoiser, "sigma_data", 0.0))
    given = encoded(denoiser, condition)
    arguments = () if given is None else (given,)
    positions = torch.arange(len(x)) if seeds is None else torch.as_tensor(seeds, dtype=torch.int64)
    denoise, low, high, variance = denoiser, sigma_min, sigma_max, data_std**2
    if grid_step is None:
        denoise, low, high = _AtLevel(denoiser, sigma_min), NEAR * sigma_min, math.sqrt(sigma_max**2 - sigma_min**2)
        variance += sigma_min**2 if data_std else 0.0
    gaussian = _GaussianError((x - data_mean).double().flatten(1), variance)
    terms = _Terms(denoise, x, positions.to(x.device), arguments, gaussian)
    last = terms.density(low) if grid_step is None else terms.on_grid(low, grid_step)
    prior = terms.prior(high, sigma_max**2 + data_std**2)
    diffusion = terms.diffusion(low, high, levels, times)
    return DiffusionBound(prior, diffusion, last, levels + (grid_step is None))


@dataclass(frozen=True)
class _AtLevel:
    """The denoiser of data that have noise `level` already: E[y | y + rho z] for y = x_0 + level z'.

    By Tweedie's formula it is x + rho^2 score(x; sqrt(level^2 + rho^2)). Its density has no detail below `level`, so
    that at a tenth of it the posterior of y is N(denoised, rho^2) to 1% of its variance: the last term needs no more.
    """

    denoiser: Denoise
    level: float

    def __call__(self, x: Tensor, rho: Tensor, *condition: AnyCondition) -> Tensor:
        total = (rho.double() ** 2 + self.level**2).sqrt()
        share = like(((rho.double() / total) ** 2).to(x.dtype), x)
        return x + share * (self.denoiser(x, total.to(x.dtype), *condition) - x)


@dataclass(frozen=True)
class _GaussianError:
    """|x - D|^2 / sigma^2 for the denoiser of N(mean, variance I): a control variate, whose mean over the noise and
    integral over ln sigma are known. Most of the diffusion term's noise goes with it, all of it for Gaussian data.

    offset: x - mean, [B, d]. With a variance of 0 (not known) it is 0 itself.
    """

    offset: Tensor
    variance: float

    def error(self, z: Tensor, sigma: Tensor) -> Tensor:
        """At x + sigma z, z [B, d] and sigma [B]: [B]."""
        if not self.variance:
            return torch.zeros_like(sigma)
        kept, level = (self.variance / (self.variance + sigma**2))[:, None], sigma[:, None]
        return ((1 - kept) * self.offset / level - kept * z).square().sum(1)

    def mean(self, sigma: Tensor) -> Tensor:
        """Of `error` over z."""
        if not self.variance:
            return torch.zeros_like(sigma)
        kept = self.variance / (self.variance + sigma**2)
        return ((1 - kept) / sigma).square() * self._squared + kept**2 * self.offset.shape[1]

    def integral(self, low: float, high: float) -> Tensor | float:
        """Of `mean` over ln sigma."""
        if not self.variance:
            return 0.0
        (a, of_a), (b, of_b) = ((sigma**2, self.variance / (self.variance + sigma**2)) for sigma in (low, high))
        noise = (math.log(b * of_b / (a * of_a)) + of_b - of_a) / 2
        return self._squared / self.variance * (of_a - of_b) / 2 + noise * self.offset.shape[1]

    @property
    def _squared(self) -> Tensor:
        return self.offset.square().sum(1)


@dataclass(frozen=True)
class _Terms:
    """The terms of rows x [B, ...] whose noise is keyed by positions [B]."""

    denoise: Denoise
    x: Tensor
    positions: Tensor
    condition: tuple[AnyCondition, ...]
    gaussian: _GaussianError

    def prior(self, high: float, variance: float) -> Tensor:
        """KL(N(x, high^2 I) | N(mean, variance I)), [B]."""
        offset, ratio = self.gaussian.offset, high**2 / variance
        return offset.shape[1] / 2 * (ratio - 1 - math.log(ratio)) + offset.square().sum(1) / (2 * variance)

    def diffusion(self, low: float, high: float, levels: int, times: Times) -> Tensor:
        """int |x - D|^2 / sigma^2 d ln sigma from low to high, [B], at `levels` noise levels of each row."""
        total = torch.zeros(len(self.x), dtype=torch.float64, device=self.x.device)
        for number in range(levels):
            total += self._beyond(low * (math.log(high / low) * self._uniform(number, levels, times)).exp(), number)
        return total * (math.log(high / low) / levels) + self.gaussian.integral(low, high)

    def density(self, low: float) -> Tensor:
        """-ln N(x; D, low^2 I) at noise level low, [B], in expectation over the noise."""
        sigma = torch.full((len(self.x),), low, dtype=torch.float64, device=self.x.device)
        error = self._beyond(sigma, -1) + self.gaussian.mean(sigma)
        return self.x[0].numel() / 2 * math.log(2 * math.pi * low**2) + error / 2

    def on_grid(self, low: float, step: float) -> Tensor:
        """-ln P(x | z), [B], of z = x + low times noise: a softmax of -(z - v)^2 / (2 low^2) over 256 values v."""
        z = self._noise(-1).double().flatten(1)
        noisy = self.x.double().flatten(1) + low * z
        values = -1 + step * torch.arange(256, dtype=torch.float64, device=z.device)
        logits = [-((part[..., None] - values) ** 2) / (2 * low**2) for part in noisy.split(1)]
        normaliser = torch.cat([one.logsumexp(-1) for one in logits])  # one row at a time: 256 times its size
        return (normaliser + z.square() / 2).sum(1)

    def _beyond(self, sigma: Tensor, number: int) -> Tensor:
        """|x - D|^2 / sigma^2 at noise levels sigma [B] less that of the Gaussian at the same noise, [B]."""
        z = self._noise(number)
        level = sigma.to(self.x.dtype)
        denoised = self.denoise(self.x + like(level, self.x) * z, level, *self.condition)
        found = (self.x - denoised).double().flatten(1).square().sum(1) / sigma**2
        return found - self.gaussian.error(z.double().flatten(1), sigma)

    def _uniform(self, number: int, levels: int, times: Times) -> Tensor:
        own = 0 if times == "low_discrepancy" else number
        u = counter.uniform(SAMPLING_SEED, self.positions, stream=STREAM_TIMES + 2 * own, dtype=torch.float64)
        return (u + number) / levels if times == "low_discrepancy" else u

    def _noise(self, number: int) -> Tensor:
        shape, stream = tuple(self.x.shape[1:]), STREAM_TIMES + 2 * number + 3
        return counter.normal(SAMPLING_SEED, self.positions, shape, stream=stream, dtype=self.x.dtype)
