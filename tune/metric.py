"""What trials are compared by: numbers that no searched parameter changes.

The denoising error of a model D is taken at fixed noise levels, on images that it was not trained on, with noise
that is a function of the image alone. Its expectation at a level is that of |D - D*|^2, D* the ideal denoiser, plus a
constant of the data: so its order of models is that of their score error sigma^2 |score error| (Vincent 2011), whatever
weighting and noise levels they were trained under. All trials see the same images and noise, so their differences vary
far less than their values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.reading.samples import Samples, spread
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.evaluation.plan import EvaluationSettings
from scoreray.sampling.evaluation.tasks import LOSS_STREAM
from scoreray.sampling.measures.features import IDENTITY_VALUES
from scoreray.sampling.measures.likelihood import dequantize, log_likelihood
from scoreray.sampling.model.load import LoadedDenoiser
from scoreray.sampling.offline.generate import Request
from scoreray.sampling.samplers.noise import SAMPLING_SEED
from scoreray.trainer.diffusion import noise
from scoreray.trainer.step import to_unit_range
from scoreray.tune.sweep import OF_SAMPLES, MetricSection, calls_of

MOST_LIKELIHOODS = 128  # images for bpd and nats: each takes some hundred passes


@dataclass(frozen=True)
class Held:
    """The reference's images that are measured: x0 float32 [n, ...], labels int64 [n], numbers int64 [n], spread."""

    x0: Tensor
    images: Tensor
    labels: Tensor
    numbers: Tensor
    classes: tuple[str, ...]
    spread: float
    """standard deviation about the mean image: the sigma_data of the weighting, whatever a trial's own is"""


@lru_cache(maxsize=2)
def held_out(url: str, count: int) -> Held:
    """`count` images of a packed data set, evenly over it."""
    reference = Samples(url)
    numbers = spread(count, reference.manifest.num_samples)
    images, labels = reference.read(numbers)
    x0 = to_unit_range(images)
    std = float((x0.double() - x0.double().mean(0)).square().mean().sqrt())
    chosen = torch.from_numpy(np.asarray(numbers, np.int64))
    return Held(x0, images, labels, chosen, tuple(reference.manifest.classes), max(std, 1e-6))


def levels_of(section: MetricSection) -> list[float]:
    """The fixed noise levels, ascending."""
    return np.geomspace(section.sigma_min, section.sigma_max, section.levels).tolist()


def measure(
    model: LoadedDenoiser, url: str, section: MetricSection, drawn: dict[str, Any], place: str
) -> dict[str, Any]:
    """Every metric of `section` of a loaded model: {"metrics": {name: value}, "curve": ..., "std_errors": ...}.

    url: of the model's checkpoint; drawn: how samples are drawn (`draw_settings`); place: where evaluations go.
    The curve is the weighted denoising error by level, there whatever the metrics are. Raises UserError where a number
    is not finite (`check_finite`).
    """
    held = held_out(section.reference, section.count)
    errors = denoising_errors(model, held, levels_of(section), section.batch_size)
    weights = weights_of(section, held)
    weighted = errors * weights
    found: dict[str, float] = {}
    for name in section.names:
        if name == "denoising":
            found[name] = float(weighted.mean())
        elif name in ("bpd", "nats"):
            found[name] = likelihood(model, held, section, name)
        elif name == "nfe":
            request = Request(count=1, sampler=drawn["sampler"], steps=drawn["steps"], grid=drawn["grid"],
                              options=drawn["options"]).fitted(model.info)  # fmt: skip
            found[name] = float(calls_of(request, model.info))
    if wanted := tuple(name for name in section.names if name in OF_SAMPLES):
        found |= _of_samples(model, url, section, drawn, place, wanted)
    curve = weighted.mean(0).tolist()
    check_finite({"denoising": float(weighted.mean()), **found})
    return {
        "metrics": {name: found[name] for name in section.names},
        "curve": curve,
        "std_errors": (weighted.std(0) / math.sqrt(len(weighted))).tolist(),
    }


def check_finite(metrics: Mapping[str, float]) -> None:
    """The rule that a trial without a finite metric has failed: it can't be compared. Raises UserError."""
    bad = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise UserError(f"metric {', '.join(bad)}: not a finite number, so the trial can't be compared with others")


def weights_of(section: MetricSection, held: Held) -> Tensor:
    """EDM's lambda at the fixed levels, with the data's own spread: 1 / sigma^2 + 1 / sd^2, float64 [levels]."""
    sigmas = torch.tensor(levels_of(section), dtype=torch.float64)
    return sigmas**-2 + held.spread**-2


@torch.no_grad()
def denoising_errors(model: Any, held: Held, sigmas: list[float], batch_size: int) -> Tensor:
    """Mean squared error per dimension, float64 [n, levels]; image i has the same noise at every level and trial."""
    device = next(model.parameters()).device
    parts = []
    for part in torch.arange(len(held.x0)).split(batch_size):
        shape = tuple(held.x0.shape[1:])
        z = noise.normal(SAMPLING_SEED, held.numbers[part], shape, stream=LOSS_STREAM).to(device)
        clean = held.x0[part].to(device)
        classes = _classes(model, held, part, device)
        columns = []
        for sigma in sigmas:
            denoised = model(clean + sigma * z, torch.full((len(part),), sigma, device=device), classes)
            columns.append((denoised - clean).double().flatten(1).square().mean(1).cpu())
        parts.append(torch.stack(columns, 1))
    return torch.cat(parts)


def _classes(model: Any, held: Held, part: Tensor, device: torch.device) -> Tensor | None:
    info = getattr(model, "info", None)
    if info is None or not info.classes or tuple(info.classes) != held.classes:
        return None
    return held.labels[part].to(device)


def likelihood(model: Any, held: Held, section: MetricSection, name: str) -> float:
    """Mean bits per dimension or nats over the metric's own range of noise levels."""
    part = torch.from_numpy(spread(MOST_LIKELIHOODS, len(held.x0)))  # the first ones may all be of one class
    device = next(model.parameters()).device
    x, width = held.x0[part], math.nan
    if held.images.dtype == torch.uint8:
        x, width = dequantize(held.images[part], held.numbers[part])
    found = log_likelihood(
        model,
        x.to(device),
        sigma_min=section.sigma_min,
        sigma_max=section.sigma_max,
        trace="exact" if x[0].numel() <= IDENTITY_VALUES else "rademacher",
        seeds=held.numbers[part],
        rtol=1e-4,
        atol=1e-4,
        data_mean=held.x0.mean(0).to(device),
        data_std=held.spread,
        class_labels=_classes(model, held, part, device),
    )
    return float((found.nats if name == "nats" else found.bits_per_dim(width)).double().mean())


def _of_samples(
    model: LoadedDenoiser, url: str, section: MetricSection, drawn: dict[str, Any], place: str, names: tuple[str, ...]
) -> dict[str, float]:
    device = next(model.parameters()).device
    done = evaluate(
        EvaluationSettings(
            checkpoint=url,
            reference=section.reference,
            metrics=names,
            out=f"{place}/evaluations",
            cache=f"{place}/cache",
            ema=model.info.ema,
            extractor=section.extractor,
            count=section.samples,
            reference_count=max(section.samples, 1000),
            sampler=drawn["sampler"],
            steps=drawn["steps"],
            grid=drawn["grid"],
            guidance=float(drawn["guidance"]),
            batch_size=section.batch_size,
            options=drawn["options"],
            threads=torch.get_num_threads(),
            device=device.type,
        )
    )
    values = {name: done.record["metrics"][name]["value"] for name in names}
    return {name: math.nan if value is None else float(value) for name, value in values.items()}
