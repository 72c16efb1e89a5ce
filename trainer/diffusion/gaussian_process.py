"""A forward process x_t = alpha(t) x_0 + sigma(t) z, and all that follows from alpha and sigma.

The marginal of x_t / alpha(t) is that of x_0 + r z with r = sigma(t) / alpha(t), the noise-to-signal ratio: this is the
`sigma` that denoisers, samplers and objectives speak of, and what lets one checkpoint serve all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from scoreray.data import checks
from scoreray.data.errors import UserError

Time = Tensor | float
SAMPLED = (0.002, 80.0)  # noise levels between which Karras 2022 samples, for want of ends of a process's own


class GaussianProcess:
    """What every process shares. A subclass is a frozen dataclass with a `kind`, `_alpha` and `_sigma`, float64 to
    float64 and differentiable; its own checks come before `super().__post_init__()`.

    t is a number or a tensor of any shape; where it meets x [B, ...], a number, a scalar tensor or [B]. All is computed
    in float64 and comes back in the dtype of t (of x where x is given), float32 for a Python number. A number that is
    negative or not finite raises UserError; values of a tensor are not looked at, which would wait for a device.
    `_time_of`, the inverse of the noise-to-signal ratio, is a bisection unless the process knows better.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        # Noise levels are squared and divided by each other in float32: beyond these bounds that ends in inf, 0 or NaN.
        low, high = self.sigma_range()
        smallest, largest = checks.NOISE_LEVELS
        if not smallest <= low < high <= largest:  # NaN is none
            settings = ", ".join(f"{name} {value}" for name, value in vars(self).items() if name != "kind")
            raise UserError(
                f"process: {settings} make noise levels (sigma / alpha) from {low:.3g} to {high:.3g}: "
                f"they must rise within {smallest:g} to {largest:g}"
            )

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

    def _variance(self, t: Tensor) -> Tensor:
        """sigma^2. A process whose sigma is a root gives what is under it, as a root has no derivative at 0."""
        return self._sigma(t).square()

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

    def sampling_range(self) -> tuple[float, float]:
        """The noise levels between which a grid goes: `sigma_range`, whose ends are the process's own.

        Where the noise is gone at t = 0, or the signal at the other end (less than a thousandth is left), t_min and
        t_max only say how near to it training comes. A grid would spend its levels on the way there: it ends at 0.002,
        and begins at 80.
        """
        low, high = self.sigma_range()
        ends = torch.tensor([0.0, max(1.0, self.t_max)], dtype=torch.float64, device="cpu")
        if float(self.alpha(ends)[1]) < 1e-3:
            high = min(high, max(SAMPLED[1], 2 * low))
        if float(self.sigma(ends)[0]) == 0:
            low = max(low, min(SAMPLED[0], high / 2))
        return low, high

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
        """g(t), from g^2 = (sigma^2)' - 2 (alpha' / alpha) sigma^2."""
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
        return _derivative(self._variance, t) - 2 * self._drift_rate(t) * self._variance(t)


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
