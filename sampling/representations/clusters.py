"""How far clusters of codes are the classes that are known: homogeneity, completeness, V-measure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Annotated, Any

import numpy as np

from scoreray.sampling.representations.labelled import CodeScore, LabelledCodes, leave_groups_out, scikit_learn
from scoreray.sampling.samplers.options import Range

PARTS = ("homogeneity", "completeness", "v_measure")
RESTARTS = 10


def cluster_scores(
    labelled: LabelledCodes, *, factors: str = "", clusters: Annotated[int, Range(0, 10_000)] = 0
) -> dict[str, CodeScore]:
    """Of k-means clusters of the codes (`clusters` of them; 0: as many as classes) against the first class factor, by
    scikit-learn: of each of PARTS (Rosenberg & Hirschberg 2007), with the clusters taken as given for its error."""
    known = labelled.chosen(factors, classes_alone=True)
    factor = known.factors[0]
    classes = factor.values.astype(int)
    number = clusters or len(set(classes))
    with scikit_learn():
        from sklearn.cluster import KMeans
        from sklearn.metrics import homogeneity_completeness_v_measure

        found = KMeans(min(number, len(classes)), n_init=RESTARTS, random_state=0).fit_predict(known.codes)
    beside = {"clusters": number, "factor": factor.name, "samples": len(classes)}

    def score(part: int, rows: np.ndarray) -> float:
        return float(homogeneity_completeness_v_measure(classes[rows], found[rows])[part])

    return {
        name: CodeScore(leave_groups_out(partial(score, part), len(classes)), beside=beside)
        for part, name in enumerate(PARTS)
    }


def cluster_score(name: str) -> Callable[..., CodeScore]:
    """`cluster_scores`'s of one name."""

    @wraps(cluster_scores)
    def score(labelled: LabelledCodes, **options: Any) -> CodeScore:
        return cluster_scores(labelled, **options)[name]

    return score
