"""Forward processes x_t = alpha(t) x_0 + sigma(t) z, each two functions of t; the rest follows from them.

A process is its dataclass, so a config's `process` section is one. The marginal of x_t / alpha(t) is that of
x_0 + r z with r = sigma(t) / alpha(t), the noise-to-signal ratio: this is the `sigma` that denoisers, samplers and
objectives speak of, and what lets one checkpoint serve all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import torch
from pydantic import ConfigDict
from torch import Tensor

from scoreray.data import checks
from scoreray.data.errors import UserError

Time = Tensor | float


class GaussianProcess:
    """What every process shares. A new one gives `_alpha` and `_sigma`, float64 to float64 and differentiable.

    t is a number or a tensor of any shape; where it meets x [B, ...], a number, a scalar tensor or [B]. All is computed
    in float64 and comes back in the dtype of t (of x where x is given), float32 for a Python number. A number that is
    negative or not finite raises UserError; values of a tensor are not looked at, which would wait for a device.
    `_time_of`, the inverse of the noise-to-signal ratio, is a bisection unless the process knows better.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def t_min(self) -> float:
        """The smallest t of training."""
        return 0.0

    @property
    def t_max(self) -> float:
        """The largest t, where sampling starts."""
        return 1.0

    @property
    def sampling_t_min(self) -> float:
        """The t at which sampling ends before its last denoising."""
        return self.t_min

    def _alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _ratio(self, t: Tensor) -> Tensor:
        return self._sigma(t) / self._alpha(t)

    def _time_of(self, ratio: Tensor) -> Tensor:
        low, high = torch.full_like(ratio, self.t_min), torch.full_like(ratio, self.t_max)
        for _ in range(64):  # float64 has 53 bits: the interval cannot shrink further
            middle = (low + high) / 2
            below = self._ratio(middle) < ratio
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def alpha(self, t: Time) -> Tensor:
        """The factor of the data at t."""
        return self._alpha(_wide(t)).to(_dtype(t))

    def sigma(self, t: Time) -> Tensor:
        """The standard deviation of the noise at t, in the process's own frame."""
        return self._sigma(_wide(t)).to(_dtype(t))

    def noise_to_signal(self, t: Time) -> Tensor:
        """sigma(t) / alpha(t): the noise level of x_t / alpha(t), which samplers and denoisers call sigma."""
        return self._ratio(_wide(t)).to(_dtype(t))

    def time(self, noise_to_signal: Time) -> Tensor:
        """The t at which sigma(t) / alpha(t) has this value, the inverse of `noise_to_signal`."""
        if not isinstance(noise_to_signal, Tensor):
            checks.positive("process", noise_to_signal=noise_to_signal)
        return self._time_of(_wide(noise_to_signal)).to(_dtype(noise_to_signal))

    def log_snr(self, t: Time) -> Tensor:
        """ln(alpha^2 / sigma^2) (Kingma 2021)."""
        return (-2 * self._ratio(_wide(t)).log()).to(_dtype(t))

    def sigma_range(self) -> tuple[float, float]:
        """The noise-to-signal ratios at t_min and t_max: the noise levels that this process covers."""
        ends = self.noise_to_signal(torch.tensor([self.t_min, self.t_max], dtype=torch.float64, device="cpu"))
        return float(ends[0]), float(ends[1])

    def ladder(self, num_levels: int) -> Tensor:
        """`num_levels` noise-to-signal ratios at even steps of t, descending, float64.

        Geometric for VE (the ladder of NCSN), the DDPM's own steps for DDPM(num_steps=num_levels).
        """
        checks.at_least("ladder", 1, num_levels=num_levels)
        t = torch.linspace(self.t_max, self.t_min, num_levels, dtype=torch.float64)
        return self.noise_to_signal(t)

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """f(x, t) = (alpha' / alpha) x of dx = f dt + g dw (Song 2021, eq. 5)."""
        return _scaled(self._drift_rate(_wide(t, x)), x)

    def diffusion(self, t: Time) -> Tensor:
        """g(t), from g^2 = 2 sigma sigma' - 2 (alpha' / alpha) sigma^2."""
        return self._diffusion_squared(_wide(t)).sqrt().to(_dtype(t))

    def perturb(self, x0: Tensor, t: Time, noise: Tensor) -> Tensor:
        """A sample of the transition kernel, alpha(t) x0 + sigma(t) noise, in the dtype of x0 [B, ...]."""
        if noise.shape != x0.shape:
            raise UserError(f"noise of shape {tuple(noise.shape)} for x0 {tuple(x0.shape)}: both must be the same")
        wide = _wide(t, x0)
        return _scaled(self._alpha(wide), x0) + _scaled(self._sigma(wide), noise)

    def reverse_sde(self, x: Tensor, t: Time, score: Tensor) -> tuple[Tensor, Tensor]:
        """(f - g^2 score, g) of the reverse-time SDE (Anderson 1982); score is that of p_t at x, in this frame."""
        wide = _wide(t, x)
        squared = self._diffusion_squared(wide)
        drift = _scaled(self._drift_rate(wide), x) - _scaled(squared, score)
        return drift, squared.sqrt().to(x.dtype)

    def probability_flow(self, x: Tensor, t: Time, score: Tensor) -> Tensor:
        """dx/dt = f - g^2 score / 2 of the ODE with the same marginals (Song 2021, eq. 13)."""
        wide = _wide(t, x)
        return _scaled(self._drift_rate(wide), x) - _scaled(self._diffusion_squared(wide) / 2, score)

    def score(self, x: Tensor, t: Time, denoiser: Callable[..., Tensor], *args: object) -> Tensor:
        """The score of p_t at x in this frame, (alpha D(x / alpha, sigma / alpha) - x) / sigma^2."""
        wide = _wide(t, x)
        denoised = denoiser(_scaled(1 / self._alpha(wide), x), self._ratio(wide).expand(len(x)).to(x.dtype), *args)
        return _scaled(self._sigma(wide) ** -2, _scaled(self._alpha(wide), denoised) - x)

    def _drift_rate(self, t: Tensor) -> Tensor:
        """alpha' / alpha = d ln alpha / dt."""
        return _derivative(self._alpha, t) / self._alpha(t)

    def _diffusion_squared(self, t: Tensor) -> Tensor:
        """g^2: what the variance sigma^2 gains beyond the drift's own scaling of it."""
        sigma = self._sigma(t)
        return 2 * sigma * (_derivative(self._sigma, t) - self._drift_rate(t) * sigma)


