"""The trials of a study as they are on record, and what follows from what they report: written before it follows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from scoreray.data.errors import UserError
from scoreray.data.storage.lease import Lease
from scoreray.trainer.checkpoints.checkpoint import committed, latest, open_checkpoint
from scoreray.trainer.monitoring.metrics import TrainingProgress
from scoreray.trainer.run_folder import run_store
from scoreray.tune.schedule import milestones, next_milestone
from scoreray.tune.search import num_trials
from scoreray.tune.space import Values
from scoreray.tune.sweep import POPULATIONS, StudyPlan, draw_settings
from scoreray.tune.trial import RUNS, Trial, copy_checkpoint, study_store, trial_config

OWNER = "owner"
OWNED_EVERY_S = 10.0


@dataclass
class RunningTrial:
    """A trial at work: trains to `target` images, or is measured there. progress: None before its first step."""

    trial: Trial
    target: int
    sent: float
    progress: TrainingProgress | None = None


@dataclass
class State:
    """What a person is shown: all trials, those under way, and what has happened."""

    trials: list[Trial]
    total: int
    running: dict[int, RunningTrial] = field(default_factory=dict)


class StudyBook:
    """Which trial may start, and what becomes of each. concurrent: trials at once. note: takes a line for a person."""

    def __init__(self, plan: StudyPlan, trials: list[Trial], concurrent: int, note: Callable[[str], None]) -> None:
        self.plan, self.store, self.note = plan, study_store(plan.sweep), note
        self.trials, self.concurrent = trials, concurrent
        self.state = State(trials, num_trials(plan))
        self.waiting = [trial for trial in trials if trial.state == "running"]
        self.ended_before = [trial for trial in trials if trial.state != "running"]
        if plan.sweep.scheduler.kind == "hyperband":  # they would take places in its brackets
            self.ended_before = []
        self._lease = Lease.take(self.store, OWNER, "study")
        self.is_population = plan.sweep.scheduler.kind in POPULATIONS
        self._milestones = milestones(plan)
        self._seq = max((r["seq"] for trial in trials for r in trial.reports), default=-1) + 1
        if self.is_population:
            self._settle_exchanges()

    def next_trial(self, propose: Callable[[int], Values | None]) -> Trial | None:
        """The trial that should be started now: one on record, else a new one; None where none may start yet.

        Those that have ended come first: they report once more how, so that a start of Tune's shows all trials.

        propose: values for a trial of this number, None where there are none.
        """
        if self.ended_before:
            return self.ended_before.pop(0)
        while True:
            for trial in self.waiting:
                if self._may_start(trial):
                    self.started(trial.number)
                    return trial
            if len(self.trials) >= self.state.total or len(self.waiting) >= self.concurrent or self._is_blocked():
                return None
            known = {trial.number for trial in self.trials}
            number = next(number for number in itertools.count() if number not in known)
            values = propose(number)
            if values is None:
                return None
            self._add(number, values)

    @property
    def is_complete(self) -> bool:
        """Whether no trial will be started any more."""
        stuck = not self.state.running and self._is_blocked()  # what would have trained the run of all has failed
        return not self.waiting and (len(self.trials) >= self.state.total or stuck)

    def populate(self, propose: Callable[[int], Values]) -> None:
        """All trials of a population, of which none may start before the others are known."""
        known = {trial.number for trial in self.trials}
        for number in range(self.state.total):
            if number not in known:
                self._add(number, propose(number))

    def started(self, number: int) -> None:
        """A trial is under way, for the first time or again."""
        trial = self._trial(number)
        self.waiting = [one for one in self.waiting if one is not trial]
        if trial.state == "running" and number not in self.state.running:
            self.state.running[number] = RunningTrial(
                trial, next_milestone(self._milestones, trial.images), time.time()
            )

    def _trial(self, number: int) -> Trial:
        return next(trial for trial in self.trials if trial.number == number)

    def _add(self, number: int, values: Values) -> None:
        """A new trial, or one whose record a person has deleted."""
        trial = Trial(number, values)
        if not self.plan.sweep.checkpoint:
            try:
                config = trial_config(self.plan, values, self._unused_run(number) if self.is_population else "")
                trial.run = config.run.name
            except UserError as error:  # values that are good one by one and not together
                trial.state, trial.error = "failed", " ".join(str(error).split())
        trial.save(self.store)
        self.trials.insert(number, trial)
        if trial.state == "running":
            self.waiting.append(trial)

    def _unused_run(self, number: int) -> str:
        """A name for the run of a population's member: one that none has had, nor one whose record was deleted."""
        name = f"{RUNS}/trial-{number:05d}-"
        used = [int(key[len(name) :].partition("/")[0]) for key, _ in self.store.list(name)]
        return f"trial-{number:05d}-{max(used, default=-1) + 1}"

    def _is_blocked(self) -> bool:
        """Whether new trials would only wait for the run that a trial trains now, as all share it."""
        if self.plan.space.trains or self.plan.sweep.checkpoint or not self.trials:
            return False
        return not any(trial.images >= self.plan.total for trial in self.trials)

    def _may_start(self, trial: Trial) -> bool:
        """Not where a trial under way trains the same run, or measures the same: its results are then found there."""
        others = [work.trial for work in self.state.running.values()]
        trained = any(one.run == trial.run and one.images >= self.plan.total for one in self.trials)
        if not trained and any(other.run == trial.run for other in others if trial.run):
            return False
        drawn = draw_settings(self.plan.sweep, trial.values)
        return not any(
            other.run == trial.run and draw_settings(self.plan.sweep, other.values) == drawn for other in others
        )

    def exchange(self, number: int, source: int, images: int, values: Values) -> None:
        """A trial is to go on with the weights that another committed at `images`, and with `values`.

        They are copied into a run of its own at once: when the other one trains on, it may remove that checkpoint.
        """
        trial, donor = self._trial(number), self._trial(source)
        if images != trial.images or trial.has_exchanged:
            return  # of an exchange before
        report = next(one for one in donor.reports if one["images"] == images)
        folder = report["checkpoint"].rpartition("/checkpoints/")[2]
        config = trial_config(self.plan, values, self._unused_run(number))
        given = run_store(trial_config(self.plan, donor.values, report["run"]))
        copy_checkpoint(open_checkpoint(given, f"checkpoints/{folder}"), run_store(config))
        trial.values, trial.run = values, config.run.name
        trial.lineage.append({"images": images, "source": source, "values": values})
        trial.save(self.store)
        self.note(f"trial {number} continues with the weights of trial {source} at {images:,} images")

    def _settle_exchanges(self) -> None:
        """Where a kill cut an exchange of weights, those that had not got another's by then keep theirs."""
        decided = {one["images"] for trial in self.trials for one in trial.lineage}
        for trial in self.waiting:
            if trial.images in decided and not trial.has_exchanged:
                self._kept(trial)
                trial.save(self.store)

    def _kept(self, trial: Trial) -> None:
        trial.lineage.append({"images": trial.images, "source": None, "values": trial.values})

    def reported(self, number: int, report: dict[str, Any], ended: bool) -> None:
        """A trial has come to a milestone. ended: it goes no further, being at its end or stopped by the scheduler."""
        work = self.state.running[number]
        trial = work.trial
        again = bool(trial.reports) and trial.images == report["images"]  # for an exchange that a kill prevented
        if not again:
            if self.is_population and trial.reports and not trial.has_exchanged:
                self._kept(trial)
            trial.reports.append(report | {"seq": self._seq, "sent": work.sent})
            self._seq += 1
        if ended:
            trial.state = "done" if trial.images >= self._milestones[-1] else "stopped"
        work.target, work.sent, work.progress = next_milestone(self._milestones, trial.images), time.time(), None
        self.check_owned()
        trial.save(self.store)

    def check_owned(self) -> None:
        """Raises where another start has taken the study over; looks now and then."""
        self._lease.check_every(OWNED_EVERY_S)

    def failed(self, number: int, error: str) -> None:
        """A trial can't go on."""
        trial = self._trial(number)
        trial.state, trial.error = "failed", error
        trial.save(self.store)
        self.note(f"trial {number} failed: {error}")

    def died(self, number: int, reason: str, why: str, last: bool) -> None:
        """A trial's process has died, or got no answer from the store; `last`: once too often."""
        trial = self._trial(number)
        if trial.state != "running":
            return
        trial.deaths += 1
        if last:
            trial.state = "failed"
            trial.error = f"{reason} {trial.deaths} times (resources.max_failures)" + (f": {why}" if why else "")
        run = None if self.plan.sweep.checkpoint else run_store(trial_config(self.plan, trial.values, trial.run))
        newest = latest(run) if run and committed(run) else None
        if not last:
            images = newest.images_seen if newest else 0
            self.note(f"trial {number}: {reason}; it continues from {images:,} images")
        trial.save(self.store)

    def ended(self, number: int) -> None:
        """A trial takes no resources any more; one that the scheduler ended between two reports is stopped."""
        self.state.running.pop(number, None)
        trial = self._trial(number)
        if trial.state == "running":
            trial.state = "stopped" if trial.reports else "failed"
            trial.save(self.store)
