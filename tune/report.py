"""What a study found, for people and machines: report.html with its pictures inside, report.json, best.yaml."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoreray.data.errors import ScorerayError
from scoreray.data.own_code import with_words
from scoreray.data.pages import render
from scoreray.sampling.metrics.record import finite
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.generate import Request, generate
from scoreray.sampling.samplers.options import option_words
from scoreray.sampling.samplers.sigmas import grid_text
from scoreray.trainer.config import Config, dump_config
from scoreray.tune.metric import levels_of
from scoreray.tune.pictures import (
    DPI,
    compared,
    curves_picture,
    front_pictures,
    history_picture,
    importance,
    importance_picture,
    parallel_picture,
    progress_picture,
    sheet_picture,
    without_far,
)
from scoreray.tune.schedule import best_of
from scoreray.tune.space import short_names
from scoreray.tune.sweep import StudyPlan, draw_settings
from scoreray.tune.trial import Trial, study_store

PAGE, RECORD, BEST = "report.html", "report.json", "best.yaml"
SHOWN = 10  # trials in the page's table
SHEET = 64
POINTS = 1000


@dataclass(frozen=True)
class Report:
    """Where a study's report is stored and what it holds."""

    url: str
    record: dict[str, Any]
    best_url: str | None  # None where nothing was trained, or no trial reached its end

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
            shares = ", ".join(f"{key} {value:.0%}" for key, value in ranked)
            lines.append(f"importance: {shares} ({self.record['importance_note']})")
        else:
            lines.append(f"importance: {self.record['importance_note']}")
        return "\n".join([*lines, *self.record["next"]])


def make_report(plan: StudyPlan, trials: Sequence[Trial]) -> Report:
    """Write the report of a study's trials into its place; returns it."""
    store, ranked = study_store(plan.sweep), best_of(plan, list(trials))
    best, default = (ranked[0] if ranked else None), _default(plan, trials)
    following, best_url = [], None
    if best is not None and not plan.sweep.checkpoint:
        store.put(BEST, _best_yaml(plan, best).encode())
        best_url = store.url(BEST)
        following.append(f"next: {shlex.join(['scoreray', 'train', best_url, *with_words()])}")
    if best is not None and any(key.startswith("sample.") for key in best.values):
        following.append("draw: " + _sample_command(plan, best))
    shares, note = importance(plan, trials)
    record = {
        "study": plan.sweep.dump(),
        "metrics": list(plan.sweep.metric.names),
        "sigmas": levels_of(plan.sweep.metric),
        "best": _summary(best),
        "default": _summary(default),
        "front": [trial.number for trial in ranked] if len(plan.sweep.metric.names) > 1 else [],
        "importance": shares,
        "importance_note": note,
        "states": {state: sum(trial.state == state for trial in trials) for state in ("done", "stopped", "failed")},
        "images": 0 if plan.sweep.checkpoint else _trained(trials),
        "trials": [_summary(trial) for trial in trials],
        "next": following,
    }
    store.put(RECORD, json.dumps(finite(record), indent=1).encode())
    store.put(PAGE, page(plan, trials, best, default, record).encode())
    return Report(store.url(PAGE), record, best_url)


@dataclass(frozen=True)
class Chart:
    """A picture and its caption; no picture where the caption says why there is none.

    least_rem: its width on a phone, where it is moved sideways: 4.4 rem for each inch that it was drawn with keep its
    letters readable.
    """

    caption: str
    png: bytes | None = None
    least_rem: float = 0.0

    @staticmethod
    def of(caption: str, png: bytes) -> Chart:
        width = int.from_bytes(png[16:20], "big")  # of the PNG's header
        return Chart(caption, png, 4.4 * width / DPI)


@dataclass(frozen=True)
class ReportRow:
    """A trial's cells; `error`: why it failed."""

    cells: list[str]
    error: str


@dataclass(frozen=True)
class ReportTable:
    """A row for each trial. head: (short name, full key) of each column."""

    head: list[tuple[str, str]]
    rows: list[ReportRow]


def page(
    plan: StudyPlan, trials: Sequence[Trial], best: Trial | None, default: Trial | None, record: dict[str, Any]
) -> str:
    """The page; it loads nothing from other hosts."""
    states = ", ".join(f"{count} {state}" for state, count in record["states"].items() if count)
    trained = "nothing was trained" if plan.sweep.checkpoint else f"{record['images']:,} images trained on"
    shown = best_of(plan, list(trials))[:SHOWN] if best is not None else []
    shown += [default] if shown and default is not None and default not in shown else []
    return render(
        "scoreray.tune/report.html",
        name=plan.sweep.study.name,
        summary=f"{len(trials)} trials: {states}; {trained}. Compared by {', '.join(plan.sweep.metric.names)} on "
        f"{plan.sweep.metric.reference}.",
        best_table=_table(plan, shown, default) if shown else None,
        next=record["next"],
        charts=_charts(plan, trials, best, default, record),
        sheets=[] if best is None else _sheets(plan, best, default),
        table=_table(plan, trials, default),
    )


