"""A study's trials as an Optuna study, for its pictures, and which dimensions mattered (conditional PED-ANOVA)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from scoreray.tune.schedule import cost_of
from scoreray.tune.space import Dimension
from scoreray.tune.sweep import MAXIMISED, StudyPlan
from scoreray.tune.trial import Trial

FEWEST = 8  # trials below which a dimension's importance is noise


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


def distribution(dimension: Dimension) -> Any:
    """A dimension as Optuna's distribution."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.kind == "choice":
        return CategoricalDistribution(dimension.categories)
    if dimension.kind == "int":
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def importance(plan: StudyPlan, trials: Sequence[Trial]) -> tuple[dict[str, float], str]:
    """Share of each dimension in what makes a trial good, of the first metric; and of which trials that is, or why
    there is none.

    Optuna's PED-ANOVA (Watanabe 2023), with its extension to conditional dimensions (arXiv 2601.20800).
    """
    from optuna.importance import get_param_importances

    chosen, note = comparable(plan, trials)
    having = {one.key: [t for t in chosen if one.key in t.values] for one in plan.space.dimensions if chosen}
    too_few = [key for key, some in having.items() if len(some) < FEWEST]
    note = "; ".join([note, *(f"{key} in too few of them" for key in too_few)])
    keys = [key for key in having if key not in too_few]
    if not keys:
        return {}, note
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shares = get_param_importances(optuna_study(plan, chosen), params=keys, target=target_of(plan), normalize=False)
    total = sum(shares.values())
    if total == 0:
        return {}, f"{note}; no difference found"
    return {key: share / total for key, share in shares.items()}, note


def target_of(plan: StudyPlan) -> Callable[[Any], float] | None:
    """What Optuna takes as a trial's worth where there are several metrics: the first, less is better."""
    first, *others = plan.sweep.metric.names
    sign = -1.0 if first in MAXIMISED else 1.0
    return (lambda trial: sign * trial.values[0]) if others else None


def comparable(plan: StudyPlan, trials: Sequence[Trial]) -> tuple[list[Trial], str]:
    """Trials that importance is taken of, as they stood at one stop, and a word on them; none where too few.

    The finished trials; where asha left too few of these, all that reached its farthest stop with enough.
    """
    first = plan.sweep.metric.names[0]
    done = [trial for trial in trials if trial.state == "done" and math.isfinite(cost_of(trial, first))]
    if len(done) >= FEWEST:
        return done, f"{len(done)} finished trials"
    if plan.sweep.scheduler.kind == "asha":
        for images in sorted({report["images"] for trial in trials for report in trial.reports}, reverse=True):
            reached = [_as_at(trial, images) for trial in trials if any(r["images"] == images for r in trial.reports)]
            reached = [trial for trial in reached if math.isfinite(cost_of(trial, first))]
            if len(reached) >= FEWEST:
                return reached, f"{len(reached)} trials as they stood at {images:,} images"
    return [], f"too few finished trials ({len(done)} of {FEWEST})"


def _as_at(trial: Trial, images: int) -> Trial:
    """A trial as if it had ended at a stop that it has reported."""
    return replace(trial, state="done", reports=[r for r in trial.reports if r["images"] <= images])
