"""A study: many trials at once on a Ray cluster, each in a process that is used again, all of it on record as JSON.

    <storage>/<name>/study.json             the sweep that made it
    <storage>/<name>/trials/00007.json      each trial: values and reports, written before anything follows from them
    <storage>/<name>/runs/run-3f9a.../      the trials' runs, as `scoreray train` leaves them
    <storage>/<name>/report.html, .json, best.yaml

What is decided follows from the records alone, so after a kill the same command goes on with every trial where it was:
none is lost, none runs twice.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scoreray.data.errors import DataError, ScorerayError, StorageError, Unanswered, UserError, shortened
from scoreray.data.storage.lease import Lease
from scoreray.data.yaml_text import parse_value
from scoreray.trainer.checkpoints.checkpoint import committed, latest, open_checkpoint
from scoreray.trainer.run_folder import run_store, store_config
from scoreray.tune.processes import Pool, RunningTrial, kill
from scoreray.tune.schedule import Asha, exchange, milestones
from scoreray.tune.search import num_trials, propose
from scoreray.tune.space import flat
from scoreray.tune.sweep import StudyPlan, draw_settings, need_of
from scoreray.tune.trial import RUNS, Trial, copy_checkpoint, not_a_record, read_trials, study_store, trial_config

STUDY = "study.json"
OWNER = "owner"
POLL_S = 0.5
OWNED_EVERY_S = 10.0
CHANGEABLE = ("trials", "resources", "study.storage")  # may differ where a study is continued


@dataclass
class State:
    """What a person is shown: all trials, those under way, and what has happened."""

    trials: list[Trial]
    total: int
    running: dict[int, RunningTrial] = field(default_factory=dict)


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
        values = {
            key: (_as_read_now(stored.get(key), given.get(key)), given.get(key)) for key in stored.keys() | given.keys()
        }
        keys = sorted(key for key, (old, new) in values.items() if old != new)
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
        _read_choices(plan, trial)
        _check_fits(plan, trial)
    return trials


def _as_read_now(stored: Any, present: Any) -> Any:
    """`stored`, or `present` where that is how it is read now: earlier versions took 1e-3 in a sweep for a string."""
    if isinstance(stored, list) and isinstance(present, list) and len(stored) == len(present):
        return [_as_read_now(old, new) for old, new in zip(stored, present, strict=True)]
    if isinstance(stored, str) and isinstance(present, float):
        with contextlib.suppress(UserError):
            return present if parse_value(stored, "") == present else stored
    return stored


def _read_choices(plan: StudyPlan, trial: Trial) -> None:
    """Makes choices on record the present ones that they are read as."""
    for values in [trial.values, *(one["values"] for one in trial.lineage)]:
        for one in plan.space.dimensions:
            if one.key in values:
                stored = values[one.key]
                values[one.key] = next((new for new in one.choices if _as_read_now(stored, new) == new), stored)


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
    """Runs a checked sweep on the connected Ray cluster. `room`: its resources; `show`: called a few times a second."""

    def __init__(
        self,
        plan: StudyPlan,
        room: Mapping[str, float],
        note: Callable[[str], None] = lambda line: None,
        show: Callable[[State], None] = lambda state: None,
    ) -> None:
        self.plan, self.store, self._note, self._show = plan, study_store(plan.sweep), note, show
        self.trials = claim(plan)
        self._total, self._milestones = num_trials(plan), milestones(plan)
        kind = plan.sweep.scheduler.kind
        self._asha = Asha(plan, self.trials) if kind == "asha" else None
        self._pbt = kind == "pbt"
        self._seq = max((r["seq"] for trial in self.trials for r in trial.reports), default=-1) + 1
        self._pool = Pool(plan, dict(room))
        self._lease = Lease.take(self.store, OWNER, "study")
        for trial in self.trials:
            self._decide(trial)  # a report may have been written, and the driver killed before what follows from it

    def run(self) -> list[Trial]:
        """All trials to their ends; returns them. Raises what would end every trial, and UserError when all failed.

        The first KeyboardInterrupt lets trials of one worker commit what they have trained; a second one does not.
        """
        import ray

        state = State(self.trials, self._total)
        try:
            while True:
                while self._start_one():
                    pass
                state.running = {work.trial.number: work for work in self._pool.working.values()}
                self._show(state)
                if not self._pool.working:
                    break
                ready, _ = ray.wait(list(self._pool.working), num_returns=1, timeout=POLL_S)
                for one in ready:
                    self._finish(one)
                self._pool.look()
                self._lease.check_every(OWNED_EVERY_S)
        except KeyboardInterrupt:
            if self._pool.working:
                self._note("stopping: saving first (once more Ctrl-C: at once)")
                self._pool.stop()
            raise
        finally:
            self._pool.close()
        if self.trials and all(trial.state == "failed" for trial in self.trials):
            raise UserError(f"every trial failed; the first: {self.trials[0].error}")
        return self.trials

    def _start_one(self) -> bool:
        limit = self.plan.sweep.resources.concurrent
        if limit is not None and len(self._pool.working) >= limit:
            return False
        busy = {work.trial.number for work in self._pool.working.values()}
        for trial in self.trials:
            if trial.state == "running" and trial.number not in busy and self._may_go(trial):
                return self._start(trial)
        if len(self.trials) >= self._total:
            return False
        need = need_of(self.plan, None if self.plan.sweep.checkpoint else self.plan.config({}))
        if not self._pool.has_room(need) or self._blocked():
            return False
        trial = self._new()
        return trial.state == "failed" or (self._may_go(trial) and self._start(trial))

    def _new(self) -> Trial:
        """The next trial, or one whose record a person has deleted."""
        there = {trial.number for trial in self.trials}
        number = next(number for number in itertools.count() if number not in there)
        trial = Trial(number, propose(self.plan, number, self.trials))
        if not self.plan.sweep.checkpoint:
            try:
                config = trial_config(self.plan, trial.values, self._free_run(number) if self._pbt else "")
                trial.run = config.run.name
            except UserError as error:  # values that are good one by one and not together
                trial.state, trial.error = "failed", " ".join(str(error).split())
        trial.save(self.store)
        self.trials.insert(number, trial)
        return trial

    def _free_run(self, number: int) -> str:
        """A name for the run of a population's new member: of a trial on record before, those it had are left alone."""
        name = f"{RUNS}/trial-{number:05d}-"
        used = [int(key[len(name) :].partition("/")[0]) for key, _ in self.store.list(name)]
        return f"trial-{number:05d}-{max(used, default=-1) + 1}"

    def _blocked(self) -> bool:
        """Whether new trials would only wait for the run that a trial trains now, as all share it."""
        if self.plan.space.trains or self.plan.sweep.checkpoint or not self.trials:
            return False
        return not any(trial.images >= self.plan.total for trial in self.trials)

    def _may_go(self, trial: Trial) -> bool:
        if any(work.run == trial.run and trial.run for work in self._pool.working.values()):
            reached = [other.images for other in self.trials if other.run == trial.run]
            if max(reached, default=0) < self._target(trial):
                return False  # another trial trains the same run
        if any(self._draws_as(work.trial, trial) for work in self._pool.working.values()):
            return False  # the same evaluation; when it is done, this trial finds it done
        if not self._pbt or not trial.reports:
            return True
        there = trial.images
        others = [other for other in self.trials if other.state != "failed"]
        if len(self.trials) < self._total or any(other.images < there for other in others):
            return False  # the population exchanges weights when all are there
        self._exchange([other for other in others if other.images >= there], there)
        return True

    def _draws_as(self, one: Trial, other: Trial) -> bool:
        """Whether two trials are the same in all that is measured, whatever else their values are."""
        sweep = self.plan.sweep
        return one.run == other.run and draw_settings(sweep, one.values) == draw_settings(sweep, other.values)

    def _exchange(self, population: list[Trial], images: int) -> None:
        """Decide, copy weights, and write each decision down; what was decided before a kill is as it was."""
        if all(any(one["images"] == images for one in trial.lineage) for trial in population):
            return
        by_number = {trial.number: trial for trial in self.trials}
        for number, (source, values) in exchange(self.plan, population, images).items():
            trial = by_number[number]
            if any(one["images"] == images for one in trial.lineage):
                continue
            if source is not None:
                donor = by_number[source]
                report = next(r for r in donor.reports if r["images"] == images)
                run = f"trial-{number:05d}-{int(trial.run.rpartition('-')[2]) + 1}"
                config = trial_config(self.plan, values, run)
                folder = report["checkpoint"].rpartition("/checkpoints/")[2]
                at = trial_config(self.plan, donor.values, report["run"])
                copy_checkpoint(open_checkpoint(run_store(at), f"checkpoints/{folder}"), run_store(config))
                self._note(f"trial {number} continues with the weights of trial {source} at {images:,} images")
                trial.values, trial.run = values, run
            trial.lineage.append({"images": images, "source": source, "values": trial.values})
            trial.save(self.store)

    def _target(self, trial: Trial) -> int:
        return next((one for one in self._milestones if one > trial.images), self._milestones[-1])

    def _start(self, trial: Trial) -> bool:
        config = None if self.plan.sweep.checkpoint else trial_config(self.plan, trial.values, trial.run)
        if not self._pool.has_room(need_of(self.plan, config)):
            return False
        if config is not None:
            store_config(run_store(config), config)
        self._pool.start(trial, config, self._target(trial))
        return True

    def _finish(self, one: Any) -> None:
        import ray

        work = self._pool.take(one)
        trial = work.trial
        try:
            report = ray.get(one)
        except ray.exceptions.RayTaskError as error:
            self._pool.keep(work)
            self._failed(trial, error.cause)
        except ray.exceptions.RayError as error:  # its process is gone
            kill(work.actor)
            self._died(trial, "its process died", str(error))
        else:
            self._pool.keep(work)
            report |= {"seq": self._seq, "run": trial.run, "sent": work.sent}
            self._seq += 1
            trial.reports.append(report)
            self._lease.check_every(OWNED_EVERY_S)
            trial.save(self.store)
            self._decide(trial)

    def _decide(self, trial: Trial) -> None:
        """What follows from a trial's newest report."""
        if trial.state != "running" or not trial.reports:
            return
        if trial.images >= self._milestones[-1]:
            trial.state = "done"
        elif (
            self._asha is not None and not self._asha.goes_on(trial, trial.reports[-1]) and not self._is_default(trial)
        ):
            trial.state = "stopped"
        else:
            return
        trial.save(self.store)

    def _is_default(self, trial: Trial) -> bool:
        """Whether it is what the report compares with: that trains to its end, however it stands."""
        return trial.number == 0 and self.plan.sweep.search.default_first and trial.values == self.plan.default()

    def _failed(self, trial: Trial, error: BaseException) -> None:
        if isinstance(error, Unanswered):
            self._died(trial, str(error))
        elif isinstance(error, DataError | StorageError):
            raise error  # it would end every other trial too; what is on record stays
        else:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            trial.state, trial.error = "failed", lines[0] if isinstance(error, ScorerayError) else lines[-1]
            trial.save(self.store)
            self._note(f"trial {trial.number} failed: {trial.error}")

    def _died(self, trial: Trial, reason: str, why: str = "") -> None:
        trial.deaths += 1
        if trial.deaths > self.plan.sweep.resources.max_failures:
            trial.state, trial.error = (
                "failed",
                f"{reason} {trial.deaths} times (resources.max_failures){_last_line(why)}",
            )
        else:
            config = None if self.plan.sweep.checkpoint else trial_config(self.plan, trial.values, trial.run)
            there = latest(run_store(config)) if config and committed(run_store(config)) else None
            self._note(
                f"trial {trial.number}: {reason}; it continues from {there.images_seen if there else 0:,} images"
            )
        trial.save(self.store)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else ""
