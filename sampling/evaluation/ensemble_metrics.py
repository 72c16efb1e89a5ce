"""Metrics of conditional models, computed from the stored chunks of ensembles: members under one condition each.

All are in the data's own units. Beside a value stands that of each channel, as channels may be of different units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoreray.sampling.evaluation.chunks import EnsembleChunk, FeatureChunk
from scoreray.sampling.evaluation.record import MetricResult, MetricValue
from scoreray.sampling.evaluation.stored import StoredChunks, joined
from scoreray.sampling.measures import frechet
from scoreray.sampling.measures.distances import Estimate, jackknife, mean_of
from scoreray.sampling.measures.ensembles import EnsembleScores
from scoreray.sampling.measures.spectra import log_spectral_distance

FAR_FROM_CALIBRATED = 0.2  # of the spread-skill ratio from 1 that is worth a warning, beyond its interval


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


def accuracy(stored: StoredChunks) -> MetricResult:
    """Share of samples that the classifier takes for the class that was requested."""
    right = joined(chunk.right for chunk in stored.each("samples", FeatureChunk) if chunk.right is not None)
    return MetricResult(mean_of(right), {"on_reference": stored.inputs.accuracy})


def spectrum(stored: StoredChunks) -> MetricResult:
    """Root mean square ratio of the samples' power spectrum and the reference's, dB, the mean over channels."""
    rows, drawn = _mean_spectra(stored, "samples")
    _, (of_reference,) = _mean_spectra(stored, "reference", groups=1)

    def distance(groups: Tensor) -> Tensor:
        weights = rows[groups] / rows[groups].sum()
        return log_spectral_distance((weights[:, None, None] * drawn[groups]).sum(0), of_reference)

    every = torch.arange(len(rows))
    mean = (rows[:, None, None] / rows.sum() * drawn).sum(0)
    beside = {"channels": distance(every).tolist(), "samples": mean.tolist(), "reference": of_reference.tolist()}
    return MetricResult(
        jackknife(lambda groups: float(distance(groups).mean()), len(rows)),
        beside,
        drawn=(mean.tolist(), of_reference.tolist()),
    )


def _mean_spectra(stored: StoredChunks, stage: str, groups: int = frechet.GROUPS) -> tuple[Tensor, Tensor]:
    """(rows [g], mean spectra [g, C, K]) of at most `groups` groups of a stage's samples."""
    rows, means = list[int](), list[Tensor]()
    for chunk in stored.each(stage, FeatureChunk):
        assert chunk.spectra is not None
        rows += [len(part) for part in torch.arange(len(chunk.features)).tensor_split(len(chunk.spectra))]
        means += torch.from_numpy(chunk.spectra)
    counts, spectra = torch.tensor(rows, dtype=torch.float64), torch.stack(means)
    parts = torch.arange(len(rows)).tensor_split(min(groups, len(rows)))
    sums = torch.stack([(counts[part, None, None] * spectra[part]).sum(0) for part in parts])
    totals = torch.stack([counts[part].sum() for part in parts])
    return totals, sums / totals[:, None, None]


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