def _charts(
    plan: StudyPlan, trials: Sequence[Trial], best: Trial | None, default: Trial | None, record: dict[str, Any]
) -> list[Chart]:
    """Pictures in the order of the page; none but the curves where no trial is finished."""
    names, found = plan.sweep.metric.names, list[Chart]()
    shown = without_far(plan, trials)
    far = sum(one.state != trial.state for one, trial in zip(shown, trials, strict=True))
    without = f" Without {far} far beyond all others." if far else ""
    if best is not None and len(names) > 1:
        ringed = next((one for one in shown if default and one.number == default.number and one.state == "done"), None)
        ring = " Ring: the default." if ringed is not None else ""
        caption = f"The Pareto front, in red: trials that none beats in every metric.{ring}{without}"
        found += [Chart.of(caption, png) for png in front_pictures(plan, shown, ringed)]
    if best is not None:
        caption = f"Finished trials in the order of their numbers, and the best so far.{without}"
        found.append(Chart.of(caption, history_picture(plan, shown)))
    if best is not None and any(len(trial.reports) > 1 for trial in trials):
        caption = "Every trial as it trained; grey ones were stopped, the best is orange."
        found.append(Chart.of(caption, progress_picture(plan, trials, best)))
    note = record["importance_note"]
    if record["importance"]:
        caption = f"Share of each dimension in what makes a trial good, by {names[0]}: {note}."
        found.append(Chart.of(caption, importance_picture(plan, trials, list(record["importance"]))))
    elif best is not None:
        found.append(Chart(f"Importance of each dimension: {note}."))
    if best is not None:
        order = names[0] if len(names) == 1 else "Pareto rank"
        caption = f"Each line is a finished trial, darker the better its {order}.{without}"
        found.append(Chart.of(caption, parallel_picture(plan, shown)))
        below = "; below, relative to the default" if compared(plan, best, default) else ""
        caption = f"Weighted denoising error by noise level, 95% bands{below}."
        found.append(Chart.of(caption, curves_picture(plan, best, default)))
    return found


def _sheets(plan: StudyPlan, best: Trial, default: Trial | None) -> list[Chart]:
    """Samples of the best and of the default, or why there are none."""
    shown = [("best", best)]
    if default is not None and default.number != best.number:
        shown.append(("default", default))
    found, frame = list[Chart](), None
    for name, trial in shown:
        try:
            samples = _samples(plan, trial)
        except ScorerayError as error:
            found.append(Chart(f"No samples of the {name}: {error}"))
            continue
        frame = samples if frame is None else frame
        data = sheet_picture(samples, frame)
        if data is not None:
            found.append(Chart(f"Samples of the {name} (trial {trial.number}), the same seeds.", data))
    return found


def _samples(plan: StudyPlan, trial: Trial) -> Tensor:
    report, drawn = trial.reports[-1], draw_settings(plan.sweep, trial.values)
    model = load(report["checkpoint"], report["ema"], "cpu")
    count = SHEET if len(model.info.sample_shape) == 3 else POINTS
    request = Request(count=count, sampler=drawn["sampler"], steps=drawn["steps"], grid=drawn["grid"],
                      guidance=float(drawn["guidance"]), options=drawn["options"],
                      batch_size=min(count, 256))  # fmt: skip
    return model.info.latents_decoded(torch.cat([x for x, _ in generate(model, request)]))


def _table(plan: StudyPlan, trials: Sequence[Trial], default: Trial | None) -> ReportTable:
    """A dimension's full key shows when its short name is pointed at."""
    keys, names = [one.key for one in plan.space.dimensions], plan.sweep.metric.names
    plain = all(trial.state == "done" for trial in trials)
    short = short_names(keys)
    head = [(text, "") for text in ("trial", *([] if plain else ["state"]), *names, "images")]
    head += [(short[key], key) for key in keys]
    head += [("", "")] if any(trial.error for trial in trials) else []
    rows = []
    for trial in trials:
        metrics = trial.metrics or {}
        cells = [f"{trial.number}" + (" (default)" if trial is default else "")]
        cells += [] if plain else [trial.state]
        cells += [f"{metrics[name]:.5g}" if name in metrics else "" for name in names]
        cells += [f"{trial.images:,}", *(_short(trial.values.get(key, "")) for key in keys)]
        rows.append(ReportRow(cells, trial.error))
    return ReportTable(head, rows)


def _best_yaml(plan: StudyPlan, best: Trial) -> str:
    """A config that `scoreray train` takes as it is: the best trial's, as a run of its own beside the study's."""
    config = plan.config(best.values)
    run = config.run.model_copy(update={"name": f"{plan.sweep.study.name}-best", "storage": plan.sweep.study.storage})
    made: Config = config.model_copy(update={"run": run})
    names = ", ".join(f"{name} {value:.5g}" for name, value in (best.metrics or {}).items())
    head = f"# Trial {best.number} of study {plan.sweep.study.name}: {names} after {best.images:,} images.\n"
    if best.lineage and any(one["source"] is not None for one in best.lineage):
        head += "# Population-based training changed its values as it went; these are the last.\n"
    return head + dump_config(made)


def _sample_command(plan: StudyPlan, best: Trial) -> str:
    """The command line that draws as the best trial was drawn from, for a shell."""
    drawn, report = draw_settings(plan.sweep, best.values), best.reports[-1]
    words = ["scoreray", "sample", report["checkpoint"], "--count", "64", "--out", "samples", "--ema", report["ema"]]
    for key in ("sampler", "steps"):
        words += [f"--{key}", str(drawn[key])] if drawn[key] is not None else []
    words += ["--grid", grid_text(drawn["grid"])] if drawn["grid"] is not None else []
    words += ["--guidance", str(drawn["guidance"])] if drawn["guidance"] != 1.0 else []
    return shlex.join([*words, *option_words(drawn["options"]), *with_words()])


def _trained(trials: Sequence[Trial]) -> int:
    """Images that all runs have seen; trials that share a run share those."""
    seen: dict[str, int] = {}
    for trial in trials:
        seen[trial.run] = max(seen.get(trial.run, 0), trial.images)
    return sum(seen.values())


def _default(plan: StudyPlan, trials: Sequence[Trial]) -> Trial | None:
    values = plan.default()
    if values is None:
        return None
    return next((trial for trial in trials if trial.values == values and trial.reports and not trial.lineage), None)


def _summary(trial: Trial | None) -> dict[str, Any] | None:
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


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())
