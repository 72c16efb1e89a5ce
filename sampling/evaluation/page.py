"""One HTML page of an evaluation: numbers with intervals, samples, nearest neighbours, curves; all of it inside."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scoreray.data.pages import DPI, render
from scoreray.data.reading.samples import spread
from scoreray.sampling.evaluation.chunks import FeatureChunk
from scoreray.sampling.evaluation.metrics import METRICS, MetricResult, stages_of
from scoreray.sampling.evaluation.record import EvaluationRecord, MetricValue, as_text
from scoreray.sampling.evaluation.stored import StoredChunks
from scoreray.sampling.model.describe import is_picture
from scoreray.sampling.offline.generate import png_of_sheet

SHEET = 64
BESIDE = {
    "fid_infinity": "at infinite count",
    "floor": "two sets of real data",
    "nfe": "network evaluations",
    "log_z": "ln Z",
    "bandwidth": "bandwidth",
    "median_distance": "median distance to the reference",
    "median_distance_among_reference": "among the reference",
}
"""What a page shows beside a value, where a metric has it."""
Captioned = tuple[str, bytes]  # and its PNG


@dataclass(frozen=True)
class _Row:
    title: str
    value: str
    interval: str
    beside: str


def page(record: EvaluationRecord, stored: StoredChunks, results: dict[str, MetricResult]) -> str:
    """The page of a record (as read back from its JSON) and of what its metrics left to draw."""
    subject = record.subject.checkpoint
    return render(
        "scoreray.sampling.evaluation/report.html",
        title=f"evaluation at {subject.images_seen:,} images, EMA {subject.ema}",
        record=record,
        how=_how(record),
        rows=[row for name, metric in METRICS.items() if name in record.metrics
              for row in _rows(metric.title, record.metrics[name])],
        figures=_figures(stored, {name: result.drawn for name, result in results.items() if result.drawn is not None}),
        text=record.to_json().decode(),
    )  # fmt: skip


def _how(record: EvaluationRecord) -> str:
    """One sentence of how it was measured."""
    sampling, protocol = record.subject.sampling, record.protocol
    words = []
    if "samples" in protocol:
        words.append(
            f"{protocol['samples']['count']:,} samples by {sampling.sampler}, {sampling.steps} steps, "
            f"seed {sampling.seed}, guidance {sampling.guidance:g}"
        )
    if "reference" in protocol:
        of = protocol["reference"]
        words.append(f"{of['count']:,} of {of['of']:,} samples of {of['name']}")
    if "extractor" in protocol:
        extractor = protocol["extractor"]
        accuracy = f", {extractor['accuracy']:.1%} of held-out images right" if "accuracy" in extractor else ""
        words.append(f"extractor {extractor['kind']} {extractor['sha256'][:8]}".strip() + accuracy)
    return "; ".join(words)


def _rows(title: str, found: MetricValue) -> list[_Row]:
    if found.get("recall") is not None:
        both = {name.capitalize(): MetricValue(**found.get(name)) for name in ("precision", "recall")}
        return [_Row(name, as_text(one.value), one.interval_text, "") for name, one in both.items()]
    shown = {text: found.get(key) for key, text in BESIDE.items()}
    beside = ", ".join(f"{text} {value:.4g}" for text, value in shown.items() if value is not None)
    return [_Row(title, as_text(found.value), found.interval_text, beside)]


def _figures(stored: StoredChunks, drawn: dict[str, Any]) -> list[Captioned]:
    found, info, stages = list[Captioned](), stored.inputs.info, stages_of(stored.plan)
    if "samples" in stages and info.is_picture:
        pictures = next(stored.each("samples", FeatureChunk)).pictures
        assert pictures is not None  # the first chunk's
        samples = torch.from_numpy(pictures)
        found.append(("Samples, in the order of their numbers.", png_of_sheet(samples[:SHEET])))
        if "nn" in drawn:
            found.append(_neighbours(stored, drawn["nn"], samples))
    elif "samples" in stages and info.image_shape == (2,):
        found.append(_points(stored))
    restored = drawn.get("psnr", drawn.get("ssim"))
    if restored is not None and is_picture(restored.shape[2:]):
        rows = torch.from_numpy(restored).transpose(0, 1).flatten(0, 1)
        found.append(("Restorations: images, what is known of them, restored.", png_of_sheet(rows, len(restored))))
    if "loss" in drawn or "fid" in drawn:
        found.append(_curves(drawn))
    return found


def _neighbours(stored: StoredChunks, drawn: tuple[list[int], list[int]], samples: torch.Tensor) -> Captioned:
    places, nearest = drawn
    inputs = stored.inputs
    of_rows = inputs.numbers(inputs.num_reference)[spread(inputs.num_rows, inputs.num_reference)]
    numbers = of_rows[np.array(nearest)]
    order = np.unique(numbers)
    images, _ = inputs.reference.read(order)
    originals = images[torch.from_numpy(np.searchsorted(order, numbers))]
    both = torch.cat([samples[torch.tensor(places)], originals])
    caption = "The samples that are nearest to the reference (above), and the image nearest to each (below)."
    return caption, png_of_sheet(both, len(places))


def _points(stored: StoredChunks) -> Captioned:
    figure = _new_figure(5, 5)
    axes = figure.subplots()
    for stage, colour in (("reference", "0.7"), ("samples", "C0")):
        x = stored.rows(stage, "values", 2000)
        axes.plot(x[:, 0], x[:, 1], ".", ms=2, color=colour, label=stage)
    axes.set(aspect="equal")
    axes.legend(frameon=False)
    return "Samples over the reference.", _saved(figure)


def _curves(drawn: dict[str, Any]) -> Captioned:
    names = [name for name in ("loss", "fid") if name in drawn]
    figure = _new_figure(5 * len(names), 3.6)
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        if name == "loss":
            sigmas, means, errors = drawn["loss"]
            axes.errorbar(sigmas, means, yerr=[2 * (error or 0) for error in errors], fmt="o-", lw=1.4, ms=4)
            axes.set(
                xscale="log", xlabel="noise level σ", ylabel="weighted error", title="Denoising loss by noise level"
            )
        else:
            points = drawn["fid"]
            axes.plot([1 / n for n, _ in points], [d for _, d in points], "o")
            if len(points) > 1 and np.isfinite(points).all():
                slope, end = np.polyfit([1 / n for n, _ in points], [d for _, d in points], 1)
                line = np.linspace(0, 1 / points[-1][0], 2)
                axes.plot(line, end + slope * line, "--", color="0.5", lw=1)
            axes.set(
                xlabel="1 / number of samples", ylabel="Fréchet distance", title="To infinite count", xlim=(0, None)
            )
        axes.grid(alpha=0.3)
    captions = {
        "loss": "The loss at each level, with 95% bars.",
        "fid": "Fréchet distance of parts of the samples, and of all.",
    }
    return " ".join(captions[name] for name in names), _saved(figure)


def _new_figure(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
