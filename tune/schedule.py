"""Which trials continue, and with which weights: by Ray Tune's schedulers; and who hears of it: its callbacks."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from scoreray.data.errors import UserError, key_in_errors
from scoreray.tune.plugins import CALLBACKS, SCHEDULERS, build, plugin_class
from scoreray.tune.search import domain
from scoreray.tune.sweep import MAXIMISED, POPULATIONS, StudyPlan, goals
from scoreray.tune.trial import Trial

if TYPE_CHECKING:
    from ray.tune import Callback
    from ray.tune.schedulers import TrialScheduler


RESAMPLED = 0.25  # probability of drawing a value again, Tune's default
ON_RECORD = "on_record"  # marks a result that a study which goes on reports once more, to show it
SINCE_EXCHANGE = "images_since_exchange"  # that was the last before this start: schedulers begin with a first one


def milestones(plan: StudyPlan) -> list[int]:
    """Images at which a trial reports, ascending, the last its end."""
    scheduler, total = plan.sweep.scheduler, plan.total
    if scheduler.kind == "asha":
        assert scheduler.grace_images is not None
        rungs = itertools.takewhile(
            lambda images: images < total, (scheduler.grace_images * scheduler.reduction**k for k in itertools.count())
        )
        return [*rungs, total]
    if scheduler.every_images is not None:
        return [*range(scheduler.every_images, total, scheduler.every_images), total]
    return [total]


def next_milestone(stops: Sequence[int], images: int) -> int:
    """Of these milestones the one that a trial trains to from here; at its end that."""
    return next((one for one in stops if one > images), stops[-1])


@dataclass(eq=False)
class RecordedTrial:
    """What schedulers look at of a trial, for the reports of one that is on record."""

    trial_id: str
    config: dict[str, Any]


@key_in_errors("scheduler")
def scheduler(plan: StudyPlan, trials: Sequence[Trial] = ()) -> TrialScheduler | None:
    """Ray Tune's scheduler of a sweep, by images seen. Raises UserError where it can't be had.

    asha, median and a user's own don't stop the base config's trial, which the report compares with. asha and median
    compare with what the trials on record have reported, in the order of `seq`.
    """
    section, default = plan.sweep.scheduler, plan.default()
    if section.kind == "none":
        return None
    kind = plugin_class(section.kind, SCHEDULERS)
    metric, mode = goals(plan.sweep)
    given = {
        "time_attr": "images", "metric": metric, "mode": mode, "max_t": plan.total,
        "grace_period": section.grace_images or section.every_images, "reduction_factor": section.reduction,
        "perturbation_interval": section.every_images, "quantile_fraction": section.quantile, "synch": True,
    }  # fmt: skip
    if section.kind == "hyperband":  # its first bracket has about ln max_t trials: in images too many, in stretches not
        given |= {"time_attr": "training_iteration", "max_t": len(milestones(plan))}
    elif section.kind in POPULATIONS:
        kind = _without_the_failed(kind)
        ranges = [one for one in plan.space.dimensions if one.kind != "choice"]
        given |= {
            "time_attr": SINCE_EXCHANGE,
            "custom_explore_fn": partial(allowed, plan),
            "hyperparam_mutations": {one.key: domain(one) for one in ranges},
            "hyperparam_bounds": {one.key: [one.low, one.high] for one in ranges},
        }
    else:
        spared = default if plan.sweep.search.default_first else None
        kind = _sparing(kind, None if spared is None else plan.space.encoded(spared), plan.total)
    made: TrialScheduler = build(kind, given, section.options)
    if section.kind in ("asha", "median"):
        recorded = {trial.number: RecordedTrial(f"trial-{trial.number}", trial.values) for trial in trials}
        reports = [(report["seq"], trial.number, report) for trial in trials for report in trial.reports]
        for _, number, report in sorted(reports, key=lambda one: one[0]):
            result = {"images": report["images"], **report["metrics"]}
            made.on_trial_add(None, recorded[number])  # type: ignore[arg-type]  # neither looks at the controller
            made.on_trial_complete(None, recorded[number], result)  # type: ignore[arg-type]
    return made


def callbacks(plan: StudyPlan) -> list[Callback]:
    """Ray Tune's callbacks that a sweep names. Raises UserError where one can't be had."""
    return [callback(plan, name) for name in plan.sweep.callbacks]


def callback(plan: StudyPlan, name: str) -> Callback:
    """One of these."""
    given = {"experiment_name": plan.sweep.study.name, "project": plan.sweep.study.name}
    with key_in_errors(f"callbacks.{name}"):
        made: Callback = build(_one_line(plugin_class(name, CALLBACKS), name), given, plan.sweep.callbacks[name] or {})
    return made


def _one_line(kind: type[Any], name: str) -> type[Any]:
    """A callback's class whose `setup`, where loggers open their store or log in, fails in one line with its name."""

    @wraps(kind, updated=())  # its constructor's signature: options are checked by that
    class Named(kind):  # type: ignore[misc]
        def setup(self, *arguments: Any, **info: Any) -> None:
            try:
                super().setup(*arguments, **info)
            except Exception as error:
                raise UserError(f"callbacks.{name}: {' '.join(str(error).split()) or type(error).__name__}") from None

    return Named


