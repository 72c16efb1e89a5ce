"""The chunks of samples and of the reference: what is drawn, under which conditions, and what is kept of it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from scoreray.data.fields.normalisation import to_uint8, to_unit_range
from scoreray.sampling.evaluation.loaded import load_extractor, loaded_model, once
from scoreray.sampling.measures import distances
from scoreray.sampling.measures.features import IDENTITY_VALUES
from scoreray.sampling.measures.held_out import HeldOut
from scoreray.sampling.measures.similarity import image_similarity
from scoreray.sampling.measures.spectra import power_spectrum
from scoreray.sampling.metrics.chunks import PROJECTIONS, CodesChunk, FeatureChunk, RestorationChunk
from scoreray.sampling.metrics.plan import Chunk, EvaluationInputs, EvaluationPlan
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.offline.generate import class_labels, prepare
from scoreray.sampling.representations.codes import decode, encode
from scoreray.sampling.representations.labelled import read_factors
from scoreray.trainer.diffusion.condition import AnyCondition, Condition, as_condition, class_name_of

SPECTRUM_GROUPS = 8  # of a chunk's samples
RECORDS = "of the reference's samples"
RECONSTRUCTION = "reconstruction"
KEPT_PICTURES = 8  # of restorations and reconstructions


def reference_chunk(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> FeatureChunk:
    found, _ = _extracted(plan.inputs, rows.images)
    values = rows.images.numpy() if keeps_values(plan.inputs.info) else None
    return FeatureChunk(**found, values=values, spectra=_mean_spectra(plan, rows.images))


def _mean_spectra(plan: EvaluationPlan, samples: Tensor) -> np.ndarray | None:
    """[g, C, K], where the plan's metrics need it: means of groups, to take an error from."""
    if "spectrum" not in plan.metrics:
        return None
    groups = samples.tensor_split(min(SPECTRUM_GROUPS, len(samples)))
    return torch.stack([power_spectrum(group).mean(0) for group in groups]).numpy()


