"""Processes for trials: actors that are used again, with torch and the data loaded."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scoreray.trainer.config import Config
from scoreray.trainer.monitoring.metrics import TrainingProgress
from scoreray.trainer.on_ray.run import worker_environment
from scoreray.tune.sweep import StudyPlan, Sweep, need_of
from scoreray.tune.trial import Trial, advance

SAVE_S = 25.0
Signature = tuple[tuple[str, float], ...]


@dataclass
class RunningTrial:
    """A stretch of a trial that is being computed."""

    trial: Trial
    target: int
    actor: Any
    need: Signature
    sent: float
    run: str
    progress: TrainingProgress | None = None
    answer: Any = None


class TrialProcess:
    """An actor: computes stretches of trials one after another."""

    def __init__(self, sweep: dict[str, Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._sweep = sweep
        self._progress: TrainingProgress | None = None
        self._stopped = False

    def advance(self, config: dict[str, Any] | None, target: int, values: dict[str, Any], device: str) -> Any:
        self._progress = None
        loaded = None if config is None else Config.model_validate(config)
        return advance(
            loaded, target, Sweep.model_validate(self._sweep), values, device, self._watch, lambda: self._stopped
        )

    def progress(self) -> TrainingProgress | None:
        return self._progress

    def stop(self) -> None:
        """Commit what is trained, and end the stretch."""
        self._stopped = True

    def _watch(self, progress: TrainingProgress) -> None:
        self._progress = progress


@dataclass
class Pool:
    """Processes within `room`, the cluster's resources: those at work, by their report's ObjectRef, and those idle."""

    plan: StudyPlan
    room: Mapping[str, float]
    working: dict[Any, RunningTrial] = field(default_factory=dict)
    idle: list[tuple[Any, Signature]] = field(default_factory=list)

    def has_room(self, need: Mapping[str, float]) -> bool:
        """Whether a trial fits beside those under way; processes that wait for work make place."""
        held = [dict(work.need) for work in self.working.values()]
        return all(
            sum(one[name] for one in held) + amount <= self.room.get(name, 0.0) + 1e-9 for name, amount in need.items()
        )

    def start(self, trial: Trial, config: Config | None, target: int) -> None:
        """Have a stretch of a trial computed, to `target` images."""
        need = need_of(self.plan, config)
        actor, signature = self._process(config, need)
        dumped = None if config is None else config.model_dump(mode="json")
        owed = actor.advance.remote(dumped, target, trial.values, "cuda" if need["GPU"] else "cpu")
        self.working[owed] = RunningTrial(trial, target, actor, signature, time.time(), trial.run)

    def take(self, owed: Any) -> RunningTrial:
        """A stretch that has ended, well or not."""
        return self.working.pop(owed)

    def keep(self, work: RunningTrial) -> None:
        """Its process is good for another."""
        self.idle.append((work.actor, work.need))

    def look(self) -> None:
        """Progress of what is under way, without waiting for it."""
        import ray

        for work in self.working.values():
            if work.answer is None:
                work.answer = work.actor.progress.remote()
            elif ray.wait([work.answer], timeout=0)[0]:
                with contextlib.suppress(ray.exceptions.RayError):
                    work.progress = ray.get(work.answer)
                work.answer = None

    def stop(self) -> None:
        """Have trials under way commit what they have trained, and wait for that, for at most SAVE_S."""
        import ray

        for work in self.working.values():
            work.actor.stop.remote()
        if self.working:
            ray.wait(list(self.working), num_returns=len(self.working), timeout=SAVE_S)

    def close(self) -> None:
        """End all of them."""
        for work in self.working.values():
            kill(work.actor)
        for actor, _ in self.idle:
            kill(actor)

    def _process(self, config: Config | None, need: Mapping[str, float]) -> tuple[Any, Signature]:
        """A process for a trial: one that waits, else a new one; those of other sizes end, as their place is needed."""
        import ray

        alone = config is None or config.scaling.range[1] == 1
        signature = (*sorted(need.items()), ("alone", float(alone)))
        for i, (actor, other) in enumerate(self.idle):
            if other == signature:
                del self.idle[i]
                return actor, signature
        for actor, _ in self.idle:
            kill(actor)
        self.idle.clear()
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


def kill(actor: Any) -> None:
    """End an actor's process, if it has not ended."""
    import ray

    with contextlib.suppress(Exception):
        ray.kill(actor)
