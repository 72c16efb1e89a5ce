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
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from scoreray.data.errors import DataError, ScorerayError, StorageError, Unanswered, UserError
from scoreray.data.store import NotFound
from scoreray.trainer.checkpoint import committed, latest, open_checkpoint
from scoreray.trainer.config import Config, dump_config
from scoreray.trainer.loop import run_store
from scoreray.trainer.progress import Progress
from scoreray.trainer.run import CONFIG_FILE, worker_environment
from scoreray.tune.schedule import Asha, exchange, milestones
from scoreray.tune.search import num_trials, propose
from scoreray.tune.space import flat
from scoreray.tune.sweep import Plan, Sweep, need_of
from scoreray.tune.trial import Trial, advance, copy_checkpoint, read_trials, study_store, trial_config

STUDY = "study.json"
OWNER = "owner"
POLL_S = 0.5
OWNED_EVERY_S = 10.0
CHANGEABLE = ("trials", "resources", "study.storage")  # may differ where a study goes on


@dataclass
class Work:
    """A stretch of a trial that is being computed."""

    trial: Trial
    target: int
    actor: Any
    need: tuple[tuple[str, float], ...]
    sent: float
    run: str
    progress: Progress | None = None
    asked: Any = None


@dataclass
class State:
    """What a person is shown: all trials, those under way, and what has happened."""

    trials: list[Trial]
    total: int
    running: dict[int, Work] = field(default_factory=dict)


