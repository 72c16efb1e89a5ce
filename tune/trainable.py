"""A trial as Ray Tune runs it: an actor that trains to the next milestone, measures, and is used again for others.

What a trial is (values, run, reports) is in its record, which the driver writes before anything follows from it; the
actor reads it at every step. So a trial that is resumed, retried after its process died, or given another's weights by
population-based training needs nothing but its number, which is its name in Tune.
"""

from __future__ import annotations

import _thread
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ray import tune

from scoreray.data.errors import DataError, ScorerayError, StorageError, Unanswered
from scoreray.trainer.monitoring.metrics import TrainingProgress
from scoreray.trainer.run_folder import run_store, store_config
from scoreray.tune.monitor import MonitorLink
from scoreray.tune.schedule import ON_RECORD, SINCE_EXCHANGE, milestones, next_milestone
from scoreray.tune.sweep import POPULATIONS, StudyPlan, need_of
from scoreray.tune.trial import Stopped, advance, read_trial, study_store, trial_config

WAIT_S = 0.25
REFERENCE = "checkpoint.json"  # all that a checkpoint of Tune's holds: where ours is


class TrialTrainable(tune.Trainable):
    """A step leads to the next milestone: images seen at which the scheduler decides. Results are flat: `images`, the
    metrics by name, and what else a record keeps of a report.

    A trial that can't go on reports `error` and is done: Tune would try again after any exception, also where the
    values themselves are wrong. `ends_study`: the error would end every other trial too (data, storage).
    """

    def setup(
        self, config: dict[str, Any], plan: StudyPlan, monitor: Any, exchanged_at: int, variables: dict[str, str]
    ) -> None:
        os.environ.update(variables)  # by which this process has somebody else's parts of the run
        self._plan, self._trial_monitor, self._store = plan, monitor, study_store(plan.sweep)
        self._milestones, self._exchanged_at = milestones(plan), exchanged_at
        self._reference: dict[str, Any] = {}  # to the newest report's checkpoint
        torch.set_num_threads(max(1, int(need_of(plan, None)["CPU"])))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ready for another trial, whose values its record has."""
        self._reference = {}
        return True

    def step(self) -> dict[str, Any]:
        import ray

        number = int(self.trial_name)
        while (answer := ray.get(self._trial_monitor.begin.remote(number))) == "wait":
            time.sleep(WAIT_S)
        if answer == "stop":
            raise Stopped("the study is being stopped")
        try:
            return self._advance(number)
        except (Stopped, Unanswered):
            raise  # Tune tries the trial again, where the study goes on
        except (DataError, StorageError) as error:
            return {"error": str(error), "ends_study": type(error).__name__, "done": True}
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            return {"error": lines[0] if isinstance(error, ScorerayError) else lines[-1], "done": True}
        finally:
            self._trial_monitor.end.remote(number)

    def _advance(self, number: int) -> dict[str, Any]:
        trial = read_trial(self._store, number)
        if trial.state != "running":
            result = self._result(trial.reports[-1]) if trial.reports else {}
            return result | {"done": True, ON_RECORD: True} | ({"error": trial.error} if trial.error else {})
        population = self._plan.sweep.scheduler.kind in POPULATIONS
        if population and self.iteration == 0 and trial.reports and not trial.has_exchanged:
            return self._result(trial.reports[-1])  # again: the driver died before the population's exchange
        config = None if self._plan.sweep.checkpoint else trial_config(self._plan, trial.values, trial.run)
        target = next_milestone(self._milestones, trial.images)
        need, link = need_of(self._plan, config), MonitorLink(self._trial_monitor, number)
        watch: Callable[[TrainingProgress], None] = link.watch
        if config is not None:
            store_config(run_store(config), config)
            if config.scaling.range[1] > 1:
                watch = _interrupting(link)
        try:
            report = advance(
                config, target, self._plan.sweep, trial.values, "cuda" if need["GPU"] else "cpu", watch, link.stopped
            )
        except KeyboardInterrupt:  # of `_interrupting`
            raise Stopped("the study is being stopped") from None
        return self._result(report | {"run": trial.run})

    def _result(self, report: dict[str, Any]) -> dict[str, Any]:
        rest = {key: value for key, value in report.items() if key != "metrics"}
        done = report["images"] >= self._milestones[-1]
        self._reference = {key: report[key] for key in ("run", "checkpoint", "images")}
        since = report["images"] - self._exchanged_at
        return {**rest, **report["metrics"], SINCE_EXCHANGE: since, "done": done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Where the newest report's checkpoint is committed: its bytes stay in the trial's run."""
        Path(checkpoint_dir, REFERENCE).write_text(json.dumps(self._reference))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """The next step goes on from the newest commit of the run that the record names."""
        self._reference = json.loads(Path(checkpoint, REFERENCE).read_text())


def _interrupting(link: MonitorLink) -> Callable[[TrainingProgress], None]:
    """`watch` for a run of several workers: Ray Train blocks this process's main thread, and ends the run at Ctrl-C."""
    interrupted = False

    def watch(progress: TrainingProgress) -> None:  # called from another thread
        nonlocal interrupted
        link.watch(progress)
        if link.stopped() and not interrupted:
            interrupted = True
            _thread.interrupt_main()

    return watch
