"""What a study found, for people and machines: report.html with its pictures inside, report.json, best.yaml."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoreray.data.errors import ScorerayError
from scoreray.data.inspect import picture_grid
from scoreray.sampling.generate import Request, generate
from scoreray.sampling.load import load
from scoreray.trainer.config import Config, dump_config
from scoreray.trainer.step import to_uint8
from scoreray.tune.metric import levels_of
from scoreray.tune.search import optuna_study
from scoreray.tune.space import Dimension
from scoreray.tune.study import best_of
from scoreray.tune.sweep import MAXIMISED, Plan, draw_settings
from scoreray.tune.trial import Trial, study_store

PAGE, RECORD, BEST = "report.html", "report.json", "best.yaml"
SHOWN = 10  # trials in the page's table
SHEET = 64
POINTS = 1000
FEWEST = 8  # trials that tell anything of a dimension's importance


@dataclass(frozen=True)
class Report:
    """Where a study's report lies and what stands in it."""

    url: str
    record: dict[str, Any]
    best_url: str

    def answer(self) -> dict[str, Any]:
        return {"report": self.url, "best": self.record["best"], "best_config": self.best_url,
                "importance": self.record["importance"]}  # fmt: skip

    def text(self) -> str:
        best, default = self.record["best"], self.record["default"]
        if best is None:
            return "no trial reached its end"
        lines = [f"best: trial {best['number']}, " + _numbers(best["metrics"])]
        lines += [f"  {key}: {_short(value)}" for key, value in best["values"].items()]
        if default is not None and default["number"] != best["number"]:
            lines.append("default: " + _numbers(default["metrics"]))
        if len(self.record["metrics"]) > 1:
            lines.append(f"{len(self.record['front'])} trials are on the Pareto front")
        if self.record["importance"]:
            ranked = sorted(self.record["importance"].items(), key=lambda one: -one[1])
            lines.append("importance: " + ", ".join(f"{key} {value:.0%}" for key, value in ranked))
        return "\n".join([*lines, *self.record["next"]])


def make_report(plan: Plan, trials: Sequence[Trial]) -> Report:
    """Write the report of a study's trials into its place; returns it."""
    store, ranked = study_store(plan.sweep), best_of(plan, list(trials))
    best, default = (ranked[0] if ranked else None), _default(plan, trials)
    following = []
    if best is not None and not plan.sweep.checkpoint:
        store.put(BEST, _best_yaml(plan, best).encode())
        following.append(f"next: scoreray train {store.url(BEST)}")
    if best is not None and any(key.startswith("sample.") for key in best.values):
        following.append("draw: " + _sample_command(plan, best))
    record = {
        "study": plan.sweep.dump(),
        "metrics": list(plan.sweep.metric.names),
        "sigmas": levels_of(plan.sweep.metric),
        "best": _told(best),
        "default": _told(default),
        "front": [trial.number for trial in ranked] if len(plan.sweep.metric.names) > 1 else [],
        "importance": importance(plan, trials),
        "states": {state: sum(trial.state == state for trial in trials) for state in ("done", "stopped", "failed")},
        "images": sum(trial.images for trial in {trial.run or trial.number: trial for trial in trials}.values()),
        "trials": [_told(trial) for trial in trials],
        "next": following,
    }
    store.put(RECORD, json.dumps(_finite(record), indent=1).encode())
    store.put(PAGE, page(plan, trials, best, default, record).encode())
    return Report(store.url(PAGE), record, store.url(BEST))


