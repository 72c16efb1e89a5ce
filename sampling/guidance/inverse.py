"""Linear inverse problems y = A x0 + noise: wrappers of a denoiser whose samples then agree with a measurement y.

Inpainting, super-resolution, colourisation and a general matrix differ in their `Operator` only. Every sampler takes
the wrapped denoiser, so there is no sampler of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.guidance.guidance import Denoise
from scoreray.sampling.guidance.operators import Operator, mask
from scoreray.trainer.diffusion.condition import AnyCondition, Condition, encoded

MOST_NOISE_STD = 1e9  # its square must be a number of float32


@dataclass(frozen=True)
class LinearInverse:
    """The denoiser of p(x0 | y), y = A x0 + noise_std z: E[x0 | x, y] for x0 | x approximated by a Gaussian.

    denoised = D + C A^T (r^2 A A^T + noise_std^2)^-1 (y - A D), with r^2 = sigma^2 s^2 / (sigma^2 + s^2) the variance
    of x0 | x for data of standard deviation s = `data_std`. The `method` is how C, the covariance, is taken:

    projection  C = r^2 I: no gradient. Without noise A denoised = y (the null-space correction of DDNM, Wang 2023; for
                a mask it sets the known pixels).
    jacobian    C = sigma^2 dD/dx, the true one (Tweedie's second order), through one more pass backward: pseudoinverse
                guidance, Song 2023, eqs. 7 and 8. Exact for Gaussian data.

    observed: y, [B, ...] or of one sample's shape. Raises UserError on bad settings.
    """

    denoiser: Denoise
    operator: Operator
    observed: Tensor
    noise_std: float = 0.0
    data_std: float = 0.5
    method: Literal["projection", "jacobian"] = "projection"

    def __post_init__(self) -> None:
        if not 0 <= self.noise_std <= MOST_NOISE_STD:
            raise UserError(f"noise_std = {self.noise_std}: must be a number in [0, {MOST_NOISE_STD:g}]")
        if not (math.isfinite(self.data_std) and self.data_std > 0):
            raise UserError(f"data_std = {self.data_std}: must be a positive number, the data's standard deviation")
        if self.method not in ("projection", "jacobian"):
            raise UserError(f"method = {self.method!r}: must be projection or jacobian")
        if not bool(torch.isfinite(self.observed).all()):
            raise UserError("observed holds values that are not finite; mark unknown ones with a mask, not with NaN")

    def encode(self, condition: Condition) -> Condition:
        return encoded(self.denoiser, condition)

    def __call__(self, x: Tensor, sigma: Tensor, condition: AnyCondition = None) -> Tensor:
        given = () if condition is None else (condition,)
        variance = sigma.to(x.dtype).square()
        prior = variance * self.data_std**2 / (variance + self.data_std**2)
        if self.method == "projection":
            denoised = self.denoiser(x, sigma, *given)
            return denoised + _times(prior, self._pull(denoised, prior))
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            denoised = self.denoiser(leaf, sigma, *given)
            (pulled,) = torch.autograd.grad(denoised, leaf, self._pull(denoised.detach(), prior))
        return denoised.detach() + _times(variance, pulled)

    def _pull(self, denoised: Tensor, prior: Tensor) -> Tensor:
        """A^T (r^2 A A^T + noise_std^2)^-1 (y - A D)."""
        residual = self.observed.to(denoised) - self.operator.apply(denoised)
        return self.operator.transpose(self.operator.solve(residual, prior, self.noise_std**2))


def inpaint(denoiser: Denoise, picture: Tensor, known: Tensor, **settings: float | str) -> LinearInverse:
    """The denoiser of what is missing: `picture` holds where the bool `known` is true; settings as in LinearInverse."""
    return LinearInverse(denoiser, mask(known), torch.where(known, picture, 0.0), **settings)  # type: ignore[arg-type]


def _times(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (x.ndim - 1)) * x
