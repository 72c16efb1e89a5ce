"""How good ensembles are: members drawn under one condition each, against what was observed under it.

Every number is unbiased by the number of members, so ensembles of different sizes can be compared, and is taken for
each channel alone (the first axis of a sample), in the data's own units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreray.sampling.measures.distances import Estimate, jackknife, mean_of

FEWEST_MEMBERS = 2


@dataclass(frozen=True)
class EnsembleScores:
    """Of n ensembles, float64 [n, C], each a mean over a sample's grid.

    crps; variance: of the members, unbiased; squared_error: of the ensemble's mean.
    """

    crps: Tensor
    variance: Tensor
    squared_error: Tensor
    members: int

    @staticmethod
    def of(members: Tensor, observed: Tensor) -> EnsembleScores:
        """members [n, M, C, ...] and what was observed [n, C, ...]; M is 2 or more."""
        members, observed = members.double(), observed.double()
        return EnsembleScores(
            crps=_per_channel(crps(members, observed)),
            variance=_per_channel(members.var(1)),
            squared_error=_per_channel((members.mean(1) - observed).square()),
            members=members.shape[1],
        )

    def mean_crps(self) -> tuple[Estimate, list[float]]:
        """The mean over ensembles and channels with its error, and each channel's."""
        return mean_of(self.crps.mean(1)), self.crps.mean(0).tolist()

    def rmse(self) -> tuple[Estimate, list[float]]:
        """Of the ensemble's mean: the mean of the channels', and each channel's."""
        return _over_channels(lambda rows: self.squared_error[rows].mean(0).sqrt(), len(self.crps))

    def spread_skill(self) -> tuple[Estimate, list[float]]:
        """Spread by skill: sqrt((M + 1) / M mean variance) / RMSE of the mean (Fortin 2014, eq. 15).

        1 where observations and members are drawn from one distribution; below it the ensemble is too sure.
        """
        factor = (self.members + 1) / self.members
        return _over_channels(
            lambda rows: (factor * self.variance[rows].mean(0) / self.squared_error[rows].mean(0)).sqrt(),
            len(self.crps),
        )


def crps(members: Tensor, observed: Tensor) -> Tensor:
    """The continuous ranked probability score of members [n, M, ...] against observed [n, ...]: [n, ...].

    The fair estimator, E|X - y| - E|X - X'| / 2 over distinct members: unbiased at every M (Zamo & Naveau 2018).
    Pairs are summed by rank: sum over i < j of x_(j) - x_(i) = sum of (2 i - M - 1) x_(i), i from 1.
    """
    count = members.shape[1]
    weights = 2 * torch.arange(1, count + 1, dtype=members.dtype, device=members.device) - count - 1
    pairs = (members.sort(1).values * weights.view(-1, *[1] * (members.ndim - 2))).sum(1)
    return (members - observed[:, None]).abs().mean(1) - pairs / (count * (count - 1))


def _per_channel(values: Tensor) -> Tensor:
    """[n, C, ...] -> its mean over the grid, [n, C]."""
    return values.flatten(2).mean(2) if values.ndim > 2 else values


def _over_channels(statistic: Callable[[Tensor], Tensor], count: int) -> tuple[Estimate, list[float]]:
    """A statistic [C] of some of `count` ensembles: of all, its mean over channels with the jackknife's error."""
    return jackknife(lambda rows: float(statistic(rows).mean()), count), statistic(torch.arange(count)).tolist()
