"""The demo's picture of the loss and its page, summary.html."""

from __future__ import annotations

from pathlib import Path

from scoreray.cluster.verbs.train import TrainResult
from scoreray.data.pages import DPI, render
from scoreray.trainer.config import Config
from scoreray.trainer.monitoring.metrics import SIGMA_EDGES, TrainingRecord


def loss_picture(records: list[TrainingRecord], path: Path) -> None:
    """Two panels: the mean loss over images seen, and the last records' loss by noise level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([record.images for record in records], [record.loss for record in records], lw=1.6)
    left.set(xlabel="images seen", ylabel="weighted loss", title="Loss over the run")
    left.grid(alpha=0.3)
    left.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
    for part, label, colour in ((records[: max(1, len(records) // 10)], "first tenth", "0.6"),
                                (records[-max(1, len(records) // 5) :], "last fifth", "C0")):  # fmt: skip
        levels, losses = _by_sigma(part)
        right.plot(levels, losses, "o-", color=colour, label=label, lw=1.6)
    right.set(xscale="log", xlabel="noise level σ", ylabel="weighted loss", title="Loss by noise level")
    right.grid(alpha=0.3)
    right.legend(frameon=False)
    figure.savefig(path, dpi=DPI)


def _by_sigma(records: list[TrainingRecord]) -> tuple[list[float], list[float]]:
    ratio = SIGMA_EDGES[1] / SIGMA_EDGES[0]
    centres = [SIGMA_EDGES[0] / ratio**0.5] + [edge * ratio**0.5 for edge in SIGMA_EDGES]
    levels, losses = [], []
    for i, centre in enumerate(centres):
        values = [loss for record in records if (loss := record.sigma_losses[i]) is not None]
        if values:
            levels.append(centre)
            losses.append(sum(values) / len(values))
    return levels, losses


def _engine(config: Config) -> str:
    stage = config.engine.zero_stage
    return f"DeepSpeed ZeRO-{stage}" if stage else "the whole state on each (ZeRO-0)"


def _precision(config: Config) -> str:
    import torch

    from scoreray.trainer.engine import resolve_precision

    if config.engine.precision != "auto" or config.scaling.use_gpu:
        return config.engine.precision
    return f"auto: {str(resolve_precision('auto', torch.device('cpu'))).removeprefix('torch.')} on this CPU"


def summary_page(
    config: Config,
    records: list[TrainingRecord],
    trained: TrainResult,
    *,
    num_samples: int,
    samples_s: float,
    guidance: float,
) -> str:
    """One HTML page beside samples.png, loss.png and config.yaml; it loads nothing from other hosts."""
    rates = sorted(record.images_per_s for record in records[1:] or records)
    low, high = config.scaling.range
    rows = {
        "run": trained.run,
        "checkpoint": trained.checkpoint,
        "data": config.data.url,
        "images seen": f"{trained.images_seen:,}",
        "mean loss of the last record": "-" if trained.loss is None else f"{trained.loss:.4f}",
        "training rate": f"{rates[len(rates) // 2]:,.0f} images/s (median)" if rates else "-",
        "waiting for data": f"{max(record.data_stall for record in records[-3:]):.1%}" if records else "-",
        "workers": f"{low if low == high else f'{low} to {high}'}, {_engine(config)}",
        "precision": _precision(config),
        "network": config.network.kind,
        "process": config.process.kind,
        "objective": config.objective.kind,
        "EMA drawn from": config.ema.names[0],
        "samples": f"{num_samples} in {samples_s:.1f} s: Heun, 18 steps, classes in turn, guidance {guidance:g}",
    }
    return render("scoreray.cluster.verbs/summary.html", name=config.run.name, rows=rows, num_samples=num_samples)
