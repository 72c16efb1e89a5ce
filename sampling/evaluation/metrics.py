"""Every metric of an evaluation: what it is computed from, which models and data it fits, its function, its warnings.

A new one is one function (`sample_metrics.py`, `held_out_metrics.py`) and one entry of METRICS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from scoreray.data.errors import UserError, nearest
from scoreray.data.own_code import code_hash, is_own, or_own
from scoreray.data.reading.manifest import Manifest
from scoreray.sampling.evaluation import held_out_metrics, sample_metrics
from scoreray.sampling.evaluation.plan import EvaluationInputs, EvaluationPlan
from scoreray.sampling.evaluation.record import MetricResult
from scoreray.sampling.evaluation.sample_chunks import PROJECTIONS
from scoreray.sampling.evaluation.sample_metrics import COPY_RATIO, NEIGHBOURS, kid_block
from scoreray.sampling.evaluation.stages import STAGES
from scoreray.sampling.evaluation.stored import StoredChunks
from scoreray.sampling.guidance.steering import untrained_estimate
from scoreray.sampling.measures import frechet
from scoreray.sampling.measures.distances import Estimate
from scoreray.sampling.measures.features import IDENTITY_VALUES, ExtractorChoice
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.stored_conditions import StoredConditions

SHORTEST_GRID = 4
FEWEST_CLASSES = 1.5  # that the labels count as (exp of their entropy): below, it is 9 in 10 of one class
NOT_FINITE = (torch.linalg.LinAlgError, np.linalg.LinAlgError, ArithmeticError)


Misfit = Callable[[ModelInfo, Manifest, ExtractorChoice], str | None]


@dataclass(frozen=True)
class EvaluationMetric:
    """One metric.

    title: as a page shows it. needs: parts of the protocol beside its own that its value depends on; those that are in
    STAGES are computed for it. compute: of the stored chunks. protocol: its own settings, as the record has them.
    misfit: why it makes no sense for a model, data and an extractor, beside what holds for every metric (`unfit`).
    costly: only where it is asked for, or of an autoencoder, which is measured in a forward pass.
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

    def unfit(self, info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
        """Why it makes no sense for a model, data and an extractor; None where it does."""
        if info.is_autoencoder and not set(self.needs) <= {*OF_RECONSTRUCTIONS, "extractor"}:
            return "an autoencoder draws no samples and knows no noise level"
        return self.misfit(info, manifest, extractor)

    @property
    def stages(self) -> set[str]:
        """The chunks that it is computed from; the reference's own only where sets are compared, as others read its
        images."""
        return {part for part in self.needs if part in STAGES} - (set() if self.compares_sets else {"reference"})

    @property
    def compares_sets(self) -> bool:
        """Whether it compares samples, or reconstructions, with the reference as a whole."""
        return "reference" in self.needs and bool({"samples", "extractor"} & set(self.needs))

    @property
    def draws(self) -> bool:
        """Whether settings of sampling change it."""
        return bool({"samples", "ensembles", "restoration"} & set(self.needs))


def _knows_noise_levels(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if info.is_machine:
        return f"network.kind '{info.config.network.kind}' knows no noise level"
    target = info.target
    if info.encoding is not None and target is not None and target.name not in {one.name for one in manifest.fields}:
        return f"it is of the latents that the model was trained on, and the reference has no field '{target.name}'"
    return None


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
    if info.encoding is not None:
        return "the model has a density of latents, not of pictures; nats are of these"
    unfit = _knows_noise_levels(info, manifest, extractor)
    return unfit or (None if _is_8_bit(manifest) else "bits per dimension are of 8-bit images; nats fit these data")


def _reconstructs(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    return None if info.is_autoencoder else "it is of an autoencoder's reconstructions"


def _restores_images(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if info.encoding is not None:
        return "it restores samples by what is known of their pixels, and the model is of latents"
    unfit = _knows_noise_levels(info, manifest, extractor)
    if unfit or _is_8_bit(manifest):
        return unfit
    return f"it measures images, the reference has samples of shape {list(manifest.shape)}"


def _has_energy(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    parameterization, values = info.config.denoiser.parameterization, math.prod(manifest.shape)
    if info.is_machine:
        return None
    if info.encoding is not None:
        return "the model has an energy of latents, not of the reference's samples"
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
OF_RECONSTRUCTIONS = ("reference", "restoration")
OF_ENSEMBLES = ("reference", "ensembles")

METRICS: dict[str, EvaluationMetric] = {
    "fid": EvaluationMetric(
        "Fréchet distance (FID)", OF_FEATURES, sample_metrics.fid,
        protocol=lambda inputs: {"covariance": "unbiased", "groups": frechet.GROUPS},
    ),
    "kid": EvaluationMetric(
        "Kernel distance (KID)", OF_FEATURES, sample_metrics.kid,
        protocol=lambda inputs: {"kernel": "(x.y / d + 1)^3", "rows": inputs.num_rows,
                                 "block": kid_block(inputs.num_rows)},
    ),
    "is": EvaluationMetric(
        "Inception Score", ("samples", "extractor"), sample_metrics.inception_score,
        protocol=lambda inputs: {"groups": frechet.GROUPS}, misfit=_has_classes,
    ),
    "pr": EvaluationMetric(
        "Precision (recall below)", OF_FEATURES, sample_metrics.precision_recall,
        protocol=lambda inputs: {"k": NEIGHBOURS, "rows": inputs.num_rows},
    ),
    "sw": EvaluationMetric(
        "Sliced Wasserstein", ("reference", "samples"), sample_metrics.sliced_wasserstein,
        protocol=lambda inputs: {"projections": PROJECTIONS, "rows": inputs.num_rows},
    ),
    "nn": EvaluationMetric(
        "Share of copies", OF_FEATURES, sample_metrics.copies,
        protocol=lambda inputs: {"rows": inputs.num_rows, "threshold": COPY_RATIO},
    ),
    "kde": EvaluationMetric(
        "Log-density of the reference under samples, nats", ("reference", "samples"), sample_metrics.kernel_density,
        protocol=lambda inputs: {"rows": inputs.num_rows, "bandwidth": "largest leave-one-out likelihood"},
        misfit=_few_values,
    ),
    "bpd": EvaluationMetric(
        "Bits per dimension", ("reference", "likelihood"), held_out_metrics.likelihood("bpd"),
        misfit=_likelihood_of_8_bit, costly=True,
    ),
    "nats": EvaluationMetric(
        "Log-likelihood, nats", ("reference", "likelihood"), held_out_metrics.likelihood("nats"),
        misfit=_knows_noise_levels, costly=True,
    ),
    "loss": EvaluationMetric(
        "Denoising loss, EDM-weighted", ("reference", "loss"), held_out_metrics.loss, misfit=_knows_noise_levels
    ),
    "mse": EvaluationMetric(
        "Mean squared error of reconstructions", OF_RECONSTRUCTIONS, held_out_metrics.reconstruction_error,
        misfit=_reconstructs,
    ),
    "psnr": EvaluationMetric(
        "PSNR of restorations or reconstructions, dB", OF_RECONSTRUCTIONS, held_out_metrics.restoration("psnr"),
        misfit=_restores_images, costly=True,
    ),
    "ssim": EvaluationMetric(
        "SSIM of restorations or reconstructions", OF_RECONSTRUCTIONS, held_out_metrics.restoration("ssim"),
        misfit=_restores_images, costly=True,
    ),
    "reconstruction_fid": EvaluationMetric(
        "Fréchet distance of reconstructions", (*OF_RECONSTRUCTIONS, "extractor"), sample_metrics.reconstruction_fid,
        protocol=lambda inputs: {"covariance": "unbiased", "groups": frechet.GROUPS}, misfit=_reconstructs,
    ),
    "ais": EvaluationMetric(
        "Log-likelihood by AIS, nats", ("reference", "ais"), held_out_metrics.annealed_likelihood,
        misfit=_has_energy, costly=True,
    ),
    "crps": EvaluationMetric(
        "CRPS of ensembles", OF_ENSEMBLES, held_out_metrics.crps,
        protocol=lambda inputs: {"estimator": "fair"}, misfit=_is_conditional, costly=True,
    ),
    "spread_skill": EvaluationMetric(
        "Spread-skill ratio of ensembles", OF_ENSEMBLES, held_out_metrics.spread_skill, misfit=_is_conditional,
        costly=True,
    ),
    "rmse": EvaluationMetric(
        "RMSE of the mean of ensembles", OF_ENSEMBLES, held_out_metrics.rmse, misfit=_is_conditional, costly=True
    ),
    "match": EvaluationMetric(
        "Match with what was requested", OF_ENSEMBLES, held_out_metrics.match,
        protocol=lambda inputs: {"scorer": inputs.settings.scorer}, misfit=_is_conditional, costly=True,
    ),
    "accuracy": EvaluationMetric(
        "Share classified as was requested", OF_FEATURES, sample_metrics.accuracy,
        misfit=_classifies_what_was_requested, costly=True,
    ),
    "spectrum": EvaluationMetric(
        "Distance of power spectra, dB", ("reference", "samples"), sample_metrics.spectrum,
        protocol=lambda inputs: {"power": "mean over directions"}, misfit=_has_grid, costly=True,
    ),
}  # fmt: skip
"""Every metric of ours, by the word that chooses it in a config and on the command line, in the record's order."""


def metric_of(name: str) -> EvaluationMetric:
    """The metric of a name: one of METRICS, or somebody else's function, `package.module:Name`, which nothing but its
    computation imports. Raises UserError."""
    if is_own(name):
        code: Callable[[EvaluationInputs], dict[str, Any]] = lambda inputs: {"code": code_hash(name)}  # noqa: E731
        return EvaluationMetric(name, OF_FEATURES, partial(sample_metrics.of_own, name), code, costly=True)
    if name not in METRICS:
        raise UserError(f"unknown metric '{name}'; {nearest(name, METRICS)}{or_own(name)}")
    return METRICS[name]


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of metrics in the record's order: ours as in METRICS, then others' as they are given."""
    given = tuple(dict.fromkeys(names))
    return (*(name for name in METRICS if name in given), *(name for name in given if name not in METRICS))


def check_names(names: Iterable[str]) -> None:
    """Raises UserError for the first name that is no metric's."""
    for name in names:
        metric_of(name)


def stages_of(plan: EvaluationPlan) -> list[str]:
    """The stages whose chunks a plan's metrics are computed from, in their order."""
    wanted = {stage for name in plan.metrics for stage in metric_of(name).stages}
    return [stage for stage in STAGES if stage in wanted]


def compute_metrics(plan: EvaluationPlan) -> tuple[dict[str, MetricResult], list[str]]:
    """Every metric of a plan whose chunks are all stored, and what is to be warned of."""
    stored, found = StoredChunks(plan), dict[str, MetricResult]()
    warnings, inputs = _warnings_of_one_class(plan), plan.inputs
    untrained = untrained_estimate(inputs.info, inputs.info.conditions, inputs.request.guided)
    if untrained is not None and any(metric_of(name).draws for name in plan.metrics):
        warnings.append(untrained)
    for name in plan.metrics:
        try:
            found[name] = metric_of(name).compute(stored)
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
