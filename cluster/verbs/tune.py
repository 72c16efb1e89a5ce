"""`scoreray tune`: a study from its checked sweep to its report, with a table of the trials while it runs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scoreray.cluster import display
from scoreray.cluster.connect.local_ray import connected, set_environment
from scoreray.cluster.connect.room import autoscaler, wait_for_room
from scoreray.cluster.display import QUIET_LINE_EVERY_S, say, waiting
from scoreray.sampling.model.describe import describe
from scoreray.trainer.config import Config
from scoreray.trainer.on_ray.run import worker_environment
from scoreray.tune.checks import check_plugins
from scoreray.tune.load import check_room, check_sweep, needs
from scoreray.tune.report import Report, make_report
from scoreray.tune.schedule import best_of, expected_images
from scoreray.tune.space import short_names
from scoreray.tune.study import State, Study
from scoreray.tune.sweep import StudyPlan
from scoreray.tune.trial import Trial, study_store

PRIOR = 4  # trials that the scheduler's plan counts for beside those that have ended
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


def check_tune(plan: StudyPlan) -> None:
    """Everything that can be known before the first trial; warnings are said. Raises ScorerayErrors."""
    _warn(plan)
    set_environment()
    check_plugins(plan)
    if "RAY_ADDRESS" in os.environ:
        with connected():
            if not autoscaler().is_there:
                check_room(plan, _room())
    else:
        check_room(plan, {"CPU": float(os.cpu_count() or 1), "GPU": _gpus()})


def tune_to_end(plan: StudyPlan, *, verbose: bool = False) -> TuneResult:
    """Run a study on RAY_ADDRESS's cluster or on this machine until its last trial, and write its report."""
    started, store = time.monotonic(), study_store(plan.sweep)
    _warn(plan)
    with connected(verbose=verbose, environment=worker_environment(_trained(plan))):
        if autoscaler().is_there:
            _wait_for_a_trial(plan)
        room = _room()
        check_room(plan, room)
        with waiting("loading the searcher and the scheduler"):  # ray.tune and pandas: seconds, on a busy machine
            check_plugins(plan)
        with TrialTable(plan) as table:
            study = Study(plan, room, table.note, table)
            if study.trials:
                done = sum(trial.state != "running" for trial in study.trials)
                table.note(f"study '{plan.sweep.study.name}' goes on: {done} trials have ended, "
                           f"{len(study.trials) - done} were under way")  # fmt: skip
            trials = study.run()
    with waiting("the report: pictures, and samples of the best trial"):
        report = make_report(plan, trials)
    return TuneResult(store.url(), report, len(trials), time.monotonic() - started)


def _trained(plan: StudyPlan) -> Config:
    """The config of the trials' runs, or of the run that the sweep draws from."""
    return describe(plan.sweep.checkpoint).info.config if plan.sweep.checkpoint else plan.config({})


def _warn(plan: StudyPlan) -> None:
    for line in check_sweep(plan):
        say(f"warning: {line}")


def _wait_for_a_trial(plan: StudyPlan) -> None:
    """Until the largest trial has room, in units that a node may have: a CPU, a GPU."""
    for where, need in needs(plan):
        units = [{name: 1.0} for name, amount in need.items() for _ in range(math.ceil(amount))]
        wait_for_room(f"{where}a trial needs", units, "ask for less")


def _room() -> Mapping[str, float]:
    import ray

    return ray.cluster_resources()


def _gpus() -> float:
    import torch

    return float(torch.cuda.device_count())


class TrialTable:
    """The trials of a study: a table on a terminal; in a log a line now and then, where something has changed."""

    def __init__(self, plan: StudyPlan) -> None:
        self._plan = plan
        console = display.console
        self._live = Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else None
        self._line_at, self._shown = time.monotonic(), ""
        self._pace: Pace | None = None

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
        now = time.monotonic()
        self._pace = self._pace or Pace(self._plan, state, now)
        left = self._pace.left_s(state, now)
        if now - self._line_at <= QUIET_LINE_EVERY_S:
            return
        best = best_of(self._plan, state.trials)
        shown = self._pace.progress(state) + (f"; best trial {best[0].number}: {_metrics(best[0])}" if best else "")
        if shown != self._shown:
            self._shown, self._line_at = shown, now
            say(f"tune: {shown}" + (f"; about {left:,.0f} s left" if left else ""))


class Pace:
    """How far a study has come since a start, and how long it will take: by images where trials are trained, else by
    trials."""

    def __init__(self, plan: StudyPlan, state: State, now: float) -> None:
        self._plan, self._at = plan, now
        self._before = self._images(state), _ended(state)

    def progress(self, state: State) -> str:
        """Trials, and images trained on."""
        return summary_of(state) + (f"; {self._images(state):,} images" if self._plan.total else "")

    def left_s(self, state: State, now: float) -> float | None:
        """Seconds until the last trial's end; None (and the clock starts again) where nothing has been done yet.

        A trial is taken to go as far as those that have ended did on average, at first as far as the scheduler plans.
        """
        if not self._plan.space.trains:
            done, left = _ended(state) - self._before[1], state.total - _ended(state)
            return (now - self._at) / done * left if done > 0 else None
        done = self._images(state) - self._before[0]
        if done <= 0:
            self._at = now  # processes are starting
            return None
        ended = [trial.images for trial in state.trials if trial.state in ("done", "stopped")]
        far = (sum(ended) + PRIOR * expected_images(self._plan)) / (len(ended) + PRIOR)
        under_way = [trial for trial in state.trials if trial.state == "running"]
        ends = {number: max(far, work.target) for number, work in state.running.items()}  # its stop, where past that
        ahead = sum(max(0.0, ends.get(trial.number, far) - _images_of(state, trial)) for trial in under_way)
        return (now - self._at) / done * (ahead + far * (state.total - len(state.trials)))

    def _images(self, state: State) -> int:
        seen: dict[str, int] = {}
        for trial in state.trials:
            seen[trial.run] = max(seen.get(trial.run, 0), _images_of(state, trial))
        return sum(seen.values())


def _images_of(state: State, trial: Trial) -> int:
    work = state.running.get(trial.number)
    return max(trial.images, work.progress.images if work is not None and work.progress is not None else 0)


def _ended(state: State) -> int:
    return sum(trial.state != "running" for trial in state.trials)


def summary_of(state: State) -> str:
    """One line: how many trials are in which state."""
    counts = {name: sum(trial.state == name for trial in state.trials) for name in ("done", "stopped", "failed")}
    ended = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{len(state.trials)} of {state.total} trials" + (f", {ended}" if ended else "")


def table_of(plan: StudyPlan, state: State) -> Table:
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


def _values(plan: StudyPlan, trial: Trial) -> str:
    short = short_names([one.key for one in plan.space.dimensions])
    return "  ".join(
        f"{short[key]}={value:.3g}" if isinstance(value, float) else f"{short[key]}={value}"
        for key, value in trial.values.items()
    )


def _metrics(trial: Trial) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in (trial.metrics or {}).items())
