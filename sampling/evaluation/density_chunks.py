"""The chunks of metrics of a denoiser as a density: bounds, residuals, divergences, likelihoods of its own samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.own_code import instance
from scoreray.sampling.evaluation.loaded import loaded_denoiser, once
from scoreray.sampling.evaluation.sample_chunks import drawn
from scoreray.sampling.measures.calibration import residual_products
from scoreray.sampling.measures.held_out import (
    Denoise,
    HeldOut,
    HeldOutLikelihood,
    divergences,
    held_out_bound,
    held_out_likelihood,
    read_held_out,
)
from scoreray.sampling.metrics.chunks import BoundChunk, LossChunk, OwnLikelihoodChunk, ResidualChunk
from scoreray.sampling.metrics.plan import MOST_ROWS, Chunk, EvaluationInputs, EvaluationPlan
from scoreray.sampling.metrics.registry import all_options
from scoreray.trainer.diffusion.condition import LABEL, AnyCondition
from scoreray.trainer.diffusion.denoiser import like
from scoreray.trainer.diffusion.targets import Mixture
from scoreray.trainer.step import to_model_range

OWN_NUMBERS = 1 << 40  # and from here on those that key a model's own samples, beside the reference's

Known = Callable[..., Tensor]


def bound_chunk(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> BoundChunk:
    inputs, settings = plan.inputs, plan.inputs.settings
    options = all_options("elbo", settings.metric_options)
    found = held_out_bound(
        loaded_denoiser(inputs),
        rows,
        sigma_range=inputs.info.sigma_range,
        levels=options["levels"],
        times=options["times"],
        discretised=options["reconstruction"] == "discretised",
        batch_size=settings.batch_size,
        device=settings.device,
    )
    bound = found.bound
    return BoundChunk(
        bound.prior.numpy(),
        bound.diffusion.numpy(),
        bound.reconstruction.numpy(),
        found.bpd.numpy(),
        np.array(bound.nfe),
    )


def residual_chunk(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> ResidualChunk:
    inputs, settings = plan.inputs, plan.inputs.settings
    sigma_data = inputs.info.config.denoiser.resolved_sigma_data
    denoiser = loaded_denoiser(inputs)
    found = residual_products(denoiser, rows, inputs.sigmas, sigma_data, settings.batch_size, settings.device)
    return ResidualChunk(found.with_residual.numpy(), found.among.numpy())


def fisher_chunk(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> LossChunk:
    inputs, settings = plan.inputs, plan.inputs.settings
    options = all_options("fisher", settings.metric_options)
    known = _known(inputs, options["against"], options["gives"])
    denoiser = loaded_denoiser(inputs)
    return LossChunk(divergences(denoiser, known, rows, inputs.sigmas, settings.batch_size, settings.device).numpy())


def _known(inputs: EvaluationInputs, against: str, gives: str) -> Known:
    """The true denoiser: of the finite data set that the reference is, or somebody else's."""
    if against == "data":
        which = (inputs.reference.sha256, inputs.settings.device)
        return once("exact denoiser", which, lambda: _posterior_mean(inputs))
    function = instance(against, "--metric-option fisher.against")
    if gives == "denoised":
        return function  # type: ignore[no-any-return]
    return lambda x, sigma, *given: x + like(sigma, x) ** 2 * function(x, sigma, *given)


def _posterior_mean(inputs: EvaluationInputs) -> Known:
    """E[x_0 | x] over every sample of the reference, within the class where that is what the model is given."""
    manifest, conditions = inputs.manifest, list(inputs.info.conditions)
    if manifest.num_samples > MOST_ROWS or conditions not in ([], [LABEL]):
        why = (
            f"{manifest.num_samples:,} samples"
            if conditions in ([], [LABEL])
            else f"conditions {', '.join(conditions)}"
        )
        raise UserError(
            f"fisher: the exact denoiser is of at most {MOST_ROWS:,} samples under no condition but a class, not "
            f"{why}; give --metric-option fisher.against=package.module:Name"
        )
    whole = read_held_out(inputs.reference, np.arange(manifest.num_samples), inputs.info)
    labels = None if whole.condition is None else whole.condition.values[LABEL]
    exact = Mixture(whole.x0, component_labels=labels).to(inputs.settings.device)

    def denoise(x: Tensor, sigma: Tensor, condition: AnyCondition = None) -> Tensor:
        given = condition if condition is None or isinstance(condition, Tensor) else condition.values[LABEL]
        return exact(x, sigma, given)

    return denoise


def own_likelihood_chunk(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> OwnLikelihoodChunk:
    """Of the reference's samples, and of samples that the model draws under the same conditions."""
    inputs = plan.inputs
    images = drawn(inputs, chunk.first, chunk.last, rows.condition, torch.arange(chunk.size))
    target = inputs.info.target
    x0 = to_model_range(images, None if target is None else target.normaliser)
    own = replace(rows, images=images, x0=x0, numbers=torch.arange(chunk.first, chunk.last) + OWN_NUMBERS)
    (nats, background), (own_nats, own_background) = (_likelihoods(inputs, one) for one in (rows, own))
    return OwnLikelihoodChunk(nats, background, own_nats, own_background)


def likelihood_of(inputs: EvaluationInputs, denoiser: Denoise, held: HeldOut) -> HeldOutLikelihood:
    """Of all samples in one batch."""
    return held_out_likelihood(
        denoiser, held, sigma_range=inputs.info.sigma_range, rtol=inputs.settings.rtol,
        batch_size=len(held.images), device=inputs.settings.device,
    )  # fmt: skip


def _likelihoods(inputs: EvaluationInputs, held: HeldOut) -> tuple[Any, Any]:
    """ln p of the model [n], and of the background: N(data's mean, sigma_data^2 I)."""
    found = likelihood_of(inputs, loaded_denoiser(inputs), held)
    variance = inputs.info.config.denoiser.resolved_sigma_data**2
    offset = (held.x0 - held.mean).double().flatten(1)
    background = -(offset.square().sum(1) / variance + offset.shape[1] * math.log(2 * math.pi * variance)) / 2
    return found.nats.numpy(), background.numpy()
