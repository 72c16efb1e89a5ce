"""Metrics of samples as a set, against the reference as one, computed from their stored chunks.

Chunks are read one after another in their order, so sums are the same whichever process computed them, and memory does
not grow with the number of samples: what needs rows at once takes at most `plan.MOST_ROWS` of a side, spread evenly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import reduce
from operator import add
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.own_code import instance, line_of
from scoreray.data.storage.store import NotFound
from scoreray.sampling.measures import distances, frechet
from scoreray.sampling.measures.distances import Estimate, jackknife, mean_of
from scoreray.sampling.measures.spectra import log_spectral_distance
from scoreray.sampling.metrics.chunks import (
    FeatureChunk,
    ReferenceMoments,
    RestorationChunk,
    read_chunk,
    write_chunk,
)
from scoreray.sampling.metrics.record import MetricResult, MetricValue, parts_of
from scoreray.sampling.metrics.stored import StoredChunks, joined
from scoreray.sampling.samplers.options import Range

NEIGHBOURS = 3
NEIGHBOUR_PICTURES = 16
COPY_RATIO = 1 / 3  # of the distances to the nearest and to the next image of the reference (Yoon 2023)


def fid(stored: StoredChunks) -> MetricResult:
    count, num_reference = stored.inputs.settings.count, stored.inputs.num_reference
    reference = _reference_moments(stored)
    features = (chunk.features for chunk in stored.each("samples", FeatureChunk))
    found = frechet.estimate(reference, _group_moments(features, count, reference.mean))
    bias = None if found.infinity is None else found.value - found.infinity
    warnings = _warnings_of_few("fid", min(count, num_reference), len(reference.mean))
    if not warnings and bias is not None and bias > max(0.05 * found.value, 2 * (found.std_error or 0)):
        warnings.append(
            f"fid: about {bias:.3g} of {found.value:.4g} is bias of {count:,} samples; compare at equal counts only, "
            "or compare fid_infinity"
        )
    beside = {"fid_infinity": found.infinity, "points": [list(point) for point in found.points]}
    return MetricResult(Estimate(found.value, found.std_error), beside, tuple(warnings), found.points)


def reconstruction_fid(stored: StoredChunks) -> MetricResult:
    """FID of reconstructions and the samples that they are of. A group is left out of both for the error: so a perfect
    autoencoder has 0, whatever the count."""
    count = stored.inputs.num_reference
    center = torch.from_numpy(next(stored.each("reference", FeatureChunk)).features).double().mean(0)
    originals = _group_moments((one.features for one in stored.each("reference", FeatureChunk)), count, center)
    reconstructions = (chunk.features for chunk in stored.each("restoration", RestorationChunk))
    made = _group_moments((one for one in reconstructions if one is not None), count, center)

    def distance(groups: Tensor) -> float:
        both = ([side[number] for number in groups.tolist()] for side in (originals, made))
        of, by = (reduce(add, chosen) for chosen in both)
        return frechet.distance(frechet.Reference.of(of), by)

    warnings = _warnings_of_few("reconstruction_fid", count, len(center))
    return MetricResult(jackknife(distance, frechet.GROUPS), warnings=tuple(warnings))


def _group_moments(features: Iterable[np.ndarray], count: int, center: Tensor) -> list[frechet.FeatureMoments]:
    """Of `count` rows of features, in arrays one after another, in as many equal groups as an error is taken from."""
    groups = [frechet.FeatureMoments.zero(center) for _ in range(frechet.GROUPS)]
    row = 0
    for rows in map(torch.from_numpy, features):
        numbers = torch.arange(row, row + len(rows)) * frechet.GROUPS // count
        for number in numbers.unique().tolist():
            groups[number].add(rows[numbers == number])
        row += len(rows)
    return groups


def _warnings_of_few(metric: str, count: int, dims: int) -> list[str]:
    if count > dims:
        return []
    return [
        f"{metric}: {count:,} samples in {dims:,} dimensions leave the covariance singular and the distance far too "
        "large: take several times as many samples as dimensions"
    ]


def _reference_moments(stored: StoredChunks) -> frechet.Reference:
    """Mean and covariance's root of the reference, from the cache where an evaluation before this one left them."""
    store, key = stored.plan.folder("reference"), "moments.npz"
    try:
        kept = read_chunk(store, key, ReferenceMoments)
        return frechet.Reference(torch.from_numpy(kept.mean), float(kept.trace), torch.from_numpy(kept.root))
    except NotFound:
        pass
    moments = None
    for chunk in stored.each("reference", FeatureChunk):
        features = torch.from_numpy(chunk.features)
        if moments is None:  # about the first chunk's mean, near enough to keep rounding small
            moments = frechet.FeatureMoments.zero(features.double().mean(0))
        moments.add(features)
    assert moments is not None
    made = frechet.Reference.of(moments)
    write_chunk(store, key, ReferenceMoments(made.mean.numpy(), np.array(made.trace), made.root.numpy()))
    return made


