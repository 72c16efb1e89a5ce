"""Frechet distance of two sets of features, as Gaussians (FID, Heusel 2017), its error and its value at infinite count.

Sums are float64, added in a fixed order and of one chunk at a time, so memory does not grow with the number of samples
and the result does not depend on who computed which chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from torch import Tensor

from scoreray.data.errors import UserError

FEWEST = 16  # samples of a side that a distance of two sets is taken from; more are needed for it to mean much
GROUPS = 8  # equal parts of the samples whose moments are kept apart, for the error and the extrapolation


@dataclass
class FeatureMoments:
    """Count, sum [d] and sum of outer products [d, d], float64, of features about `center` [d].

    A centre near the mean (the same for all that are added together) keeps the products' rounding small.
    """

    count: int
    total: Tensor
    outer: Tensor
    center: Tensor

    @staticmethod
    def zero(center: Tensor) -> FeatureMoments:
        dims = len(center)
        return FeatureMoments(0, torch.zeros(dims).double(), torch.zeros(dims, dims).double(), center.double())

    def add(self, features: Tensor) -> None:
        """Takes features [n, d] in."""
        rows = features.double() - self.center
        self.count += len(rows)
        self.total += rows.sum(0)
        self.outer.addmm_(rows.T, rows)

    def __add__(self, other: FeatureMoments) -> FeatureMoments:
        return FeatureMoments(self.count + other.count, self.total + other.total, self.outer + other.outer, self.center)

    def __sub__(self, other: FeatureMoments) -> FeatureMoments:
        return FeatureMoments(self.count - other.count, self.total - other.total, self.outer - other.outer, self.center)

    @property
    def mean(self) -> Tensor:
        return self.center + self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """The unbiased one. Raises UserError below two samples."""
        if self.count < 2:
            raise UserError(f"{self.count} samples have no covariance: take at least two")
        mean = self.total / self.count
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def moments(features: Tensor) -> FeatureMoments:
    """Moments of features [n, d] about their mean."""
    found = FeatureMoments.zero(features.double().mean(0))
    found.add(features)
    return found


@dataclass(frozen=True)
class Reference:
    """One side of many distances: mean, trace and the symmetric root of the covariance are computed once."""

    mean: Tensor
    trace: float
    root: Tensor

    @staticmethod
    def of(moments: FeatureMoments) -> Reference:
        covariance = moments.covariance
        return Reference(moments.mean, float(covariance.trace()), symmetric_root(covariance))


def symmetric_root(covariance: Tensor) -> Tensor:
    """S with S S = covariance, positive semi-definite; eigenvalues below 0 are rounding and become 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def distance(reference: Reference, other: FeatureMoments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), exact for singular covariances too (Dowson & Landau 1982).

    tr (C1 C2)^(1/2) = sum of the roots of the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2): real, and several
    times cheaper than a general matrix square root.
    """
    covariance = other.covariance
    product = reference.root @ covariance @ reference.root
    roots = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt()
    shift = (reference.mean - other.mean).square().sum()
    return float(shift + reference.trace + covariance.trace() - 2 * roots.sum())


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of features a [n, d] and b [m, d]."""
    return distance(Reference.of(moments(a)), moments(b))


@dataclass(frozen=True)
class FrechetEstimate:
    """`value` of all samples, `infinity` by extrapolation, and what they are made of.

    `std_error` is that of `value` from leaving out each of the groups in turn (the reference counts as fixed), None
    with a single group. `points`: (count, distance) pairs that the extrapolation went through.
    """

    value: float
    std_error: float | None
    infinity: float | None
    points: list[tuple[int, float]]


def estimate(reference: Reference, groups: Sequence[FeatureMoments]) -> FrechetEstimate:
    """Of samples in disjoint groups of equal size, with the jackknife's error and FID-infinity.

    The bias of the distance falls as 1 / count, so a line through the mean distance of halves, quarters, eighths ...
    over 1 / count ends at infinite count (Chong & Forsyth 2020, with disjoint sets instead of random ones).
    """
    everything = reduce(add, groups)
    value = distance(reference, everything)
    num = len(groups)
    if num < 2:
        return FrechetEstimate(value, None, None, [(everything.count, value)])
    without = np.array([distance(reference, everything - group) for group in groups])
    error = float(np.sqrt((num - 1) / num * np.square(without - without.mean()).sum()))
    points = [(everything.count, value)]
    parts = 2
    while parts <= num:
        size = num // parts
        sets = [reduce(add, groups[i * size : (i + 1) * size]) for i in range(parts)]
        if min(part.count for part in sets) < 2:
            break
        mean = float(np.mean([distance(reference, part) for part in sets]))
        points.append((round(np.mean([part.count for part in sets])), mean))
        parts *= 2
    _, infinity = np.polyfit([1 / n for n, _ in points], [d for _, d in points], 1)
    return FrechetEstimate(value, error, float(infinity), points)