def _sparing(kind: type[Any], spared: Mapping[str, Any] | None, total: int) -> type[Any]:
    """The scheduler's class, which stops the trial of the `spared` config at `total` images and not before, and counts
    nothing twice of a trial that is on record."""
    from ray.tune.schedulers import AsyncHyperBandScheduler

    # At its end Tune's asha enters a trial at the farthest stop where its id is not: of one that went on after a kill,
    # whose earlier stops are counted by the id of its record, that is a stop that it passed long ago.
    every_stop_reported = issubclass(kind, AsyncHyperBandScheduler)
    outlived = set[str]()  # trials that it would have stopped, whose later reports it does not expect

    class Sparing(kind):  # type: ignore[misc]
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if trial.trial_id in outlived:
                return "CONTINUE"
            decision: str = super().on_trial_result(tune_controller, trial, result)
            early = decision == "STOP" and result["images"] < total
            if early and spared is not None and spared.items() <= trial.config.items():
                outlived.add(trial.trial_id)
                return "CONTINUE"
            return decision

        def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
            if isinstance(trial, RecordedTrial) or not (every_stop_reported or result.get(ON_RECORD)):
                super().on_trial_complete(tune_controller, trial, result)

    return Sparing


def exchanged_at(trials: Sequence[Trial]) -> int:
    """Images at which a population has exchanged weights last."""
    return max((one["images"] for trial in trials for one in trial.lineage), default=0)


def _without_the_failed(kind: type[Any]) -> type[Any]:
    """Population-based training's class, whose members don't wait for one that has failed: Tune's do so for ever where
    the others had all come to the exchange before (seen in Ray 2.60)."""

    class WithoutTheFailed(kind):  # type: ignore[misc]
        def choose_trial_to_run(self, tune_controller: Any) -> Any:
            live = tune_controller.get_live_trials()
            live -= {trial for trial in live if trial.is_finished()}  # those that an error ended are still in there
            waiting = [trial for trial in live if trial.status == "PAUSED"]
            chosen = super().choose_trial_to_run(tune_controller)
            if chosen is None and waiting and len(waiting) == len(live):
                self.on_trial_result(tune_controller, waiting[0], waiting[0].last_result)
                chosen = super().choose_trial_to_run(tune_controller)
            return chosen

    return WithoutTheFailed


def expected_images(plan: StudyPlan) -> float:
    """How far a trial comes on average, where asha continues exactly the share that it plans to."""
    share = 1 / plan.sweep.scheduler.reduction if plan.sweep.scheduler.kind == "asha" else 1.0
    stops = [0, *milestones(plan)]
    return sum((b - a) * share**k for k, (a, b) in enumerate(itertools.pairwise(stops)))


def cost_of(trial: Trial, name: str) -> float:
    """A metric of a trial's newest report, less is better; infinite where there is none."""
    value = (trial.metrics or {}).get(name, math.nan)
    return math.inf if not math.isfinite(value) else -value if name in MAXIMISED else value


def best_of(plan: StudyPlan, trials: Sequence[Trial]) -> list[Trial]:
    """With one metric the finished trials from the best on; with several those that no other beats in all (Pareto)."""
    names = plan.sweep.metric.names
    costs = {trial.number: [cost_of(trial, name) for name in names] for trial in trials}
    finished = [trial for trial in trials if trial.state == "done" and trial.metrics]
    finished.sort(key=lambda trial: (costs[trial.number], trial.number))

    def beaten(trial: Trial) -> bool:
        mine = costs[trial.number]
        others = (costs[other.number] for other in finished)
        return any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in others)

    return finished if len(names) == 1 else [trial for trial in finished if not beaten(trial)]


def allowed(plan: StudyPlan, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose ranges population-based training has mutated: within their bounds, with some choices drawn again,
    and all of it drawn again where a run's config refuses it.

    Tune's own mutation of a list takes its next or last member, as if it had an order, and so loses a good choice.
    """
    choices = [one for one in plan.space.dimensions if one.kind == "choice" and random.random() < RESAMPLED]
    redrawn = {one.key: random.choice(one.categories) for one in choices}
    values = plan.space.decoded({**config, **redrawn}, plan.base)
    try:
        plan.config(values)
    except UserError:
        values = plan.space.draw(random.Random(), plan.base)
    return {**config, **plan.space.encoded(values)}
