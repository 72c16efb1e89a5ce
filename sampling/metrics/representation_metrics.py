"""Metrics of representations: those of `sampling/representations/` over the stored codes of the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from scoreray.sampling.metrics.chunks import CodesChunk
from scoreray.sampling.metrics.record import MetricResult, parts_of
from scoreray.sampling.metrics.stored import StoredChunks
from scoreray.sampling.representations.labelled import CodeScore, LabelledCodes, factors_of


def of_codes(score: Callable[..., CodeScore]) -> Callable[..., MetricResult]:
    """The metric of a score of `LabelledCodes`, with its options."""

    @functools.wraps(score)
    def compute(stored: StoredChunks, **options: Any) -> MetricResult:
        return result_of(score(labelled_codes(stored), **options))

    return compute


def result_of(score: CodeScore) -> MetricResult:
    """As a record has it."""
    return MetricResult(score.estimate, score.beside | (parts_of(score.parts) if score.parts else {}))


def labelled_codes(stored: StoredChunks) -> LabelledCodes:
    """The codes of the reference's samples beside its class and scalar fields."""
    chunks = list(stored.each("codes", CodesChunk))
    codes = np.concatenate([chunk.codes for chunk in chunks]).astype(np.float64)
    values = np.concatenate([chunk.factors for chunk in chunks])
    return LabelledCodes(codes, factors_of(stored.inputs.manifest, values))
