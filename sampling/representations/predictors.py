"""Disentanglement by predicting factors from codes: SAP from each code alone, DCI from all of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np

from scoreray.data.errors import UserError
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

MOST_CODES = 256  # that a predictor is fitted to one by one (SAP), or by trees (DCI)
TINY = 1e-11  # beside importances, so that a logarithm is finite, as in disentanglement_lib


def attribute_predictability(
    labelled: LabelledCodes, *, factors: str = "", penalty: Annotated[float, Range(1e-9, 1e9)] = 100.0
) -> CodeScore:
    """SAP: the mean over factors of the gap between the two codes that predict it best alone, by the held-out accuracy
    of a linear SVM (classes) or the squared correlation (numbers) (Kumar 2018, "Variational inference of disentangled
    latent concepts", section 3). penalty: of the SVM, 1 / C."""
    known = _few_codes(labelled.chosen(factors), "sap")
    train, test = held_out(len(known.codes))
    with scikit_learn():
        right = [_right(known.codes, one, train, test, penalty) for one in known.factors if one.num_classes]
    numbers = [one.values for one in known.factors if not one.num_classes]

    def gaps(rows: np.ndarray) -> np.ndarray:
        scores = [found[:, rows].mean(1) for found in right]
        scores += [_squared_correlations(known.codes[test][rows], values[test][rows]) for values in numbers]
        ordered = np.sort(np.array([np.append(one, 0.0) for one in scores]), 1)
        return ordered[:, -1] - ordered[:, -2]

    estimate = leave_groups_out(lambda rows: float(gaps(rows).mean()), len(test))
    ordered = [one.name for one in sorted(known.factors, key=lambda one: not one.num_classes)]
    found = {name: Estimate(gap) for name, gap in zip(ordered, gaps(np.arange(len(test))).tolist(), strict=True)}
    return CodeScore(estimate, found, {"samples": len(known.codes), "held_out": len(test)})


def _right(codes: np.ndarray, factor: Factor, train: np.ndarray, test: np.ndarray, penalty: float) -> np.ndarray:
    """bool [d, held out]: whether each code alone predicts the class."""
    from sklearn.svm import LinearSVC

    wanted, found = factor.values.astype(int), []
    for column in codes.T:
        machine = LinearSVC(C=1 / penalty, class_weight="balanced").fit(column[train, None], wanted[train])
        found.append(machine.predict(column[test, None]) == wanted[test])
    return np.stack(found)


def _squared_correlations(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    centred, wanted = codes - codes.mean(0), values - values.mean()
    variances = np.square(centred).sum(0) * np.square(wanted).sum()
    return np.where(variances > 0, (wanted @ centred) ** 2 / np.where(variances > 0, variances, 1.0), 0.0)


def dci(labelled: LabelledCodes, *, factors: str = "", trees: Literal["boosted", "forest"] = "boosted") -> CodeScore:
    """Disentanglement, and beside it completeness and informativeness, from how important each code is to trees that
    predict each factor (Eastwood & Williams 2018, "A framework for the quantitative evaluation of disentangled
    representations", section 2).

    Disentanglement: 1 less the entropy over factors of a code's importances, in units of the logarithm of how many
    there are, weighted by the code's importance. Completeness: the same over codes, weighted by factors.
    Informativeness: held-out accuracy, or R2 of numbers.
    """
    known = _few_codes(labelled.chosen(factors, fewest=2), "dci")
    train, test = held_out(len(known.codes))
    with scikit_learn():
        fitted = [(_trees(trees, one), _wanted(one)) for one in known.factors]
        for predictor, wanted in fitted:
            predictor.fit(known.codes[train], wanted[train])
        scores = [float(predictor.score(known.codes[test], wanted[test])) for predictor, wanted in fitted]
    importance = np.stack([predictor.feature_importances_ for predictor, _ in fitted], 1)
    disentanglement, completeness = _one_less_entropy(importance), _one_less_entropy(importance.T)
    parts = {"completeness": Estimate(completeness), "informativeness": Estimate(float(np.mean(scores)))}
    of_factors = zip(known.factors, scores, strict=True)
    parts |= {f"informativeness of {one.name}": Estimate(score) for one, score in of_factors}
    return CodeScore(
        Estimate(disentanglement), parts, {"importance": importance.T.tolist(), "samples": len(known.codes)}
    )


def _wanted(factor: Factor) -> np.ndarray:
    return factor.values.astype(int) if factor.num_classes else factor.values


def _trees(kind: str, factor: Factor) -> Any:
    """Trees that look at every code at every split: of a few codes by chance, as a forest's are by default, some splits
    are of codes that say nothing, which then count as important."""
    from sklearn import ensemble

    if kind == "boosted":
        boosted = ensemble.GradientBoostingClassifier if factor.num_classes else ensemble.GradientBoostingRegressor
        return boosted(random_state=0)
    forest = ensemble.RandomForestClassifier if factor.num_classes else ensemble.RandomForestRegressor
    return forest(max_features=None, random_state=0)


def _one_less_entropy(importance: np.ndarray) -> float:
    """Of rows [a, b], the mean weighted by each row's share of all: 1 where each row has one entry, 0 where all are
    equal."""
    total, columns = importance.sum(), importance.shape[1]
    if total == 0 or columns == 1:
        return float(total > 0)
    shares = importance + TINY
    shares /= shares.sum(1, keepdims=True)
    spread = -(shares * np.log(shares)).sum(1) / np.log(columns)
    return float(((1 - spread) * importance.sum(1)).sum() / total)


def _few_codes(known: LabelledCodes, metric: str) -> LabelledCodes:
    """Raises UserError where there are too many to fit a predictor to each."""
    if known.codes.shape[1] > MOST_CODES:
        raise UserError(
            f"{metric}: codes of {known.codes.shape[1]:,} values; at most {MOST_CODES} here, as a predictor is fitted "
            "to each; mig, modularity, beta_vae and factor_vae take more"
        )
    return known