def sample_chunk(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> FeatureChunk:
    inputs = plan.inputs
    condition, row = _conditions_of(inputs, chunk, rows)
    samples = drawn(inputs, chunk.first, chunk.last, condition, row)
    found, logits = _extracted(inputs, samples)
    if logits is not None and "accuracy" in plan.metrics:
        requested = class_labels(as_condition(condition, inputs.info.conditions), chunk.size)
        found["right"] = (logits.argmax(1) == requested[row]).numpy()
    if logits is not None:
        sums = [distances.ClassSums.of(batch) for batch in logits.split(inputs.settings.batch_size)]
        found["counts"] = np.array([one.count for one in sums])
        found["probabilities"] = torch.stack([one.probabilities for one in sums]).numpy()
        found["negentropies"] = np.array([one.negentropy for one in sums])
    if keeps_values(inputs.info):
        found["values"] = samples.numpy()
    pictures = samples.numpy() if chunk.first == 0 else None
    return FeatureChunk(**found, pictures=pictures, spectra=_mean_spectra(plan, samples))


def reconstructs(info: ModelInfo, task: str) -> bool:
    """Whether what a restoration takes as known of a sample is its code: of a denoiser where `task` says so."""
    return info.is_autoencoder or info.is_machine or task == RECONSTRUCTION


def codes_chunk(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> CodesChunk:
    codes = torch.cat([code.flatten(1).cpu() for code, _ in _codes(plan, rows)])
    return CodesChunk(codes.numpy(), read_factors(plan.inputs.reference, rows.numbers.numpy()))


def _codes(plan: EvaluationPlan, rows: HeldOut) -> Iterator[tuple[Tensor, Condition | None]]:
    """Of each batch, on the device: codes and what conditions them."""
    settings, model = plan.inputs.settings, loaded_model(plan.inputs)
    for part in torch.arange(len(rows.x0)).split(settings.batch_size):
        given = None if rows.condition is None else rows.condition[part].to(settings.device)
        x0 = rows.x0[part].to(settings.device)
        yield encode(model, x0, rows.numbers[part].to(settings.device), given, settings.code_options()), given


def reconstruction_chunk(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> RestorationChunk:
    """What a model makes of its codes (of an autoencoder, its latents' means), against the samples that it encoded."""
    inputs, options = plan.inputs, plan.inputs.settings.code_options()
    model = loaded_model(inputs)
    parts = [decode(model, code, given, options).cpu() for code, given in _codes(plan, rows)]
    x0, is_picture = rows.x0, inputs.info.is_picture
    made = torch.cat(parts).clamp(-1, 1) if is_picture else torch.cat(parts)
    mse = (made - x0).double().flatten(1).square().mean(1).numpy()
    features = None
    if "reconstruction_fid" in plan.metrics:
        features = _extracted(inputs, inputs.info.in_data_units(made))[0]["features"]
    if not is_picture:
        return RestorationChunk(np.zeros(0), np.zeros(0), np.zeros(0, np.uint8), mse, features)
    psnr, ssim = image_similarity(made, x0)
    pictures = to_uint8(torch.stack([x0, made], 1)[:KEPT_PICTURES] if chunk.number == 0 else x0[:0])
    return RestorationChunk(psnr.numpy(), ssim.numpy(), pictures.numpy(), mse, features)


def _extracted(inputs: EvaluationInputs, samples: Tensor) -> tuple[dict[str, np.ndarray], Tensor | None]:
    """Features and projections of samples by name, and logits if any, in batches of the plan's size."""
    extract, logits = load_extractor(inputs), list[Tensor]()
    found: dict[str, list[Tensor]] = {"features": [], "projections": []}
    dims = samples[0].numel()
    lines = once("lines", dims, lambda: distances.directions(dims, PROJECTIONS).float())
    with torch.no_grad():
        for batch in samples.split(inputs.settings.batch_size):
            rows, of_classes = extract(batch.to(inputs.settings.device))
            found["features"].append(rows.cpu())
            if of_classes is not None:
                logits.append(of_classes.cpu())
            found["projections"].append(to_unit_range(batch).flatten(1) @ lines.T)
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}, torch.cat(logits) if logits else None


def keeps_values(info: ModelInfo) -> bool:
    """Whether all samples themselves are kept: few values, for a density estimate."""
    return math.prod(info.sample_shape) <= IDENTITY_VALUES


def condition_rule(info: ModelInfo, inputs: EvaluationInputs) -> str:
    """How samples get their conditions. One class alone: as often as the reference has it, where it has the model's
    classes; anything else: what the reference's samples have, evenly over it."""
    if not info.conditions or info.is_machine:
        return "none"
    if class_name_of(info.conditions) is None or len(info.conditions) > 1:
        return RECORDS
    known = tuple(inputs.manifest.classes) == info.classes and inputs.manifest.classes_with_images > 0
    return "as in the reference" if known else "in turn"


def records_of(inputs: EvaluationInputs, chunk: Chunk) -> np.ndarray:
    """Which sample of the reference each sample of a chunk takes its conditions from; none by other rules."""
    if condition_rule(inputs.info, inputs) != RECORDS:
        return inputs.numbers(0)
    numbers = inputs.numbers(inputs.settings.count)
    return numbers[np.arange(chunk.first, chunk.last) % len(numbers)]


def _conditions_of(inputs: EvaluationInputs, chunk: Chunk, rows: HeldOut) -> tuple[AnyCondition, Tensor]:
    """(conditions, which row of them each sample of a chunk has); rows: those of the reference that have them."""
    if condition_rule(inputs.info, inputs) != RECORDS:
        return labels_of(inputs, chunk.first, chunk.last), torch.arange(chunk.size)
    return rows.condition, torch.from_numpy(np.searchsorted(rows.numbers.numpy(), records_of(inputs, chunk)))


def labels_of(inputs: EvaluationInputs, first: int, last: int) -> Tensor:
    """Classes int64 of samples [first, last): every stretch of them has nearly the shares of the whole.

    Number i takes the class at which the cumulative shares pass the fractional part of i times the golden ratio, the
    sequence whose stretches are spread most evenly (Knuth, vol. 3, 6.4).
    """
    if condition_rule(inputs.info, inputs) != "as in the reference":
        return inputs.request.labels(first, last, inputs.info)
    counts = inputs.manifest.class_counts
    shares = np.cumsum(counts) / sum(counts)
    golden = (np.arange(first, last) + 0.5) * ((math.sqrt(5) - 1) / 2) % 1.0
    return torch.from_numpy(np.minimum(np.searchsorted(shares, golden, side="right"), len(shares) - 1))


def drawn(inputs: EvaluationInputs, first: int, last: int, condition: AnyCondition, row: Tensor) -> Tensor:
    """Samples [first, last) in the data's own units, each with the seed of its number.

    row: int64 [last - first], which row of `condition` each has.
    """
    request, parts = inputs.request, list[Tensor]()
    draw = prepare(loaded_model(inputs), request)
    for begin in range(first, last, request.batch_size):
        end = min(begin + request.batch_size, last)
        given = None if condition is None else condition[row[begin - first : end - first]]
        parts.append(inputs.info.in_data_units(draw(request.sample_seeds(begin, end), given)))
    return torch.cat(parts)
