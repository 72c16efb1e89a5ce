"""What every objective has: its weighting, its noise levels, and the denoising error that both are of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from scoreray.data import checks
from scoreray.data.own_code.part import PartOf
from scoreray.trainer.diffusion.condition import AnyCondition
from scoreray.trainer.diffusion.contrastive import PersistentChains
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.gaussian_process import GaussianProcess
from scoreray.trainer.diffusion.levels import GUIDANCE_WEIGHT, TARGET_LEVEL
from scoreray.trainer.diffusion.sigma_sampling import (
    BaseSigmaSampling,
    SigmaSampling,
    UniformT,
)
from scoreray.trainer.diffusion.weighting import (
    BaseWeighting,
    LevelFunction,
    Sigma2,
    Weighting,
)
from scoreray.trainer.objectives.teacher import Teacher, TeacherConfig

Map = Literal["none", "consistency", "flow_map", "progressive"]
"""What a trained network gives: the denoiser at any noise level (none), the end of the probability-flow ODE's path
through x (consistency), a point of it at any lower level (flow_map), or its point a step of a fixed grid further
(progressive)."""

AnyWeighting = Annotated[Weighting, PartOf("weighting", ("weight", "build"), BaseWeighting)]
AnySampling = Annotated[SigmaSampling, PartOf("sigma sampling", ("quantile",), BaseSigmaSampling)]


@dataclass(frozen=True)
class NoisedBatch:
    """x [B, ...] = x0 + sigma z at sigma [B]. probes: of `draw_probes`; chains: the persistent ones, of `positions`;
    process: of the run. Of an interpolant with noise of its own, x0 is what D is to estimate
    (`trainer/flows/sources.py`).  log_partition: the log-normaliser that an objective learns beside the energy, of
    `build_log_partition`.  teacher: of an objective that names one."""

    x0: Tensor
    x: Tensor
    sigma: Tensor
    condition: AnyCondition = None
    probes: Tensor | None = None
    positions: Tensor | None = None
    chains: PersistentChains | None = None
    process: GaussianProcess | None = None
    log_partition: LevelFunction | None = None
    teacher: Teacher | None = None


@dataclass(frozen=True)
class AlignmentConfig:
    """Draws hidden tokens of a transformer to features of the clean sample, which `field` holds (`networks/alignment`).

    field: a sequence or array of one feature vector a token.  layer: the block whose output is drawn to them.  weight:
    of 1 - cosine similarity beside the loss.  hidden_size: of the perceptron in between.
    The defaults are REPA's of DiT-XL (Yu 2024).
    """

    field: str
    layer: int = 8
    weight: float = 0.5
    hidden_size: int = 2048

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        checks.at_least("objective.alignment", 1, layer=self.layer, hidden_size=self.hidden_size)
        checks.positive("objective.alignment", weight=self.weight)


@dataclass(frozen=True)
class BaseObjective:
    """What every objective has: its weighting, its noise levels, and the error that both are of.

    A subclass is a frozen dataclass with a `kind`; what it does not override is denoising score matching.
    weighting: lambda(sigma), the weight of each noise level's error.  sigma_sampling: how often each is drawn.
    label_dropout: share of samples whose conditions are all dropped, so that the network also learns to do without, as
    guidance needs.  alignment: None for none.
    """

    weighting: AnyWeighting = field(default=Sigma2())
    sigma_sampling: AnySampling = field(default=UniformT())
    label_dropout: float = 0.0
    """Share of samples whose label is hidden (-1), for classifier-free guidance."""
    alignment: AlignmentConfig | None = field(default=None, kw_only=True)

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    needs_jacobian: ClassVar[bool] = False
    """The error itself holds derivatives of the denoiser, so that a training step differentiates twice."""
    has_noise_levels: ClassVar[bool] = True
    """Each sample's loss is at one noise level."""
    only_flow: ClassVar[bool] = False
    """D gives the velocity of a flow whose densities are not those of x0 + sigma z with z independent of x0, so that
    (D - x) / sigma^2 is not their score: samplers of the ODE are right, those that add noise are not."""
    map: ClassVar[Map] = "none"
    """What of the probability-flow ODE the network learns, which says how samples are drawn from it."""
    levels: ClassVar[tuple[str, ...]] = ()
    """Inputs beside the data's that the network is built for (`trainer/diffusion/levels.py`)."""
    max_zero_stage: ClassVar[Literal[0, 1, 2, 3]] = 3
    """The highest `engine.zero_stage` that it can be trained under."""

    def __post_init__(self) -> None:
        checks.fraction("objective", label_dropout=self.label_dropout)

    @property
    def level_sampling(self) -> BaseSigmaSampling:
        """What a training step draws noise levels by."""
        return self.sigma_sampling

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The random directions [B, P, *shape] that `error` needs beside the noise; None where it needs none."""
        return None

    def build_log_partition(self) -> LevelFunction | None:
        """What learns the energy's log-normaliser at each noise level beside it; None where nothing does."""
        return None

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """The denoising error per dimension [B].

        For implicit and sliced objectives an unbiased estimate of it, which can be negative. Persistent chains go on
        from, and in training mode back to, the batch's. Nothing here waits for the device or draws a number.
        """
        denoised = denoiser.denoise(batch.x, batch.sigma, batch.condition)
        return (denoised - batch.x0).flatten(1).square().mean(1)


@dataclass(frozen=True)
class FewStepObjective(BaseObjective):
    """What objectives of few-step models share. teacher: whose probability-flow ODE they learn; None: the data's."""

    teacher: TeacherConfig | None = field(default=None, kw_only=True)

    needs_teacher: ClassVar[bool] = False

    @property
    def levels(self) -> tuple[str, ...]:  # type: ignore[override]
        guided = self.teacher is not None and self.teacher.guidance_range is not None
        return (TARGET_LEVEL,) * (self.map == "flow_map") + (GUIDANCE_WEIGHT,) * guided
