"""Consistency models in discrete time: two noise levels of one path, whose gap shrinks while the run goes on.

The consistency function f(x, sigma) gives the end of the probability-flow ODE's path through x (Song 2023). It is the
denoiser's own parameterization at every sigma, so that a network that begins from a trained denoiser (`init`) is near
it already: with the largest gap the loss is the denoising error (Geng 2024, "Consistency models made easy").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from scoreray.data import checks
from scoreray.data.units import Count
from scoreray.trainer.diffusion.denoiser import Denoiser, like
from scoreray.trainer.diffusion.layers import outside_graphs
from scoreray.trainer.diffusion.sigma_sampling import LogNormal
from scoreray.trainer.diffusion.weighting import Constant
from scoreray.trainer.objectives.base import AnySampling, AnyWeighting, FewStepObjective, Map, NoisedBatch


@dataclass(frozen=True)
class ConsistencyObjective(FewStepObjective):
    """f at sigma against f at a lower level rho of the same path, which gets no gradient (Song & Dhariwal 2023, iCT).

    Without a teacher x_rho has the noise of x_sigma; with one, its ODE is solved from sigma to rho by one step of
    `solver`. Where rho is 0 the other side is x_rho itself.

    1 - rho / sigma is (1 + gap_scale / (1 + exp(gap_slope sigma))) / gap_base^(1 + stage), at most 1 (Geng 2024, q, k,
    b).
    num_stages: of the gap; the last goes on to the run's end.  stage_images: length of each of the others.
    gap_base, gap_scale, gap_slope: in the formula above.  huber: in the metric's.  solver: of the teacher's ODE.
    metric: of the difference's root
    mean square r, sqrt(r^2 + huber^2) - huber or r^2, over sigma - rho.
    """

    weighting: AnyWeighting = field(default=Constant())
    sigma_sampling: AnySampling = field(default=LogNormal(-1.1, 2.0))
    stage_images: Count = 1_000_000
    num_stages: int = 8
    gap_base: float = 2.0
    gap_scale: float = 8.0
    gap_slope: float = 1.0
    metric: Literal["pseudo_huber", "squared"] = "pseudo_huber"
    huber: float = 0.00054
    solver: Literal["heun", "euler"] = "heun"
    kind: Literal["consistency"] = field(default="consistency", kw_only=True)

    map: ClassVar[Map] = "consistency"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, stage_images=self.stage_images, num_stages=self.num_stages)
        checks.between("objective", 1.001, 1e3, gap_base=self.gap_base)
        checks.between("objective", 0, 1e3, gap_scale=self.gap_scale)
        checks.positive("objective", gap_slope=self.gap_slope, huber=self.huber)

    def lower_level(self, sigma: Tensor, positions: Tensor) -> Tensor:
        """rho [B] of samples at sigma [B], by their place in the run."""
        stage = (positions // self.stage_images).clamp(max=self.num_stages - 1).to(sigma)
        gap = (1 + self.gap_scale * torch.sigmoid(-self.gap_slope * sigma)) * self.gap_base ** -(1 + stage)
        return sigma * (1 - gap.clamp(max=1))

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """The metric of f's difference over the gap [B], which is of no noise level alone."""
        assert batch.positions is not None
        rho = self.lower_level(batch.sigma, batch.positions)
        with torch.no_grad():
            x = self._lower_point(batch, rho)
            dropped = _dropout_state(batch.x)
            target = denoiser.denoise(x, _positive(rho), batch.condition)
            target = torch.where(like(rho > 0, x), target, x)
        _repeat_dropout(dropped)
        found = denoiser.denoise(batch.x, batch.sigma, batch.condition)
        error = (found - target).flatten(1).square().mean(1)
        if self.metric == "pseudo_huber":
            error = (error + self.huber**2).sqrt() - self.huber
        return error / (batch.sigma - rho)

    def _lower_point(self, batch: NoisedBatch, rho: Tensor) -> Tensor:
        """x_rho [B, ...] on the path through the batch's x."""
        if batch.teacher is None:
            return batch.x0 + like(rho / batch.sigma, batch.x) * (batch.x - batch.x0)
        teacher = batch.teacher
        return ode_step(
            lambda x, sigma: teacher.denoise(x, sigma, batch.condition), batch.x, batch.sigma, rho, self.solver
        )


def ode_step(
    denoise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, rho: Tensor, solver: str = "euler"
) -> Tensor:
    """The probability-flow ODE's dx/dsigma = (x - D(x, sigma)) / sigma from sigma [B] down to rho [B]: x_rho [B, ...].

    heun: Karras 2022, Alg. 1; where rho is 0, a step of Euler's.
    """
    slope = (x - denoise(x, sigma)) / like(sigma, x)
    euler = x + like(rho - sigma, x) * slope
    if solver == "euler":
        return euler
    level = _positive(rho)
    other = (euler - denoise(euler, level)) / like(level, x)
    return torch.where(like(rho > 0, x), x + like(rho - sigma, x) * (slope + other) / 2, euler)


def _positive(rho: Tensor) -> Tensor:
    """rho [B] with 1 in the place of 0, where what a network gives is not used."""
    return torch.where(rho > 0, rho, 1)


@outside_graphs
def _dropout_state(x: Tensor) -> tuple[Tensor, list[int], list[Tensor]]:
    """Of torch's generators, from which a network on the device of x draws what it drops."""
    return torch.get_rng_state(), *get_device_states(x)


@outside_graphs
def _repeat_dropout(state: tuple[Tensor, list[int], list[Tensor]]) -> None:
    """The next call of a network drops the same units as the one after `_dropout_state`."""
    cpu, devices, states = state
    torch.set_rng_state(cpu)
    set_device_states(devices, states)
