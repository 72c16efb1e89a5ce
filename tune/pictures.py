"""What a report shows: importance, and pictures as PNG, Optuna's where it has them; error by images and noise level."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scoreray.data.fields.limits import is_picture
from scoreray.data.fields.normalisation import to_uint8
from scoreray.sampling.offline.generate import png_of_sheet
from scoreray.tune.metric import levels_of
from scoreray.tune.schedule import best_of, cost_of
from scoreray.tune.search import optuna_study
from scoreray.tune.space import short_names
from scoreray.tune.sweep import MAXIMISED, StudyPlan
from scoreray.tune.trial import Trial

WIDTH = 7.2  # inches: what a page of text is wide
DPI = 144
FEWEST = 8  # trials below which a dimension's importance is noise
COLOURS = {"done": "C0", "stopped": "0.65", "running": "C1"}


@contextmanager
def _optuna_style(width: float, height: float) -> Iterator[None]:
    """Optuna draws on pyplot and changes its style: that is as it was afterwards."""
    from matplotlib import pyplot

    with pyplot.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its pictures by matplotlib are marked experimental
        pyplot.rcParams["figure.figsize"] = (width, height)
        yield


def _finished(axes: Any) -> bytes:
    """The picture of Optuna's axes, on white as the others, and without its title: the page has captions."""
    from matplotlib import pyplot

    for place in ("left", "center"):
        axes.set_title("", loc=place)
    axes.set_facecolor("white")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    data = _png(axes.figure)
    pyplot.close(axes.figure)
    return data


def _short_study(plan: StudyPlan, trials: Sequence[Trial]) -> Any:
    """With the dimensions' short names, as pictures have room for."""
    study = optuna_study(plan, trials, short_names([one.key for one in plan.space.dimensions]))
    study.set_metric_names(list(plan.sweep.metric.names))
    return study


def history_picture(plan: StudyPlan, trials: Sequence[Trial]) -> bytes:
    """The first metric of each finished trial, and the best so far."""
    from optuna.visualization.matplotlib import plot_optimization_history

    first, *others = plan.sweep.metric.names
    target = (lambda trial: trial.values[0]) if others else None
    with _optuna_style(WIDTH, 2.9):
        axes: Any = plot_optimization_history(optuna_study(plan, trials), target=target, target_name=first)
        axes.xaxis.get_major_locator().set_params(integer=True)
        return _finished(axes)


def importance(plan: StudyPlan, trials: Sequence[Trial]) -> tuple[dict[str, float], str]:
    """Share of each dimension in what makes a trial good, of the first metric; and of which trials that is, or why
    there is none.

    Optuna's PED-ANOVA (Watanabe 2023), with its extension to conditional dimensions (arXiv 2601.20800).
    """
    from optuna.importance import get_param_importances

    chosen, note = comparable(plan, trials)
    having = {one.key: [t for t in chosen if one.key in t.values] for one in plan.space.dimensions if chosen}
    too_few = [key for key, some in having.items() if len(some) < FEWEST]
    note = "; ".join([note, *(f"{key} in too few of them" for key in too_few)])
    keys = [key for key in having if key not in too_few]
    if not keys:
        return {}, note
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = get_param_importances(optuna_study(plan, chosen), params=keys, target=target_of(plan), normalize=False)
    total = sum(shares.values())
    if total == 0:
        return {}, f"{note}; no difference found"
    return {key: share / total for key, share in shares.items()}, note


def target_of(plan: StudyPlan) -> Callable[[Any], float] | None:
    """What Optuna takes as a trial's worth where there are several metrics: the first, less is better."""
    first, *others = plan.sweep.metric.names
    sign = -1.0 if first in MAXIMISED else 1.0
    return (lambda trial: sign * trial.values[0]) if others else None


def comparable(plan: StudyPlan, trials: Sequence[Trial]) -> tuple[list[Trial], str]:
    """Trials that importance is taken of, as they stood at one stop, and a word on them; none where too few.

    The finished trials; where asha left too few of these, all that reached its farthest stop with enough.
    """
    first = plan.sweep.metric.names[0]
    done = [trial for trial in trials if trial.state == "done" and math.isfinite(cost_of(trial, first))]
    if len(done) >= FEWEST:
        return done, f"{len(done)} finished trials"
    if plan.sweep.scheduler.kind == "asha":
        for images in sorted({report["images"] for trial in trials for report in trial.reports}, reverse=True):
            reached = [_as_at(trial, images) for trial in trials if any(r["images"] == images for r in trial.reports)]
            reached = [trial for trial in reached if math.isfinite(cost_of(trial, first))]
            if len(reached) >= FEWEST:
                return reached, f"{len(reached)} trials as they stood at {images:,} images"
    return [], f"too few finished trials ({len(done)} of {FEWEST})"


