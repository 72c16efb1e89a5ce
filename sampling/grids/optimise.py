"""The grid of n steps on which one sampler of one model comes nearest to where the exact trajectories end.

Dynamic programming over a fine reference's levels gives a grid to begin from (`dynamic.py`), least squares moves its
levels until the samples themselves are nearest to the reference's (`refine.py`), and samples of other noise decide
whether it is better than the grids that have names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoreray.sampling.grids.dynamic import best_levels
from scoreray.sampling.grids.reference import NUM_FINE, NoiseBatch, fine_levels, make_reference, num_reference_rows
from scoreray.sampling.grids.refine import refine
from scoreray.sampling.samplers.sample import num_calls

OPTIMISED = "optimised"
TRIED = 2  # of the grids to begin from, those of the least error are refined


@dataclass(frozen=True)
class GridSearch:
    """What is searched: `steps` levels, between the ends of `sigma_range`, for a sampler with its options.

    named: the grids that it must beat, by name, each [steps + 1] from sigma_max on. budget: how many grids may be tried
    in refining, `steps` from each of two beginnings where it is less. num_fine: levels of the reference.
    """

    sampler: str
    steps: int
    sigma_range: tuple[float, float]
    named: Mapping[str, Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: int = 150
    num_fine: int = NUM_FINE

    def num_rows(self, fitted: list[int], held_out: list[int]) -> int:
        """Rows that the network is called with at most, on batches of these sizes."""
        grids = next(iter(self.named.values()))
        calls, held = num_calls(self.sampler, grids, **self.options), sum(held_out)
        tried = len(self.named) + 1
        return (
            num_reference_rows(fitted, self.num_fine)
            + (2 * self.num_fine - 1) * held
            + calls * (sum(fitted) * (tried + TRIED + max(self.budget, TRIED * self.steps)) + held * tried)
        )


@dataclass(frozen=True)
class FoundGrid:
    """levels: float64 [n + 1]; name: OPTIMISED, or the named grid that was no worse. errors: the root mean square
    distance of held-out samples to the reference's, by name of grid."""

    levels: Tensor
    name: str
    errors: dict[str, float]


def optimise(search: GridSearch, fitted: list[NoiseBatch], held_out: list[NoiseBatch]) -> FoundGrid:
    """The best grid found. fitted: samples that it is fitted to; held_out: others, that decide between it and the named
    ones, so that it is never worse than the best of these there. Raises UserError, as `sample`."""
    low, high = search.sigma_range
    reference = make_reference(fitted, low, high, search.num_fine)
    wanted = torch.cat(reference.ends)

    def ends(levels: Tensor) -> Tensor:
        return torch.cat([batch.drawn(levels, search.sampler, search.options) for batch in fitted])

    starts = [*search.named.values()]
    if search.steps <= search.num_fine:
        starts.append(best_levels(reference, search.sampler, search.steps))
    starts.sort(key=lambda levels: distance(ends(levels), wanted))
    budget = search.budget // TRIED
    refined = [refine(start, low, ends, wanted, budget) for start in starts[:TRIED]]
    best = min(refined, key=lambda levels: distance(ends(levels), wanted))
    grids = {OPTIMISED: best, **search.named}
    fine = fine_levels(low, high, search.num_fine)
    exact = torch.cat([batch.drawn(fine) for batch in held_out])
    errors = {
        name: distance(torch.cat([one.drawn(levels, search.sampler, search.options) for one in held_out]), exact)
        for name, levels in grids.items()
    }
    name = min(errors, key=lambda name: errors[name])
    return FoundGrid(grids[name], name, errors)


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square over samples and dimensions."""
    return math.sqrt(float((a - b).double().square().mean()))
