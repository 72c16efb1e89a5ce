"""What an autoencoder minimises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict
from torch import Tensor

from scoreray.data import checks


@dataclass(frozen=True)
class AutoencodingObjective:
    """Reconstruction and Kullback-Leibler divergence of an autoencoder (Kingma & Welling 2014; Rombach 2022).

    Of a sample of d values with latent z ~ N(mean, std^2): (|x - decode(z)| or its square, summed, + kl_weight
    KL(N(mean, std^2) | N(0, 1))) / d, and perceptual_weight times the distance of features where `perceptual` names
    what takes them.
    reconstruction: the square of the difference ("mse") or its absolute value ("l1").
    kl_weight: of the divergence; with "mse", twice the variance of the Gaussian decoder whose evidence bound is
    maximised (docs/mathematics.md).
    perceptual: `package.module:Name`, or a file of TorchScript (`trainer/perceptual.py`); None for none.
    perceptual_weight: of the distance of features.
    """

    reconstruction: Literal["mse", "l1"] = "mse"
    kl_weight: float = 1e-6
    perceptual: str | None = None
    perceptual_weight: float = 1.0
    kind: Literal["autoencoding"] = field(default="autoencoding", kw_only=True)

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        checks.between("objective", 0, checks.LARGEST, kl_weight=self.kl_weight)
        checks.positive("objective", perceptual_weight=self.perceptual_weight)

    def error(self, x: Tensor, reconstruction: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """The loss [B] without its perceptual term, of x [B, ...] and latents' mean and std [B, ...]."""
        difference = (reconstruction - x).flatten(1)
        found = difference.square() if self.reconstruction == "mse" else difference.abs()
        return found.mean(1) + self.kl_weight / difference.shape[1] * kl_from_standard_normal(mean, std)


def kl_from_standard_normal(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) | N(0, 1)) of independent values [B, ...], summed over each sample's: [B], in nats."""
    return (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(1) / 2