def _as_at(trial: Trial, images: int) -> Trial:
    """A trial as if it had ended at a stop that it has reported."""
    return replace(trial, state="done", reports=[r for r in trial.reports if r["images"] <= images])


def importance_picture(plan: StudyPlan, trials: Sequence[Trial], keys: Sequence[str]) -> bytes:
    """Bars of these dimensions' importance, the greatest on top."""
    from optuna.visualization.matplotlib import plot_param_importances

    short = short_names([one.key for one in plan.space.dimensions])
    with _optuna_style(WIDTH, 0.9 + 0.4 * len(keys)):
        study = _short_study(plan, comparable(plan, trials)[0])
        axes: Any = plot_param_importances(study, params=[short[key] for key in keys], target=target_of(plan))
        axes.get_legend().remove()
        return _finished(axes)


def parallel_picture(plan: StudyPlan, trials: Sequence[Trial]) -> bytes:
    """A vertical axis for each metric and each dimension; a line for each finished trial."""
    from optuna.visualization.matplotlib import plot_parallel_coordinate

    names = plan.sweep.metric.names
    count = len(plan.space.dimensions) + len(names)
    target_name = names[0] if len(names) == 1 else ""
    with _optuna_style(max(WIDTH, 1.3 * count + 1), 4.2):
        axes: Any = plot_parallel_coordinate(_short_study(plan, trials), target_name=target_name)
        for lines in axes.collections:  # the worst of Optuna's blues can't be seen on white
            lines.set_cmap("viridis_r" if len(names) == 1 and names[0] in MAXIMISED else "viridis")
            scale = lines.colorbar.ax
            scale.set_position(scale.get_position().translated(0.06, 0))  # off the last axis's labels
        return _finished(axes)


def front_pictures(plan: StudyPlan, trials: Sequence[Trial], default: Trial | None) -> list[bytes]:
    """The first metric against each of the others; trials that none beats in all of them in red, the default ringed."""
    from optuna.visualization.matplotlib import plot_pareto_front

    first, *others = plan.sweep.metric.names
    found = []
    for place, other in enumerate(others, 1):

        def shown(trial: Any, place: int = place) -> tuple[float, float]:
            return trial.values[place], trial.values[0]

        with _optuna_style(WIDTH, 3.6):
            axes = plot_pareto_front(optuna_study(plan, trials), target_names=[other, first], targets=shown)
            if default is not None and default.metrics:
                x, y = default.metrics[other], default.metrics[first]
                axes.scatter([x], [y], s=90, fc="none", ec="0.2", label="default")
                axes.legend()
            found.append(_finished(axes))
    return found


