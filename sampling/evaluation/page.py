"""One HTML page of an evaluation: numbers with intervals, samples, nearest neighbours, curves; all of it inside."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scoreray.data.pages import DPI, render
from scoreray.data.reading.samples import spread
from scoreray.sampling.evaluation.ensembles import SHOWN, num_ensembles
from scoreray.sampling.evaluation.stages import stages_of
from scoreray.sampling.measures.held_out import read_held_out
from scoreray.sampling.metrics.chunks import FeatureChunk
from scoreray.sampling.metrics.record import MOST_CHANNELS, EvaluationRecord, MetricResult, MetricValue, as_text
from scoreray.sampling.metrics.registry import in_order, metric_of
from scoreray.sampling.metrics.stored import StoredChunks
from scoreray.sampling.model.describe import is_picture
from scoreray.sampling.offline.generate import png_of_sheet

SHEET = 64
SHOWN_MEMBERS = 4
BESIDE = {
    "fid_infinity": "at infinite count",
    "floor": "two sets of real data",
    "nfe": "network evaluations",
    "log_z": "ln Z",
    "effective_samples": "effective samples",
    "elbo": "by one sample",
    "bandwidth": "bandwidth",
    "covered": "share with a density",
    "p_value": "p by relabelling",
    "on_reference": "of the reference",
    "largest_class": "share of the largest class",
    "chance": "chance",
    "median_distance": "median distance to the reference",
    "median_distance_among_reference": "among the reference",
    "ks": "Kolmogorov-Smirnov distance",
    "ks_p_value": "its p-value",
}
"""What a page shows beside a value, where a metric has it."""
BY_LEVEL = {
    "loss": ("Denoising loss by noise level", "The loss at each level, with 95% bars."),
    "fisher": ("Divergence from the known score", "The part of the loss that is the model's error, with 95% bars."),
    "calibration": ("Avoidable loss by noise level", "At least so much of the loss is avoidable, with 95% bars."),
}
"""Metrics with a curve over noise levels: title and caption."""
Captioned = tuple[str, bytes]  # and its PNG


@dataclass(frozen=True)
class MetricRow:
    """A line of a table of metrics, as a person reads it."""

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
        how=how_measured(record),
        rows=metric_rows(record),
        figures=_figures(stored, {name: result.drawn for name, result in results.items() if result.drawn is not None}),
        text=record.to_json().decode(),
    )  # fmt: skip


def metric_rows(record: EvaluationRecord) -> list[MetricRow]:
    """All that a record holds, in the order of METRICS."""
    return [row for name in in_order(record.metrics)
            for row in _rows(metric_of(name).title, record.metrics[name])]  # fmt: skip


def how_measured(record: EvaluationRecord) -> str:
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


def _rows(title: str, found: MetricValue) -> list[MetricRow]:
    if found.get("recall") is not None:
        both = {name.capitalize(): MetricValue(**found.get(name)) for name in ("precision", "recall")}
        return [MetricRow(name, as_text(one.value), one.interval_text, "") for name, one in both.items()]
    if found.get("scores") is not None:
        observed = found.get("observed")
        scores = {name: MetricValue(**one) for name, one in found.get("scores").items()}
        return [
            MetricRow(f"{title}: {name}", as_text(one.value), one.interval_text, f"the reference {observed[name]:.4g}")
            for name, one in scores.items()
        ]
    shown = {text: found.get(key) for key, text in BESIDE.items()}
    beside = [f"{text} {value:.4g}" for text, value in shown.items() if value is not None]
    beside += [found.channels_text] if found.channels_text else []
    parts = {f"{title}: {name}": MetricValue(**one) for name, one in (found.get("parts") or {}).items()}
    return [
        MetricRow(title, as_text(found.value), found.interval_text, ", ".join(beside)),
        *(MetricRow(name, as_text(one.value), one.interval_text, "") for name, one in parts.items()),
    ]


def _figures(stored: StoredChunks, drawn: dict[str, Any]) -> list[Captioned]:
    found, info, stages = list[Captioned](), stored.inputs.info, stages_of(stored.plan)
    if "samples" in stages and info.is_picture:
        pictures = next(stored.each("samples", FeatureChunk)).pictures
        assert pictures is not None  # the first chunk's
        samples = torch.from_numpy(pictures)
        found.append(("Samples, in the order of their numbers.", png_of_sheet(samples[:SHEET])))
        if "nn" in drawn:
            found.append(_neighbours(stored, drawn["nn"], samples))
    elif "samples" in stages and info.sample_shape == (2,):
        found.append(_points(stored))
    restored = next((drawn[name] for name in ("psnr", "ssim", "mse") if name in drawn), None)
    if restored is not None and is_picture(restored.shape[2:]):
        rows = torch.from_numpy(restored).transpose(0, 1).flatten(0, 1)
        restorations = "Restorations: images, what is known of them, restored."
        shown = "Images (above) and their reconstructions (below)." if info.is_autoencoder else restorations
        found.append((shown, png_of_sheet(rows, len(restored))))
    if any(name in drawn for name in (*BY_LEVEL, "fid")):
        found.append(_curves(drawn))
    if "spectrum" in drawn:
        found.append(_spectra(*drawn["spectrum"]))
    ensembles = next((drawn[name] for name in ("crps", "spread_skill", "rmse") if name in drawn), None)
    if ensembles is not None and len(info.sample_shape) > 1:
        members, observed = ensembles
        found.append(draw_ensembles(members, observed, _conditions(stored)))
    return found


def _conditions(stored: StoredChunks) -> list[str]:
    """What was requested of the ensembles that are shown, a line each."""
    inputs = stored.inputs
    numbers = inputs.numbers(num_ensembles(inputs))[:SHOWN]
    requested = read_held_out(inputs.reference, numbers, inputs.info).requested
    return [
        "\n".join([f"record {number}", *(f"{name}: {_shown(values[i])}" for name, values in requested.items())])
        for i, number in enumerate(numbers)
    ]


def _shown(value: Any) -> str:
    """A requested value in a few words."""
    if isinstance(value, torch.Tensor):
        few = value.numel() <= 4
        return ", ".join(f"{x:.3g}" for x in value.flatten().tolist()) if few else f"{list(value.shape)}"
    return "-" if value is None else textwrap.shorten(str(value), 40)


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
    names = [name for name in (*BY_LEVEL, "fid") if name in drawn]
    figure = _new_figure(5 * len(names), 3.6)
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        if name in BY_LEVEL:
            sigmas, means, errors = drawn[name]
            axes.errorbar(sigmas, means, yerr=[2 * (error or 0) for error in errors], fmt="o-", lw=1.4, ms=4)
            axes.set(xscale="log", xlabel="noise level σ", ylabel="weighted error", title=BY_LEVEL[name][0])
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
    captions = {name: caption for name, (_, caption) in BY_LEVEL.items()} | {
        "fid": "Fréchet distance of parts of the samples, and of all.",
    }
    return " ".join(captions[name] for name in names), _saved(figure)


def _spectra(samples: list[list[float]], reference: list[list[float]]) -> Captioned:
    """Power by wavenumber, a colour for each channel."""
    figure = _new_figure(5, 3.6)
    axes = figure.subplots()
    for channel, (drawn, real) in enumerate(zip(samples, reference, strict=True)):
        numbers = range(1, len(real))
        axes.plot(numbers, real[1:], "--", color=f"C{channel}", lw=1)
        axes.plot(numbers, drawn[1:], "-", color=f"C{channel}", lw=1.4, label=f"channel {channel}")
    axes.set(xscale="log", yscale="log", xlabel="wavenumber", ylabel="power")
    axes.grid(alpha=0.3)
    if 1 < len(reference) <= MOST_CHANNELS:
        axes.legend(frameon=False)
    return "Power spectra of the samples, and of the reference (dashed).", _saved(figure)


def draw_ensembles(members: np.ndarray, observed: np.ndarray, titles: Sequence[str]) -> Captioned:
    """Ensembles [n, M, C, ...] beside what was observed [n, C, ...]: a row each of observed, some members, the mean and
    the spread. Lines are shown as such, volumes by their middle slice; of channels that are no colours the first."""
    columns = ["observed", *(f"member {i}" for i in range(min(SHOWN_MEMBERS, members.shape[1]))), "mean", "spread"]
    figure = _new_figure(1.6 * len(columns) + 1.2, 1.7 * len(members))
    for i, row in enumerate(np.atleast_2d(figure.subplots(len(members), len(columns), squeeze=False))):
        values = members[i].astype(np.float64)
        parts = [observed[i], *members[i, : len(columns) - 3], values.mean(0), values.std(0, ddof=1)]
        limits = float(observed[i].min()), float(observed[i].max())
        is_colour = observed.dtype == np.uint8 and observed.shape[1] == 3
        for axes, name, part in zip(row, columns, parts, strict=True):
            _draw_field(axes, part, limits if name != "spread" else None, is_colour)
            axes.set(xticks=[], yticks=[])
            if not i:
                axes.set_title(name, fontsize=8)
        row[0].set_ylabel(titles[i], fontsize=7, rotation=0, ha="right", va="center")
    caption = "Ensembles: what was observed, members under the same condition, their mean and standard deviation."
    return caption, _saved(figure)


def _draw_field(axes: Any, field: np.ndarray, limits: tuple[float, float] | None, is_colour: bool) -> None:
    """One sample [C, ...]; limits: of its values, where it is not a spread; is_colour: of an RGB picture, 0 to 255."""
    if field.ndim == 2:
        axes.plot(field[0], lw=0.8)
        if limits is not None:
            axes.set_ylim(*limits)
        return
    if field.ndim == 4:
        field = field[:, field.shape[1] // 2]
    if is_colour and limits is not None:
        axes.imshow(field.transpose(1, 2, 0).clip(0, 255).astype(np.uint8), interpolation="nearest")
    else:
        low, high = limits or (None, None)
        axes.imshow(field[0], vmin=low, vmax=high, cmap="viridis", interpolation="nearest")


def _new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
