"""How an evaluation measures: which metrics fit a model and its data, and every setting that a number depends on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from scoreray.data.errors import UserError
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import Samples
from scoreray.data.units import whole_number
from scoreray.sampling.evaluation import record
from scoreray.sampling.guidance.inverse import BRIGHTNESS, Operator, average_pool, gray, mask
from scoreray.sampling.measures import frechet
from scoreray.sampling.measures.features import IDENTITY_VALUES, ExtractorChoice
from scoreray.sampling.measures.likelihood import Trace
from scoreray.sampling.model.describe import ModelInfo

if TYPE_CHECKING:
    from scoreray.sampling.evaluation.plan import EvaluationSettings

MOST_ROWS = 10_000  # a side, of metrics that look at all pairs or keep rows: memory does not grow beyond
PROJECTIONS = 128
KID_BLOCK = 1000
KID_BLOCKS = 10
NEIGHBOURS = 3
NEIGHBOUR_PICTURES = 16
SIGMAS = 12
VERSION = 1  # raised when the same settings give other numbers


def unfit(metric: str, info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice) -> str | None:
    """Why a metric makes no sense for this model, data and extractor; None when it does."""
    images = len(manifest.shape) == 3 and manifest.dtype == "uint8"
    values = math.prod(manifest.shape)
    machine = info.is_machine
    if machine and metric in ("bpd", "nats", "loss", "psnr", "ssim"):
        return f"network.kind '{info.config.network.kind}' knows no noise level"
    if metric == "is" and extractor.kind not in ("inception", "classifier", "torchscript"):
        return f"it needs class probabilities, which extractor '{extractor.kind}' has not"
    if metric == "bpd" and not images:
        return "bits per dimension are of 8-bit images; nats fit these data"
    if metric in ("psnr", "ssim") and not images:
        return f"it measures images, the reference has samples of shape {list(manifest.shape)}"
    if metric == "kde" and values > IDENTITY_VALUES:
        return f"a kernel density says nothing in {values} dimensions (at most {IDENTITY_VALUES})"
    if metric == "ais":
        if not machine and not info.config.denoiser.parameterization.startswith("energy_"):
            return f"it needs an energy, parameterization '{info.config.denoiser.parameterization}' has none"
        if not machine and values > IDENTITY_VALUES:
            return f"chains do not mix in {values} dimensions (at most {IDENTITY_VALUES} here)"
    return None


def restoration(name: str, shape: tuple[int, ...]) -> Operator:
    """What is known of an image: "superresolution=FACTOR", "gray", or "inpaint" (all but the middle half each way)."""
    word, _, value = name.partition("=")
    channels, height, width = shape
    factor = whole_number(value) or 0
    if word == "superresolution" and factor > 1 and height % factor == width % factor == 0:
        return average_pool(factor)
    if word == "gray" and channels == 3 and not value:
        return gray()
    if word == "inpaint" and not value:
        known = torch.ones(shape, dtype=torch.bool)
        known[:, height // 4 : height - height // 4, width // 4 : width - width // 4] = False
        return mask(known)
    raise UserError(
        f"--restoration {name}: accepted for images {list(shape)}: superresolution=FACTOR (a divisor of both sides), "
        "inpaint, and gray for colour images"
    )


OF_SETS = ("fid", "kid", "pr", "sw", "nn", "kde")  # compare the samples with the reference as a whole
COSTLY = ("bpd", "nats", "psnr", "ssim", "ais")  # only where asked for


def choose_metrics(
    wanted: tuple[str, ...], info: ModelInfo, manifest: Manifest, extractor: ExtractorChoice, task: str
) -> tuple[str, ...]:
    """The metrics to compute, in the record's order. Raises UserError, a line for each that does not fit.

    task: of restoration, where psnr or ssim are wanted.
    """
    if tuple(manifest.shape) != info.image_shape:
        raise UserError(
            f"--reference: samples of shape {list(manifest.shape)}, the model draws {list(info.image_shape)}"
        )
    reasons = {name: unfit(name, info, manifest, extractor) for name in record.PROTOCOL}
    mistakes = [f"metric {name} does not fit: {reasons[name]}" for name in wanted if reasons[name]]
    if mistakes:
        raise UserError("\n".join(mistakes))
    if {"psnr", "ssim"} & set(wanted):
        restoration(task, info.image_shape)
    chosen = wanted or [name for name, reason in reasons.items() if not reason and name not in COSTLY]
    of_sets = [name for name in record.PROTOCOL if name in chosen and name in OF_SETS]
    if of_sets and manifest.num_samples < frechet.FEWEST:
        raise UserError(
            f"--reference: '{manifest.name}' has {manifest.num_samples} samples, and {', '.join(of_sets)} compare sets "
            f"of at least {frechet.FEWEST}; give a larger one, or other --metrics"
        )
    return tuple(name for name in record.PROTOCOL if name in chosen)


def protocol(
    settings: EvaluationSettings,
    metrics: tuple[str, ...],
    info: ModelInfo,
    reference: Samples,
    extractor: ExtractorChoice,
    accuracy: float | None,
) -> dict[str, Any]:
    """How it is measured, part by part; of the parts that no chosen metric depends on, none."""
    manifest = reference.manifest
    total = min(settings.reference_count, manifest.num_samples)
    rows = min(MOST_ROWS, settings.count, total)
    low, high = info.sigma_range
    extraction: dict[str, Any] = {"kind": extractor.kind, "sha256": extractor.sha256}
    if accuracy is not None:
        extraction["accuracy"] = accuracy
    parts: dict[str, dict[str, Any]] = {
        "reference": {
            "url": reference.url,
            "name": manifest.name,
            "sha256": reference.sha256,
            "count": total,
            "of": manifest.num_samples,
        },
        "samples": {"count": settings.count, "classes": label_rule(info, manifest)},
        "extractor": extraction,
        "fid": {"covariance": "unbiased", "groups": frechet.GROUPS},
        "kid": {"kernel": "(x.y / d + 1)^3", "rows": rows, "block": kid_block(rows)},
        "is": {"groups": frechet.GROUPS},
        "pr": {"k": NEIGHBOURS, "rows": rows},
        "sw": {"projections": PROJECTIONS, "rows": rows},
        "nn": {"rows": rows, "threshold": 1 / 3},
        "kde": {"rows": rows, "bandwidth": "largest leave-one-out likelihood"},
        "likelihood": {
            "count": min(settings.likelihood_count, manifest.num_samples),
            "solver": "rk45",
            "rtol": settings.rtol,
            "trace": trace_of(info),
            "probes": 1,
            "sigma_min": low,
            "sigma_max": high,
            "dequantize": manifest.dtype == "uint8",
        },
        "loss": {
            "count": min(settings.loss_count, manifest.num_samples),
            "sigma_min": low,
            "sigma_max": high,
            "levels": SIGMAS,
            "sigma_data": info.config.denoiser.resolved_sigma_data,
        },
        "restoration": {
            "task": settings.restoration,
            "count": min(settings.restoration_count, manifest.num_samples),
            **({"brightness": list(BRIGHTNESS)} if settings.restoration == "gray" else {}),
        },
        "ais": {"chains": settings.chains},
    }
    needed = {part for metric in metrics for part in record.PROTOCOL[metric]}
    return {"version": VERSION, **{part: values for part, values in parts.items() if part in needed}}


def trace_of(info: ModelInfo) -> Trace:
    """Of the likelihood's Jacobian: exactly where there are few values, else by one random vector a sample."""
    return "exact" if math.prod(info.image_shape) <= IDENTITY_VALUES else "rademacher"


def kid_block(rows: int) -> int:
    """Rows of a block: at most 1,000, and so few that there are ten blocks to take an error from."""
    return max(2, min(KID_BLOCK, rows // KID_BLOCKS))


def label_rule(info: ModelInfo, manifest: Manifest) -> str:
    """How classes are given to samples: as often as the reference has them, where it has the model's classes."""
    if not info.classes or info.is_machine:
        return "none"
    known = tuple(manifest.classes) == info.classes and manifest.classes_with_images > 0
    return "as in the reference" if known else "in turn"
