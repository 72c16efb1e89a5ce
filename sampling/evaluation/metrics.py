"""Every metric of an evaluation: what it is computed from, which models and data it fits, its function, its warnings.

A new one is one function and one entry of METRICS. Chunks are read one after another in their order, so sums are the
same whichever process computed them, and memory does not grow with the number of samples: what needs rows at once takes
at most `plan.MOST_ROWS` of a side, spread evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoreray.data.errors import UserError, nearest
from scoreray.data.reading.manifest import Manifest
from scoreray.data.storage.store import NotFound
from scoreray.sampling.evaluation import ensemble_metrics
from scoreray.sampling.evaluation.chunks import (
    AnnealingChunk,
    FeatureChunk,
    LikelihoodChunk,
    LossChunk,
    ReferenceMoments,
    RestorationChunk,
    read_chunk,
    write_chunk,
)
from scoreray.sampling.evaluation.plan import EvaluationInputs, EvaluationPlan
from scoreray.sampling.evaluation.record import MetricResult, MetricValue
from scoreray.sampling.evaluation.stages import PROJECTIONS, STAGES
from scoreray.sampling.evaluation.stored import StoredChunks, joined
from scoreray.sampling.measures import distances, frechet, kde
from scoreray.sampling.measures.distances import Estimate
from scoreray.sampling.measures.features import IDENTITY_VALUES, ExtractorChoice
from scoreray.sampling.measures.held_out import edm_weighted
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.stored_conditions import StoredConditions
from scoreray.trainer.step import to_unit_range

KID_BLOCK = 1000
KID_BLOCKS = 10
NEIGHBOURS = 3
NEIGHBOUR_PICTURES = 16
SHORTEST_GRID = 4
COPY_RATIO = 1 / 3  # of the distances to the nearest and to the next image of the reference (Yoon 2023)
FEWEST_CLASSES = 1.5  # that the labels count as (exp of their entropy): below, it is 9 in 10 of one class
NOT_FINITE = (torch.linalg.LinAlgError, np.linalg.LinAlgError, ArithmeticError)


Misfit = Callable[[ModelInfo, Manifest, ExtractorChoice], str | None]


@dataclass(frozen=True)
class EvaluationMetric:
    """One metric.

    title: as a page shows it. needs: parts of the protocol beside its own that its value depends on; those that are in
    STAGES are computed for it. compute: of the stored chunks. protocol: its own settings, as the record has them.
    misfit: why it makes no sense for a model, data and an extractor. costly: only where it is asked for.
    """

    title: str
    needs: tuple[str, ...]
    compute: Callable[[StoredChunks], MetricResult]
    protocol: Callable[[EvaluationInputs], dict[str, Any]] | None = None
    misfit: Misfit = lambda info, manifest, extractor: None
    costly: bool = False

    def parts(self, name: str) -> tuple[str, ...]:
        """All parts of the protocol that it depends on: records are comparable in it where these agree."""
        return self.needs if self.protocol is None else (*self.needs, name)

    @property
    def stages(self) -> set[str]:
        """The chunks that it is computed from; the reference's own only beside samples, as others read its images."""
        return {part for part in self.needs if part in STAGES} - (set() if "samples" in self.needs else {"reference"})

    @property
    def compares_sets(self) -> bool:
        """Whether it compares the samples with the reference as a whole."""
        return {"samples", "reference"} <= set(self.needs)

    @property
    def draws(self) -> bool:
        """Whether settings of sampling change it."""
        return bool({"samples", "restoration"} & set(self.needs))


def _fid(stored: StoredChunks) -> MetricResult:
    count, num_reference = stored.inputs.settings.count, stored.inputs.num_reference
    reference = _reference_moments(stored)
    groups = [frechet.FeatureMoments.zero(reference.mean) for _ in range(frechet.GROUPS)]
    row = 0
    for chunk in stored.each("samples", FeatureChunk):
        features = torch.from_numpy(chunk.features)
        numbers = torch.arange(row, row + len(features)) * frechet.GROUPS // count
        for number in numbers.unique().tolist():
            groups[number].add(features[numbers == number])
        row += len(features)
    found = frechet.estimate(reference, groups)
    dims, warnings = len(reference.mean), []
    bias = None if found.infinity is None else found.value - found.infinity
    if count <= dims or num_reference <= dims:
        warnings.append(
            f"fid: {min(count, num_reference):,} samples in {dims:,} dimensions leave the covariance singular and "
            "the distance far too large: take several times as many samples as dimensions"
        )
    elif bias is not None and bias > max(0.05 * found.value, 2 * (found.std_error or 0)):
        warnings.append(
            f"fid: about {bias:.3g} of {found.value:.4g} is bias of {count:,} samples; compare at equal counts only, "
            "or compare fid_infinity"
        )
    beside = {"fid_infinity": found.infinity, "points": [list(point) for point in found.points]}
    return MetricResult(Estimate(found.value, found.std_error), beside, tuple(warnings), found.points)


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


