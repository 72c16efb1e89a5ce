"""The likelihood of a continuous normalising flow, maximised through its ODE."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from scoreray.data import checks
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.jacobian import exact_trace, projected_trace
from scoreray.trainer.diffusion.weighting import (
    Constant,
)
from scoreray.trainer.flows.continuous_flow import Integration, Solver, log_density
from scoreray.trainer.objectives.base import AnyWeighting, BaseObjective, NoisedBatch
from scoreray.trainer.objectives.score_matching import Probe, draw_directions


@dataclass(frozen=True)
class MaximumLikelihoodObjective(BaseObjective):
    """-ln p(x0; sigma_min) per dimension through the probability-flow ODE, in nats (Chen 2018; Grathwohl 2019, FFJORD).

    solver: adaptive steps (bosh3, dopri5, dopri8), which the samples of a micro-batch share, or fixed ones (euler,
    midpoint, rk4).  rtol, atol: relative and absolute tolerance of adaptive steps.  steps: how many fixed ones; a
    network learns to exploit the error of too few.  adjoint: gradients by the adjoint equation, in the memory of one
    step, or through the solver.  trace: of the velocity's Jacobian, exact or over random directions.
    num_probes: random directions a sample.  probe: their law, of unit variance in each dimension.
    """

    weighting: AnyWeighting = field(default=Constant())
    solver: Solver = "dopri5"
    steps: int = 16
    rtol: float = 1e-5
    atol: float = 1e-5
    adjoint: bool = False
    trace: Literal["exact", "hutchinson"] = "hutchinson"
    num_probes: int = 1
    probe: Probe = "rademacher"
    kind: Literal["maximum_likelihood"] = field(default="maximum_likelihood", kw_only=True)

    needs_jacobian = True
    has_noise_levels = False
    max_zero_stage = 2  # the network is called all along a path, and stage 3 frees its weights in between

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, steps=self.steps, num_probes=self.num_probes)
        checks.positive("objective", rtol=self.rtol, atol=self.atol)

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        if self.trace == "exact":
            return None
        return draw_directions(self.probe, self.num_probes, seed, positions, shape, dtype)

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """-ln p(x0; sigma_min) [B] in nats per dimension."""
        assert batch.process is not None

        def divergence(outputs: Tensor, inputs: Tensor) -> Tensor:
            if batch.probes is None:
                return exact_trace(outputs, inputs, create_graph=True)
            return projected_trace(outputs, inputs, batch.probes.flatten(2), create_graph=True)

        nats = log_density(
            lambda x, sigma: denoiser.denoise(x, sigma, batch.condition),
            divergence,
            batch.x0,
            batch.process.sigma_range(),
            denoiser.sigma_data,
            Integration(self.solver, self.steps, self.rtol, self.atol, self.adjoint),
            list(denoiser.parameters()),
        )
        return -nats / batch.x0[0].numel()
