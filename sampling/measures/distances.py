"""Distances between sets of features beside Frechet's: maximum mean discrepancy (KID is one of its kernels), Inception
Score, precision and recall, sliced Wasserstein.

Each takes features in fixed blocks, so that memory stays bounded and a result is the same wherever it is computed. All
arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion import noise

PROJECTION_SEED = 0x51CED
PERMUTATION_SEED = 0x9E2A
BLOCK = 1024  # rows of a distance matrix that are held at once


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error (None where the count gives none)."""

    value: float
    std_error: float | None = None


def mean_of(values: Tensor) -> Estimate:
    """Mean of independent values [n], and its standard error."""
    values = values.double()
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return Estimate(float(values.mean()), error)


def jackknife(statistic: Callable[[Tensor], float], count: int) -> Estimate:
    """A statistic of rows int64 [n] out of `count`: of all rows, and its error from leaving out each in turn."""
    every = torch.arange(count)
    if count < 2:
        return Estimate(statistic(every))
    without = np.array([statistic(every[every != i]) for i in range(count)])
    error = math.sqrt((count - 1) / count * float(np.square(without - without.mean()).sum()))
    return Estimate(statistic(every), error)


Kernel = Callable[[Tensor, Tensor], Tensor]
"""k(x [n, d], y [m, d]) -> [n, m], symmetric and positive definite."""
MIXTURE = (0.25, 0.5, 1.0, 2.0, 4.0)  # of a bandwidth, in a mixture of Gaussian kernels (Li 2015)


def gaussian_kernel(bandwidth: float, factors: Sequence[float] = (1.0,)) -> Kernel:
    """exp(-|x - y|^2 / (2 h^2)), the mean over bandwidths h of `factors` times `bandwidth`."""
    return lambda x, y: torch.stack([
        (-_distances(x, y, y.mean(0)).square() / (2 * (factor * bandwidth) ** 2)).exp() for factor in factors
    ]).mean(0)  # fmt: skip


def laplacian_kernel(bandwidth: float) -> Kernel:
    """exp(-|x - y|_1 / h)."""
    return lambda x, y: (-torch.cdist(x, y, p=1) / bandwidth).exp()


def polynomial_kernel(degree: int = 3) -> Kernel:
    """(x.y / d + 1)^degree: KID's at degree 3 (Binkowski 2018)."""
    return lambda x, y: (x @ y.T / x.shape[1] + 1) ** degree


def linear_kernel(x: Tensor, y: Tensor) -> Tensor:
    """x.y, under which the squared MMD is that of the means."""
    return x @ y.T


KID_KERNEL = polynomial_kernel()


