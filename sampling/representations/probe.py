"""A linear probe: how well a linear model of the codes predicts what is known of samples that it did not see."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from scoreray.sampling.measures.distances import Estimate
from scoreray.sampling.representations.labelled import (
    CodeScore,
    Factor,
    LabelledCodes,
    held_out,
    leave_groups_out,
    scikit_learn,
)
from scoreray.sampling.samplers.options import Range

ITERATIONS = 1000  # of logistic regression, at most


def linear_probe(
    labelled: LabelledCodes, *, factors: str = "", penalty: Annotated[float, Range(1e-9, 1e9)] = 1.0
) -> CodeScore:
    """Mean over factors of the held-out accuracy of logistic regression (classes) or R2 of ridge regression (numbers),
    on codes of unit variance. penalty: of the squared weights, scikit-learn's alpha, 1 / C."""
    known = labelled.chosen(factors)
    train, test = held_out(len(known.codes))
    with scikit_learn():
        made = {one.name: _predicted(known.codes, one, train, test, penalty) for one in known.factors}
    scores = {one.name: _score(one, one.values[test], made[one.name]) for one in known.factors}
    classes = [one.values[test].astype(int) for one in known.factors if one.num_classes]
    majority = float(np.mean([np.bincount(one).max() / len(test) for one in classes])) if classes else None
    mean = leave_groups_out(
        lambda rows: float(np.mean([_fit(one, one.values[test][rows], made[one.name][rows]) for one in known.factors])),
        len(test),
    )
    return CodeScore(mean, scores, {"samples": len(known.codes), "held_out": len(test), "largest_class": majority})


def _predicted(codes: np.ndarray, factor: Factor, train: np.ndarray, test: np.ndarray, penalty: float) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    linear = LogisticRegression(C=1 / penalty, max_iter=ITERATIONS) if factor.num_classes else Ridge(alpha=penalty)
    wanted = factor.values[train].astype(int) if factor.num_classes else factor.values[train]
    found: np.ndarray = make_pipeline(StandardScaler(), linear).fit(codes[train], wanted).predict(codes[test])
    return found


def _score(factor: Factor, wanted: np.ndarray, found: np.ndarray) -> Estimate:
    return leave_groups_out(lambda rows: _fit(factor, wanted[rows], found[rows]), len(wanted))


def _fit(factor: Factor, wanted: np.ndarray, found: np.ndarray) -> float:
    """Accuracy of classes, R2 of numbers."""
    if factor.num_classes:
        return float((wanted == found).mean())
    return float(1 - np.square(wanted - found).mean() / max(wanted.var(), np.finfo(float).tiny))
