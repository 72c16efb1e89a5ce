"""The pictures of a study's report, as PNG: trials, importance, parallel coordinates, Pareto front, error curves."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scoreray.data.reading.manifest import is_picture
from scoreray.sampling.offline.generate import png_of_sheet
from scoreray.trainer.step import to_uint8
from scoreray.tune.metric import levels_of
from scoreray.tune.schedule import best_of, cost_of
from scoreray.tune.space import Dimension
from scoreray.tune.sweep import MAXIMISED, StudyPlan
from scoreray.tune.trial import Trial

WIDTH = 7.2  # inches: what a page of text is wide
DPI = 144
COLOURS = {"done": "C0", "stopped": "0.65", "running": "C1"}
PALEST = 0.25  # of the colours from yellow to violet: what is paler can't be seen on white
NONE_AT = -0.12  # height on its axis of a dimension that a trial does not have


def history_picture(plan: StudyPlan, trials: Sequence[Trial]) -> bytes:
    """The first metric of each trial, and the best so far."""
    figure, axes = _axes(WIDTH, 2.9)
    name = plan.sweep.metric.names[0]
    measured = [(trial, trial.metrics[name]) for trial in trials if trial.metrics]
    measured = [(trial, value) for trial, value in measured if math.isfinite(value)]
    low, high = _frame(plan, [value for _, value in measured])
    for state, colour in COLOURS.items():
        some = [(trial.number, value) for trial, value in measured if trial.state == state and low <= value <= high]
        if some:
            axes.scatter(*zip(*some, strict=True), s=18, color=colour, label=state)
    far = [(trial.number, high if value > high else low) for trial, value in measured if not low <= value <= high]
    if far:
        axes.scatter(*zip(*far, strict=True), s=24, color="0.65", marker="x", label="far beyond")
    best, line = math.inf, []
    for trial, value in measured:
        if trial.state == "done" and cost_of(trial, name) < best:
            best = cost_of(trial, name)
            line.append((trial.number, value))
    if line:
        line.append((len(trials) - 1, line[-1][1]))
        axes.step(*zip(*line, strict=True), where="post", color="0.2", lw=1.2, label="best so far")
    axes.set(xlabel="trial", ylabel=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if measured:
        margin = 0.05 * (high - low)
        axes.set_ylim(low - margin, high + margin)
        axes.legend(frameon=False, fontsize=9)
    return _png(figure)


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
    low, high = _frame(plan, [value for value in measured if math.isfinite(value)])
    margin = 0.05 * (high - low)
    axes.set(xlabel="images seen", ylabel=name, xscale="log", ylim=(low - margin, high + margin))
    stops = sorted({report["images"] for trial in trials for report in trial.reports})
    stops = stops[:: -(-len(stops) // 8)]
    axes.set_xticks(stops, [f"{images:,}" for images in stops])
    axes.set_xticks([], minor=True)
    return _png(figure)


def _frame(plan: StudyPlan, values: list[float], name: str = "", keep: Sequence[float] = ()) -> tuple[float, float]:
    """Ends of an axis for a metric (the first by default): all, but no farther off than 4 times the median is from the
    best; never less than `keep`."""
    if not values:
        return 0.0, 1.0
    sign = -1 if (name or plan.sweep.metric.names[0]) in MAXIMISED else 1
    costs = sorted(sign * value for value in values)
    best, middle, worst = costs[0], costs[len(costs) // 2], costs[-1]
    if middle > best:
        worst = min(worst, max([best + 4 * (middle - best), *(sign * value for value in keep)]))
    if worst == best:
        best, worst = best - 0.5 * abs(best) - 1e-9, best + 0.5 * abs(best) + 1e-9
    return (best, worst) if sign > 0 else (-worst, -best)


def importance_picture(shares: dict[str, float]) -> bytes:
    """Bars, the greatest on top."""
    figure, axes = _axes(WIDTH, 0.7 + 0.35 * len(shares))
    ranked = sorted(shares.items(), key=lambda one: one[1])
    axes.barh([key for key, _ in ranked], [value for _, value in ranked], color="C0")
    for place, (_, value) in enumerate(ranked):
        axes.text(value + 0.01, place, f"{value:.0%}", va="center", fontsize=9)
    axes.set_xlim(0, max(value for _, value in ranked) * 1.12)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    return _png(figure)


def parallel_picture(plan: StudyPlan, trials: Sequence[Trial]) -> bytes:
    """A vertical axis for each dimension and each metric; a line for each finished trial, coloured by its rank."""
    import matplotlib

    dimensions, names = plan.space.dimensions, plan.sweep.metric.names
    finished = [trial for trial in trials if trial.state == "done" and math.isfinite(cost_of(trial, names[0]))]
    finished.sort(key=lambda trial: -cost_of(trial, names[0]))  # the best drawn last, on top
    count = len(dimensions) + len(names)
    figure, axes = _axes(max(WIDTH, 1.15 * count + 1), 4.2)
    for trial in trials:
        if trial.state == "stopped":
            axes.plot(range(len(dimensions)), _heights(plan, trial), color="0.8", lw=0.7, zorder=0)
    ends = {name: _ends(plan, finished, name) for name in names}
    for i, trial in enumerate(finished):
        good = i / (len(finished) - 1) if len(finished) > 1 else 1.0
        metrics = [_between(cost_of(trial, name), *ends[name]) for name in names]
        colour = matplotlib.colormaps["viridis_r"](PALEST + (1 - PALEST) * good)
        axes.plot(range(count), [*_heights(plan, trial), *metrics], color=colour, alpha=0.6 + 0.4 * good,
                  lw=2.2 if good == 1.0 else 1.0)  # fmt: skip
    for i, one in enumerate(dimensions):
        ticks = [*_ticks(one), *([(NONE_AT, "none")] if one.when else [])]
        _axis(axes, i, ticks)
    for i, name in enumerate(names, len(dimensions)):
        sign, (low, high) = -1 if name in MAXIMISED else 1, ends[name]
        beyond = " or worse" if any(cost_of(trial, name) > high for trial in finished) else ""
        _axis(axes, i, [(0.0, f"{sign * low:.4g}"), *([(1.0, f"{sign * high:.4g}{beyond}")] if high > low else [])])
    labels = [".\n".join(one.key.rsplit(".", 2)[-2:]) for one in dimensions]
    axes.set_xticks(range(count), [*labels, *names], fontsize=8)
    axes.set_yticks([])
    axes.set(xlim=(-0.1, count - 0.4), ylim=(NONE_AT - 0.05, 1.05))
    for side in axes.spines.values():
        side.set_visible(False)
    axes.grid(visible=False)
    return _png(figure)


def _axis(axes: Any, place: int, ticks: list[tuple[float, str]]) -> None:
    axes.axvline(place, color="0.3", lw=0.8)
    box = {"fc": "white", "ec": "none", "alpha": 0.9, "pad": 0.8}
    for height, text in ticks:
        axes.text(place + 0.04, height, text, fontsize=8, va="center", bbox=box, zorder=5)  # lines pass under it


def _heights(plan: StudyPlan, trial: Trial) -> list[float]:
    """Where a trial's values are on the axes; below them where it has none."""
    return [one.place(trial.values[one.key]) if one.key in trial.values else NONE_AT for one in plan.space.dimensions]


