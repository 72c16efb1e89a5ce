"""What trials are compared by: numbers that no searched parameter changes.

The denoising error and the likelihood are those of evaluations (`sampling/measures/held_out.py`), with settings of the
sweep in place of a trial's: the noise levels, the tolerance, the number of images, and the data's own spread in the
weighting. So models are ordered by their score error, whatever weighting and noise levels they were trained under.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from scoreray.data.errors import UserError
from scoreray.data.reading.samples import SampleReader, spread
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.measures.held_out import (
    HeldOut,
    denoising_errors,
    edm_weighted,
    held_out_likelihood,
    read_held_out,
)
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.load import LoadedDenoiser
from scoreray.sampling.offline.generate import Request
from scoreray.tune.sweep import MetricSection, of_samples


@lru_cache(maxsize=2)
def _reference(url: str) -> SampleReader:
    return SampleReader(url)


@lru_cache(maxsize=4)
def _held_out(url: str, count: int, model: HashedInfo) -> HeldOut:
    reference = _reference(url)
    return read_held_out(reference, spread(count, reference.manifest.num_samples), model.info)


@dataclass(frozen=True)
class HashedInfo:
    """What a model takes and draws, by which the trials of a sweep share what was read."""

    fields: tuple[object, ...]
    info: ModelInfo | None = field(compare=False)


def held_out(url: str, count: int, info: ModelInfo | None = None) -> HeldOut:
    """`count` samples of a packed data set, evenly over it, and what conditions a model on them."""
    fields = () if info is None else (info.target, *info.conditions.items())
    return _held_out(url, count, HashedInfo(fields, info))


def spread_of(held: HeldOut) -> float:
    """Standard deviation about the mean image: the sigma_data of the weighting, whatever a trial's own is."""
    x0 = held.x0.double()
    return max(float((x0 - x0.mean(0)).square().mean().sqrt()), 1e-6)


def levels_of(section: MetricSection) -> list[float]:
    """The fixed noise levels, ascending."""
    return np.geomspace(section.sigma_min, section.sigma_max, section.levels).tolist()


def measure(
    model: LoadedDenoiser, url: str, section: MetricSection, drawn: dict[str, Any], place: str
) -> dict[str, Any]:
    """Every metric of `section` of a loaded model: {"metrics": {name: value}, "curve": ..., "std_errors": ...}.

    url: of the model's checkpoint; drawn: how samples are drawn (`draw_settings`); place: where evaluations go.
    The curve is the weighted denoising error by level, whatever the metrics are. Raises UserError where a number
    is not finite (`check_finite`).
    """
    device = next(model.parameters()).device
    held = held_out(section.reference, section.count, model.info)
    sigmas = levels_of(section)
    errors = denoising_errors(model, held, sigmas, section.batch_size, device)
    weighted = edm_weighted(errors, sigmas, spread_of(held))
    found = {"denoising": float(weighted.mean())}
    if {"bpd", "nats"} & set(section.names):
        likelihood = held_out_likelihood(
            model,
            held_out(section.reference, section.likelihood_count, model.info),
            sigma_range=(section.sigma_min, section.sigma_max),
            rtol=section.rtol,
            device=device,
        )
        found |= {"bpd": float(likelihood.bpd.mean()), "nats": float(likelihood.nats.mean())}
    if "nfe" in section.names:
        request = Request(count=1, sampler=drawn["sampler"], steps=drawn["steps"], grid=drawn["grid"],
                          options=drawn["options"]).fitted(model.info)  # fmt: skip
        found["nfe"] = float(request.calls(model.info))
    if wanted := of_samples(section.names):
        found |= _of_samples(model, url, section, drawn, place, wanted)
    metrics: dict[str, float] = {name: found[name] for name in section.names}
    check_finite({"denoising": found["denoising"], **metrics})
    return {
        "metrics": metrics,
        "curve": weighted.mean(0).tolist(),
        "std_errors": (weighted.std(0) / math.sqrt(len(weighted))).tolist(),
    }


def check_finite(metrics: Mapping[str, float]) -> None:
    """The rule that a trial without a finite metric has failed: it can't be compared. Raises UserError."""
    bad = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise UserError(f"metric {', '.join(bad)}: not a finite number, so the trial can't be compared with others")


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
    values = {name: done.record.metrics[name].value for name in names}
    return {name: math.nan if value is None else float(value) for name, value in values.items()}
