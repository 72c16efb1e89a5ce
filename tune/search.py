"""Which values trials have: at random, on a grid, or by one of Ray Tune's searchers, over a sweep's space."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scoreray.data.errors import UserError, key_in_errors
from scoreray.tune.plugins import SEARCHERS, build, plugin_class
from scoreray.tune.space import Dimension, Space, Values
from scoreray.tune.sweep import MAXIMISED, POPULATIONS, StudyPlan, goals
from scoreray.tune.trial import Trial

if TYPE_CHECKING:
    from ray.tune.search import Searcher

OPTUNA = ("tpe", "optuna")
DRAWN = ("random", "grid")  # values that depend on no other trial


@key_in_errors("search")
def searcher(plan: StudyPlan, trials: Sequence[Trial]) -> Searcher | None:
    """Ray Tune's searcher of a sweep, None where each trial's values are `drawn`.

    It has its metric and mode, so TuneConfig has none. Trials on record that have ended count as evaluated; what it
    suggests first are the values of those under way, then the base config's where trial 0 is not on record.
    A function of the sweep and the records. Raises UserError where it can't be had.
    """
    kind = plan.sweep.search.kind
    if kind in DRAWN or plan.sweep.scheduler.kind in POPULATIONS:
        return None
    points = [trial.values for trial in trials if trial.state == "running"]
    if all(trial.number != 0 for trial in trials):
        points += [default] if (default := _first_values(plan)) is not None else []
    ended = [trial for trial in trials if trial.state != "running"]
    return _optuna(plan, ended, points) if kind in OPTUNA else _named(plan, ended, points)


def num_trials(plan: StudyPlan) -> int:
    """Trials of the whole study; a grid has no more than its points."""
    search = plan.sweep.search
    if search.kind == "grid":
        return min(plan.sweep.trials, len(plan.space.grid(search.points, plan.base)))
    return plan.sweep.trials


def drawn(plan: StudyPlan, number: int) -> Values:
    """Values of trial `number` where they depend on no other trial: the base config's own for the first, then on the
    grid or at random, a function of the seed and the number."""
    search = plan.sweep.search
    if number == 0 and (default := _first_values(plan)) is not None:
        return default
    if search.kind == "grid":
        return plan.space.grid(search.points, plan.base)[number]
    return plan.space.draw(random.Random(f"{plan.sweep.study.seed}/{number}"), plan.base)


def values(plan: StudyPlan, config: Mapping[str, Any]) -> Values:
    """A trial's values of the config that Tune gives it."""
    return plan.space.decoded(config, plan.base)


def _first_values(plan: StudyPlan) -> Values | None:
    """The base config's own values, for the first trial, where the space has them."""
    search = plan.sweep.search
    return plan.default() if search.default_first and search.kind != "grid" else None


def _seed(plan: StudyPlan, trials: Sequence[Trial]) -> int:
    """Of a searcher that goes on after these trials, whose first values it should not draw again."""
    return (plan.sweep.study.seed * 1_000_003 + len(trials)) % 2**32


@dataclass(frozen=True)
class DefineByRun:
    """The space as Optuna's define-by-run function, which honours conditions. A class, as `OptunaSearch` pickles it."""

    space: Space
    base: dict[str, Any]

    def __call__(self, trial: Any) -> None:
        found: Values = {}
        for one in self.space.dimensions:
            if self.space.active(one, found, self.base):
                found[one.key] = one.decoded(_suggested(trial, one))


