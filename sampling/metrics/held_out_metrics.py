"""Metrics of a model on data that it was not trained on: likelihood, denoising error, restorations, and ensembles that
are drawn under conditions of the reference, against what it has under them.

Those of ensembles are means over channels, in the data's own units; beside the value is that of each channel
(`channels`), as channels may be of different units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from scoreray.sampling.measures.distances import Estimate, mean_of
from scoreray.sampling.measures.ensembles import EnsembleScores
from scoreray.sampling.measures.held_out import edm_weighted
from scoreray.sampling.measures.importance import effective_samples, log_mean_weight
from scoreray.sampling.metrics.chunks import (
    AnnealingChunk,
    EnsembleChunk,
    ImportanceChunk,
    LikelihoodChunk,
    LossChunk,
    RestorationChunk,
)
from scoreray.sampling.metrics.record import MetricResult, MetricValue
from scoreray.sampling.metrics.stored import StoredChunks, joined
from scoreray.sampling.samplers.options import Range

FAR_FROM_CALIBRATED = 0.2  # of the spread-skill ratio from 1 that is worth a warning, beyond its interval


def likelihood(name: str) -> Callable[[StoredChunks], MetricResult]:
    def compute(stored: StoredChunks) -> MetricResult:
        chunks = list(stored.each("likelihood", LikelihoodChunk))
        values = joined(getattr(chunk, name) for chunk in chunks)
        nfe = float(np.mean([float(chunk.nfe) for chunk in chunks]))
        return MetricResult(mean_of(values), {"nfe": nfe})

    return compute


def loss(stored: StoredChunks) -> MetricResult:
    """EDM-weighted error at the fixed levels, and its curve over them; at the optimum it is 1 or below."""
    errors = joined(chunk.errors for chunk in stored.each("loss", LossChunk))
    return by_level(stored, errors, {"errors": errors.mean(0).tolist()})


def by_level(
    stored: StoredChunks, errors: Tensor, more: Mapping[str, object], warnings: tuple[str, ...] = ()
) -> MetricResult:
    """Of squared errors per dimension [n, levels]: the EDM-weighted mean, and its curve; beside it also `more`."""
    sigmas = stored.inputs.sigmas
    weighted = edm_weighted(errors, sigmas, stored.inputs.info.config.denoiser.resolved_sigma_data)
    curve = [mean_of(column) for column in weighted.T]
    means, std_errors = [point.value for point in curve], [point.std_error for point in curve]
    beside = {"sigmas": sigmas, "weighted": means, "std_errors": std_errors, **more}
    return MetricResult(mean_of(weighted.mean(1)), beside, warnings, drawn=(sigmas, means, std_errors))


def restoration(name: str) -> Callable[[StoredChunks], MetricResult]:
    def compute(stored: StoredChunks) -> MetricResult:
        chunks = list(stored.each("restoration", RestorationChunk))
        values = joined(getattr(chunk, name) for chunk in chunks)
        return MetricResult(mean_of(values), drawn=chunks[0].pictures)

    return compute


def reconstruction_error(stored: StoredChunks) -> MetricResult:
    """Mean squared error of reconstructions, per value in the model's range."""
    chunks = list(stored.each("restoration", RestorationChunk))
    return MetricResult(
        mean_of(joined(chunk.mse for chunk in chunks if chunk.mse is not None)), drawn=chunks[0].pictures
    )


def annealed_likelihood(stored: StoredChunks) -> MetricResult:
    """Mean log-likelihood of the reference under the energy, in nats: -E - ln Z."""
    chunk = next(stored.each("ais", AnnealingChunk))
    log_weights, energies = torch.from_numpy(chunk.log_weights), torch.from_numpy(chunk.energies)
    log_z = float(log_weights.logsumexp(0)) - math.log(len(log_weights))
    weights = (log_weights - log_weights.max()).exp()
    z_error = float(weights.std() / weights.mean() / math.sqrt(len(weights)))
    effective = float(weights.sum() ** 2 / weights.square().sum())
    warning = (
        f"ais: {effective:.1f} of {len(weights)} chains carry the weight, so ln Z is likely too low and the likelihood "
        "too high: take more chains"
    )
    mean = mean_of(-energies)
    error = math.hypot(mean.std_error or 0.0, z_error)
    beside = {"log_z": log_z, "log_z_std_error": z_error, "effective_chains": effective}
    few = effective < 0.1 * len(weights)
    return MetricResult(Estimate(mean.value - log_z, error), beside, (warning,) if few else ())


