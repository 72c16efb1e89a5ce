"""Which values the next trial has: at random, on a grid, or by Optuna's TPE.

Each is a function of (seed, number, history), so that a study that was killed proposes what it would have proposed.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from scoreray.tune.importance import optuna_study
from scoreray.tune.space import Dimension, Values
from scoreray.tune.sweep import StudyPlan
from scoreray.tune.trial import Trial

Search = Callable[[StudyPlan, int, Sequence[Trial]], Values]


def num_trials(plan: StudyPlan) -> int:
    """Trials of the whole study; a grid has no more than its points."""
    search = plan.sweep.search
    if search.kind == "grid":
        return min(plan.sweep.trials, len(plan.space.grid(search.points, plan.base)))
    return plan.sweep.trials


def propose(plan: StudyPlan, number: int, trials: Sequence[Trial]) -> Values:
    """Values of trial `number` after these trials; the base config's own for the first, where the space has them."""
    search = plan.sweep.search
    if number == 0 and search.default_first and search.kind != "grid" and (default := plan.default()) is not None:
        return default
    return SEARCHES[search.kind](plan, number, trials)


def _random(plan: StudyPlan, number: int, trials: Sequence[Trial]) -> Values:
    return plan.space.draw(random.Random(f"{plan.sweep.study.seed}/{number}"), plan.base)


def _grid(plan: StudyPlan, number: int, trials: Sequence[Trial]) -> Values:
    return plan.space.grid(plan.sweep.search.points, plan.base)[number]


def _tpe(plan: StudyPlan, number: int, trials: Sequence[Trial]) -> Values:
    """The tree-structured Parzen estimator (Bergstra 2011), over all dimensions together (Falkner 2018)."""
    import optuna

    sweep = plan.sweep
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=sweep.search.startup, multivariate=True, group=True, constant_liar=True,
            seed=(sweep.study.seed * 1_000_003 + number) % 2**32,
        )  # fmt: skip
        study = optuna_study(plan, trials, sampler)
        asked = study.ask()
        values: Values = {}
        for one in plan.space.dimensions:
            if plan.space.active(one, values, plan.base):
                values[one.key] = _suggested(asked, one)
    return values


SEARCHES: dict[str, Search] = {"random": _random, "grid": _grid, "tpe": _tpe}


def _suggested(asked: Any, one: Dimension) -> Any:
    if one.kind == "choice":
        return one.choices[asked.suggest_categorical(one.key, range(len(one.choices)))]
    suggest = asked.suggest_int if one.kind == "int" else asked.suggest_float
    return suggest(one.key, int(one.low) if one.kind == "int" else one.low,
                   int(one.high) if one.kind == "int" else one.high, log=one.log)  # fmt: skip