def _optuna(plan: StudyPlan, ended: Sequence[Trial], points: Sequence[Values]) -> Searcher:
    """Optuna's search; by default the tree-structured Parzen estimator (Bergstra 2011) over all dimensions together
    (Falkner 2018).

    `OptunaSearch` takes no evaluated points beside a define-by-run space, and takes a storage: that has them.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    options = {"sampler": "TPESampler", **plan.sweep.search.options}
    name = str(options.pop("sampler"))
    given: dict[str, Any] = {"seed": _seed(plan, ended), "n_startup_trials": plan.sweep.search.startup,
                             "multivariate": True, "group": True, "constant_liar": True}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        place = f"optuna.samplers:{name}"
        sampler = build(plugin_class(place, {place: place}), given, options)
        storage = optuna.storages.InMemoryStorage()
        study = optuna_study(plan, ended, storage=storage, study_name="scoreray")
        for point in points:
            study.enqueue_trial(plan.space.encoded(point))
        metric, mode = goals(plan.sweep)
        return OptunaSearch(DefineByRun(plan.space, plan.base), metric=metric, mode=mode, sampler=sampler,
                            storage=storage, study_name="scoreray")  # fmt: skip


def optuna_study(plan: StudyPlan, trials: Sequence[Trial], names: Mapping[str, str] | None = None, **given: Any) -> Any:
    """An Optuna study with these trials: those stopped early as pruned, those under way as running.

    names: of its parameters where those are not the dimensions' keys. given: what else `optuna.create_study` takes;
    without a storage the study is in memory.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    metrics, named = plan.sweep.metric.names, names or {}
    directions: Any = ["maximize" if name in MAXIMISED else "minimize" for name in metrics]
    study = optuna.create_study(directions=directions, **given)
    State = optuna.trial.TrialState
    states = {"done": State.COMPLETE, "stopped": State.PRUNED, "running": State.RUNNING, "failed": State.FAIL}
    for trial in trials:
        kinds = {one.key: one for one in plan.space.dimensions if one.key in trial.values}
        made = optuna.trial.create_trial(
            state=states[trial.state],
            params={named.get(key, key): one.encoded(trial.values[key]) for key, one in kinds.items()},
            distributions={named.get(key, key): distribution(one) for key, one in kinds.items()},
            values=[trial.metrics[name] for name in metrics] if trial.state == "done" and trial.metrics else None,
            intermediate_values=_on_the_way(trial, metrics[0]) if len(metrics) == 1 else {},
        )
        study.add_trial(made)
    return study


def _on_the_way(trial: Trial, name: str) -> dict[int, float]:
    """Images seen -> metric, of each report of a trial that can be compared; Optuna takes no NaN."""
    metrics = {report["images"]: report["metrics"][name] for report in trial.reports}
    return {images: value for images, value in metrics.items() if math.isfinite(value)}


def _named(plan: StudyPlan, ended: Sequence[Trial], points: Sequence[Values]) -> Searcher:
    """Another searcher, over all dimensions: those that do not exist beside others are left out of what it gives.

    What is on record is given to it as points to evaluate, and at once evaluated.
    """
    search, seed = plan.sweep.search, _seed(plan, ended)
    metric, mode = goals(plan.sweep)
    middle = {one.key: one.at(0.5) for one in plan.space.dimensions}
    known = [plan.space.encoded(middle | one) for one in (*(trial.values for trial in ended), *points)]
    given = {"metric": metric, "mode": mode, "points_to_evaluate": known or None, "seed": seed,
             "random_state_seed": seed, "n_initial_points": search.startup}  # fmt: skip
    kind = plugin_class(search.kind, SEARCHERS)
    made: Searcher = build(kind, given, search.options)
    try:
        fits = made.set_search_properties(metric, mode, {one.key: domain(one) for one in plan.space.dimensions})
    except Exception as error:  # of whatever library it stands on: a kind of dimension that it does not have
        raise UserError(f"'{search.kind}' can't search this space: {' '.join(str(error).split())}") from None
    if not fits:
        raise UserError(f"'{search.kind}' takes no space from Ray Tune: its set_search_properties returns False")
    for trial in ended:
        made.suggest(name := f"trial-{trial.number:05d}")
        failed = trial.state == "failed"
        made.on_trial_complete(name, None if failed else {"images": trial.images, **(trial.metrics or {})}, failed)
    return made


def domain(one: Dimension) -> Any:
    """A dimension in Ray Tune's terms."""
    from ray import tune

    if one.kind == "choice":
        return tune.choice(one.categories)
    if one.kind == "int":
        return (tune.lograndint if one.log else tune.randint)(int(one.low), int(one.high) + 1)
    return (tune.loguniform if one.log else tune.uniform)(one.low, one.high)


def distribution(one: Dimension) -> Any:
    """A dimension in Optuna's terms."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if one.kind == "choice":
        return CategoricalDistribution(one.categories)
    kind: Any = IntDistribution if one.kind == "int" else FloatDistribution
    return kind(one.low, one.high, log=one.log)


def _suggested(trial: Any, one: Dimension) -> Any:
    if one.kind == "choice":
        return trial.suggest_categorical(one.key, one.categories)
    return (trial.suggest_int if one.kind == "int" else trial.suggest_float)(one.key, one.low, one.high, log=one.log)
