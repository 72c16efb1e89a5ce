"""Progressive distillation: a student whose one step on a grid is two of its teacher's (Salimans & Ho 2022).

A run is a stage: the student of N steps is the teacher of the next, of N / 2. All stages walk down one grid, of which
each has every second level of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from scoreray.data import checks
from scoreray.trainer.diffusion.denoiser import Denoiser, like
from scoreray.trainer.diffusion.process import Process
from scoreray.trainer.diffusion.sigma_sampling import BaseSigmaSampling
from scoreray.trainer.diffusion.weighting import EDMWeighting
from scoreray.trainer.objectives.base import AnyWeighting, FewStepObjective, Map, NoisedBatch
from scoreray.trainer.objectives.consistency import ode_step

MOST_STEPS = 1 << 16


@dataclass(frozen=True)
class ProgressiveObjective(FewStepObjective):
    """D at each of `steps` levels so that an Euler (DDIM) step to the next one ends where two of the teacher's do.

    The teacher is a plain denoiser, or a student of this kind with twice the steps.  grid: `interior`, Karras' levels
    without the smallest, over the process's range; the teacher's steps are those of twice as many.
    """

    weighting: AnyWeighting = field(default=EDMWeighting())
    steps: int = field(default=8, kw_only=True)
    grid: Literal["interior"] = field(default="interior", kw_only=True)
    kind: Literal["progressive"] = field(default="progressive", kw_only=True)

    map: ClassVar[Map] = "progressive"

    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.between("objective", 1, MOST_STEPS, steps=self.steps)

    @property
    def level_sampling(self) -> GridUniform:
        return GridUniform(self.steps)

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """|D - D*|^2 per dimension [B], D* of which one step to the next level is the teacher's two steps."""
        assert batch.teacher is not None
        assert batch.process is not None
        teacher, x, sigma = batch.teacher, batch.x, batch.sigma
        levels = interior_levels(2 * self.steps, *batch.process.sampling_range(), sigma.device).to(sigma.dtype)
        at = 2 * (levels[:-1:2] - sigma[:, None]).abs().argmin(1)
        with torch.no_grad():
            ends = x
            for start in (at, at + 1):
                ends = ode_step(
                    lambda x, sigma: teacher.denoise(x, sigma, batch.condition), ends, levels[start], levels[start + 1]
                )
            kept = like(levels[at + 2] / sigma, x)
            target = (ends - kept * x) / (1 - kept)
        return (denoiser.denoise(x, sigma, batch.condition) - target).flatten(1).square().mean(1)


@dataclass(frozen=True)
class GridUniform(BaseSigmaSampling):
    """Each of the levels of `interior`'s `steps` steps as often."""

    steps: int
    stratified = True

    def quantile(self, u: Tensor, process: Process) -> Tensor:
        levels = interior_levels(self.steps, *process.sampling_range(), u.device)
        return levels[(u * self.steps).long().clamp(max=self.steps - 1)]


def interior_levels(steps: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """`steps` levels from sigma_max down, and 0: float64 [steps + 1]. They go evenly in sigma^(1/7) towards sigma_min
    (Karras 2022, eq. 5) and leave it out, so that every second one of 2 n is a level of n (to rounding)."""
    low, high = sigma_min ** (1 / 7), sigma_max ** (1 / 7)
    ramp = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=device)
    levels = ((high + ramp * (low - high)) ** 7)[:steps]
    levels[0] = sigma_max  # powers round
    return torch.cat([levels, levels.new_zeros(1)])
