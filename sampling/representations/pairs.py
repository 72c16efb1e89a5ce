"""Disentanglement by samples that share one factor: the scores of beta-VAE and FactorVAE.

The papers draw such samples from a generator. Of a data set they are drawn from its samples that have the same value of
the factor (the same interval, of a number); where factors are independent in it, that is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
import torch

from scoreray.data.errors import UserError
from scoreray.sampling.measures.distances import mean_of
from scoreray.sampling.representations.labelled import CodeScore, LabelledCodes, scikit_learn
from scoreray.sampling.samplers.options import Range

AT_ONCE = 1 << 22  # values of codes that are gathered together

Points = Annotated[int, Range(100, 1_000_000)]
Batch = Annotated[int, Range(2, 4096)]
Bins = Annotated[int, Range(2, 1000)]


class _SharedFactor:
    """Draws rows that have the same value of a factor as others. values: int64 [n]."""

    def __init__(self, values: np.ndarray) -> None:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        self._order = np.argsort(inverse, kind="stable")
        self._first = np.concatenate([[0], np.cumsum(counts)[:-1]])[inverse]
        self._count = counts[inverse]
        self._place = np.empty_like(self._order)
        self._place[self._order] = np.arange(len(values))

    def partners(self, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Another row each, of the same value; itself where it is the only one."""
        count, first = self._count[rows], self._first[rows]
        steps = 1 + np.floor(rng.random(rows.shape) * np.maximum(count - 1, 1)).astype(np.int64)
        return self._order[first + (self._place[rows] - first + steps) % count]


def beta_vae_score(
    labelled: LabelledCodes, *, factors: str = "", points: Points = 10_000, batch: Batch = 64, bins: Bins = 20
) -> CodeScore:
    """Held-out accuracy of a linear classifier that says which factor pairs share, from the mean absolute difference of
    their codes over `batch` pairs (Higgins 2017, "beta-VAE", section 3). points: that it learns from; it is tested on
    half as many. 1 over the number of factors is chance."""
    known = labelled.chosen(factors, fewest=2)

    def differences(shared: _SharedFactor, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        for part in _parts(count, batch * known.codes.shape[1]):
            rows = rng.integers(len(known.codes), size=(part, batch))
            yield np.abs(known.codes[rows] - known.codes[shared.partners(rows, rng)]).mean(1)

    rng, drawn = np.random.default_rng(0), list[tuple[np.ndarray, np.ndarray]]()
    for total in (points, points // 2):
        numbers = np.sort(rng.integers(len(known.factors), size=total))
        parts = [
            part
            for number, one in enumerate(known.factors)
            for part in differences(_SharedFactor(one.binned(bins)), int((numbers == number).sum()), rng)
        ]
        drawn.append((np.concatenate(parts), numbers))
    (features, which), (test, wanted) = drawn
    with scikit_learn():
        from sklearn.linear_model import LogisticRegression

        found = LogisticRegression(max_iter=1000).fit(features, which).predict(test)
    beside = {"chance": 1 / len(known.factors), "points": points, "batch": batch, "samples": len(known.codes)}
    return CodeScore(mean_of(torch.from_numpy((found == wanted).astype(np.float64))), beside=beside)


def factor_vae_score(
    labelled: LabelledCodes, *, factors: str = "", points: Points = 10_000, batch: Batch = 64, bins: Bins = 20
) -> CodeScore:
    """Held-out accuracy of the majority vote that says which factor `batch` samples share, from the code that varies
    least among them next to its variance in all of the data (Kim & Mnih 2018, "Disentangling by factorising", section
    4). points: votes that are counted; it is tested on half as many. Codes that are the same for all samples are left
    out. 1 over the number of factors is chance."""
    known = labelled.chosen(factors, fewest=2)
    variances = known.codes.var(0, ddof=1)
    active = variances > 0
    if not active.any():
        raise UserError("factor_vae: every code is the same for all samples; the model encodes nothing")
    codes, scale = known.codes[:, active], variances[active]

    def least(shared: _SharedFactor, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        for part in _parts(count, batch * codes.shape[1]):
            first = np.repeat(rng.integers(len(codes), size=(part, 1)), batch, 1)
            yield (codes[shared.partners(first, rng)].var(1, ddof=1) / scale).argmin(1)

    rng, votes = np.random.default_rng(0), list[np.ndarray]()
    for total in (points, points // 2):
        shares = np.bincount(rng.integers(len(known.factors), size=total), minlength=len(known.factors))
        table = np.zeros((len(known.factors), codes.shape[1]))
        for number, one in enumerate(known.factors):
            for part in least(_SharedFactor(one.binned(bins)), int(shares[number]), rng):
                table[number] += np.bincount(part, minlength=codes.shape[1])
        votes.append(table)
    learnt, test = votes
    right = test[learnt.argmax(0), np.arange(codes.shape[1])].sum()
    hits = torch.zeros(int(test.sum()), dtype=torch.float64)
    hits[: int(right)] = 1
    beside = {"chance": 1 / len(known.factors), "active": int(active.sum()), "points": points, "batch": batch,
              "samples": len(codes)}  # fmt: skip
    return CodeScore(mean_of(hits), beside=beside)


def _parts(count: int, values: int) -> Iterator[int]:
    """Sizes that sum to `count`, of which each gathers about AT_ONCE values at most."""
    size = max(1, AT_ONCE // values)
    for first in range(0, count, size):
        yield min(size, count - first)