def importance(plan: Plan, trials: Sequence[Trial]) -> dict[str, float]:
    """Share of each dimension in what makes a trial good, by PED-ANOVA (Watanabe 2023), of the first metric.

    A conditional dimension's is among the trials that have it, times their share. Empty where trials are too few.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    finished = [
        trial for trial in trials if trial.state == "done" and trial.metrics and math.isfinite(_cost(plan, trial))
    ]
    found: dict[str, float] = {}
    for one in plan.space.dimensions:
        having = [trial for trial in finished if one.key in trial.values]
        if len(having) < FEWEST or len({str(trial.values[one.key]) for trial in having}) < 2:
            continue
        common = [key for key in having[0].values if all(key in trial.values for trial in having)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna_study(plan, having)
            evaluator = PedAnovaImportanceEvaluator()
            several = len(plan.sweep.metric.names) > 1
            target = (lambda trial: trial.values[0]) if several else None
            values = get_param_importances(study, evaluator=evaluator, params=common, target=target, normalize=False)
        found[one.key] = float(values[one.key]) * len(having) / len(finished)
    total = sum(found.values())
    return {key: value / total for key, value in found.items()} if total > 0 else {}


def page(plan: Plan, trials: Sequence[Trial], best: Trial | None, default: Trial | None, record: dict[str, Any]) -> str:
    """The page; nothing in it comes from elsewhere."""
    shown = [trial for trial in (best, default) if trial is not None]
    shown = shown[:1] if len(shown) == 2 and shown[0].number == shown[1].number else shown
    name = html.escape(plan.sweep.study.name)
    several = len(plan.sweep.metric.names) > 1
    figures = [
        _figure("Trials in the order of their numbers, and the best so far.", history_picture(plan, trials)),
        _figure(f"Share of each dimension in what makes a trial good, by {html.escape(plan.sweep.metric.names[0])}.",
                importance_picture(record["importance"])) if record["importance"] else "",
        _figure("Each line is a finished trial, dark where it is good; grey ones were stopped.",
                parallel_picture(plan, trials))
        if best is not None else "",
        _figure("The Pareto front.", front_picture(plan, trials)) if several and best is not None else "",
        _figure("Weighted denoising error by noise level, 95% bands; below, relative to the default.",
                curves_picture(plan, best, default)) if best is not None else "",
        *(_sheet(plan, trial, "best" if trial is best else "default") for trial in shown),
    ]  # fmt: skip
    states = ", ".join(f"{count} {state}" for state, count in record["states"].items() if count)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>scoreray study: {name}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }}
img {{ max-width: 100% }} th {{ text-align: left }} th, td {{ padding: .2rem 1.2rem .2rem 0; vertical-align: top }}
td.n {{ font-variant-numeric: tabular-nums; text-align: right }} figure {{ margin: 1.5rem 0 }}
figcaption {{ color: #555 }} pre {{ font-size: 13px; overflow-x: auto }} .wide {{ overflow-x: auto }}
</style>
<h1>{name}</h1>
<p>{len(trials)} trials: {states}; {record["images"]:,} images trained on. Compared by
{html.escape(", ".join(plan.sweep.metric.names))} on {html.escape(plan.sweep.metric.reference)}.</p>
{_table(plan, trials, best, default)}
{"".join(figures)}
<p>{"<br>".join(html.escape(line) for line in record["next"])}</p>
</html>
"""


def history_picture(plan: Plan, trials: Sequence[Trial]) -> bytes:
    """The first metric of each trial, and the best so far."""
    figure, axes = _axes(9, 3.2)
    colours = {"done": "C0", "stopped": "0.65", "failed": "C3", "running": "C1"}
    for state, colour in colours.items():
        some = [t for t in trials if t.state == state and t.metrics and math.isfinite(_first(plan, t))]
        if some:
            axes.scatter([t.number for t in some], [_first(plan, t) for t in some], s=18, color=colour, label=state)
    best, line = math.inf, []
    for trial in trials:
        if trial.state == "done" and _cost(plan, trial) < best:
            best = _cost(plan, trial)
            line.append((trial.number, _first(plan, trial)))
    if line:
        line.append((len(trials) - 1, line[-1][1]))
        axes.step(*zip(*line, strict=True), where="post", color="0.2", lw=1.2, label="best so far")
    axes.set(xlabel="trial", ylabel=plan.sweep.metric.names[0])
    values = [_first(plan, t) for t in trials if t.metrics]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def importance_picture(shares: dict[str, float]) -> bytes:
    """Bars, the greatest on top."""
    figure, axes = _axes(9, 0.7 + 0.35 * len(shares))
    ranked = sorted(shares.items(), key=lambda one: one[1])
    axes.barh([key for key, _ in ranked], [value for _, value in ranked], color="C0")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    return _png(figure)


