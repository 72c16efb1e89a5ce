"""Linear inverse problems y = A x0 + noise: wrappers of a denoiser whose samples then agree with a measurement y.

Inpainting, super-resolution, colourisation and a general matrix differ in `Operator` only. Every sampler takes the
wrapped denoiser, so there is no sampler of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.guidance.guidance import Denoise, rows_per_sample

BRIGHTNESS = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, what Pillow and paint programs take
MOST_NOISE_STD = 1e9  # its square must be a number of float32


@dataclass(frozen=True)
class Operator:
    """A linear map A of one sample, batched: `apply` takes x [B, ...] to y, `transpose` y back to x.

    `solve(residual, prior [B], noise)` is (prior A A^T + noise I)^-1 residual; it must have a meaning at noise 0.
    """

    apply: Callable[[Tensor], Tensor]
    transpose: Callable[[Tensor], Tensor]
    solve: Callable[[Tensor, Tensor, float], Tensor]


def mask(known: Tensor) -> Operator:
    """Inpainting: A keeps what `known` (bool, of a sample's shape, or [B, ...]) marks."""
    if known.dtype != torch.bool:
        raise UserError(f"a mask of {known.dtype}: must be bool, true where the sample is known")
    return Operator(lambda x: x * known.to(x.device), lambda y: y * known.to(y.device), _even(1.0))


def average_pool(factor: int) -> Operator:
    """Super-resolution by `factor`: A is the mean over factor x factor blocks of an image [B, C, H, W]."""

    def spread(y: Tensor) -> Tensor:
        return y.repeat_interleave(factor, -1).repeat_interleave(factor, -2) / factor**2

    return Operator(lambda x: torch.nn.functional.avg_pool2d(x, factor), spread, _even(1 / factor**2))


def gray() -> Operator:
    """Colourisation: A is the brightness of a colour image [B, 3, H, W], as pictures are made grey everywhere."""

    def weights(like: Tensor) -> Tensor:
        return torch.tensor(BRIGHTNESS, dtype=like.dtype, device=like.device).view(3, 1, 1)

    gram = math.fsum(weight**2 for weight in BRIGHTNESS)
    return Operator(lambda x: (x * weights(x)).sum(1, keepdim=True), lambda y: y * weights(y), _even(gram))


def matrix(a: Tensor) -> Operator:
    """Any A [m, d] of full row rank on flat samples [B, d]."""
    values, vectors = torch.linalg.eigh((a @ a.T).double())
    if values[0] <= 1e-12 * values[-1]:
        raise UserError(
            f"a matrix {list(a.shape)} whose rows depend on each other: leave out the ones that add nothing"
        )

    def solve(residual: Tensor, prior: Tensor, noise: float) -> Tensor:
        basis = vectors.to(residual)
        scaled = (residual @ basis) / (prior[:, None] * values.to(residual) + noise)
        return scaled @ basis.T

    return Operator(lambda x: x @ a.T.to(x), lambda y: y @ a.to(y), solve)


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

    @property
    def rows_per_sample(self) -> int:
        return rows_per_sample(self.denoiser)

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        labels = () if class_labels is None else (class_labels,)
        variance = sigma.to(x.dtype).square()
        prior = variance * self.data_std**2 / (variance + self.data_std**2)
        if self.method == "projection":
            denoised = self.denoiser(x, sigma, *labels)
            return denoised + _times(prior, self._pull(denoised, prior))
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            denoised = self.denoiser(leaf, sigma, *labels)
            (pulled,) = torch.autograd.grad(denoised, leaf, self._pull(denoised.detach(), prior))
        return denoised.detach() + _times(variance, pulled)

    def _pull(self, denoised: Tensor, prior: Tensor) -> Tensor:
        """A^T (r^2 A A^T + noise_std^2)^-1 (y - A D)."""
        residual = self.observed.to(denoised) - self.operator.apply(denoised)
        return self.operator.transpose(self.operator.solve(residual, prior, self.noise_std**2))


def inpaint(denoiser: Denoise, picture: Tensor, known: Tensor, **settings: float | str) -> LinearInverse:
    """The denoiser of what is missing: `picture` holds where the bool `known` is true; settings as in LinearInverse."""
    return LinearInverse(denoiser, mask(known), torch.where(known, picture, 0.0), **settings)  # type: ignore[arg-type]


def _even(gram: float) -> Callable[[Tensor, Tensor, float], Tensor]:
    """`solve` of an operator whose A A^T is `gram` times the identity."""
    return lambda residual, prior, noise: residual / (prior * gram + noise).view(-1, *[1] * (residual.ndim - 1))


def _times(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (x.ndim - 1)) * x
