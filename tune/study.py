"""A study: many trials at once on a Ray cluster, run by Ray Tune, all of it on record as JSON.

    <storage>/<name>/study.json             the sweep that made it
    <storage>/<name>/trials/00007.json      each trial: values and reports, written before anything follows from them
    <storage>/<name>/runs/run-3f9a.../      the trials' runs, as `scoreray train` leaves them
    <storage>/<name>/ray/<name>-1/          Tune's own folder of the first start, for `tune.ExperimentAnalysis`
    <storage>/<name>/report.html, .json, best.yaml

What is decided follows from the records alone, so after a kill the same command goes on with every trial where it was:
none is lost, none runs twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from scoreray.data.errors import DataError, UserError, shortened
from scoreray.tune.book import State, StudyBook
from scoreray.tune.load import needs
from scoreray.tune.space import flat
from scoreray.tune.sweep import StudyPlan
from scoreray.tune.trial import Trial, not_a_record, read_trials, study_store

STUDY = "study.json"
CHANGEABLE = ("trials", "resources", "study.storage")  # may differ where a study is continued


def claim(plan: StudyPlan) -> list[Trial]:
    """Make the study's place ours, or find the trials that the same sweep left there. Raises UserError on another."""
    store, sweep = study_store(plan.sweep), plan.sweep.dump()
    if not store.put_new(STUDY, json.dumps(sweep).encode()):
        try:
            stored, given = flat(json.loads(store.get(STUDY))), flat(sweep)
        except (ValueError, AttributeError, RecursionError):  # not JSON, or no mapping
            raise DataError(
                f"{store.url(STUDY)}: not a record of a sweep; delete that file and give the same command again"
            ) from None
        keys = sorted(key for key in stored.keys() | given.keys() if stored.get(key) != given.get(key))
        differing = [key for key in keys if not any(key == one or key.startswith(one + ".") for one in CHANGEABLE)]
        if differing and read_trials(store):
            lines = [f"{key}: {stored.get(key)} in the study, {given.get(key)} in this sweep" for key in differing]
            raise UserError(
                f"study '{plan.sweep.study.name}' exists at {store.url()} with another sweep; give its sweep, or "
                "another study.name\n  " + "\n  ".join(lines)
            )
        store.put(STUDY, json.dumps(sweep).encode())
    trials = read_trials(store)
    for trial in trials:
        _check_fits(plan, trial)
    return trials


def _check_fits(plan: StudyPlan, trial: Trial) -> None:
    """Raises DataError where a trial on record can't be of this sweep, whatever wrote it."""
    store, dimensions = study_store(plan.sweep), {one.key: one for one in plan.space.dimensions}
    for values in [trial.values, *(one["values"] for one in trial.lineage)]:
        for key, value in values.items():
            if key not in dimensions or not dimensions[key].contains(value):
                raise not_a_record(
                    store, trial.number, f"{key} is {shortened(str(value))}, which the space does not contain"
                )
    for report in trial.reports:
        if set(report["metrics"]) != set(plan.sweep.metric.names):
            raise not_a_record(store, trial.number, f"its metrics are {', '.join(report['metrics']) or 'none'}")


class Study:
    """A checked sweep on the connected Ray cluster, whose resources are `room`.

    note: takes a line for a person; show: called a few times a second.
    """

    def __init__(
        self,
        plan: StudyPlan,
        room: Mapping[str, float],
        note: Callable[[str], None] = lambda line: None,
        show: Callable[[State], None] = lambda state: None,
    ) -> None:
        self.plan, self.trials, self._show = plan, claim(plan), show
        fitting = [room.get(name, 0.0) / amount for _, need in needs(plan) for name, amount in need.items() if amount]
        at_once = min(int(min(fitting) + 1e-9), plan.sweep.resources.concurrent or len(self.trials) + plan.sweep.trials)
        self._book = StudyBook(plan, self.trials, at_once, note)

    def run(self) -> list[Trial]:
        """All trials to their ends; returns them. Raises what would end every trial, and UserError when all failed.

        The first KeyboardInterrupt lets trials commit what they have trained; a second one does not.
        """
        from scoreray.tune.tuner import run

        run(self._book, self._show)
        if self.trials and all(trial.state == "failed" for trial in self.trials):
            raise UserError(f"every trial failed; the first: {self.trials[0].error}")
        return self.trials
