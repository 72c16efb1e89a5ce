"""The demo's page, summary.html: all that it shows is inside it, so it can be sent to somebody."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scoreray.cluster.verbs.train import TrainResult
from scoreray.data.pages import DPI, render
from scoreray.trainer.config import Config, dump_config
from scoreray.trainer.monitoring.metrics import SIGMA_EDGES, TrainingRecord

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PAGE = "summary.html"
FRAME_MS, LAST_FRAME_MS = 220, 2500


@dataclass(frozen=True)
class Expected:
    """What a run of so many images of the demo's network gave. fid: "" where it was not measured in this way."""

    images: int
    look: str
    fid: str


# Measured as the demo measures: `configs/demo.yaml` on the demo's 10,000 images, a warm-up of an eighth, one run each.
# docs/images/demo-samples.png is of the last, a demo of four minutes on two cores.
EXPECTED = (
    Expected(4_000, "outlines under grain", "3.7 ± 0.2"),
    Expected(8_000, "most kinds are recognisable, still grainy", "1.1 ± 0.1"),
    Expected(14_000, "all kinds but sandals, with grain inside", "0.50 ± 0.06"),
    Expected(100_000, "clothes with collars, stripes and prints", "0.37 ± 0.03"),
    Expected(500_000, "sandals too, bags with handles; by FID hardly better", "0.32 ± 0.04"),
)
TOO_FEW = 3000  # images: below, samples are noise or blots


@dataclass(frozen=True)
class Fid:
    """value, error: its standard error. floor: of held-out images among themselves. count: of the samples."""

    value: float | None
    error: float | None
    floor: float | None
    count: int

    @property
    def text(self) -> str:
        if self.value is None:
            return "-"
        return f"{self.value:.2f}" + (f" ± {self.error:.2f}" if self.error is not None else "")


@dataclass(frozen=True)
class Copies:
    """share, of_held_out: of samples, and of held-out images, that are much nearer to one image that was trained on
    than to the next. distance, distance_of_held_out: to the nearest, medians. pairs: uint8 [2 n, C, H, W], the samples
    that are nearest to an image, then these images."""

    share: float
    of_held_out: float
    distance: float
    distance_of_held_out: float
    pairs: np.ndarray


@dataclass(frozen=True)
class Measured:
    """What was found about the demo's model. samples: uint8 [N, C, H, W]; frames: estimates of them on their way."""

    images: int
    fid: Fid
    copies: Copies
    samples: Tensor
    frames: list[Tensor]

    def sentence(self) -> str:
        few = " That is too few to draw anything: take more --minutes." if self.images < TOO_FEW else ""
        return f"after {self.images:,} pictures the FID is {self.fid.text}.{few}"

    def answer(self) -> dict[str, Any]:
        return {"fid": self.fid.value, "fid_error": self.fid.error, "copies": self.copies.share}


@dataclass(frozen=True)
class NextStep:
    what: str
    command: str


def expected_lines() -> list[str]:
    return [f"{one.images:>7,} pictures  {one.look}" + f" (FID {one.fid})" * bool(one.fid) for one in EXPECTED]


def page(config: Config, trained: TrainResult, finding: Measured, steps: list[NextStep]) -> str:
    """The page. It loads nothing, so it works from a file, and reads well on a phone."""
    from scoreray.sampling.offline.generate import png_of_sheet

    copies = finding.copies
    return render(
        "scoreray.cluster.verbs/summary.html",
        images=finding.images,
        minutes=_training_minutes(trained.records),
        fid=finding.fid,
        expected=[(one, one is _nearest(finding.images)) for one in EXPECTED],
        too_few=finding.images < TOO_FEW,
        copies=copies,
        moving=moving_picture(finding.frames),
        still=png_of_sheet(finding.samples),
        num_samples=len(finding.samples),
        num_frames=len(finding.frames),
        pairs=png_of_sheet(copies.pairs, len(copies.pairs) // 2),
        loss=_loss_by_images(trained.records),
        by_level=_loss_by_level(trained.records),
        steps=steps,
        rows=_rows(config, trained),
        config=dump_config(config),
    )


def moving_picture(frames: list[Tensor]) -> bytes:
    """Sheets of pictures [N, C, H, W] one after another, for ever, as WebP."""
    from scoreray.data.packing.inspect import picture_grid

    first, *others = [picture_grid(frame) for frame in frames]
    buffer, times = io.BytesIO(), [FRAME_MS] * len(others) + [LAST_FRAME_MS]
    first.save(buffer, "WEBP", save_all=True, append_images=others, duration=times, loop=0, quality=80)
    return buffer.getvalue()


def _nearest(images: int) -> Expected | None:
    """The row whose number of images is nearest, as a ratio."""
    return min(EXPECTED, key=lambda one: abs(math.log(max(images, 1) / one.images)), default=None)


def _training_minutes(records: list[TrainingRecord]) -> float:
    """Time of its steps, whatever was between interrupted parts."""
    before = [0, *(record.images for record in records)]
    parts = zip(before, records, strict=False)
    return sum((record.images - last) / record.images_per_s for last, record in parts if record.images_per_s > 0) / 60


def _loss_by_images(records: list[TrainingRecord]) -> bytes:
    figure, axes = _new_figure()
    axes.plot([record.images for record in records], [record.loss for record in records], lw=1.6)
    axes.set(xlabel="pictures seen", ylabel="weighted loss")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
    return _png(figure)


def _loss_by_level(records: list[TrainingRecord]) -> bytes:
    figure, axes = _new_figure()
    for part, label, colour in ((records[: max(1, len(records) // 10)], "first tenth of the run", "0.6"),
                                (records[-max(1, len(records) // 5) :], "last fifth", "C0")):  # fmt: skip
        levels, losses = _by_sigma(part)
        axes.plot(levels, losses, "o-", color=colour, label=label, lw=1.6)
    axes.set(xscale="log", xlabel="noise level σ", ylabel="weighted loss")
    axes.legend(frameon=False)
    return _png(figure)


def _new_figure() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


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


def _rows(config: Config, trained: TrainResult) -> dict[str, str]:
    """Facts for somebody who knows the field."""
    records = trained.records
    rates = sorted(record.images_per_s for record in records[1:] or records)
    low, high = config.scaling.range
    return {
        "run": trained.run,
        "checkpoint": trained.checkpoint,
        "data": str(config.data.url),
        "mean loss of the last record": "-" if trained.loss is None else f"{trained.loss:.4f}",
        "training rate": f"{rates[len(rates) // 2]:,.0f} images/s (median)" if rates else "-",
        "waiting for data": f"{max(record.data_stall for record in records[-3:]):.1%}" if records else "-",
        "workers": f"{low if low == high else f'{low} to {high}'}, {_engine(config)}",
        "precision": _precision(config),
        "network": config.network.kind,
        "process": config.process.kind,
        "objective": config.objective.kind,
        "EMA drawn from": config.ema.names[0],
    }
