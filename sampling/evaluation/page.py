"""One HTML page of an evaluation: numbers with intervals, samples, nearest neighbours, curves; all of it inside."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scoreray.data.packing.inspect import picture_grid
from scoreray.data.reading.samples import Samples, spread
from scoreray.sampling.evaluation.plan import EvaluationPlan
from scoreray.sampling.evaluation.record import as_text, interval_text
from scoreray.sampling.evaluation.tasks import get_arrays

if TYPE_CHECKING:
    from scoreray.sampling.evaluation.quality import Work

SHEET = 64
TITLES = {
    "fid": "Fréchet distance (FID)",
    "kid": "Kernel distance (KID)",
    "is": "Inception Score",
    "pr": "Precision (recall below)",
    "sw": "Sliced Wasserstein",
    "nn": "Share of copies",
    "kde": "Log-density of the reference under samples, nats",
    "bpd": "Bits per dimension",
    "nats": "Log-likelihood, nats",
    "loss": "Denoising loss, EDM-weighted",
    "psnr": "PSNR of restorations, dB",
    "ssim": "SSIM of restorations",
    "ais": "Log-likelihood by AIS, nats",
}


def page(plan: EvaluationPlan, record: dict[str, Any], work: Work) -> str:
    """The page of a record (as read back from its JSON) and the pictures that its metrics left."""
    parts = [
        _table(record),
        *(f'<p class="note">{html.escape(warning)}</p>' for warning in record["warnings"]),
        *_figures(plan, work),
        "<h2>The record</h2>",
        f"<details><summary>everything that changes these numbers</summary><pre>"
        f"{html.escape(json.dumps(record, indent=1, sort_keys=True))}</pre></details>",
    ]
    subject = record["subject"]["checkpoint"]
    title = f"{subject['images_seen']:,} images, EMA {subject['ema']}"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>scoreray evaluation: {html.escape(title)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }}
img {{ max-width: 100% }} th {{ text-align: left }} th, td {{ padding: .2rem 1.5rem .2rem 0; vertical-align: top }}
td.n {{ font-variant-numeric: tabular-nums; text-align: right }} .note {{ background: #fff4d6; padding: .5rem .8rem }}
pre {{ font-size: 13px; overflow-x: auto }} figure {{ margin: 1.5rem 0 }} figcaption {{ color: #555 }}
</style>
<h1>{html.escape(title)}</h1>
<p>{html.escape(subject["url"])}<br>{html.escape(_how(record))}</p>
{"".join(parts)}
</html>
"""


def _how(record: dict[str, Any]) -> str:
    """One sentence of how it was measured."""
    sampling, protocol = record["subject"]["sampling"], record["protocol"]
    words = []
    if "samples" in protocol:
        words.append(
            f"{protocol['samples']['count']:,} samples by {sampling['sampler']}, {sampling['steps']} steps, "
            f"seed {sampling['seed']}, guidance {sampling['guidance']:g}"
        )
    if "reference" in protocol:
        of = protocol["reference"]
        words.append(f"{of['count']:,} of {of['of']:,} samples of {of['name']}")
    if "extractor" in protocol:
        extractor = protocol["extractor"]
        accuracy = f", {extractor['accuracy']:.1%} of held-out images right" if "accuracy" in extractor else ""
        words.append(f"extractor {extractor['kind']} {extractor['sha256'][:8]}{accuracy}")
    return "; ".join(words)


def _table(record: dict[str, Any]) -> str:
    rows = []
    for name in TITLES:
        values = record["metrics"].get(name)
        if values is None:
            continue
        entries = [(TITLES[name], values)]
        if "recall" in values:
            entries = [("Precision", values["precision"]), ("Recall", values["recall"])]
        for title, entry in entries:
            rows.append(
                f'<tr><th>{html.escape(title)}</th><td class="n">{as_text(entry["value"])}</td>'
                f"<td>{interval_text(entry)}</td><td>{html.escape(_beside(entry))}</td></tr>"
            )
    return (
        "<table><tr><th>metric</th><th>value</th><th>95% interval</th><th></th></tr>" + "".join(rows) + "</table>"
    )  # fmt: skip


