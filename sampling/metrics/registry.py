"""Every metric of an evaluation, by the word that chooses it.

A new one is one function (`sample_metrics.py`, `held_out_metrics.py`, or a file of its own) and one entry of METRICS.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

from scoreray.data.errors import UserError, nearest
from scoreray.data.own_code import code_hash, instance, is_own, or_own
from scoreray.sampling.measures import frechet
from scoreray.sampling.measures.calibration import FUNCTIONS
from scoreray.sampling.metrics import density_metrics, held_out_metrics, kernel_metrics, misfits, sample_metrics
from scoreray.sampling.metrics.chunks import PROJECTIONS
from scoreray.sampling.metrics.kernel_metrics import block_of
from scoreray.sampling.metrics.metric import OF_CODES, OF_ENSEMBLES, OF_FEATURES, OF_RECONSTRUCTIONS, EvaluationMetric
from scoreray.sampling.metrics.plan import EvaluationInputs
from scoreray.sampling.metrics.representation_metrics import of_codes
from scoreray.sampling.metrics.sample_metrics import COPY_RATIO, NEIGHBOURS
from scoreray.sampling.representations.scores import SCORES
from scoreray.sampling.samplers.options import check_options, options_of

METRICS: dict[str, EvaluationMetric] = {
    "fid": EvaluationMetric(
        "Fréchet distance (FID)", OF_FEATURES, sample_metrics.fid,
        protocol=lambda inputs: {"covariance": "unbiased", "groups": frechet.GROUPS},
    ),
    "kid": EvaluationMetric(
        "Kernel distance (KID)", OF_FEATURES, kernel_metrics.kid,
        protocol=lambda inputs: {"kernel": "(x.y / d + 1)^3", "rows": inputs.num_rows,
                                 "block": block_of(inputs.num_rows)},
    ),
    "mmd": EvaluationMetric(
        "Squared maximum mean discrepancy", OF_FEATURES, kernel_metrics.mmd,
        protocol=lambda inputs: {"kernel": "gaussian", "bandwidth": "median distance in the reference",
                                 "rows": inputs.num_rows, "block": block_of(inputs.num_rows)},
        costly=True,
    ),
    "is": EvaluationMetric(
        "Inception Score", ("samples", "extractor"), sample_metrics.inception_score,
        protocol=lambda inputs: {"groups": frechet.GROUPS}, misfit=misfits.has_classes,
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
        "Log-density of the reference under samples, nats", ("reference", "samples"), kernel_metrics.kernel_density,
        protocol=lambda inputs: {
            "rows": inputs.num_rows,
            **({} if "rule" in inputs.settings.metric_options.get("kde", {}) else
               {"bandwidth": "largest leave-one-out likelihood"}),
        },
        misfit=misfits.few_values,
    ),
    "bpd": EvaluationMetric(
        "Bits per dimension", ("reference", "likelihood"), held_out_metrics.likelihood("bpd"),
        misfit=misfits.likelihood_of_8_bit, costly=True,
    ),
    "nats": EvaluationMetric(
        "Log-likelihood, nats", ("reference", "likelihood"), held_out_metrics.likelihood("nats"),
        misfit=misfits.knows_noise_levels, costly=True,
    ),
    "loss": EvaluationMetric(
        "Denoising loss, EDM-weighted", ("reference", "loss"), held_out_metrics.loss, misfit=misfits.knows_noise_levels
    ),
    "elbo": EvaluationMetric(
        "Diffusion bound on the log-likelihood, nats", ("reference", "bound"), density_metrics.elbo,
        misfit=misfits.knows_noise_levels, costly=True,
    ),
    "fisher": EvaluationMetric(
        "Divergence from a known score, EDM-weighted", ("reference", "fisher"), density_metrics.fisher,
        misfit=misfits.knows_noise_levels, costly=True,
    ),
    "calibration": EvaluationMetric(
        "Avoidable part of the denoising loss, at least", ("reference", "residuals"), density_metrics.avoidable,
        protocol=lambda inputs: {"functions": len(FUNCTIONS)}, misfit=misfits.knows_noise_levels, costly=True,
    ),
    "ood": EvaluationMetric(
        "Share of outliers among samples of the model", ("reference", "own_likelihood"), density_metrics.ood,
        misfit=misfits.draws_data, costly=True,
    ),
    "mse": EvaluationMetric(
        "Mean squared error of restorations or reconstructions", OF_RECONSTRUCTIONS,
        held_out_metrics.reconstruction_error, misfit=misfits.encodes_and_decodes, costly=True,
    ),
    "psnr": EvaluationMetric(
        "PSNR of restorations or reconstructions, dB", OF_RECONSTRUCTIONS, held_out_metrics.restoration("psnr"),
        misfit=misfits.restores_images, costly=True,
    ),
    "ssim": EvaluationMetric(
        "SSIM of restorations or reconstructions", OF_RECONSTRUCTIONS, held_out_metrics.restoration("ssim"),
        misfit=misfits.restores_images, costly=True,
    ),
    "reconstruction_fid": EvaluationMetric(
        "Fréchet distance of reconstructions", (*OF_RECONSTRUCTIONS, "extractor"), sample_metrics.reconstruction_fid,
        protocol=lambda inputs: {"covariance": "unbiased", "groups": frechet.GROUPS}, misfit=misfits.reconstructs,
    ),
    "ais": EvaluationMetric(
        "Log-likelihood by AIS, nats", ("reference", "ais"), held_out_metrics.annealed_likelihood,
        misfit=misfits.has_energy, costly=True,
    ),
    "iwae": EvaluationMetric(
        "Log-likelihood by importance sampling, nats", ("reference", "importance"), held_out_metrics.importance,
        protocol=lambda inputs: {"samples": 64, "proposal": "posterior"}, misfit=misfits.has_latent_variables,
        costly=True,
    ),
    "crps": EvaluationMetric(
        "CRPS of ensembles", OF_ENSEMBLES, held_out_metrics.crps,
        protocol=lambda inputs: {"estimator": "fair"}, misfit=misfits.is_conditional, costly=True,
    ),
    "spread_skill": EvaluationMetric(
        "Spread-skill ratio of ensembles", OF_ENSEMBLES, held_out_metrics.spread_skill, misfit=misfits.is_conditional,
        costly=True,
    ),
    "rmse": EvaluationMetric(
        "RMSE of the mean of ensembles", OF_ENSEMBLES, held_out_metrics.rmse, misfit=misfits.is_conditional, costly=True
    ),
    "match": EvaluationMetric(
        "Match with what was requested", OF_ENSEMBLES, held_out_metrics.match,
        protocol=lambda inputs: {"scorer": inputs.settings.scorer}, misfit=misfits.is_conditional, costly=True,
    ),
    "accuracy": EvaluationMetric(
        "Share classified as was requested", OF_FEATURES, sample_metrics.accuracy,
        misfit=misfits.classifies_what_was_requested, costly=True,
    ),
    "spectrum": EvaluationMetric(
        "Distance of power spectra, dB", ("reference", "samples"), sample_metrics.spectrum,
        protocol=lambda inputs: {"power": "mean over directions"}, misfit=misfits.has_grid, costly=True,
    ),
    **{
        name: EvaluationMetric(title, OF_CODES, of_codes(SCORES[name]), misfit=misfit, costly=True)
        for name, title, misfit in (
            ("homogeneity", "Homogeneity of clusters of codes", misfits.has_a_class),
            ("completeness", "Completeness of clusters of codes", misfits.has_a_class),
            ("v_measure", "V-measure of clusters of codes", misfits.has_a_class),
            ("probe", "Linear probe of codes", misfits.has_a_factor),
            ("beta_vae", "beta-VAE score of codes", misfits.has_factors),
            ("factor_vae", "FactorVAE score of codes", misfits.has_factors),
            ("mig", "Mutual information gap of codes", misfits.has_a_factor),
            ("sap", "SAP score of codes", misfits.has_a_factor),
            ("dci", "Disentanglement of codes (DCI)", misfits.has_factors),
            ("modularity", "Modularity of codes", misfits.has_factors),
        )
    },
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


def checked_options(given: Mapping[str, Mapping[str, Any]], measured: Collection[str]) -> dict[str, dict[str, Any]]:
    """Options by the name of the metric, checked against the signatures of the metrics' functions, without those that
    are a default anyway. Raises UserError: no such metric or not among `measured`, no such option, no such value."""
    checked = {}
    for name, options in given.items():
        metric_of(name)
        if name not in measured:
            raise UserError(f"options of metric '{name}', which is not measured; measured: {', '.join(measured)}")
        function = _function_of(name)
        values, defaults = check_options(name, function, options, "metric"), options_of(function)
        checked[name] = {key: value for key, value in values.items() if value != defaults[key].default}
    return {name: options for name, options in checked.items() if options}


def all_options(name: str, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every option of a metric: as given, or its default."""
    return {key: one.default for key, one in options_of(_function_of(name)).items()} | dict(given.get(name, {}))


def _function_of(name: str) -> Callable[..., Any]:
    """The function whose keyword-only parameters are a metric's options."""
    if not is_own(name):
        return METRICS[name].compute
    function = instance(name, "--metrics")
    return function if inspect.isfunction(function) else type(function).__call__  # type: ignore[no-any-return]


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of metrics in the record's order: ours as in METRICS, then others' as they are given."""
    given = tuple(dict.fromkeys(names))
    return (*(name for name in METRICS if name in given), *(name for name in given if name not in METRICS))


def check_names(names: Iterable[str]) -> None:
    """Raises UserError for the first name that is no metric's."""
    for name in names:
        metric_of(name)