def progress_picture(plan: StudyPlan, trials: Sequence[Trial], best: Trial) -> bytes:
    """The first metric of each trial at its stops, by images seen."""
    figure, axes = _axes(WIDTH, 2.9)
    name = plan.sweep.metric.names[0]
    for trial in trials:
        points = [(report["images"], report["metrics"][name]) for report in trial.reports]
        points = [(images, value) for images, value in points if math.isfinite(value)]
        if points:
            colour, width = ("C1", 2.2) if trial is best else (COLOURS.get(trial.state, "0.65"), 0.9)
            axes.plot(*zip(*points, strict=True), "o-", ms=3, color=colour, lw=width, zorder=2 + (trial is best),
                      alpha=1.0 if trial.state == "done" else 0.6)  # fmt: skip
    measured = [report["metrics"][name] for trial in trials for report in trial.reports]
    low, high = frame([value for value in measured if math.isfinite(value)], name)
    margin = 0.05 * (high - low)
    axes.set(xlabel="images seen", ylabel=name, xscale="log", ylim=(low - margin, high + margin))
    stops = sorted({report["images"] for trial in trials for report in trial.reports})
    stops = stops[:: -(-len(stops) // 8)]
    axes.set_xticks(stops, [f"{images:,}" for images in stops])
    axes.set_xticks([], minor=True)
    return _png(figure)


def without_far(plan: StudyPlan, trials: Sequence[Trial]) -> list[Trial]:
    """The trials as pictures show them: those that one bad metric puts far beyond all others, as if they had failed.

    Far is more than 4 times as far from the best as the median is; what is on the Pareto front never is.
    """
    kept = {trial.number for trial in best_of(plan, list(trials))} if len(plan.sweep.metric.names) > 1 else set()
    done = [trial for trial in trials if trial.state == "done" and trial.metrics]
    far = set[int]()
    for name in plan.sweep.metric.names:
        values = {trial.number: trial.metrics[name] for trial in done if trial.metrics}
        low, high = frame([*values.values()], name)
        far |= {number for number, value in values.items() if not low <= value <= high}
    return [replace(trial, state="failed") if trial.number in far - kept else trial for trial in trials]


def frame(values: Sequence[float], name: str) -> tuple[float, float]:
    """Ends of an axis for a metric: all values, but none that is farther from the best than 4 times the median is."""
    if not values:
        return 0.0, 1.0
    sign = -1 if name in MAXIMISED else 1
    costs = sorted(sign * value for value in values)
    best, middle, worst = costs[0], costs[len(costs) // 2], costs[-1]
    worst = min(worst, best + 4 * (middle - best)) if middle > best else worst
    if worst == best:
        best, worst = best - 0.5 * abs(best) - 1e-9, best + 0.5 * abs(best) + 1e-9
    return (best, worst) if sign > 0 else (-worst, -best)


def compared(plan: StudyPlan, best: Trial, default: Trial | None) -> bool:
    """Whether there is a default's curve beside the best's."""
    if default is None or default.number == best.number:
        return False
    return len(default.reports[-1]["curve"]) == len(levels_of(plan.sweep.metric))


def curves_picture(plan: StudyPlan, best: Trial, default: Trial | None) -> bytes:
    """Per-sigma error of the best and the default with 95% bands, and their ratio."""
    from matplotlib.figure import Figure

    sigmas = levels_of(plan.sweep.metric)
    shown = [("best", best, "C0")]
    if default is not None and compared(plan, best, default):
        shown.append(("default", default, "0.45"))
    figure = Figure(figsize=(WIDTH, 4.6 if len(shown) > 1 else 2.9), layout="constrained")
    rows = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=[3, 2][: len(shown)])[:, 0]
    base = shown[-1][1].reports[-1]["curve"]
    for name, trial, colour in shown:
        curve, errors = trial.reports[-1]["curve"], trial.reports[-1]["std_errors"]
        rows[0].plot(sigmas, curve, "o-", ms=3.5, lw=1.6, color=colour, label=f"{name} (trial {trial.number})")
        low = [c - 1.96 * e for c, e in zip(curve, errors, strict=True)]
        high = [c + 1.96 * e for c, e in zip(curve, errors, strict=True)]
        rows[0].fill_between(sigmas, low, high, color=colour, alpha=0.15, lw=0)
        if len(shown) > 1:
            ratio = [100 * (c / b - 1) for c, b in zip(curve, base, strict=True)]
            rows[1].plot(sigmas, ratio, "o-", ms=3.5, color=colour)
            rows[1].set(ylabel="difference, %")
    rows[0].set(ylabel="weighted error", ylim=(0, None))
    rows[0].legend(frameon=False)
    rows[-1].set(xscale="log", xlabel="noise level σ")
    for axes in rows:
        axes.grid(alpha=0.3)
    return _png(figure)


def sheet_picture(samples: Tensor, like: Tensor) -> bytes | None:
    """Images as a grid, points as a scatter in the frame of `like`, so that two sheets compare; None for other data."""
    if is_picture(samples.shape[1:]):
        return png_of_sheet(to_uint8(samples))
    if samples.ndim == 2 and samples.shape[1] >= 2:
        figure, axes = _axes(4, 4)
        axes.scatter(samples[:, 0], samples[:, 1], s=2, color="C0")
        ends = torch.quantile(like[:, :2].double(), torch.tensor([0.01, 0.99], dtype=torch.float64), dim=0)
        middle, half = ends.mean(0).tolist(), max(0.65 * float((ends[1] - ends[0]).max()), 1e-6)
        axes.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
        axes.set_aspect("equal")
        return _png(figure)
    return None


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")
    return buffer.getvalue()
