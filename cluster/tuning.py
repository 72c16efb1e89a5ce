"""`scoreray tune`: a study from its checked sweep to its report, with a table of the trials while it runs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scoreray.cluster.display import QUIET_LINE_EVERY_S, console, say
from scoreray.cluster.local_ray import connected
from scoreray.tune.load import check_room, check_sweep
from scoreray.tune.report import Report, make_report
from scoreray.tune.schedule import best_of
from scoreray.tune.space import short_names
from scoreray.tune.study import State, Study
from scoreray.tune.sweep import Plan
from scoreray.tune.trial import Trial, study_store

ROWS = 12  # of the table: those under way, then the best


@dataclass(frozen=True)
class TuneResult:
    """What a finished study left."""

    study: str
    report: Report
    trials: int
    seconds: float

    def answer(self) -> dict[str, Any]:
        return {"study": self.study, "seconds": self.seconds, "trials": self.trials, **self.report.answer()}

    def text(self) -> str:
        return f"{self.report.text()}\n{self.trials} trials in {self.seconds:,.0f} s\nreport {self.report.url}"


def check_tune(plan: Plan) -> None:
    """Everything that can be known before the first trial; warnings are said. Raises ScorerayErrors."""
    _warn(plan)
    if "RAY_ADDRESS" in os.environ:
        with connected():
            check_room(plan, _room())
    else:
        check_room(plan, {"CPU": float(os.cpu_count() or 1), "GPU": _gpus()})


def tune_to_end(plan: Plan, *, verbose: bool = False) -> TuneResult:
    """Run a study on RAY_ADDRESS's cluster or on this machine until its last trial, and write its report."""
    started, store = time.monotonic(), study_store(plan.sweep)
    _warn(plan)
    with connected(verbose=verbose):
        room = _room()
        check_room(plan, room)
        with TrialTable(plan) as table:
            study = Study(plan, room, table.note, table)
            if study.trials:
                done = sum(trial.state != "running" for trial in study.trials)
                table.note(f"study '{plan.sweep.study.name}' goes on: {done} trials have ended, "
                           f"{len(study.trials) - done} were under way")  # fmt: skip
            trials = study.run()
    report = make_report(plan, trials)
    return TuneResult(store.url(), report, len(trials), time.monotonic() - started)


def _warn(plan: Plan) -> None:
    for line in check_sweep(plan):
        say(f"warning: {line}")


def _room() -> Mapping[str, float]:
    import ray

    return ray.cluster_resources()


def _gpus() -> float:
    import torch

    return float(torch.cuda.device_count())


class TrialTable:
    """The trials of a study: a table on a terminal, a line for each report in a log."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._told = plan, 0
        self._live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        self._line_at, self._reported = time.monotonic(), -1

    def __enter__(self) -> TrialTable:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def note(self, line: str) -> None:
        say(line)

    def __call__(self, state: State) -> None:
        if self._live:
            self._live.update(Group(table_of(self._plan, state), Text(summary_of(state))))
            return
        reported = sum(len(trial.reports) for trial in state.trials)
        if reported != self._reported and time.monotonic() - self._line_at > QUIET_LINE_EVERY_S:
            self._reported, self._line_at = reported, time.monotonic()
            best = best_of(self._plan, state.trials)
            say(f"tune: {summary_of(state)}" + (f"; best trial {best[0].number}: {_metrics(best[0])}" if best else ""))


def summary_of(state: State) -> str:
    """One line: how many trials are in which state."""
    counts = {name: sum(trial.state == name for trial in state.trials) for name in ("done", "stopped", "failed")}
    ended = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{len(state.trials)} of {state.total} trials" + (f", {ended}" if ended else "")


def table_of(plan: Plan, state: State) -> Table:
    """Trials under way first, then the best of those that have reported."""
    table = Table(box=None, title=f"study {plan.sweep.study.name}", title_justify="left")
    for name in ("trial", "state", "images", *plan.sweep.metric.names):
        table.add_column(name, justify="right" if name != "state" else "left")
    table.add_column("values")
    working = [work.trial for work in state.running.values()]
    ranked = [trial for trial in best_of(plan, state.trials) if trial not in working]
    for trial in [*working, *ranked][:ROWS]:
        work = state.running.get(trial.number)
        images = f"{trial.images:,}"
        if work is not None and work.progress is not None:
            images = f"{work.progress.images:,}/{work.target:,}"
        metrics = trial.metrics or {}
        numbers = [f"{metrics[name]:.4g}" if name in metrics else "" for name in plan.sweep.metric.names]
        table.add_row(str(trial.number), trial.state, images, *numbers, _values(plan, trial))
    return table


def _values(plan: Plan, trial: Trial) -> str:
    short = short_names([one.key for one in plan.space.dimensions])
    return "  ".join(
        f"{short[key]}={value:.3g}" if isinstance(value, float) else f"{short[key]}={value}"
        for key, value in trial.values.items()
    )


def _metrics(trial: Trial) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in (trial.metrics or {}).items())