def importance(
    stored: StoredChunks,
    *,
    samples: Annotated[int, Range(1, 10_000)] = 64,
    proposal: Literal["posterior", "prior"] = "posterior",
    scale: Annotated[float | None, Range(0, 1e6, open_low=True)] = None,
) -> MetricResult:
    """Mean of ln of mean weights (Burda 2016), nats: below the log-likelihood in expectation, tighter with `samples`.

    What the options change was computed with the chunk. scale: of the decoder, None by the objective's kl_weight.
    """
    chunk = next(stored.each("importance", ImportanceChunk))
    weights, log_z = torch.from_numpy(chunk.log_weights), float(chunk.log_z)
    mean, effective = mean_of(log_mean_weight(weights)), float(effective_samples(weights).mean())
    warning = f"iwae: {effective:.1f} of {samples} samples carry the weight, so the value is too low: take more samples"
    beside = {"effective_samples": effective, "elbo": float(weights.mean()) - log_z}
    if log_z:
        beside |= {"log_z": log_z, "log_z_std_error": float(chunk.log_z_error)}
    error = math.hypot(mean.std_error or 0.0, float(chunk.log_z_error))
    few = effective < 0.1 * samples
    return MetricResult(Estimate(mean.value - log_z, error), beside, (warning,) if few else ())


def crps(stored: StoredChunks) -> MetricResult:
    return _of_scores(stored, *_scores(stored).mean_crps())


def rmse(stored: StoredChunks) -> MetricResult:
    return _of_scores(stored, *_scores(stored).rmse())


def spread_skill(stored: StoredChunks) -> MetricResult:
    found, channels = _scores(stored).spread_skill()
    warning = (
        f"spread_skill: {found.value:.3g}, so the ensembles are too {'sure' if found.value < 1 else 'unsure'}: 1 is "
        "calibrated"
    )
    far = abs(found.value - 1) > FAR_FROM_CALIBRATED + 2 * (found.std_error or 0)
    return _of_scores(stored, found, channels, (warning,) if far else ())


def match(stored: StoredChunks) -> MetricResult:
    """The scorer's scores of all members under what was requested, its first one the value; `observed`: what it gives
    the reference's own samples. The error is over conditions, as members of one share it."""
    chunks = list(stored.each("ensembles", EnsembleChunk))
    names = [str(name) for name in chunks[0].score_names]
    drawn, observed = joined(chunk.scores for chunk in chunks), joined(chunk.observed_scores for chunk in chunks)
    by_name = {name: mean_of(drawn[:, :, i].mean(1)) for i, name in enumerate(names)}
    beside = {
        "scores": {name: MetricValue.of(found).model_dump() for name, found in by_name.items()},
        "observed": {name: float(observed[:, i].mean()) for i, name in enumerate(names)},
    }
    return MetricResult(by_name[names[0]], beside)


def _scores(stored: StoredChunks) -> EnsembleScores:
    chunks = list(stored.each("ensembles", EnsembleChunk))
    parts: Callable[[str], Tensor] = lambda name: joined(getattr(chunk, name) for chunk in chunks)  # noqa: E731
    return EnsembleScores(
        parts("crps"), parts("variance"), parts("squared_error"), stored.inputs.settings.per_condition
    )


def _of_scores(
    stored: StoredChunks, found: Estimate, channels: Sequence[float], warnings: tuple[str, ...] = ()
) -> MetricResult:
    first = next(stored.each("ensembles", EnsembleChunk))
    return MetricResult(found, {"channels": list(channels)}, warnings, drawn=(first.members, first.observed))
