"""A study's trials as an Optuna study, and which dimensions mattered (PED-ANOVA)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scoreray.tune.schedule import cost_of
from scoreray.tune.space import Dimension
from scoreray.tune.sweep import MAXIMISED, StudyPlan
from scoreray.tune.trial import Trial

FEWEST = 8  # trials below which a dimension's importance is noise


def optuna_study(plan: StudyPlan, trials: Sequence[Trial], **given: Any) -> Any:
    """An Optuna study with these trials: those stopped early as pruned, those under way as running.

    given: what else `optuna.create_study` takes; without a storage the study is in memory.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    names = plan.sweep.metric.names
    directions: Any = ["maximize" if name in MAXIMISED else "minimize" for name in names]
    study = optuna.create_study(directions=directions, **given)
    State = optuna.trial.TrialState
    states = {"done": State.COMPLETE, "stopped": State.PRUNED, "running": State.RUNNING, "failed": State.FAIL}
    for trial in trials:
        kinds = {one.key: one for one in plan.space.dimensions if one.key in trial.values}
        made = optuna.trial.create_trial(
            state=states[trial.state],
            params={key: one.encoded(trial.values[key]) for key, one in kinds.items()},
            distributions={key: distribution(one) for key, one in kinds.items()},
            values=[trial.metrics[name] for name in names] if trial.state == "done" and trial.metrics else None,
            intermediate_values=_on_the_way(trial, names[0]) if len(names) == 1 else {},
        )
        study.add_trial(made)
    return study


def _on_the_way(trial: Trial, name: str) -> dict[int, float]:
    """Images seen -> metric, of each report of a trial that can be compared; Optuna takes no NaN."""
    metrics = {report["images"]: report["metrics"][name] for report in trial.reports}
    return {images: value for images, value in metrics.items() if math.isfinite(value)}


def distribution(dimension: Dimension) -> Any:
    """Optuna's own word for a dimension."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.kind == "choice":
        return CategoricalDistribution(dimension.categories)
    if dimension.kind == "int":
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def importance(plan: StudyPlan, trials: Sequence[Trial]) -> tuple[dict[str, float], str]:
    """Share of each dimension in what makes a trial good, by PED-ANOVA (Watanabe 2023), of the first metric; and of
    which trials that is, or why there is none.

    Of the finished trials; where asha left too few of these, of all that reached its farthest stop with enough. A
    conditional dimension's share is among the trials that have it, times their part.
    """
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    chosen, note = _telling(plan, trials)
    found: dict[str, float] = {}
    untold = []
    for one in plan.space.dimensions if chosen else ():
        having = [trial for trial in chosen if one.key in trial.values]
        if len(having) < FEWEST or len({str(trial.values[one.key]) for trial in having}) < 2:
            untold.append(f"{one.key} in too few of them" if len(having) < FEWEST else f"{one.key} the same in all")
            continue
        common = [key for key in having[0].values if all(key in trial.values for trial in having)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna_study(plan, having)
            evaluator = PedAnovaImportanceEvaluator()
            several = len(plan.sweep.metric.names) > 1
            target = (lambda trial: trial.values[0]) if several else None
            values = get_param_importances(study, evaluator=evaluator, params=common, target=target, normalize=False)
        found[one.key] = float(values[one.key]) * len(having) / len(chosen)
    note = "; ".join([note, *untold])
    total = sum(found.values())
    if total > 0:
        return {key: value / total for key, value in found.items()}, note
    return {}, f"{note}; no difference found" if found else note


def _telling(plan: StudyPlan, trials: Sequence[Trial]) -> tuple[list[Trial], str]:
    """Trials that importance is taken of, as they stood at one stop, and a word on them; none where too few."""
    first = plan.sweep.metric.names[0]
    done = [trial for trial in trials if trial.state == "done" and math.isfinite(cost_of(trial, first))]
    if len(done) >= FEWEST:
        return done, f"{len(done)} finished trials"
    if plan.sweep.scheduler.kind == "asha":
        for images in sorted({report["images"] for trial in trials for report in trial.reports}, reverse=True):
            there = [_as_at(trial, images) for trial in trials if any(r["images"] == images for r in trial.reports)]
            there = [trial for trial in there if math.isfinite(cost_of(trial, first))]
            if len(there) >= FEWEST:
                return there, f"{len(there)} trials as they stood at {images:,} images"
    return [], f"too few finished trials ({len(done)} of {FEWEST})"


def _as_at(trial: Trial, images: int) -> Trial:
    """A trial as if it had ended at a stop that it has reported."""
    return replace(trial, state="done", reports=[r for r in trial.reports if r["images"] <= images])
