"""What a study found, for people and machines: report.html with its pictures inside, report.json, best.yaml."""

from __future__ import annotations

import base64
import html
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoreray.data.errors import ScorerayError
from scoreray.sampling.evaluation.record import finite
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.generate import Request, generate
from scoreray.sampling.samplers.options import option_words
from scoreray.trainer.config import Config, dump_config
from scoreray.tune.metric import levels_of
from scoreray.tune.pictures import (
    DPI,
    compared,
    curves_picture,
    front_picture,
    history_picture,
    importance_picture,
    parallel_picture,
    progress_picture,
    sheet_picture,
)
from scoreray.tune.schedule import best_of
from scoreray.tune.search import importance
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
        following.append(f"next: scoreray train {best_url}")
    if best is not None and any(key.startswith("sample.") for key in best.values):
        following.append("draw: " + _sample_command(plan, best))
    shares, note = importance(plan, trials)
    record = {
        "study": plan.sweep.dump(),
        "metrics": list(plan.sweep.metric.names),
        "sigmas": levels_of(plan.sweep.metric),
        "best": _told(best),
        "default": _told(default),
        "front": [trial.number for trial in ranked] if len(plan.sweep.metric.names) > 1 else [],
        "importance": shares,
        "importance_note": note,
        "states": {state: sum(trial.state == state for trial in trials) for state in ("done", "stopped", "failed")},
        "images": 0 if plan.sweep.checkpoint else _trained(trials),
        "trials": [_told(trial) for trial in trials],
        "next": following,
    }
    store.put(RECORD, json.dumps(finite(record), indent=1).encode())
    store.put(PAGE, page(plan, trials, best, default, record).encode())
    return Report(store.url(PAGE), record, best_url)


def page(
    plan: StudyPlan, trials: Sequence[Trial], best: Trial | None, default: Trial | None, record: dict[str, Any]
) -> str:
    """The page; it loads nothing from other hosts."""
    names = plan.sweep.metric.names
    name, first, several = html.escape(plan.sweep.study.name), html.escape(names[0]), len(names) > 1
    parts = []
    if best is not None:
        best_ones = best_of(plan, list(trials))[:SHOWN]
        best_ones += [default] if default is not None and default not in best_ones else []
        parts.append(_table(plan, best_ones, default))
    if record["next"]:
        parts.append("<pre>" + "\n".join(html.escape(line) for line in record["next"]) + "</pre>")
    if best is not None and several:
        ring = " Ring: the default." if default is not None and default.metrics else ""
        parts.append(_chart(f"The Pareto front: trials, by number, that none beats in every metric.{ring}",
                            front_picture(plan, trials, default)))  # fmt: skip
    parts.append(_chart("Trials in the order of their numbers, and the best so far.", history_picture(plan, trials)))
    if best is not None and any(len(trial.reports) > 1 for trial in trials):
        parts.append(_chart("Every trial as it trained; grey ones were stopped, the best is orange.",
                            progress_picture(plan, trials, best)))  # fmt: skip
    if record["importance"]:
        note = html.escape(record["importance_note"])
        parts.append(_chart(f"Share of each dimension in what makes a trial good, by {first}: {note}.",
                            importance_picture(record["importance"])))  # fmt: skip
    elif best is not None:
        parts.append(f"<p>Importance of each dimension: {html.escape(record['importance_note'])}.</p>")
    if best is not None:
        parts.append(_chart(f"Each line is a finished trial, darker the better its {first}; grey ones were stopped.",
                            parallel_picture(plan, trials)))  # fmt: skip
        below = "; below, relative to the default" if compared(plan, best, default) else ""
        parts.append(_chart(f"Weighted denoising error by noise level, 95% bands{below}.",
                            curves_picture(plan, best, default)))  # fmt: skip
        parts.append(_sheets(plan, best, default))
    parts.append(f"<details><summary>All {len(trials)} trials</summary>{_table(plan, trials, default)}</details>")
    states = ", ".join(f"{count} {state}" for state, count in record["states"].items() if count)
    trained = "nothing was trained" if plan.sweep.checkpoint else f"{record['images']:,} images trained on"
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>scoreray study: {name}</title>
<style>{STYLE}</style>
<h1>{name}</h1>
<p>{len(trials)} trials: {states}; {trained}. Compared by
{html.escape(", ".join(names))} on {html.escape(plan.sweep.metric.reference)}.</p>
{"".join(parts)}
</html>
"""


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
figure { margin: 1.5rem 0; overflow-x: auto } figure img { width: 100% }
.sheets { display: flex; flex-wrap: wrap; gap: 1rem } .sheets figure { flex: 1 1 16rem; margin: 0 }
.sheets img { image-rendering: pixelated } figcaption { color: #555; font-size: 14px; position: sticky; left: 0 }
.wide { overflow-x: auto; width: max-content; max-width: 100% }
@media (min-width: 48rem) { .wide { max-width: calc(50vw + 21rem) } }
table { border-collapse: collapse; font-size: 14px; white-space: nowrap }
th, td { padding: .2rem .7rem; text-align: right; font-variant-numeric: tabular-nums; border-bottom: 1px solid #eee }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; text-align: left; padding-left: 0 }
td.error { text-align: left; white-space: normal; min-width: 16rem }
pre { font-size: 13px; background: #f5f5f5; padding: .6rem .8rem; overflow-x: auto } details { margin: 1.5rem 0 }
"""


