"""A study on Ray Tune's `Tuner`: what Tune calls to get the next trial and to report results, and Ctrl-C.

Whatever Tune reports goes into the study's records before anything follows from it. A study that goes on starts a new
Tuner from the records; Tune's own snapshot of an experiment is never read (docs/tune.md, "How trials run").
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import ray
from ray import tune
from ray.tune.search import BasicVariantGenerator, Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scoreray.data import own_code
from scoreray.data.errors import DataError, ScorerayError, StorageError, Unanswered
from scoreray.data.storage.arrow import arrow_location
from scoreray.tune.book import State, StudyBook
from scoreray.tune.monitor import TrialMonitor
from scoreray.tune.schedule import ON_RECORD, callbacks, exchanged_at, scheduler
from scoreray.tune.search import drawn, searcher, values
from scoreray.tune.sweep import StudyPlan, need_of
from scoreray.tune.trainable import REFERENCE, TrialTrainable

TUNE_FOLDER = "ray"
SAVE_S = 25.0  # that trials get to commit what they have trained, when a person stops the study
SHOW_EVERY_S = 0.5
ENVIRONMENT = {
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of trials that are stopped, whose results nobody fetches any more
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of data and plugins mean what they mean elsewhere
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune's would end trials without a commit
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails reports its error, and no metric
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a failure is one line of ours
    "TUNE_WARN_THRESHOLD_S": "10",
    "RAY_AIR_NEW_OUTPUT": "0",  # its reporter prints failures also where it is to be silent
}
REPORTED = (
    "images", "curve", "std_errors", "checkpoint", "ema", "run", "seconds", "trained_s", "started", "first_step",
)  # fmt: skip
ENDING = {kind.__name__: kind for kind in (DataError, StorageError)}


class _Ended(Exception):
    """The study ends early, by `_Recorder.error`: Tune cleans up after an Exception, not after a KeyboardInterrupt."""


def run(book: StudyBook, show: Callable[[State], None]) -> None:
    """The study's trials to their ends, by a Tuner that starts from what is on record.

    Raises what ends every trial; KeyboardInterrupt where a person stopped it, with nothing left running.
    """
    if not book.waiting and len(book.trials) >= book.state.total:
        return
    os.environ.update(ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    local = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": local}
    monitor = ray.remote(**options)(TrialMonitor).remote(book.concurrent)
    try:
        with _interrupts() as interrupted:
            recorder = _Recorder(book, show, monitor, interrupted)
            try:
                _tuner(book, recorder, monitor).fit()
            except Exception as error:  # Tune's own around what was raised
                cause = recorder.error or error.__cause__
                if isinstance(cause, ScorerayError | KeyboardInterrupt):
                    raise cause from None
                raise
    finally:
        ray.kill(monitor)


def _tuner(book: StudyBook, recorder: _Recorder, monitor: Any) -> tune.Tuner:
    plan, numbers = book.plan, recorder.numbers
    search_alg: Any
    space: dict[str, Any] = {}
    members: list[int] = []
    if book.is_population:  # PBT takes no Searcher: all of the population is on record before
        book.populate(lambda number: drawn(plan, number))
        known = [*book.ended_before, *book.waiting]
        search_alg = BasicVariantGenerator([plan.space.encoded(trial.values) for trial in known])
        space = {one.key: one.encoded(one.at(0.5)) for one in plan.space.dimensions}  # where a member has no value
        members = [trial.number for trial in known]
    else:
        search_alg = _Search(book, numbers)

    def name(trial: Any) -> str:
        if trial.trial_id not in numbers:  # of the population, whose trials Tune makes in this order
            numbers[trial.trial_id] = members.pop(0)
        return f"{numbers[trial.trial_id]:05d}"

    filesystem, place = arrow_location(book.store.url(TUNE_FOLDER))
    starts = {key.split("/")[1] for key, _ in book.store.list(f"{TUNE_FOLDER}/")}
    parameters = {"plan": plan, "monitor": monitor, "exchanged_at": exchanged_at(book.trials),
                  "variables": own_code.environment()}  # fmt: skip
    trainable = tune.with_parameters(TrialTrainable, **parameters)
    return tune.Tuner(
        tune.with_resources(trainable, lambda config: _resources(plan, config)),
        param_space=space,
        tune_config=tune.TuneConfig(
            search_alg=search_alg,
            scheduler=scheduler(plan, book.trials),
            num_samples=len(members) or -1,  # as many as the search has
            reuse_actors=True,
            max_concurrent_trials=None if plan.sweep.scheduler.kind == "hyperband" else book.concurrent,
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            name=f"{plan.sweep.study.name}-{len(starts) + 1}",
            storage_path=place,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=plan.sweep.resources.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
            callbacks=[recorder, *callbacks(plan)],
            verbose=0,
        ),
    )


def _resources(plan: StudyPlan, config: dict[str, Any]) -> tune.PlacementGroupFactory:
    """Of a trial's actor. Workers that it starts have a placement group of their own, by Ray Train: such an actor takes
    next to nothing, as Tune refuses a trial that takes nothing at all."""
    run = None if plan.sweep.checkpoint else plan.config(values(plan, config))
    alone = run is None or run.scaling.range[1] == 1
    need = need_of(plan, run) if alone else {"memory": 1.0}
    return tune.PlacementGroupFactory([{name: amount for name, amount in need.items() if amount}])


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the next one raises KeyboardInterrupt."""
    event = threading.Event()

    def interrupt(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Search(Searcher):
    """Trials as the study starts them. New ones have values of the sweep's own searcher, which knows them by number.

    numbers: Tune's id of a trial -> its number in the book.
    """

    def __init__(self, book: StudyBook, numbers: dict[str, int]) -> None:
        super().__init__()
        self._book, self._numbers = book, numbers
        self._searcher = searcher(book.plan, book.trials)
        if self._searcher is not None:
            for trial in book.waiting:  # it has them as its first points
                self._searcher.suggest(str(trial.number))

    def suggest(self, trial_id: str) -> Any:
        trial = self._book.next_trial(self._propose)
        if trial is None:
            return Searcher.FINISHED if self._book.is_complete else None
        self._numbers[trial_id] = trial.number
        return self._book.plan.space.encoded(trial.values)

    def _propose(self, number: int) -> Any:
        plan = self._book.plan
        if self._searcher is None:
            return drawn(plan, number)
        config = self._searcher.suggest(str(number))
        if config == Searcher.FINISHED:
            self._book.state.total = len(self._book.trials)
        return values(plan, config) if isinstance(config, dict) else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._searcher is not None and ON_RECORD not in result:
            self._searcher.on_trial_result(str(self._numbers[trial_id]), result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self._searcher is not None and ON_RECORD not in (result or {}):  # it counts those as evaluated already
            failed = error or "error" in (result or {})
            self._searcher.on_trial_complete(str(self._numbers[trial_id]), None if failed else result, failed)

    def save(self, checkpoint_path: str) -> None:
        if self._searcher is not None:
            self._searcher.save(checkpoint_path)

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a study goes on from its records")


class _Recorder(tune.Callback):
    """Puts what Tune reports on record, and ends the study where a person or an error does.

    numbers: Tune's id of a trial -> its number in the book. error: what ended the book.
    """

    def __init__(
        self, book: StudyBook, show: Callable[[State], None], monitor: Any, interrupted: threading.Event
    ) -> None:
        self.numbers: dict[str, int] = {}
        self.error: BaseException | None = None
        self._book, self._show, self._monitor, self._interrupted = book, show, monitor, interrupted
        self._reply: Any = None
        self._shown_at = 0.0

    def __reduce__(self) -> Any:  # Tune writes a pickle of its Tuner, which nothing reads
        return tune.Callback, ()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """An error of the store or a newer start of the study ends it: Tune would take one here for the trial's."""
        try:
            yield
        except ScorerayError as error:
            self.error = self.error or error

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self._interrupted.is_set():
            self._stop()
            self.error = KeyboardInterrupt()
        if self.error is not None:
            raise _Ended
        now = time.monotonic()
        if now - self._shown_at < SHOW_EVERY_S:
            return
        self._shown_at = now
        self._book.check_owned()
        if self._reply is None:
            self._reply = self._monitor.read.remote()
        elif ray.wait([self._reply], timeout=0)[0]:
            for number, progress in ray.get(self._reply).items():
                if number in self._book.state.running:
                    self._book.state.running[number].progress = progress
            self._reply = None
        self._show(self._book.state)

    def _stop(self) -> None:
        """Have trials at work commit what they have trained, and wait for that."""
        if ray.get(self._monitor.stop.remote()):
            self._book.note("stopping: saving first (once more Ctrl-C: at once)")
        end = time.monotonic() + SAVE_S
        while ray.get(self._monitor.read.remote()) and time.monotonic() < end:
            time.sleep(0.1)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._book.started(self.numbers[trial.trial_id])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number = self.numbers[trial.trial_id]
        if ON_RECORD in result:
            return
        with self._ending():
            if "ends_study" in result:
                raise ENDING[result["ends_study"]](result["error"])
            if "error" in result:
                self._book.failed(number, result["error"])
                return
            metrics = {name: result[name] for name in self._book.plan.sweep.metric.names}
            report = {name: result[name] for name in REPORTED if name in result} | {"metrics": metrics}
            self._book.reported(number, report, bool(result.get("done")))
            for one in trials if self._book.is_population else ():
                self._exchange(one)

    def _exchange(self, trial: Any) -> None:
        """Has a trial take over the checkpoint of another, where the scheduler has given it that."""
        number = self.numbers[trial.trial_id]
        if trial.checkpoint is None or (source := int(PurePath(trial.checkpoint.path).parent.name)) == number:
            return
        with trial.checkpoint.as_directory() as folder:
            images = json.loads(Path(folder, REFERENCE).read_text()).get("images")
        self._book.exchange(number, source, images, values(self._book.plan, trial.config))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if self.error is None:
            with self._ending():
                self._book.ended(self.numbers[trial.trial_id])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._died(trial, last=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._died(trial, last=True)
        with self._ending():
            self._book.ended(self.numbers[trial.trial_id])

    def _died(self, trial: Any, last: bool) -> None:
        number = self.numbers[trial.trial_id]
        self._monitor.end.remote(number)
        with self._ending():
            self._book.died(number, *_reason(trial), last)


def _reason(trial: Any) -> tuple[str, str]:
    """Why a trial could not go on, in words, and the last line of what Ray says of it."""
    lines = [line.strip() for line in Path(trial.error_file).read_text().splitlines() if line.strip()]
    unanswered = [line.partition(": ")[2] for line in lines if line.partition(": ")[0].endswith(Unanswered.__name__)]
    return (unanswered[-1], "") if unanswered else ("its process died", lines[-1])