def inception_score(stored: StoredChunks) -> MetricResult:
    sums: list[distances.ClassSums] = []
    for chunk in stored.each("samples", FeatureChunk):
        assert chunk.counts is not None  # the plan has refused extractors without classes
        assert chunk.probabilities is not None
        assert chunk.negentropies is not None
        probabilities = torch.from_numpy(chunk.probabilities)
        rows = zip(chunk.counts.tolist(), probabilities, chunk.negentropies.tolist(), strict=True)
        sums += [distances.ClassSums(*row) for row in rows]
    num = min(frechet.GROUPS, len(sums))
    groups = [distances.total(sums[i * len(sums) // num : (i + 1) * len(sums) // num]) for i in range(num)]
    warning = "is: the Inception Score of few samples is too low; compare at equal counts only"
    few = stored.inputs.settings.count < 5000
    factors = {"diversity": distances.ClassSums.diversity, "sharpness": distances.ClassSums.sharpness}
    parts = {name: distances.inception_score(groups, part) for name, part in factors.items()}
    return MetricResult(distances.inception_score(groups), parts_of(parts), (warning,) if few else ())


def precision_recall(stored: StoredChunks, *, k: Annotated[int, Range(1, 1000)] = NEIGHBOURS) -> MetricResult:
    samples, reference = stored.both("features")
    precision, recall = distances.precision_recall(samples, reference, k)
    if not _all_finite(samples, reference):  # comparisons with NaN are false, and would count as far apart
        precision = recall = Estimate(math.nan, None)
    beside = {"precision": MetricValue.of(precision).model_dump(), "recall": MetricValue.of(recall).model_dump()}
    return MetricResult(precision, beside)


def sliced_wasserstein(stored: StoredChunks) -> MetricResult:
    samples, reference = stored.both("projections")
    estimate = distances.sliced_wasserstein(samples, reference)
    # Two halves of the reference, taken to its full size: on a line the distance of two samples falls as 1 / sqrt(n).
    floor = distances.sliced_wasserstein(reference[0::2], reference[1::2]).value / math.sqrt(2)
    warning = f"sw: {estimate.value:.3g} is not above what two sets of real data of this size are apart ({floor:.3g})"
    return MetricResult(estimate, {"floor": floor}, (warning,) if estimate.value < 1.5 * floor else ())


def copies(stored: StoredChunks, *, threshold: Annotated[float, Range(0, 1)] = COPY_RATIO) -> MetricResult:
    """Whether samples are copies: much nearer to one image of the reference than to its next (Yoon 2023)."""
    samples, reference = stored.both("features")
    to_reference, _ = distances.nearest(samples, reference, 2)
    among, _ = distances.nearest(reference, reference, 1, same=True)
    ratio = to_reference[:, 0] / to_reference[:, 1].clamp_min(1e-12)
    copied = distances.mean_of((ratio < threshold).double()) if _all_finite(ratio) else Estimate(math.nan, None)
    first = torch.from_numpy(next(stored.each("samples", FeatureChunk)).features)
    apart, numbers = distances.nearest(first, reference, 1)
    closest = apart[:, 0].argsort()[:NEIGHBOUR_PICTURES]
    beside = {
        "median_distance": float(to_reference[:, 0].median()),
        "median_distance_among_reference": float(among.median()),
    }
    return MetricResult(copied, beside, drawn=(closest.tolist(), numbers[closest, 0].tolist()))


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


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


def of_own(name: str, stored: StoredChunks, **options: Any) -> MetricResult:
    """Of features of samples [n, d] and of the reference [m, d]: numbers by name, the first of which is the value. Its
    error is from leaving out a group of the samples at a time."""
    function = instance(name, "--metrics")
    samples, reference = stored.both("features")
    groups = samples.tensor_split(min(frechet.GROUPS, len(samples)))

    def value(rows: Tensor) -> dict[str, float]:
        try:
            found = function(rows, reference, **options)
            if not isinstance(found, Mapping):
                raise UserError(
                    f"--metrics {name}: gave a {type(found).__name__}; a mapping of numbers by name is needed"
                )
            found = {str(key): float(number) for key, number in found.items()}
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"--metrics {name}: failed: {line_of(error)}") from error
        if not found:
            raise UserError(f"--metrics {name}: gave no number")
        return found

    def first(numbers: Tensor) -> float:
        return next(iter(value(torch.cat([groups[number] for number in numbers.tolist()])).values()))

    return MetricResult(distances.jackknife(first, len(groups)), {"numbers": value(samples)})