@dataclass(frozen=True)
class VE(GaussianProcess):
    """Variance exploding, SMLD: sigma(t) = sigma_min (sigma_max / sigma_min)^t (Song 2021)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    _: KW_ONLY
    kind: Literal["ve"] = "ve"

    def __post_init__(self) -> None:
        _check_sigmas("process", self.sigma_min, self.sigma_max)
        _check_noise_levels(self)

    @property
    def sampling_t_min(self) -> float:
        return 1e-5  # as in Song 2021: VE is sampled down to 1e-5, VP to 1e-3

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (math.log(self.sigma_max / self.sigma_min) * t).exp()

    def _time_of(self, ratio: Tensor) -> Tensor:
        return (ratio / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class _LinearBeta(GaussianProcess):
    """alpha = e^(-B/2), B the integral of a beta(t) that rises linearly from beta_min to beta_max."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        _check_betas(self.beta_min, self.beta_max)
        _check_times(self.t_min, 1.0)
        _check_noise_levels(self)

    @property
    def sampling_t_min(self) -> float:
        return max(self.t_min, 1e-3)

    def _alpha(self, t: Tensor) -> Tensor:
        return (-_beta_integral(self, t) / 2).exp()


@dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance preserving, DDPM in continuous time: alpha = e^(-B/2), B the integral of beta(t) (Song 2021)."""

    _: KW_ONLY
    kind: Literal["vp"] = "vp"

    def _sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-_beta_integral(self, t))).sqrt()  # 1 - e^-B cancels at small t, expm1 does not

    def _time_of(self, ratio: Tensor) -> Tensor:
        return _beta_time(self, torch.log1p(ratio**2))  # B, from ratio^2 = e^B - 1


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    """Sub-VP: VP's alpha with the smaller sigma = 1 - e^(-B), so that g^2 = beta (1 - e^(-2B)) (Song 2021)."""

    _: KW_ONLY
    kind: Literal["sub_vp"] = "sub_vp"

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-_beta_integral(self, t))

    def _time_of(self, ratio: Tensor) -> Tensor:
        return _beta_time(self, 2 * torch.asinh(ratio / 2))  # as sigma / alpha = 2 sinh(B / 2)


