"""Every metric of a plan from its stored chunks, and the warnings that go with them."""

from __future__ import annotations

import math

import numpy as np
import torch

from scoreray.sampling.guidance.steering import untrained_estimate
from scoreray.sampling.measures.distances import Estimate
from scoreray.sampling.metrics.plan import EvaluationPlan
from scoreray.sampling.metrics.record import MetricResult
from scoreray.sampling.metrics.registry import metric_of
from scoreray.sampling.metrics.stored import StoredChunks

FEWEST_CLASSES = 1.5  # that the labels count as (exp of their entropy): below, it is 9 in 10 of one class
NOT_FINITE = (torch.linalg.LinAlgError, np.linalg.LinAlgError, ArithmeticError)


def compute_metrics(stored: StoredChunks) -> tuple[dict[str, MetricResult], list[str]]:
    """Every metric of a plan, and what is to be warned of."""
    plan, found = stored.plan, dict[str, MetricResult]()
    warnings, inputs = _warnings_of_one_class(plan), plan.inputs
    untrained = untrained_estimate(inputs.info, inputs.info.conditions, inputs.request.guided)
    if untrained is not None and any(metric_of(name).draws for name in plan.metrics):
        warnings.append(untrained)
    for name in plan.metrics:
        try:
            found[name] = metric_of(name).compute(stored, **inputs.settings.metric_options.get(name, {}))
        except NOT_FINITE:  # what eigenvalues, fits and exponentials raise where there is a NaN or an infinity
            found[name] = MetricResult(Estimate(math.nan, None))
        warnings += found[name].warnings
        if not math.isfinite(found[name].estimate.value):
            warnings.append(
                f"{name}: not a finite number, so null in the record: the network's values, or the extractor's, are "
                "not finite or too large at some of these samples"
            )
    return found, warnings


def _warnings_of_one_class(plan: EvaluationPlan) -> list[str]:
    """Where nearly all labels are one class, a classifier of them sees little: its features are alike for all."""
    manifest, extracts = plan.inputs.manifest, any("extractor" in metric_of(name).needs for name in plan.metrics)
    if plan.inputs.extractor.kind != "classifier" or not extracts:
        return []
    counts = np.array(manifest.class_counts, dtype=np.float64)
    if not counts.any():  # the classifier was given as a file
        return []
    shares = counts[counts > 0] / counts.sum()
    if math.exp(-float((shares * np.log(shares)).sum())) >= FEWEST_CLASSES:
        return []
    return [
        f"extractor: {shares.max():.0%} of the reference's labels are '{manifest.classes[int(counts.argmax())]}', so a "
        "classifier of them sees little difference between images, and distances in its features are too small: give "
        "--extractor FILE"
    ]