def parallel_picture(plan: Plan, trials: Sequence[Trial]) -> bytes:
    """A vertical axis for each dimension and the metric; a line for each finished trial."""
    import matplotlib

    finished = [trial for trial in trials if trial.state == "done" and trial.metrics]
    finished = sorted(finished, key=lambda trial: -_cost(plan, trial))  # the best drawn last, on top
    dimensions = plan.space.dimensions
    figure, axes = _axes(max(7.0, 1.6 * (len(dimensions) + 1)), 4.2)
    costs = sorted(_cost(plan, trial) for trial in finished if math.isfinite(_cost(plan, trial)))
    for trial in trials:
        if trial.state == "stopped":
            axes.plot(range(len(dimensions)), _heights(plan, trial), color="0.8", lw=0.7, zorder=0)
    for i, trial in enumerate(finished):
        good = i / (len(finished) - 1) if len(finished) > 1 else 1.0
        low, high = costs[0], costs[-1]
        worth = 0.0 if high == low else min(1.0, (_cost(plan, trial) - low) / (high - low))
        colour = matplotlib.colormaps["viridis_r"](good)
        width = 1 + 1.2 * (good == 1.0)
        axes.plot(range(len(dimensions) + 1), [*_heights(plan, trial), worth], color=colour,
                  alpha=0.35 + 0.6 * good, lw=width)  # fmt: skip
    for i, one in enumerate(dimensions):
        axes.axvline(i, color="0.3", lw=0.8)
        for place, text in _ticks(one):
            axes.text(
                i + 0.03,
                place,
                text,
                fontsize=8,
                va="center",
                bbox={"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.4},
            )
    axes.axvline(len(dimensions), color="0.3", lw=0.8)
    sign = -1 if plan.sweep.metric.names[0] in MAXIMISED else 1
    for place, cost in ((0.0, costs[0]), (1.0, costs[-1]))[: len(set(costs))]:
        axes.text(len(dimensions) + 0.03, place, f"{sign * cost:.4g}", fontsize=8, va="center")
    labels = [".\n".join(one.key.rsplit(".", 1)) for one in dimensions] + [plan.sweep.metric.names[0]]
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(dimensions) + 0.5)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.grid(visible=False)
    return _png(figure)


def _heights(plan: Plan, trial: Trial) -> list[float]:
    """Where a trial's values lie on the axes; below them where it has none."""
    return [one.place(trial.values[one.key]) if one.key in trial.values else -0.12 for one in plan.space.dimensions]


def front_picture(plan: Plan, trials: Sequence[Trial]) -> bytes:
    """The first two metrics of all trials; those that nothing beats are joined."""
    figure, axes = _axes(6.5, 4.2)
    first, second = plan.sweep.metric.names[:2]
    done = [trial.metrics for trial in trials if trial.state == "done" and trial.metrics]
    axes.scatter([m[second] for m in done], [m[first] for m in done], s=18, color="0.65")
    front = sorted((t.metrics for t in best_of(plan, list(trials)) if t.metrics), key=lambda m: m[second])
    axes.plot([m[second] for m in front], [m[first] for m in front], "o-", color="C0", ms=5, lw=1.2)
    axes.set(xlabel=second, ylabel=first)
    return _png(figure)


def curves_picture(plan: Plan, best: Trial, default: Trial | None) -> bytes:
    """Per-sigma error of the best and the default, and their ratio."""
    from matplotlib.figure import Figure

    sigmas = levels_of(plan.sweep.metric)
    shown = [("best", best, "C0")]
    if default is not None and default.number != best.number and len(default.reports[-1]["curve"]) == len(sigmas):
        shown.append(("default", default, "0.45"))
    figure = Figure(figsize=(9, 5.2 if len(shown) > 1 else 3.2), layout="constrained")
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


def _sheet(plan: Plan, trial: Trial, name: str) -> str:
    """Samples of a trial, or why there are none."""
    try:
        data = _png_of(_samples(plan, trial))
    except ScorerayError as error:
        return f"<p>No samples of the {name}: {html.escape(str(error))}</p>"
    return _figure(f"Samples of the {name} (trial {trial.number}), the same seeds.", data) if data else ""


def _samples(plan: Plan, trial: Trial) -> Tensor:
    report, drawn = trial.reports[-1], draw_settings(plan.sweep, trial.values)
    model = load(report["checkpoint"], report["ema"], "cpu")
    count = SHEET if len(model.info.image_shape) == 3 else POINTS
    request = Request(count=count, sampler=drawn["sampler"], steps=drawn["steps"], grid=drawn["grid"],
                      guidance=float(drawn["guidance"]), options=drawn["options"],
                      batch_size=min(count, 256))  # fmt: skip
    return torch.cat([x for x, _ in generate(model, request)])