def _kid(stored: StoredChunks) -> MetricResult:
    samples, reference = stored.both("features")
    rows = stored.inputs.num_rows
    blocks = max(1, rows // kid_block(rows))
    estimate = distances.kid((samples[i::blocks], reference[i::blocks]) for i in range(blocks))
    return MetricResult(estimate, {"blocks": blocks})


def kid_block(rows: int) -> int:
    """Rows of a block: at most 1,000, and so few that there are ten blocks to take an error from."""
    return max(2, min(KID_BLOCK, rows // KID_BLOCKS))


def _is(stored: StoredChunks) -> MetricResult:
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
    return MetricResult(distances.inception_score(groups), warnings=(warning,) if few else ())


def _pr(stored: StoredChunks) -> MetricResult:
    samples, reference = stored.both("features")
    precision, recall = distances.precision_recall(samples, reference, NEIGHBOURS)
    if not _all_finite(samples, reference):  # comparisons with NaN are false, and would count as far apart
        precision = recall = Estimate(math.nan, None)
    beside = {"precision": MetricValue.of(precision).model_dump(), "recall": MetricValue.of(recall).model_dump()}
    return MetricResult(precision, beside)


def _sw(stored: StoredChunks) -> MetricResult:
    samples, reference = stored.both("projections")
    estimate = distances.sliced_wasserstein(samples, reference)
    # Two halves of the reference, taken to its full size: on a line the distance of two samples falls as 1 / sqrt(n).
    floor = distances.sliced_wasserstein(reference[0::2], reference[1::2]).value / math.sqrt(2)
    warning = f"sw: {estimate.value:.3g} is not above what two sets of real data of this size are apart ({floor:.3g})"
    return MetricResult(estimate, {"floor": floor}, (warning,) if estimate.value < 1.5 * floor else ())


def _nn(stored: StoredChunks) -> MetricResult:
    """Whether samples are copies: much nearer to one image of the reference than to its next (Yoon 2023)."""
    samples, reference = stored.both("features")
    to_reference, _ = distances.nearest(samples, reference, 2)
    among, _ = distances.nearest(reference, reference, 1, same=True)
    ratio = to_reference[:, 0] / to_reference[:, 1].clamp_min(1e-12)
    copied = distances.mean_of((ratio < COPY_RATIO).double()) if _all_finite(ratio) else Estimate(math.nan, None)
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


def _kde(stored: StoredChunks) -> MetricResult:
    """Mean log-density of the reference under a kernel density of the samples, nats."""
    samples, reference = map(to_unit_range, stored.both("values"))
    bandwidth = kde.choose_bandwidth(samples[:2000])
    return MetricResult(distances.mean_of(kde.log_density(reference, samples, bandwidth)), {"bandwidth": bandwidth})


def _likelihood(name: str) -> Callable[[StoredChunks], MetricResult]:
    def compute(stored: StoredChunks) -> MetricResult:
        chunks = list(stored.each("likelihood", LikelihoodChunk))
        values = joined(getattr(chunk, name) for chunk in chunks)
        nfe = float(np.mean([float(chunk.nfe) for chunk in chunks]))
        return MetricResult(distances.mean_of(values), {"nfe": nfe})

    return compute


def _loss(stored: StoredChunks) -> MetricResult:
    """EDM-weighted error at the fixed levels, and its curve over them; at the optimum it is 1 or below."""
    errors = joined(chunk.errors for chunk in stored.each("loss", LossChunk))
    sigmas = stored.inputs.sigmas
    weighted = edm_weighted(errors, sigmas, stored.inputs.info.config.denoiser.resolved_sigma_data)
    curve = [distances.mean_of(column) for column in weighted.T]
    means, std_errors = [point.value for point in curve], [point.std_error for point in curve]
    beside = {"sigmas": sigmas, "errors": errors.mean(0).tolist(), "weighted": means, "std_errors": std_errors}
    return MetricResult(distances.mean_of(weighted.mean(1)), beside, drawn=(sigmas, means, std_errors))


def _restoration(name: str) -> Callable[[StoredChunks], MetricResult]:
    def compute(stored: StoredChunks) -> MetricResult:
        chunks = list(stored.each("restoration", RestorationChunk))
        values = joined(getattr(chunk, name) for chunk in chunks)
        return MetricResult(distances.mean_of(values), drawn=chunks[0].pictures)

    return compute


def _ais(stored: StoredChunks) -> MetricResult:
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
    mean = distances.mean_of(-energies)
    error = math.hypot(mean.std_error or 0.0, z_error)
    beside = {"log_z": log_z, "log_z_std_error": z_error, "effective_chains": effective}
    few = effective < 0.1 * len(weights)
    return MetricResult(Estimate(mean.value - log_z, error), beside, (warning,) if few else ())


def _knows_noise_levels(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    return f"network.kind '{info.config.network.kind}' knows no noise level" if info.is_machine else None


def _has_classes(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if extractor.kind in ("inception", "classifier", "torchscript"):
        return None
    return f"it needs class probabilities, which extractor '{extractor.kind}' has not"


def _few_values(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    values = math.prod(manifest.shape)
    if values <= IDENTITY_VALUES:
        return None
    return f"a kernel density says nothing in {values} dimensions (at most {IDENTITY_VALUES})"


def _is_8_bit(manifest: Manifest) -> bool:
    return len(manifest.shape) == 3 and manifest.dtype == "uint8"


def _likelihood_of_8_bit(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    unfit = _knows_noise_levels(info, manifest, extractor)
    return unfit or (None if _is_8_bit(manifest) else "bits per dimension are of 8-bit images; nats fit these data")


def _restores_images(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    unfit = _knows_noise_levels(info, manifest, extractor)
    if unfit or _is_8_bit(manifest):
        return unfit
    return f"it measures images, the reference has samples of shape {list(manifest.shape)}"


def _has_energy(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    parameterization, values = info.config.denoiser.parameterization, math.prod(manifest.shape)
    if info.is_machine:
        return None
    if not parameterization.startswith("energy_"):
        return f"it needs an energy, parameterization '{parameterization}' has none"
    if values > IDENTITY_VALUES:
        return f"chains do not mix in {values} dimensions (at most {IDENTITY_VALUES} here)"
    return None


def _is_conditional(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if not info.conditions or info.is_machine:
        return "the model takes no condition"
    try:
        missing = StoredConditions(info, manifest.fields, "the reference").missing
    except UserError as error:
        return str(error)
    names = ", ".join(info.conditions)
    return (
        f"the reference has nothing of what the model takes: {names}" if len(missing) == len(info.conditions) else None
    )


def _classifies_what_was_requested(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if extractor.kind != "classifier":
        return f"it needs extractor 'classifier', not '{extractor.kind}'"
    if not info.classes or tuple(manifest.classes) != info.classes:
        return "the model takes no class, or others than the reference has"
    return _is_conditional(info, manifest, extractor)


def _has_grid(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if len(manifest.shape) > 1 and min(manifest.shape[1:]) >= SHORTEST_GRID:
        return None
    return f"a spectrum needs a grid of {SHORTEST_GRID} or more points a side, samples are {list(manifest.shape)}"


OF_FEATURES = ("reference", "samples", "extractor")
OF_ENSEMBLES = ("reference", "ensembles")

METRICS: dict[str, EvaluationMetric] = {
    "fid": EvaluationMetric(
        "Fréchet distance (FID)", OF_FEATURES, _fid,
        protocol=lambda inputs: {"covariance": "unbiased", "groups": frechet.GROUPS},
    ),
    "kid": EvaluationMetric(
        "Kernel distance (KID)", OF_FEATURES, _kid,
        protocol=lambda inputs: {"kernel": "(x.y / d + 1)^3", "rows": inputs.num_rows,
                                 "block": kid_block(inputs.num_rows)},
    ),
    "is": EvaluationMetric(
        "Inception Score", ("samples", "extractor"), _is,
        protocol=lambda inputs: {"groups": frechet.GROUPS}, misfit=_has_classes,
    ),
    "pr": EvaluationMetric(
        "Precision (recall below)", OF_FEATURES, _pr,
        protocol=lambda inputs: {"k": NEIGHBOURS, "rows": inputs.num_rows},
    ),
    "sw": EvaluationMetric(
        "Sliced Wasserstein", ("reference", "samples"), _sw,
        protocol=lambda inputs: {"projections": PROJECTIONS, "rows": inputs.num_rows},
    ),
    "nn": EvaluationMetric(
        "Share of copies", OF_FEATURES, _nn,
        protocol=lambda inputs: {"rows": inputs.num_rows, "threshold": COPY_RATIO},
    ),
    "kde": EvaluationMetric(
        "Log-density of the reference under samples, nats", ("reference", "samples"), _kde,
        protocol=lambda inputs: {"rows": inputs.num_rows, "bandwidth": "largest leave-one-out likelihood"},
        misfit=_few_values,
    ),
    "bpd": EvaluationMetric(
        "Bits per dimension", ("reference", "likelihood"), _likelihood("bpd"), misfit=_likelihood_of_8_bit, costly=True
    ),
    "nats": EvaluationMetric(
        "Log-likelihood, nats", ("reference", "likelihood"), _likelihood("nats"), misfit=_knows_noise_levels,
        costly=True,
    ),
    "loss": EvaluationMetric(
        "Denoising loss, EDM-weighted", ("reference", "loss"), _loss, misfit=_knows_noise_levels
    ),
    "psnr": EvaluationMetric(
        "PSNR of restorations, dB", ("reference", "restoration"), _restoration("psnr"), misfit=_restores_images,
        costly=True,
    ),
    "ssim": EvaluationMetric(
        "SSIM of restorations", ("reference", "restoration"), _restoration("ssim"), misfit=_restores_images,
        costly=True,
    ),
    "ais": EvaluationMetric(
        "Log-likelihood by AIS, nats", ("reference", "ais"), _ais, misfit=_has_energy, costly=True
    ),
    "crps": EvaluationMetric(
        "CRPS of ensembles", OF_ENSEMBLES, ensemble_metrics.crps,
        protocol=lambda inputs: {"estimator": "fair"}, misfit=_is_conditional, costly=True,
    ),
    "spread_skill": EvaluationMetric(
        "Spread-skill ratio of ensembles", OF_ENSEMBLES, ensemble_metrics.spread_skill, misfit=_is_conditional,
        costly=True,
    ),
    "rmse": EvaluationMetric(
        "RMSE of the mean of ensembles", OF_ENSEMBLES, ensemble_metrics.rmse, misfit=_is_conditional, costly=True
    ),
    "match": EvaluationMetric(
        "Match with what was requested", OF_ENSEMBLES, ensemble_metrics.match,
        protocol=lambda inputs: {"scorer": inputs.settings.scorer}, misfit=_is_conditional, costly=True,
    ),
    "accuracy": EvaluationMetric(
        "Share classified as was requested", OF_FEATURES, ensemble_metrics.accuracy,
        misfit=_classifies_what_was_requested, costly=True,
    ),
    "spectrum": EvaluationMetric(
        "Distance of power spectra, dB", ("reference", "samples"), ensemble_metrics.spectrum,
        protocol=lambda inputs: {"power": "mean over directions"}, misfit=_has_grid, costly=True,
    ),
}  # fmt: skip
"""Every metric, by the word that chooses it in a config and on the command line, in the record's order."""


def check_names(names: Iterable[str]) -> None:
    """Raises UserError for the first name that is none of METRICS."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}'; {nearest(name, METRICS)}")


def stages_of(plan: EvaluationPlan) -> list[str]:
    """The stages whose chunks a plan's metrics are computed from, in their order."""
    wanted = {stage for name in plan.metrics for stage in METRICS[name].stages}
    return [stage for stage in STAGES if stage in wanted]


def compute_metrics(plan: EvaluationPlan) -> tuple[dict[str, MetricResult], list[str]]:
    """Every metric of a plan whose chunks are all stored, and what is to be warned of."""
    stored, found = StoredChunks(plan), dict[str, MetricResult]()
    warnings = _warnings_of_one_class(plan)
    for name in plan.metrics:
        try:
            found[name] = METRICS[name].compute(stored)
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
    manifest, extracts = plan.inputs.manifest, any("extractor" in METRICS[name].needs for name in plan.metrics)
    if plan.inputs.extractor.kind != "classifier" or not extracts:
        return []
    counts = np.array(manifest.class_counts, dtype=np.float64)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    if math.exp(-float((shares * np.log(shares)).sum())) >= FEWEST_CLASSES:
        return []
    return [
        f"extractor: {shares.max():.0%} of the reference's labels are '{manifest.classes[int(counts.argmax())]}', so a "
        "classifier of them sees little difference between images, and distances in its features are too small: give "
        "--extractor FILE"
    ]