def _sheets(plan: StudyPlan, best: Trial, default: Trial | None) -> str:
    """Samples of the best and of the default, or why there are none."""
    shown = [("best", best)]
    if default is not None and default.number != best.number:
        shown.append(("default", default))
    parts, frame = [], None
    for name, trial in shown:
        try:
            samples = _samples(plan, trial)
        except ScorerayError as error:
            parts.append(f"<p>No samples of the {name}: {html.escape(str(error))}</p>")
            continue
        frame = samples if frame is None else frame
        data = sheet_picture(samples, frame)
        if data is not None:
            parts.append(_figure(f"Samples of the {name} (trial {trial.number}), the same seeds.", data))
    return f'<div class="sheets">{"".join(parts)}</div>' if parts else ""


def _samples(plan: StudyPlan, trial: Trial) -> Tensor:
    report, drawn = trial.reports[-1], draw_settings(plan.sweep, trial.values)
    model = load(report["checkpoint"], report["ema"], "cpu")
    count = SHEET if len(model.info.image_shape) == 3 else POINTS
    request = Request(count=count, sampler=drawn["sampler"], steps=drawn["steps"], grid=drawn["grid"],
                      guidance=float(drawn["guidance"]), options=drawn["options"],
                      batch_size=min(count, 256))  # fmt: skip
    return torch.cat([x for x, _ in generate(model, request)])


def _table(plan: StudyPlan, trials: Sequence[Trial], default: Trial | None) -> str:
    """A row for each trial; a dimension's full key shows when its short name is pointed at."""
    keys, names = [one.key for one in plan.space.dimensions], plan.sweep.metric.names
    plain = all(trial.state == "done" for trial in trials)
    short = short_names(keys)
    head = [(text, "") for text in ("trial", *([] if plain else ["state"]), *names, "images")]
    head += [(short[key], key) for key in keys]
    head += [("", "")] if any(trial.error for trial in trials) else []
    top = "".join(f'<th title="{html.escape(full)}">{html.escape(text)}</th>' for text, full in head)
    rows = []
    for trial in trials:
        metrics = trial.metrics or {}
        cells = [f"{trial.number}" + (" (default)" if trial is default else "")]
        cells += [] if plain else [trial.state]
        cells += [f"{metrics[name]:.5g}" if name in metrics else "" for name in names]
        cells += [f"{trial.images:,}", *(_short(trial.values.get(key, "")) for key in keys)]
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr>{row}{f"""<td class="error">{html.escape(trial.error)}</td>""" if trial.error else ""}</tr>')
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(rows)}</table></div>'


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
    for key in ("sampler", "steps", "grid"):
        words += [f"--{key}", str(drawn[key])] if drawn[key] is not None else []
    words += ["--guidance", str(drawn["guidance"])] if drawn["guidance"] != 1.0 else []
    return shlex.join([*words, *option_words(drawn["options"])])


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


def _figure(caption: str, data: bytes, least_rem: float = 0.0) -> str:
    """A picture that is as wide as the page; on a phone at least `least_rem` wide, and moved sideways."""
    source = base64.b64encode(data).decode()
    style = f' style="min-width: {least_rem:.0f}rem"' if least_rem else ""
    return (
        f'<figure><img src="data:image/png;base64,{source}" alt=""{style}><figcaption>{caption}</figcaption></figure>'
    )


def _chart(caption: str, data: bytes) -> str:
    """A picture whose letters are to stay readable: 4.4 rem for each inch that it was drawn with."""
    return _figure(caption, data, 4.4 * int.from_bytes(data[16:20], "big") / DPI)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _numbers(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.5g}" for name, value in metrics.items())
