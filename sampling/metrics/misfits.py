"""Why a metric makes no sense for a model, a data set and an extractor, in words for a message; None where it does."""

from __future__ import annotations

import math
from collections.abc import Callable

from scoreray.data.errors import UserError
from scoreray.data.reading.manifest import Manifest
from scoreray.sampling.measures.features import IDENTITY_VALUES, ExtractorChoice
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.stored_conditions import StoredConditions
from scoreray.sampling.representations.labelled import factor_fields

SHORTEST_GRID = 4

Misfit = Callable[[ModelInfo, Manifest, ExtractorChoice], str | None]


def knows_noise_levels(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if info.is_machine:
        return f"network.kind '{info.config.network.kind}' knows no noise level"
    if info.source is not None:
        return "the model begins from samples of a data set, not from noise"
    if info.instead_of_mean:
        return info.instead_of_mean
    target = info.target
    if info.encoding is not None and target is not None and target.name not in {one.name for one in manifest.fields}:
        return f"it is of the latents that the model was trained on, and the reference has no field '{target.name}'"
    return None


def draws_data(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if info.encoding is not None:
        return "the model has a density of latents, and samples of pictures"
    return knows_noise_levels(info, manifest, extractor)


def has_classes(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if extractor.kind in ("inception", "classifier", "torchscript"):
        return None
    return f"it needs class probabilities, which extractor '{extractor.kind}' has not"


def few_values(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    values = math.prod(manifest.shape)
    if values <= IDENTITY_VALUES:
        return None
    return f"a kernel density says nothing in {values} dimensions (at most {IDENTITY_VALUES})"


def _is_8_bit(manifest: Manifest) -> bool:
    return len(manifest.shape) == 3 and manifest.dtype == "uint8"


def likelihood_of_8_bit(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if info.encoding is not None:
        return "the model has a density of latents, not of pictures; nats are of these"
    unfit = knows_noise_levels(info, manifest, extractor)
    return unfit or (None if _is_8_bit(manifest) else "bits per dimension are of 8-bit images; nats fit these data")


def reconstructs(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    return None if info.is_autoencoder else "it is of an autoencoder's reconstructions"


def encodes_and_decodes(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if info.is_autoencoder or info.is_machine:
        return None
    return _takes_measurements(info, manifest, extractor) if info.encoding is None else "the model is of latents"


def _takes_measurements(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if info.map == "flow_map":
        return "restorations correct means E[x_0 | x], and the model is drawn by its flow map"
    return knows_noise_levels(info, manifest, extractor)


def _needs_factors(fewest: int, kinds: str) -> Misfit:
    def misfit(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
        fields = [one.name for one in factor_fields(manifest) if one.kind in kinds.split()]
        if len(fields) < fewest:
            what = kinds.replace(" ", " or ")
            return f"it needs {fewest} or more fields of kind {what} in the reference, which has {len(fields)}"
        return None if info.is_machine else knows_noise_levels(info, manifest, extractor)

    return misfit


has_a_class = _needs_factors(1, "class")
has_a_factor = _needs_factors(1, "class scalar")
has_factors = _needs_factors(2, "class scalar")


def restores_images(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if info.encoding is not None:
        return "it restores samples by what is known of their pixels, and the model is of latents"
    unfit = None if info.is_machine else _takes_measurements(info, manifest, extractor)
    if unfit or _is_8_bit(manifest):
        return unfit
    return f"it measures images, the reference has samples of shape {list(manifest.shape)}"


def has_energy(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
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


def has_latent_variables(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if info.is_machine or info.is_autoencoder:
        return None
    return "it needs latent variables with a proposal: an RBM, or an autoencoder"


def is_conditional(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
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


def classifies_what_was_requested(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if extractor.kind != "classifier":
        return f"it needs extractor 'classifier', not '{extractor.kind}'"
    if not info.classes or tuple(manifest.classes) != info.classes:
        return "the model takes no class, or others than the reference has"
    return is_conditional(info, manifest, extractor)


def has_grid(info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    if len(manifest.shape) > 1 and min(manifest.shape[1:]) >= SHORTEST_GRID:
        return None
    return f"a spectrum needs a grid of {SHORTEST_GRID} or more points a side, samples are {list(manifest.shape)}"