def _png_of(samples: Tensor) -> bytes | None:
    if samples.ndim == 4 and samples.shape[1] in (1, 3):
        buffer = io.BytesIO()
        picture_grid(to_uint8(samples)).save(buffer, "PNG")
        return buffer.getvalue()
    if samples.ndim == 2 and samples.shape[1] >= 2:
        figure, axes = _axes(4, 4)
        axes.scatter(samples[:, 0], samples[:, 1], s=2, color="C0")
        axes.set_aspect("equal")
        return _png(figure)
    return None


def _table(plan: Plan, trials: Sequence[Trial], best: Trial | None, default: Trial | None) -> str:
    keys = [one.key for one in plan.space.dimensions]
    ranked = best_of(plan, list(trials))[:SHOWN]
    ranked += [default] if default is not None and default not in ranked else []
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ("trial", *plan.sweep.metric.names, "images", *keys))
    rows = []
    for trial in ranked:
        metrics = trial.metrics or {}
        cells = [f"{trial.number}" + (" (default)" if trial is default else "")]
        cells += [f"{metrics[name]:.5g}" if name in metrics else "-" for name in plan.sweep.metric.names]
        cells += [f"{trial.images:,}", *(_short(trial.values.get(key, "-")) for key in keys)]
        rows.append("<tr>" + "".join(f'<td class="n">{html.escape(cell)}</td>' for cell in cells) + "</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _best_yaml(plan: Plan, best: Trial) -> str:
    """A config that `scoreray train` takes as it is: the best trial's, as a run of its own beside the study's."""
    config = plan.config(best.values)
    run = config.run.model_copy(update={"name": f"{plan.sweep.study.name}-best", "storage": plan.sweep.study.storage})
    made: Config = config.model_copy(update={"run": run})
    names = ", ".join(f"{name} {value:.5g}" for name, value in (best.metrics or {}).items())
    head = f"# Trial {best.number} of study {plan.sweep.study.name}: {names} after {best.images:,} images.\n"
    if best.lineage and any(one["source"] is not None for one in best.lineage):
        head += "# Population-based training changed its values as it went; these are the last.\n"
    return head + dump_config(made)


def _sample_command(plan: Plan, best: Trial) -> str:
    drawn, report = draw_settings(plan.sweep, best.values), best.reports[-1]
    words = [f"scoreray sample {report['checkpoint']} --count 64 --out samples --ema {report['ema']}"]
    words += [f"--{key} {drawn[key]}" for key in ("sampler", "steps", "grid") if drawn[key] is not None]
    words += [f"--guidance {drawn['guidance']}"] if drawn["guidance"] != 1.0 else []
    words += [f"--option {key}={value}" for key, value in drawn["options"].items()]
    return " ".join(words)


def _default(plan: Plan, trials: Sequence[Trial]) -> Trial | None:
    values = plan.default()
    if values is None:
        return None
    return next((trial for trial in trials if trial.values == values and trial.reports and not trial.lineage), None)


def _told(trial: Trial | None) -> dict[str, Any] | None:
    if trial is None:
        return None
    last = trial.reports[-1] if trial.reports else {}
    return {
        "number": trial.number, "state": trial.state, "values": trial.values, "images": trial.images,
        "metrics": trial.metrics, "run": trial.run, "checkpoint": last.get("checkpoint"), "ema": last.get("ema"),
        "curve": last.get("curve"), "std_errors": last.get("std_errors"), "error": trial.error,
        "reports": [{"images": r["images"], "metrics": r["metrics"], "seconds": r["seconds"]} for r in trial.reports],
        "lineage": trial.lineage,
    }  # fmt: skip


def _first(plan: Plan, trial: Trial) -> float:
    assert trial.metrics is not None
    return trial.metrics[plan.sweep.metric.names[0]]


def _cost(plan: Plan, trial: Trial) -> float:
    if not trial.metrics:
        return math.inf
    value = _first(plan, trial)
    return -value if plan.sweep.metric.names[0] in MAXIMISED else value


def _ticks(one: Dimension) -> list[tuple[float, str]]:
    if one.kind == "choice":
        return [(one.place(value), str(value)) for value in one.choices]
    return [(place, _short(one.at(place))) for place in (0.0, 0.5, 1.0)]


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _figure(caption: str, data: bytes) -> str:
    source = base64.b64encode(data).decode()
    return f'<figure><img src="data:image/png;base64,{source}" alt=""><figcaption>{caption}</figcaption></figure>'


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
