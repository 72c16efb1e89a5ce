"""A model on samples that it was not trained on: its denoising error at fixed noise levels, its likelihood.

One rule for evaluations (`loss`, `bpd`, `nats`) and for the comparison of trials (`denoising`, `bpd`, `nats`): at the
same settings both have the same numbers, bit for bit. Noise is keyed by a sample's number, so every model sees the same
noisy images, and differences between models vary far less than their values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.fields.encoding import drawn
from scoreray.data.fields.field import Field, FieldRequest
from scoreray.data.fields.limits import is_picture
from scoreray.data.fields.normalisation import to_unit_range
from scoreray.data.reading.samples import SampleReader
from scoreray.sampling.measures.diffusion_bound import DiffusionBound, Times, diffusion_bound
from scoreray.sampling.measures.features import IDENTITY_VALUES
from scoreray.sampling.measures.likelihood import Trace, dequantize, log_likelihood
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.stored_conditions import StoredConditions
from scoreray.sampling.samplers.noise import SAMPLING_SEED
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.condition import Condition, encoded
from scoreray.trainer.step import to_model_range

LOSS_STREAM = 1 << 22  # noise of the denoising error, far from a sampler's draws
LIKELIHOOD_BATCH = 16  # samples that share an adaptive solver's calls; its gradients hold as many activations

Denoise = Callable[..., Tensor]
Truth = Callable[[Tensor, Tensor, Tensor, Condition | None], Tensor]
"""(clean samples, noisy ones, their levels, what they are given) -> what a denoiser should give."""


@dataclass(frozen=True)
class HeldOut:
    """Samples of a packed data set, as a model is measured on them.

    images: as they are stored, uint8 [n, C, H, W] of pictures; x0: in the model's range, float32 [n, ...]. Of a model
    of latents, images are what the data set has by default, and x0 the latents, [0] where the data set has none.
    numbers: int64 [n], theirs in the data set, which key their noise.
    condition: what a model is given of each; None for an unconditional one; requested: the same as a person writes it
    (`StoredConditions.requested`). mean: of the whole data set in the model's range, of a sample's shape or
    broadcastable to it.
    """

    images: Tensor
    x0: Tensor
    numbers: Tensor
    condition: Condition | None
    mean: Tensor
    requested: Mapping[str, Sequence[Any]]


def read_held_out(reference: SampleReader, numbers: np.ndarray, info: ModelInfo | None = None) -> HeldOut:
    """The samples of ascending `numbers`, and what conditions `info`'s model on them (None: no model's).

    What the data set has no field for is null, as are classes of other names. Raises UserError where a field does not
    fit the model.
    """
    manifest = reference.manifest
    stored = None if info is None else StoredConditions(info, manifest.fields, reference.url)
    modelled = None if info is None else info.target
    of_latents = info is not None and info.encoding is not None
    field = manifest.target if modelled is None or of_latents else manifest.find_field(modelled.name, reference.url)
    latents = [one for one in manifest.fields if of_latents and modelled is not None and one.name == modelled.name]
    names = dict.fromkeys(one.name for one in (field, *latents))
    found = reference.read_fields(numbers, [*map(FieldRequest, names), *(stored.requests if stored else [])])
    images = found.fields[field.name]
    if field.kind == "image":  # by the strides of a single channel too: torch looks at these
        images = images.clone(memory_format=torch.contiguous_format)
    keys = torch.from_numpy(numbers.astype(np.int64))
    condition, requested = (stored.of(found), stored.requested(found)) if stored else (None, {})
    if of_latents:
        x0, mean = _latents(modelled, latents, found.fields, keys)
        return HeldOut(images, x0, keys, condition, mean, requested)
    normaliser = None if modelled is None else modelled.normaliser
    shape = tuple(field.shape) or (1,)
    if field is manifest.target:
        mean = torch.tensor(manifest.mean, dtype=torch.float32)
    else:
        mean = torch.tensor(field.mean, dtype=torch.float32)
    mean = mean.view(shape) if mean.numel() == math.prod(shape) else mean.view(-1, *[1] * (len(shape) - 1))
    x0 = to_unit_range(images)
    if field.kind != "image" and normaliser is not None:
        x0, mean = normaliser.apply(images).float(), normaliser.apply(mean[None])[0]
    return HeldOut(images, x0, keys, condition, mean, requested)


def _latents(
    target: TargetField | None, latents: Sequence[Field], values: Mapping[str, Tensor], numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """(x0 [n, ...] in the model's range, their mean [C, 1, ...]) of the field of latents, drawn by their numbers where
    it holds moments."""
    if target is None or not latents:
        return torch.empty(0), torch.empty(0)
    (field,) = latents
    x0 = values[field.name]
    if field.holds_moments:
        x0 = drawn(x0, noise.normal(SAMPLING_SEED, numbers, tuple(field.drawn_shape), stream=noise.STREAM_LATENT))
    mean = torch.tensor(field.mean, dtype=torch.float32).view(1, -1, *[1] * (len(field.shape) - 1))
    return to_model_range(x0, target.normaliser), to_model_range(mean, target.normaliser)[0]


@torch.no_grad()
def denoising_errors(
    denoiser: Denoise, held: HeldOut, sigmas: Sequence[float], batch_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """|D(x0 + sigma z, sigma) - x0|^2 per dimension, float64 [n, levels]; a sample has the same z at every level.

    Its expectation at a level is E |D - D*|^2, D* the ideal denoiser, plus a constant of the data: so its order of
    models is that of their score error, sigma^2 |score error| (Vincent 2011).
    """
    return _errors(denoiser, lambda clean, noisy, level, given: clean, held, sigmas, batch_size, device)


def noisy_batches(
    denoiser: Denoise, held: HeldOut, batch_size: int, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor, Condition | None]]:
    """(clean samples [B, ...], their noise, what they are given), the same noise at every level and for every model."""
    for part in torch.arange(len(held.x0)).split(batch_size):
        shape = tuple(held.x0.shape[1:])
        z = noise.normal(SAMPLING_SEED, held.numbers[part], shape, stream=LOSS_STREAM).to(device)
        given = None if held.condition is None else encoded(denoiser, held.condition[part].to(device))
        yield held.x0[part].to(device), z, given


@torch.no_grad()
def divergences(
    denoiser: Denoise, known: Denoise, held: HeldOut, sigmas: Sequence[float], batch_size: int,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """|D - D*|^2 per dimension at noisy samples, D* a `known` denoiser, float64 [n, levels]: sigma^4 / d times the
    square of the difference of their scores (explicit score matching, Vincent 2011)."""
    true: Truth = lambda clean, noisy, level, given: known(noisy, level, *(() if given is None else (given,)))  # noqa: E731
    return _errors(denoiser, true, held, sigmas, batch_size, device)


def _errors(
    denoiser: Denoise, truth: Truth, held: HeldOut, sigmas: Sequence[float], batch_size: int,
    device: torch.device | str,
) -> Tensor:  # fmt: skip
    """|D - truth|^2 per dimension at noisy samples, float64 [n, levels]."""
    errors = []
    for clean, z, given in noisy_batches(denoiser, held, batch_size, device):
        levels = []
        for sigma in sigmas:
            noisy, level = clean + sigma * z, torch.full((len(clean),), sigma, device=device)
            apart = denoiser(noisy, level, given) - truth(clean, noisy, level, given)
            levels.append(apart.double().flatten(1).square().mean(1))
        errors.append(torch.stack(levels, 1).cpu())
    return torch.cat(errors)


def edm_weighted(errors: Tensor, sigmas: Sequence[float], sigma_data: float) -> Tensor:
    """Denoising errors [n, levels] times EDM's lambda(sigma) (Karras 2022, table 1), whatever was trained under.

    At the optimum of Gaussian data with this standard deviation each level is 1, and below it for all others.
    """
    levels = torch.tensor(sigmas, dtype=torch.float64)
    return errors * ((levels**2 + sigma_data**2) / (levels * sigma_data) ** 2)


@dataclass(frozen=True)
class HeldOutLikelihood:
    """`nats` [n] log-density and `bpd` [n] bits per dimension (NaN unless the images are 8-bit), float64.

    nfe: calls of the denoiser, the mean over batches.
    """

    nats: Tensor
    bpd: Tensor
    nfe: float


def held_out_likelihood(
    denoiser: Denoise,
    held: HeldOut,
    *,
    sigma_range: tuple[float, float],
    rtol: float,
    batch_size: int = LIKELIHOOD_BATCH,
    device: torch.device | str = "cpu",
) -> HeldOutLikelihood:
    """By the probability-flow ODE between the noise levels of `sigma_range`, the adaptive solver's tolerance `rtol`.

    8-bit images are dequantised by noise of their own numbers. At the upper level the prior is normal about the data's
    mean, with the denoiser's own sigma_data added to its variance.
    """
    nats, bits, nfe = [], [], []
    for part in torch.arange(len(held.images)).split(batch_size):
        if _is_8_bit(held):
            x, width = dequantize(held.images[part], held.numbers[part])
        else:
            x, width = held.x0[part], math.nan
        found = log_likelihood(
            denoiser,
            x.to(device),
            sigma_min=sigma_range[0],
            sigma_max=sigma_range[1],
            trace=trace_of(tuple(x.shape[1:])),
            seeds=held.numbers[part],
            rtol=rtol,
            atol=rtol,
            data_mean=held.mean.to(device),
            condition=None if held.condition is None else held.condition[part].to(device),
        )
        nats.append(found.nats.double().cpu())
        bits.append(found.bits_per_dim(width).double().cpu() if width == width else nats[-1] * math.nan)
        nfe.append(found.nfe)
    return HeldOutLikelihood(torch.cat(nats), torch.cat(bits), sum(nfe) / len(nfe))


@dataclass(frozen=True)
class HeldOutBound:
    """The diffusion bound [n], and `bpd` [n] bits per dimension (NaN unless the images are 8-bit)."""

    bound: DiffusionBound
    bpd: Tensor


def held_out_bound(
    denoiser: Denoise,
    held: HeldOut,
    *,
    sigma_range: tuple[float, float],
    levels: int,
    times: Times,
    discretised: bool = False,
    batch_size: int = LIKELIHOOD_BATCH,
    device: torch.device | str = "cpu",
) -> HeldOutBound:
    """Of the same values as `held_out_likelihood`, 8-bit images dequantised as there; or, `discretised`, of the pixels.

    Raises UserError where discrete values are asked of other data."""
    bounds, width = list[DiffusionBound](), math.nan
    if discretised and not _is_8_bit(held):
        raise UserError("elbo.reconstruction: 'discretised' is for 8-bit images; leave it out")
    for part in torch.arange(len(held.images)).split(batch_size):
        x = held.x0[part]
        if _is_8_bit(held) and not discretised:
            x, width = dequantize(held.images[part], held.numbers[part])
        found = diffusion_bound(
            denoiser,
            x.to(device),
            sigma_min=sigma_range[0],
            sigma_max=sigma_range[1],
            levels=levels,
            times=times,
            grid_step=1 / 127.5 if discretised else None,
            seeds=held.numbers[part],
            data_mean=held.mean.to(device),
            condition=None if held.condition is None else held.condition[part].to(device),
        )
        bounds.append(found)
    prior, diffusion, reconstruction = (
        torch.cat([getattr(one, name).cpu() for one in bounds]) for name in ("prior", "diffusion", "reconstruction")
    )
    bound = DiffusionBound(prior, diffusion, reconstruction, bounds[0].nfe)
    bits = -bound.nats / (held.x0[0].numel() * math.log(2))
    return HeldOutBound(bound, bits if discretised else bits - math.log2(width))


def _is_8_bit(held: HeldOut) -> bool:
    """Whether what is modelled are 8-bit images, and not the latents of these."""
    same = held.x0.shape == held.images.shape
    return same and held.images.dtype == torch.uint8 and is_picture(held.images.shape[1:])


def trace_of(shape: tuple[int, ...]) -> Trace:
    """Of dD/dx: exactly where samples have few values (a backward pass each), else by one random vector a sample."""
    return "exact" if math.prod(shape) <= IDENTITY_VALUES else "rademacher"
