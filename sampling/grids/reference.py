"""What grids are measured against: the same noise taken down a fine grid by Heun's method.

The products of all states and denoised estimates of that trajectory with one another are kept instead of the vectors:
the error of any step of a sampler that is linear in them follows, without another call of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import Denoise, SamplerState, sample
from scoreray.sampling.samplers.sigmas import karras
from scoreray.trainer.diffusion.condition import AnyCondition

NUM_FINE = 64  # levels of the reference: 127 calls of Heun
GAIN_EVERY = 8  # fine levels between those at which the gain is measured
GAIN_ROWS = 16  # samples that it is measured on: 7,000 rows of the network in all
COLUMNS = 1 << 16  # of all states at once in float64: a step's error is 1e-5 of what it is the difference of

Starts = Callable[[float], Tensor]


@dataclass(frozen=True)
class NoiseBatch:
    """Samples that every grid is tried on. starts: their states [b, ...] at a noise level, the same at each call;
    seeds: int64 [b], of whatever else the sampler draws; denoiser, condition: as `sample` takes them."""

    denoiser: Denoise
    starts: Starts
    seeds: Tensor
    condition: AnyCondition = None
    called: Callable[[int], None] = lambda rows: None

    def drawn(
        self,
        sigmas: Tensor,
        sampler: str = "heun",
        options: Mapping[str, Any] = MappingProxyType({}),
        x: Tensor | None = None,
        callback: Callable[[SamplerState], None] = lambda state: None,
    ) -> Tensor:
        """Samples [b, ...] on a grid; x: other states at its first level, of the first r samples, [r, ...].
        Raises UserError, as `sample`."""
        x = self.starts(float(sigmas[0])) if x is None else x

        def seen(state: SamplerState) -> None:
            self.called(len(state.x))
            callback(state)

        condition = None if self.condition is None else self.condition[: len(x)]
        noise = SampleNoise(self.seeds[: len(x)], draw=1)  # draw 0 is the initial noise
        return sample(
            self.denoiser, x, sigmas, sampler=sampler, generator=noise, condition=condition, callback=seen, **options
        )


@dataclass(frozen=True)
class ReferencePaths:
    """The fine trajectories of some batches.

    sigmas: fine levels [F + 1], the last one 0. products: float64 [2 F + 1, 2 F + 1], the mean over samples and
    dimensions of the products of x at each fine level, then the denoised estimates there, then the ends. gains: [F],
    how much of an error at a fine level is left at the end. ends: of each batch, [b, ...].
    """

    sigmas: Tensor
    products: np.ndarray
    gains: np.ndarray
    ends: list[Tensor] = field(repr=False)

    @property
    def num_fine(self) -> int:
        return len(self.sigmas) - 1


def fine_levels(sigma_min: float, sigma_max: float, num_fine: int = NUM_FINE) -> Tensor:
    """The grid [F + 1] of reference samples."""
    return karras(num_fine, sigma_min, sigma_max)


def num_reference_rows(batches: list[int], num_fine: int = NUM_FINE) -> int:
    """Rows that the network is called with by `make_reference` on batches of these sizes."""
    carried = sum(2 * (num_fine - at) - 1 for at in _gain_levels(num_fine))
    return (2 * num_fine - 1) * sum(batches) + min(GAIN_ROWS, batches[0]) * carried


def make_reference(
    batches: list[NoiseBatch], sigma_min: float, sigma_max: float, num_fine: int = NUM_FINE
) -> ReferencePaths:
    """Draws every batch on `num_fine` levels of Karras' grid.

    The gains are measured, on the first samples of the first batch: at every eighth level they get the error that
    Euler's step from eight levels up makes there, and are carried to the end by the same Heun
    steps as the reference. The ratio of the root mean squares, after and before, is the gain; between these levels
    its logarithm is linear in ln sigma. For Gaussian data of spread s it is s / sqrt(s^2 + sigma^2).
    """
    sigmas = fine_levels(sigma_min, sigma_max, num_fine)
    products, ends, weight = np.zeros((2 * num_fine + 1,) * 2), [], 0
    gains = np.ones(num_fine)
    for number, batch in enumerate(batches):
        states, estimates = list[Tensor](), list[Tensor]()

        def seen(state: SamplerState, states: list[Tensor] = states, estimates: list[Tensor] = estimates) -> None:
            if state.nfe % 2:  # Heun's second call of each step is beside the trajectory
                states.append(state.x.flatten())
                estimates.append(state.denoised.flatten())

        end = batch.drawn(sigmas, callback=seen)
        for part in torch.stack([*states, *estimates, end.flatten()]).split(COLUMNS, 1):
            wide = part.double()
            products += (wide @ wide.T).cpu().numpy()
        weight += end.numel()
        ends.append(end)
        if number == 0:
            gains = _measured_gains(batch, sigmas, states, estimates, end)
    return ReferencePaths(sigmas, products / weight, gains, ends)


def _gain_levels(num_fine: int) -> range:
    return range(GAIN_EVERY, num_fine, GAIN_EVERY)


def _measured_gains(
    batch: NoiseBatch, sigmas: Tensor, states: list[Tensor], estimates: list[Tensor], end: Tensor
) -> np.ndarray:
    rows = min(GAIN_ROWS, len(end))
    at, gains = [*_gain_levels(len(states))], []
    for j in at:
        i = j - GAIN_EVERY
        ratio = float(sigmas[j] / sigmas[i])
        x, stepped = (
            flat.view(end.shape)[:rows].to(end.dtype)
            for flat in (states[j], torch.lerp(estimates[i], states[i], ratio))
        )
        left = batch.drawn(sigmas[j:], x=stepped) - end[:rows]
        gains.append(float((left.double().norm() / (stepped - x).double().norm()).nan_to_num(1.0).clamp(1e-6, 1e6)))
    logs = sigmas[:-1].log().numpy()
    return np.exp(np.interp(-logs, -logs[at], np.log(gains))) if at else np.ones(len(logs))