class TrialProcess:
    """An actor: computes stretches of trials one after another, so that torch is imported once."""

    def __init__(self, sweep: dict[str, Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._sweep = sweep
        self._progress: Progress | None = None

    def advance(self, config: dict[str, Any] | None, target: int, values: dict[str, Any], device: str) -> Any:
        self._progress = None
        loaded = None if config is None else Config.model_validate(config)
        return advance(loaded, target, Sweep.model_validate(self._sweep), values, device, self._watch)

    def progress(self) -> Progress | None:
        return self._progress

    def _watch(self, progress: Progress) -> None:
        self._progress = progress


def claim(plan: Plan) -> list[Trial]:
    """Make the study's place ours, or find there what the same sweep left: its trials. Raises UserError on another."""
    store, sweep = study_store(plan.sweep), plan.sweep.dump()
    if not store.put_new(STUDY, json.dumps(sweep).encode()):
        there, here = flat(json.loads(store.get(STUDY))), flat(sweep)
        keys = [key for key in sorted(there.keys() | here.keys()) if there.get(key) != here.get(key)]
        differing = [key for key in keys if not any(key == one or key.startswith(one + ".") for one in CHANGEABLE)]
        if differing and read_trials(store):
            lines = [f"{key}: {there.get(key)} there, {here.get(key)} here" for key in differing]
            raise UserError(
                f"study '{plan.sweep.study.name}' exists at {store.url()} with another sweep; give its sweep, or "
                "another study.name\n  " + "\n  ".join(lines)
            )
        store.put(STUDY, json.dumps(sweep).encode())
    return read_trials(store)


class Study:
    """Runs a checked sweep on the connected Ray cluster. `room`: its resources; `show`: called a few times a second."""

    def __init__(
        self,
        plan: Plan,
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
        self._room, self._idle, self._working = dict(room), list[tuple[Any, Any]](), dict[Any, Work]()
        self._token, self._owned = uuid.uuid4().hex, time.monotonic()
        self.store.put(OWNER, self._token.encode())
        for trial in self.trials:
            self._decide(trial)  # a report may have been written, and the driver killed before what follows from it

    def run(self) -> list[Trial]:
        """All trials to their ends; returns them. Raises what would end every trial, and UserError when all failed."""
        import ray

        state = State(self.trials, self._total)
        try:
            while True:
                while self._start_one():
                    pass
                state.running = {work.trial.number: work for work in self._working.values()}
                self._show(state)
                if not self._working:
                    break
                ready, _ = ray.wait(list(self._working), num_returns=1, timeout=POLL_S)
                for one in ready:
                    self._finish(one)
                self._look()
        finally:
            for work in self._working.values():
                _kill(work.actor)
            for actor, _ in self._idle:
                _kill(actor)
        if self.trials and all(trial.state == "failed" for trial in self.trials):
            raise UserError(f"every trial failed; the first: {self.trials[0].error}")
        return self.trials

    def _start_one(self) -> bool:
        limit = self.plan.sweep.resources.concurrent
        if limit is not None and len(self._working) >= limit:
            return False
        busy = {work.trial.number for work in self._working.values()}
        for trial in self.trials:
            if trial.state == "running" and trial.number not in busy and self._may_go(trial):
                return self._start(trial)
        if len(self.trials) >= self._total:
            return False
        need = need_of(self.plan, None if self.plan.sweep.checkpoint else self.plan.config({}))
        if not self._has_room(need) or self._blocked():
            return False
        trial = self._new()
        return trial.state == "failed" or (self._may_go(trial) and self._start(trial))

    def _new(self) -> Trial:
        number = len(self.trials)
        trial = Trial(number, propose(self.plan, number, self.trials))
        if not self.plan.sweep.checkpoint:
            try:
                config = trial_config(self.plan, trial.values, f"trial-{number:05d}-0" if self._pbt else "")
                trial.run = config.run.name
            except UserError as error:  # values that are good one by one and not together
                trial.state, trial.error = "failed", " ".join(str(error).split())
        trial.save(self.store)
        self.trials.append(trial)
        return trial

    def _blocked(self) -> bool:
        """Whether new trials would only wait for the run that a trial trains now, as all share it."""
        if self.plan.space.trains or self.plan.sweep.checkpoint or not self.trials:
            return False
        return not any(trial.images >= self.plan.total for trial in self.trials)

    def _may_go(self, trial: Trial) -> bool:
        if any(work.run == trial.run and trial.run for work in self._working.values()):
            reached = [other.images for other in self.trials if other.run == trial.run]
            if max(reached, default=0) < self._target(trial):
                return False  # another trial trains the same run
        if not self._pbt or not trial.reports:
            return True
        there = trial.images
        others = [other for other in self.trials if other.state != "failed"]
        if len(self.trials) < self._total or any(other.images < there for other in others):
            return False  # the population exchanges weights when all are there
        self._exchange([other for other in others if other.images >= there], there)
        return True

    def _exchange(self, population: list[Trial], images: int) -> None:
        """Decide, copy weights, and write each decision down; what was decided before a kill is as it was."""
        if all(any(one["images"] == images for one in trial.lineage) for trial in population):
            return
        for number, (source, values) in exchange(self.plan, population, images).items():
            trial = self.trials[number]
            if any(one["images"] == images for one in trial.lineage):
                continue
            if source is not None:
                donor = self.trials[source]
                report = next(r for r in donor.reports if r["images"] == images)
                run = f"trial-{number:05d}-{int(trial.run.rpartition('-')[2]) + 1}"
                config = trial_config(self.plan, values, run)
                folder = report["checkpoint"].rpartition("/checkpoints/")[2]
                at = trial_config(self.plan, donor.values, report["run"])
                copy_checkpoint(open_checkpoint(run_store(at), f"checkpoints/{folder}"), run_store(config))
                self._note(f"trial {number} goes on with the weights of trial {source} at {images:,} images")
                trial.values, trial.run = values, run
            trial.lineage.append({"images": images, "source": source, "values": trial.values})
            trial.save(self.store)

    def _target(self, trial: Trial) -> int:
        return next((one for one in self._milestones if one > trial.images), self._milestones[-1])

    def _start(self, trial: Trial) -> bool:
        config = None if self.plan.sweep.checkpoint else trial_config(self.plan, trial.values, trial.run)
        need = need_of(self.plan, config)
        if not self._has_room(need):
            return False
        actor, signature = self._process(config, need)
        if config is not None:
            run_store(config).put_new(CONFIG_FILE, dump_config(config).encode())
        target, device = self._target(trial), "cuda" if need["GPU"] else "cpu"
        dumped = None if config is None else config.model_dump(mode="json")
        work = actor.advance.remote(dumped, target, trial.values, device)
        self._working[work] = Work(trial, target, actor, signature, time.time(), trial.run)
        return True

    def _has_room(self, need: Mapping[str, float]) -> bool:
        """Whether a trial fits beside those under way; processes that wait for work make place."""
        held = [dict(work.need) for work in self._working.values()]
        return all(
            sum(one[name] for one in held) + amount <= self._room.get(name, 0.0) + 1e-9 for name, amount in need.items()
        )

    def _process(self, config: Config | None, need: Mapping[str, float]) -> tuple[Any, Any]:
        """A process for a trial: one that waits, else a new one; those of other sizes end, as their place is needed."""
        import ray

        alone = config is None or config.scaling.range[1] == 1
        signature = (*sorted(need.items()), ("alone", float(alone)))
        for i, (actor, other) in enumerate(self._idle):
            if other == signature:
                del self._idle[i]
                return actor, signature
        for actor, _ in self._idle:
            _kill(actor)
        self._idle.clear()
        base = config or Config.model_validate(
            {"run": {"name": "x", "storage": "."}, "data": {"url": "."}, "duration": {"images": 1}}
        )
        threads = max(1, int(need["CPU"]))
        actor = ray.remote(
            num_cpus=need["CPU"] if alone else 0,
            num_gpus=need["GPU"] if alone else 0,
            max_concurrency=2,
            runtime_env={"env_vars": {**worker_environment(base), "OMP_NUM_THREADS": str(threads)}},
        )(TrialProcess).remote(self.plan.sweep.dump(), threads)
        return actor, signature

    def _finish(self, one: Any) -> None:
        import ray

        work = self._working.pop(one)
        trial = work.trial
        try:
            report = ray.get(one)
        except ray.exceptions.RayTaskError as error:
            self._idle.append((work.actor, work.need))
            self._failed(trial, error.cause)
        except ray.exceptions.RayError as error:  # its process is gone
            _kill(work.actor)
            self._died(trial, "its process died", str(error))
        else:
            self._idle.append((work.actor, work.need))
            report |= {"seq": self._seq, "run": trial.run, "sent": work.sent}
            self._seq += 1
            trial.reports.append(report)
            self._check_owner(at_once=False)
            trial.save(self.store)
            self._decide(trial)

    def _decide(self, trial: Trial) -> None:
        """What follows from a trial's newest report."""
        if trial.state != "running" or not trial.reports:
            return
        if trial.images >= self._milestones[-1]:
            trial.state = "done"
        elif self._asha is not None and not self._asha.goes_on(trial, trial.reports[-1]):
            trial.state = "stopped"
        else:
            return
        trial.save(self.store)

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
            self._note(f"trial {trial.number}: {reason}; it goes on from {there.images_seen if there else 0:,} images")
        trial.save(self.store)

    def _look(self) -> None:
        """Progress of what is under way, without waiting for it; and whether the study is still ours."""
        import ray

        for work in self._working.values():
            if work.asked is None:
                work.asked = work.actor.progress.remote()
            elif ray.wait([work.asked], timeout=0)[0]:
                with contextlib.suppress(ray.exceptions.RayError):
                    work.progress = ray.get(work.asked)
                work.asked = None
        self._check_owner(at_once=False)

    def _check_owner(self, *, at_once: bool) -> None:
        if not at_once and time.monotonic() - self._owned < OWNED_EVERY_S:
            return
        self._owned = time.monotonic()
        with contextlib.suppress(NotFound, Unanswered):
            if self.store.get(OWNER) != self._token.encode():
                raise UserError(
                    f"study '{self.plan.sweep.study.name}' at {self.store.url()} was taken over by another start of "
                    "the same command; it goes on there"
                )


def best_of(plan: Plan, trials: list[Trial]) -> list[Trial]:
    """With one metric the finished trials from the best on; with several those that no other beats in all (Pareto)."""
    from scoreray.tune.sweep import MAXIMISED

    names = plan.sweep.metric.names
    finished = [trial for trial in trials if trial.state == "done" and trial.metrics]

    def costs(trial: Trial) -> list[float]:
        assert trial.metrics is not None
        return [-trial.metrics[name] if name in MAXIMISED else trial.metrics[name] for name in names]

    if len(names) == 1:
        return sorted(finished, key=lambda trial: (costs(trial), trial.number))

    def beaten(trial: Trial) -> bool:
        mine = costs(trial)
        return any(
            all(a <= b for a, b in zip(costs(other), mine, strict=True)) and costs(other) != mine for other in finished
        )

    return sorted((trial for trial in finished if not beaten(trial)), key=lambda trial: costs(trial))


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else ""


def _kill(actor: Any) -> None:
    import ray

    with contextlib.suppress(Exception):
        ray.kill(actor)
