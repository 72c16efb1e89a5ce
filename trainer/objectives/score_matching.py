"""Objectives that never look at the clean sample, by Stein's identity: implicit and sliced score matching."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from scoreray.data import checks
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.jacobian import exact_trace, projected_trace
from scoreray.trainer.objectives.base import BaseObjective, NoisedBatch


class _ByJacobian(BaseObjective):
    """Objectives that never look at x0: (|D - x|^2 + 2 sigma^2 tr dD/dx) / d - sigma^2, by Stein's identity."""

    needs_jacobian = True

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        x, sigma = batch.x.detach().requires_grad_(), batch.sigma
        with torch.enable_grad():
            denoised = denoiser.denoise(x, sigma, batch.condition)
            step = (denoised - x).flatten(1)
            trace, squared = self.trace_and_norm(denoised, x, step, batch.probes)
        return (squared + 2 * sigma**2 * trace) / step.shape[1] - sigma**2

    def trace_and_norm(self, denoised: Tensor, x: Tensor, step: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """tr dD/dx [B] and |D - x|^2 [B], where step [B, d] is D - x: each exact or through probes."""
        raise NotImplementedError


@dataclass(frozen=True)
class ImplicitObjective(_ByJacobian):
    """Implicit score matching with the exact trace (Hyvarinen 2005): one backward pass per dimension, for points."""

    kind: Literal["implicit"] = field(default="implicit", kw_only=True)

    def trace_and_norm(self, denoised: Tensor, x: Tensor, step: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        return exact_trace(denoised, x, create_graph=True), step.square().sum(1)


Probe = Literal["rademacher", "gaussian"]


def draw_directions(
    probe: Probe,
    num_probes: int,
    seed: int,
    positions: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """Random directions [B, num_probes, *shape] for the estimate of a trace."""
    draw = noise.rademacher if probe == "rademacher" else noise.normal
    return draw(seed, positions, (num_probes, *shape), stream=noise.STREAM_PROBE, dtype=dtype)


@dataclass(frozen=True)
class _Sliced(_ByJacobian):
    """num_probes: random directions a sample.  probe: their law, of unit variance in each dimension."""

    num_probes: int = 1
    probe: Probe = "rademacher"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, num_probes=self.num_probes)

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return draw_directions(self.probe, self.num_probes, seed, positions, shape, dtype)

    def trace_and_norm(self, denoised: Tensor, x: Tensor, step: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        assert probes is not None, "sliced objectives need probes"
        directions = probes.flatten(2)
        return projected_trace(denoised, x, directions, create_graph=True), self.norm(step, directions)

    def norm(self, step: Tensor, directions: Tensor) -> Tensor:
        """|step|^2 [B] of step [B, d]."""
        return step.square().sum(1)


@dataclass(frozen=True)
class SlicedObjective(_Sliced):
    """Sliced score matching: trace and norm through random projections v (Song 2019b, eq. 7)."""

    kind: Literal["sliced"] = field(default="sliced", kw_only=True)

    def norm(self, step: Tensor, directions: Tensor) -> Tensor:
        return (directions * step[:, None]).sum(2).square().mean(1)


@dataclass(frozen=True)
class SlicedVRObjective(_Sliced):
    """Sliced score matching with reduced variance: the norm exactly, the trace through v (Song 2019b, eq. 8)."""

    kind: Literal["sliced_vr"] = field(default="sliced_vr", kw_only=True)