@dataclass(frozen=True)
class DDPM(GaussianProcess):
    """The DDPM's discrete ladder: alpha-bar_k = prod(1 - beta_i), beta linear over num_steps (Ho 2020).

    Step k is t = k / num_steps; between steps ln alpha-bar is linear in t. At the steps it is the ladder exactly.
    """

    beta_min: float = 1e-4
    beta_max: float = 0.02
    num_steps: int = 1000
    _: KW_ONLY
    kind: Literal["ddpm"] = "ddpm"

    def __post_init__(self) -> None:
        _check_betas(self.beta_min, self.beta_max)
        checks.at_least("process", 2, num_steps=self.num_steps)
        checks.ordered("process", "beta_max", "the largest variance", self.beta_max, 1.0)
        _check_noise_levels(self)

    @property
    def t_min(self) -> float:
        return 1 / self.num_steps

    def _alpha(self, t: Tensor) -> Tensor:
        return (-self._exponent(t) / 2).exp()

    def _sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._exponent(t))).sqrt()

    def _exponent(self, t: Tensor) -> Tensor:
        """-ln alpha-bar(t)."""
        table = _ddpm_table(self.beta_min, self.beta_max, self.num_steps, t.device)
        place = t * self.num_steps
        step = place.detach().floor().clamp(0, self.num_steps - 1).to(torch.int64)
        # take(), as indexing with a tensor of no dimension would wait for the device.
        low, high = table.take(step), table.take(step + 1)
        return low + (place - step) * (high - low)

    def _time_of(self, ratio: Tensor) -> Tensor:
        exponent = torch.log1p(ratio**2)
        table = _ddpm_table(self.beta_min, self.beta_max, self.num_steps, ratio.device)
        step = (torch.searchsorted(table, exponent.contiguous(), right=True) - 1).clamp(0, self.num_steps - 1)
        return (step + (exponent - table[step]) / (table[step + 1] - table[step])) / self.num_steps


@dataclass(frozen=True)
class FlowMatching(GaussianProcess):
    """Flow matching along straight lines: alpha = 1 - t, sigma = t (Lipman 2023; Liu 2023).

    The signal is gone at t = 1 and the noise at t = 0, so t stays between t_min and t_max.
    """

    t_min: float = 1e-3
    t_max: float = 0.999
    _: KW_ONLY
    kind: Literal["flow_matching"] = "flow_matching"

    def __post_init__(self) -> None:
        _check_times(self.t_min, self.t_max)
        _check_noise_levels(self)

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _time_of(self, ratio: Tensor) -> Tensor:
        return ratio / (1 + ratio)


@dataclass(frozen=True)
class Cosine(GaussianProcess):
    """The cosine schedule: alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Nichol 2021; Kingma 2021 without offset)."""

    t_min: float = 1e-3
    t_max: float = 0.999
    _: KW_ONLY
    kind: Literal["cosine"] = "cosine"

    def __post_init__(self) -> None:
        _check_times(self.t_min, self.t_max)
        _check_noise_levels(self)

    def _alpha(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).cos()

    def _sigma(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).sin()

    def _time_of(self, ratio: Tensor) -> Tensor:
        return ratio.atan() * (2 / math.pi)