def _ends(plan: StudyPlan, trials: Sequence[Trial], name: str) -> tuple[float, float]:
    """Costs at the ends of a metric's axis, which one bad trial does not rule."""
    costs = [cost for trial in trials if math.isfinite(cost := cost_of(trial, name))] or [0.0]
    sign = -1 if name in MAXIMISED else 1
    low, high = sorted(sign * end for end in _frame(plan, [sign * cost for cost in costs], name))
    return max(low, min(costs)), min(high, max(costs))


def _between(value: float, low: float, high: float) -> float:
    return 0.0 if high == low else min(1.0, (value - low) / (high - low))


def front_picture(plan: StudyPlan, trials: Sequence[Trial], default: Trial | None) -> bytes:
    """The first metric against each of the others; trials that nothing beats in all of them in colour, numbered.

    With two metrics a staircase joins them: above and right of it everything is beaten. Crosses are beyond the axes.
    """
    from matplotlib.figure import Figure

    first, *others = plan.sweep.metric.names
    columns = min(3, len(others))
    rows = -(-len(others) // columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else 5.2, 2.7 * rows if columns > 1 else 3.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    done = [trial for trial in trials if trial.state == "done" and trial.metrics]
    front = {trial.number for trial in best_of(plan, list(trials))}
    frames = {name: _front_frame(plan, done, front, name) for name in (first, *others)}
    for axes, other in zip(grid, others, strict=False):
        points = [(t.metrics[other], t.metrics[first], t.number) for t in done if t.metrics]
        points = [point for point in points if math.isfinite(point[0]) and math.isfinite(point[1])]
        beaten = [(x, y) for x, y, number in points if number not in front]
        best = sorted(point for point in points if point[2] in front)
        at_edge = [(min(max(x, frames[other][0]), frames[other][1]), min(max(y, frames[first][0]), frames[first][1]))
                   for x, y in beaten]  # fmt: skip
        for mark, some in (("o", [p for p, edge in zip(beaten, at_edge, strict=True) if p == edge]),
                           ("x", [edge for p, edge in zip(beaten, at_edge, strict=True) if p != edge])):  # fmt: skip
            if some:
                label = "far beyond" if mark == "x" else None
                axes.scatter(*zip(*some, strict=True), s=16, color="0.65", marker=mark, label=label)
        if len(others) == 1 and not {first, other} & set(MAXIMISED):
            axes.step([x for x, _, _ in best], [y for _, y, _ in best], where="post", color="C0", lw=1.2)
        axes.scatter([x for x, _, _ in best], [y for _, y, _ in best], s=22, color="C0", zorder=3)
        for x, y, number in best[:12]:
            axes.annotate(str(number), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=8, color="C0")
        if default is not None and default.metrics:
            x, y = (min(max(default.metrics[name], frames[name][0]), frames[name][1]) for name in (other, first))
            axes.scatter([x], [y], s=70, fc="none", ec="0.2", lw=1, zorder=4)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
        axes.set_xlabel(other)
        axes.grid(alpha=0.3)
        axes.margins(0.1)
    for axes in grid[len(others) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel(first)
    return _png(figure)


def _front_frame(plan: StudyPlan, done: Sequence[Trial], front: set[int], name: str) -> tuple[float, float]:
    """Ends of a metric's axis: the whole front, and as much of the others as `_frame` takes."""
    values = {t.number: t.metrics[name] for t in done if t.metrics and math.isfinite(t.metrics[name])}
    return _frame(plan, list(values.values()), name, [value for number, value in values.items() if number in front])


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


def _ticks(one: Dimension) -> list[tuple[float, str]]:
    if one.kind == "choice":
        return [(one.place(value), str(value)) for value in one.choices]
    places = (one.at(place) for place in (0.0, 0.5, 1.0))
    return [(one.place(value), f"{value:.4g}" if isinstance(value, float) else str(value)) for value in places]


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