def _beside(values: dict[str, Any]) -> str:
    """What belongs to a value."""
    names = {
        "fid_infinity": "at infinite count",
        "floor": "two sets of real data",
        "nfe": "network evaluations",
        "log_z": "ln Z",
        "bandwidth": "bandwidth",
        "median_distance": "median distance to the reference",
        "median_distance_among_reference": "among the reference",
    }
    return ", ".join(f"{text} {values[key]:.4g}" for key, text in names.items() if values.get(key) is not None)


def _figures(plan: EvaluationPlan, work: Work) -> list[str]:
    found = []
    stages = plan.stages()
    if "samples" in stages and plan.info.is_picture:
        samples = torch.from_numpy(get_arrays(plan.store, stages["samples"][0].key)["pictures"])
        found.append(_figure("Samples, in the order of their numbers.", _png(picture_grid(samples[:SHEET]))))
        if "nn" in work.pictures:
            found.append(_neighbours(plan, work, samples))
    elif "samples" in stages and plan.info.image_shape == (2,):
        found.append(_points(work))
    if "restoration" in work.pictures and work.pictures["restoration"].shape[2] in (1, 3):
        trios = torch.from_numpy(work.pictures["restoration"]).transpose(0, 1).flatten(0, 1)
        columns = len(trios) // 3
        found.append(
            _figure("Restorations: images, what is known of them, restored.", _png(picture_grid(trios, columns)))
        )
    if "loss" in work.pictures or "fid" in work.pictures:
        found.append(_curves(work))
    return found


def _neighbours(plan: EvaluationPlan, work: Work, samples: Tensor) -> str:
    places, nearest = work.pictures["nn"]
    of_rows = plan.numbers(plan.num_reference)[spread(work.num_rows, plan.num_reference)]
    numbers = of_rows[np.array(nearest)]
    order = np.unique(numbers)
    images, _ = Samples(plan.settings.reference).read(order)
    originals = images[torch.from_numpy(np.searchsorted(order, numbers))]
    both = torch.cat([samples[torch.tensor(places)], originals])
    text = "Samples that lie nearest to the reference (above), and the image nearest to each (below)."
    return _figure(text, _png(picture_grid(both, len(places))))


def _points(work: Work) -> str:
    figure = _new_figure(5, 5)
    axes = figure.subplots()
    for stage, colour in (("reference", "0.7"), ("samples", "C0")):
        x = work.rows(stage, "values", 2000)
        axes.plot(x[:, 0], x[:, 1], ".", ms=2, color=colour, label=stage)
    axes.set(aspect="equal")
    axes.legend(frameon=False)
    return _figure("Samples over the reference.", _saved(figure))


def _curves(work: Work) -> str:
    names = [name for name in ("loss", "fid") if name in work.pictures]
    figure = _new_figure(5 * len(names), 3.6)
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        if name == "loss":
            sigmas, means, errors = work.pictures["loss"]
            axes.errorbar(sigmas, means, yerr=[2 * (error or 0) for error in errors], fmt="o-", lw=1.4, ms=4)
            axes.set(
                xscale="log", xlabel="noise level σ", ylabel="weighted error", title="Denoising loss by noise level"
            )
        else:
            points = work.pictures["fid"]
            axes.plot([1 / n for n, _ in points], [d for _, d in points], "o")
            if len(points) > 1 and np.isfinite(points).all():
                slope, end = np.polyfit([1 / n for n, _ in points], [d for _, d in points], 1)
                line = np.linspace(0, 1 / points[-1][0], 2)
                axes.plot(line, end + slope * line, "--", color="0.5", lw=1)
            axes.set(
                xlabel="1 / number of samples", ylabel="Fréchet distance", title="To infinite count", xlim=(0, None)
            )
        axes.grid(alpha=0.3)
    return _figure("", _saved(figure))


def _new_figure(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _saved(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _figure(caption: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