@dataclass(frozen=True)
class EDM(GaussianProcess):
    """alpha = 1 and sigma = t, so that t is the noise level itself (Karras 2022)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    _: KW_ONLY
    kind: Literal["edm"] = "edm"

    def __post_init__(self) -> None:
        _check_sigmas("process", self.sigma_min, self.sigma_max)
        _check_noise_levels(self)

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _time_of(self, ratio: Tensor) -> Tensor:
        return ratio


Process = VE | VP | SubVP | DDPM | FlowMatching | Cosine | EDM

PROCESSES: dict[str, type[Process]] = {config.kind: config for config in get_args(Process)}


def _beta_integral(process: _LinearBeta, t: Tensor) -> Tensor:
    """B(t), the integral of beta(t) = beta_min + t (beta_max - beta_min)."""
    return t * (process.beta_min + t * ((process.beta_max - process.beta_min) / 2))


def _beta_time(process: _LinearBeta, integral: Tensor) -> Tensor:
    """The t at which B(t) is `integral`; the root in the form without cancellation at small t."""
    slope = process.beta_max - process.beta_min
    return 2 * integral / (process.beta_min + (process.beta_min**2 + 2 * slope * integral).sqrt())


@lru_cache(maxsize=16)
def _ddpm_table(beta_min: float, beta_max: float, num_steps: int, device: torch.device) -> Tensor:
    """-ln alpha-bar_k for k = 0 .. num_steps, float64."""
    on_cpu: Any = {"dtype": torch.float64, "device": "cpu"}  # also while a model is built on the meta device
    steps = torch.log1p(-torch.linspace(beta_min, beta_max, num_steps, **on_cpu))
    return torch.cat([torch.zeros(1, **on_cpu), -steps.cumsum(0)]).to(device)


def _derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """d function / dt, element by element. Reverse mode: torch's forward mode costs milliseconds on a CPU here."""
    return torch.func.grad(lambda s: function(s).sum())(t)


def _wide(t: Time, like: Tensor | None = None) -> Tensor:
    """t in float64, on the device of x where there is one."""
    if isinstance(t, Tensor):
        return t.to(torch.float64)
    if not (math.isfinite(t) and t >= 0):
        raise UserError(f"t is {t}: give a finite time from 0 up")
    return torch.full((), t, dtype=torch.float64, device=None if like is None else like.device)


def _dtype(t: Time) -> torch.dtype:
    return t.dtype if isinstance(t, Tensor) and t.is_floating_point() else torch.float32


def _scaled(factor: Tensor, x: Tensor) -> Tensor:
    """factor (scalar or [B]) times x [B, ...], in the dtype of x."""
    if factor.ndim and factor.shape != x.shape[:1]:
        raise UserError(f"t has shape {tuple(factor.shape)} and x {tuple(x.shape)}: give a number or one per sample")
    return factor.to(x.dtype).reshape(factor.shape + (1,) * (x.ndim - 1 if factor.ndim else 0)) * x


def _check_sigmas(owner: str, sigma_min: float, sigma_max: float) -> None:
    checks.positive(owner, sigma_min=sigma_min, sigma_max=sigma_max)
    checks.ordered(owner, "sigma_min", "sigma_max", sigma_min, sigma_max)


def _check_noise_levels(process: GaussianProcess) -> None:
    """Noise levels are squared and divided by each other in float32: beyond these bounds that ends in inf, 0 or NaN."""
    low, high = process.sigma_range()
    smallest, largest = checks.NOISE_LEVELS
    if not smallest <= low < high <= largest:  # NaN is none
        settings = ", ".join(f"{name} {value}" for name, value in vars(process).items() if name != "kind")
        raise UserError(
            f"process: {settings} make noise levels (sigma / alpha) from {low:.3g} to {high:.3g}: "
            f"they must rise within {smallest:g} to {largest:g}"
        )


def _check_betas(beta_min: float, beta_max: float) -> None:
    checks.positive("process", beta_min=beta_min, beta_max=beta_max)
    checks.ordered("process", "beta_min", "beta_max", beta_min, beta_max)


def _check_times(t_min: float, t_max: float) -> None:
    checks.positive("process", t_min=t_min, t_max=t_max)
    checks.ordered("process", "t_min", "t_max", t_min, t_max)
    if t_max > 1:
        checks.fraction("process", t_max=t_max)
