"""Sources: what a flow starts from at its noisy end, normal noise or samples of another data set.

Between two data sets the path is a stochastic interpolant (Albergo, Boffi & Vanden-Eijnden 2023) in the one frame of
this package: x = x0 + sigma x1 + gamma sqrt(sigma) z with x1 of the source, which for `process.kind: flow_matching` is
(1 - t) x0 + t x1 + gamma sqrt(t (1 - t)) z divided by 1 - t. Its velocity is dx/dsigma = E[x1 + gamma z / (2
sqrt(sigma)) | x], and the ODE of every denoiser here is dx/dsigma = (x - D) / sigma; both agree where D estimates
x0 + gamma sqrt(sigma) z / 2. So the samplers of the probability-flow ODE transport the source's samples as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from scoreray.data import checks

SOURCE_SEED = 0x50_0CE  # beside the run's: two data sets of one size are in orders that know nothing of each other


@dataclass(frozen=True)
class GaussianSource:
    """Normal noise."""

    kind: Literal["gaussian"] = field(default="gaussian", kw_only=True)

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class DataSetSource:
    """Samples of another packed data set, read at the run's positions in an order of their own.

    url: of the data set.  target: its field; None takes its first image, else its first array.  gamma: of the noise
    between the two, which makes the path's densities smooth; 0 for none (then D = E[x0 | x]).
    """

    url: str
    target: str | None = None
    gamma: float = 0.0
    kind: Literal["data"] = field(default="data", kw_only=True)

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        checks.between("objective.source", 0, checks.LARGEST, gamma=self.gamma)


FlowSource = Annotated[GaussianSource | DataSetSource, Field(discriminator="kind")]


def interpolant(x0: Tensor, x1: Tensor, sigma: Tensor, gamma: float, z: Tensor) -> tuple[Tensor, Tensor]:
    """(x, what D is to estimate there) of x0, x1 and z [B, ...] at sigma [B, 1, ...]."""
    spread = gamma * torch.sqrt(sigma) * z
    return x0 + sigma * x1 + spread, x0 + spread / 2