def median_distance(x: Tensor, p: float = 2.0, rows: int = BLOCK) -> float:
    """Median of the distances between rows of x [n, d] in the p-norm, of at most `rows` spread evenly: the bandwidth by
    the median heuristic (Gretton 2012). Raises UserError where it is 0."""
    median = float(torch.pdist(x[:: -(-len(x) // rows)].double(), p).median())
    if not median > 0:
        raise UserError("most rows are equal, so their median distance is 0 and is no bandwidth: give one")
    return median


def kernel_distance(a: Tensor, b: Tensor, kernel: Kernel = KID_KERNEL, *, biased: bool = False) -> float:
    """Squared MMD of features a [n, d], b [m, d] (Gretton 2012, eq. 3); under KID_KERNEL, KID of one block.

    Can be negative, as unbiased estimates of small numbers are; biased (eq. 5), never, and is that of equal sets 0.
    Raises UserError below two rows a side.
    """
    n, m = len(a), len(b)
    if n < 2 or m < 2:
        raise UserError(f"kernel distance of {n} and {m} samples: it needs at least two on each side")
    a, b = a.double(), b.double()
    aa, bb = kernel(a, a), kernel(b, b)
    if biased:
        inner = aa.mean() + bb.mean()
    else:
        inner = (aa.sum() - aa.trace()) / (n * (n - 1)) + (bb.sum() - bb.trace()) / (m * (m - 1))
    return float(inner - 2 * kernel(a, b).mean())


def mmd(blocks: Iterable[tuple[Tensor, Tensor]], kernel: Kernel = KID_KERNEL, *, biased: bool = False) -> Estimate:
    """Squared MMD over disjoint blocks of both sets: the mean, which is unbiased at any block size where the estimator
    is, and whose error is honest. The biased one is too large by E k(x, x) - E k(x, x') times 1/n + 1/m of a block."""
    return mean_of(torch.tensor([kernel_distance(a, b, kernel, biased=biased) for a, b in blocks], dtype=torch.float64))


def permutation_p_value(
    blocks: Iterable[tuple[Tensor, Tensor]], kernel: Kernel, permutations: int, *, biased: bool = False
) -> float:
    """How often sets of one distribution would be as far apart in squared MMD, or further (Gretton 2012): the share of
    relabellings of the pooled rows, within blocks, (1 + number) / (1 + permutations). Always the same relabellings."""
    totals = torch.zeros(permutations + 1, dtype=torch.float64)
    for block, (a, b) in enumerate(blocks):
        n, m = len(a), len(b)
        pooled = torch.cat([a, b]).double()
        keys = noise.uniform(PERMUTATION_SEED, block * permutations + torch.arange(permutations), (n + m,))
        labels = torch.zeros(n + m, permutations + 1, dtype=torch.float64)  # 1 for a; the first as they are
        labels[:n, 0] = 1
        labels[:, 1:].scatter_(0, keys.argsort(1)[:, :n].T, 1.0)
        matrix = kernel(pooled, pooled)
        towards = matrix @ labels
        aa, ab = (labels * towards).sum(0), ((1 - labels) * towards).sum(0)
        bb = matrix.sum() - aa - 2 * ab
        if biased:
            totals += aa / n**2 + bb / m**2 - 2 * ab / (n * m)
        else:
            own = matrix.diagonal() @ labels
            totals += (aa - own) / (n * (n - 1)) + (bb - matrix.trace() + own) / (m * (m - 1)) - 2 * ab / (n * m)
    slack = 1e-12 * float(totals.abs().max())  # rounding of equal sums
    return float(1 + (totals[1:] >= totals[0] - slack).sum()) / (1 + permutations)


@dataclass
class ClassSums:
    """What the Inception Score needs of logits: the count, the sum of p [k] and the sum of p ln p."""

    count: int
    probabilities: Tensor
    negentropy: float

    @staticmethod
    def of(logits: Tensor) -> ClassSums:
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        return ClassSums(len(p), p.sum(0), float((p * log_p).sum()))

    def __add__(self, other: ClassSums) -> ClassSums:
        return ClassSums(
            self.count + other.count, self.probabilities + other.probabilities, self.negentropy + other.negentropy
        )

    def score(self) -> float:
        """exp of the mean divergence of p(class | x) from p(class) (Salimans 2016)."""
        mean = self.probabilities / self.count
        return math.exp(self.negentropy / self.count - float(torch.xlogy(mean, mean).sum()))

    def diversity(self) -> float:
        """e^H(y) of p(class): as many classes as samples are spread over evenly. score = diversity sharpness."""
        mean = self.probabilities / self.count
        return math.exp(-float(torch.xlogy(mean, mean).sum()))

    def sharpness(self) -> float:
        """e^-E[H(y | x)]: 1 where each sample is of one class for certain, 1 / k where it may be any of k."""
        return math.exp(self.negentropy / self.count)


def inception_score(groups: list[ClassSums], part: Callable[[ClassSums], float] = ClassSums.score) -> Estimate:
    """Of all samples, or one of its two factors; its error from leaving out each group in turn."""
    return jackknife(lambda rows: part(total([groups[i] for i in rows.tolist()])), len(groups))


def total(groups: list[ClassSums]) -> ClassSums:
    """Of one or more groups together, added in their order."""
    return reduce(add, groups)


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> tuple[Estimate, Estimate]:
    """Share of samples inside the reference's k-nearest-neighbour balls, and the other way round (Kynkaanniemi 2019).

    samples [n, d], reference [m, d]. The errors are those of a share of n (of m), the balls taken as given.
    """
    precision = _covered(samples, reference, k)
    recall = _covered(reference, samples, k)
    return mean_of(precision), mean_of(recall)


def _covered(points: Tensor, centers: Tensor, k: int) -> Tensor:
    """Whether each of `points` is in any center's ball, out to its k-th nearest other center: [n] of 0 and 1."""
    if len(centers) <= k:
        raise UserError(f"precision and recall with k = {k} need more than {k} samples on each side")
    radii = nearest(centers, centers, k, same=True)[0][:, -1]
    middle, found = centers.double().mean(0), []
    for rows in points.split(BLOCK):
        inside = torch.zeros(len(rows), dtype=torch.bool)
        for first in range(0, len(centers), BLOCK):
            part = _distances(rows, centers[first : first + BLOCK], middle)
            inside |= (part <= radii[first : first + BLOCK]).any(1)
        found.append(inside)
    return torch.cat(found).double()


def nearest(points: Tensor, others: Tensor, k: int = 1, *, same: bool = False) -> tuple[Tensor, Tensor]:
    """Distances [n, k] float64, ascending, and numbers [n, k] of the k nearest of `others`; `same`: not itself."""
    distances, numbers, middle = [], [], others.double().mean(0)
    for first in range(0, len(points), BLOCK):
        rows = points[first : first + BLOCK]
        best = torch.full((len(rows), k), math.inf, dtype=torch.float64)
        where = torch.zeros(len(rows), k, dtype=torch.int64)
        for begin in range(0, len(others), BLOCK):
            part = _distances(rows, others[begin : begin + BLOCK], middle)
            if same and begin == first:
                part.fill_diagonal_(math.inf)
            joined = torch.cat([best, part], 1)
            own = torch.cat([where, torch.arange(begin, begin + part.shape[1]).expand(len(rows), -1)], 1)
            best, chosen = joined.topk(k, dim=1, largest=False)
            where = own.gather(1, chosen)
        distances.append(best)
        numbers.append(where)
    return torch.cat(distances), torch.cat(numbers)


def _distances(a: Tensor, b: Tensor, middle: Tensor) -> Tensor:
    """[n, m] float64, from products, which a matrix multiplication gives: so far from `middle` [d] that the squares'
    digits run out, they would be lost."""
    a, b = a.double() - middle, b.double() - middle
    squares = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return squares.clamp_min_(0).sqrt_()


def directions(dims: int, count: int) -> Tensor:
    """Unit vectors [count, dims] float64, spread evenly by chance, always the same ones."""
    lines = noise.normal(PROJECTION_SEED, torch.arange(count), (dims,), dtype=torch.float64)
    return lines / lines.norm(dim=1, keepdim=True)


def sliced_wasserstein(a: Tensor, b: Tensor) -> Estimate:
    """Mean over the columns of 1-Wasserstein distances of projections a [n, p], b [m, p]; the error is over columns."""
    if len(a) == len(b):
        apart = (a.double().sort(0).values - b.double().sort(0).values).abs().mean(0)
    else:
        rows, columns = (one.T.double().sort(1).values for one in (a, b))
        edges = torch.cat([rows, columns], 1).sort(1).values
        inner = edges[:, :-1].contiguous()
        cdfs = [torch.searchsorted(one, inner, right=True).double() / one.shape[1] for one in (rows, columns)]
        apart = ((cdfs[0] - cdfs[1]).abs() * edges.diff(dim=1)).sum(1)  # the area between the distribution functions
    return mean_of(apart)
