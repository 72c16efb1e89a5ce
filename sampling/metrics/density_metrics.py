"""Metrics of a denoiser as a density: the diffusion bound, its divergence from a known score, calibration, outliers."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.measures.calibration import FUNCTIONS, calibration
from scoreray.sampling.measures.diffusion_bound import Times
from scoreray.sampling.measures.distances import mean_of
from scoreray.sampling.measures.likelihood import Statistic, out_of_distribution
from scoreray.sampling.metrics.chunks import BoundChunk, LossChunk, OwnLikelihoodChunk, ResidualChunk
from scoreray.sampling.metrics.held_out_metrics import by_level
from scoreray.sampling.metrics.record import MetricResult, MetricValue
from scoreray.sampling.metrics.stored import StoredChunks, joined
from scoreray.sampling.samplers.options import Range

FEWEST = 4 * len(FUNCTIONS)  # samples of a calibration
DOUBT = 0.01  # the p-value, times the number of noise levels, below which a calibration warns


def elbo(
    stored: StoredChunks,
    *,
    levels: Annotated[int, Range(1, 10_000)] = 64,
    times: Times = "low_discrepancy",
    reconstruction: Literal["dequantised", "discretised"] = "dequantised",
) -> MetricResult:
    """The mean bound in nats; beside it the three terms, and the bits per dimension of 8-bit images."""
    chunks = list(stored.each("bound", BoundChunk))
    terms = {name: joined(getattr(one, name) for one in chunks) for name in ("prior", "diffusion", "reconstruction")}
    bits = joined(one.bpd for one in chunks)
    beside = {name: MetricValue.of(mean_of(values)).model_dump() for name, values in terms.items()}
    if not bits.isnan().any():
        beside["bits_per_dim"] = MetricValue.of(mean_of(bits)).model_dump()
    return MetricResult(mean_of(-torch.stack(list(terms.values())).sum(0)), beside | {"nfe": float(chunks[0].nfe)})


def fisher(
    stored: StoredChunks, *, against: str = "data", gives: Literal["denoised", "score"] = "denoised"
) -> MetricResult:
    """E |D - D*|^2 weighted as `loss` is, so that it is the part of `loss` that is the model's error; by noise level
    also the Fisher divergence E |score - score*|^2 of all dimensions."""
    errors = joined(chunk.errors for chunk in stored.each("fisher", LossChunk))
    return by_level(stored, errors, _divergence(stored, errors))


def avoidable(stored: StoredChunks) -> MetricResult:
    """At least so much of `loss` is the model's error: what functions of its input remove of its residual."""
    chunks = list(stored.each("residuals", ResidualChunk))
    products, among = joined(one.products for one in chunks), joined(one.among for one in chunks)
    if len(products) < FEWEST:
        raise UserError(f"calibration of {len(products)} samples: at least {FEWEST} are needed; give --loss-count")
    sigmas = stored.inputs.sigmas
    found = [calibration(products[:, level], among[:, level]) for level in range(len(sigmas))]
    scores = {name: [level.z_scores[i] for level in found] for i, name in enumerate(FUNCTIONS)}
    beside = {"p_values": [level.p_value for level in found], "z_scores": scores}
    worst = min(range(len(found)), key=lambda level: found[level].p_value)
    name = max(FUNCTIONS, key=lambda one: abs(scores[one][worst]))
    warning = (
        f"calibration: at noise level {sigmas[worst]:.3g} the residual goes with '{name}' of the input (z = "
        f"{scores[name][worst]:.3g}, p = {found[worst].p_value:.2g} of all functions), so the score is not "
        "that of these data"
    )
    removed, doubtful = torch.stack([level.removed for level in found], 1), found[worst].p_value * len(found) < DOUBT
    return by_level(stored, removed, _divergence(stored, removed) | beside, (warning,) if doubtful else ())


def _divergence(stored: StoredChunks, errors: Tensor) -> dict[str, object]:
    """Divergences of scores, of all dimensions, by noise level: of squared errors per dimension [n, levels]."""
    dims, sigmas = math.prod(stored.inputs.info.image_shape), stored.inputs.sigmas
    return {"divergence": [dims * float(error) / sigma**4 for error, sigma in zip(errors.mean(0), sigmas, strict=True)]}


def ood(
    stored: StoredChunks,
    *,
    statistic: Statistic = "typicality",
    level: Annotated[float, Range(1e-6, 0.5)] = 0.05,
) -> MetricResult:
    """The share of the reference whose p-value among the model's own samples is at most `level`, which is that share
    where the reference is the model's law."""
    chunks = list(stored.each("own_likelihood", OwnLikelihoodChunk))
    nats, background = joined(one.nats for one in chunks), joined(one.background for one in chunks)
    own_nats, own_background = joined(one.own for one in chunks), joined(one.own_background for one in chunks)
    found = out_of_distribution(nats, background, own_nats, own_background, statistic)
    beside = {"level": level, "mean_p": float(found.p_values.mean()), "ks": found.ks, "ks_p_value": found.ks_p_value}
    return MetricResult(mean_of((found.p_values <= level).double()), beside)
