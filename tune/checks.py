"""Checks of a sweep's sections against each other, the base config and the space: lists of mistakes, a line each."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from scoreray.data.errors import UserError, nearest
from scoreray.trainer.config import refusal
from scoreray.tune.plugins import CALLBACKS, SCHEDULERS, SEARCHERS
from scoreray.tune.schedule import callback, scheduler
from scoreray.tune.search import DRAWN, OPTUNA, searcher
from scoreray.tune.space import LEVEL, OPTION, SAMPLE, SAMPLE_KEYS, inside
from scoreray.tune.sweep import METRICS, OF_HELD_OUT, OF_SAMPLES, POPULATIONS, StudyPlan, Sweep, of_samples

SHARED = ("run", "duration")  # the same in all trials, so that they compare
UNSEEN = ("checkpoint", "log", "evaluation")  # sections that no metric depends on
FIXED_IN_A_RUN = ("network", "ema", "data", "denoiser", "init", "optimizer.schedule", "optimizer.frozen", "sample")


def section_mistakes(sweep: Sweep) -> list[str]:
    """What sections say that can't be, or that does not fit what others say."""
    found, metric, scheduler = [], sweep.metric, sweep.scheduler
    if (sweep.base is None) == (sweep.checkpoint is None):
        found.append("base: give either a base config to train, or a checkpoint to draw from")
    if metric.sigma_min >= metric.sigma_max:
        found.append(f"metric.sigma_min: {metric.sigma_min} must be below metric.sigma_max {metric.sigma_max}")
    if not metric.names:
        found.append(f"metric.names: is empty; give one or more of {', '.join(METRICS)}")
    if len(set(metric.names)) != len(metric.names):
        found.append(f"metric.names: {list(metric.names)} names a metric twice")
    found += _kind_mistakes(sweep)
    if sweep.checkpoint is not None:
        if scheduler.kind != "none":
            found.append(f"scheduler.kind: '{scheduler.kind}' stops training, and nothing is trained from a checkpoint")
        found += [
            f"space.{key}: needs training, and this sweep draws from a checkpoint; give a base config, or keep to "
            f"{SAMPLE}{{{', '.join(SAMPLE_KEYS)}}}, {OPTION}NAME and {LEVEL}NAME"
            for key in sweep.space
            if not key.startswith(SAMPLE)
        ]
    for key in sweep.space:
        if any(_touches(key, section) for section in SHARED):
            found.append(
                f"space.{key}: run and duration are not searched; trials share seed and length so that they compare"
            )
        if any(_touches(key, section) for section in UNSEEN):
            found.append(f"space.{key}: changes nothing that a metric sees; set it in the base config")
        if key.startswith(SAMPLE) and not key.startswith((OPTION, LEVEL)) and key[len(SAMPLE) :] not in SAMPLE_KEYS:
            known = (*SAMPLE_KEYS, "options.NAME", "levels.NAME")
            found.append(f"space.{key}: unknown key; {nearest(key[len(SAMPLE) :], known)}")
        elif key in ("sample.steps", "sample.grid") and any(other.startswith(LEVEL) for other in sweep.space):
            found.append(f"space.{key}: the levels under {LEVEL}NAME are the grid; search one or the other")
        elif metric.names and key.startswith(SAMPLE) and not _draws(key, metric.names):
            found.append(
                f"space.{key}: changes nothing that metric.names ({', '.join(metric.names)}) measure; add one of "
                f"{', '.join(OF_SAMPLES)} to them"
            )
    return found


def _kind_mistakes(sweep: Sweep) -> list[str]:
    """Searchers, schedulers and callbacks that are not known, or that lack a key or do not fit the other sections."""
    found, search, scheduler, names = [], sweep.search, sweep.scheduler, sweep.metric.names
    accepted = {
        "search.kind": ([search.kind], (*DRAWN, *OPTUNA, *SEARCHERS)),
        "scheduler.kind": ([scheduler.kind], ("none", *SCHEDULERS)),
        "callbacks": (list(sweep.callbacks), tuple(CALLBACKS)),
    }
    for key, (given, known) in accepted.items():
        found += [
            f"{key}: '{name}' is not known; {nearest(name, known)}, or a class as package.module:Name"
            for name in given
            if name not in known and ":" not in name
        ]
    if search.kind in DRAWN and search.options:
        found.append(f"search.options: '{search.kind}' has none; they are of other kinds")
    if len(names) > 1 and search.kind in SEARCHERS:
        found.append(f"search.kind: '{search.kind}' needs one metric, metric.names has {len(names)}; use tpe")
    if scheduler.kind != "none" and len(names) > 1:
        found.append(f"scheduler.kind: '{scheduler.kind}' needs one metric, metric.names has {len(names)}")
    if scheduler.kind == "asha" and scheduler.grace_images is None:
        found.append("scheduler.grace_images: missing; asha needs the images after which a trial may be stopped")
    if scheduler.kind in SCHEDULERS and scheduler.kind != "asha" and scheduler.every_images is None:
        found.append(f"scheduler.every_images: missing; {scheduler.kind} needs the images between two reports")
    if scheduler.kind in POPULATIONS and sweep.trials < 4:
        found.append(f"trials: {sweep.trials} are no population; {scheduler.kind} needs at least 4")
    if scheduler.kind in POPULATIONS and search.kind not in (*DRAWN, "tpe"):
        found.append(
            f"search.kind: '{search.kind}' with {scheduler.kind}, which chooses values itself; use random or grid"
        )
    return found


def schedule_mistakes(plan: StudyPlan) -> list[str]:
    """What the scheduler can't do with the base config and the space."""
    sweep, total, batch = plan.sweep, plan.total, plan.config({}).data.global_batch_size
    scheduler = sweep.scheduler
    found = []
    for key in ("grace_images", "every_images"):
        step = getattr(scheduler, key)
        if scheduler.kind != "none" and step is not None and not batch <= step < total:
            found.append(f"scheduler.{key}: {step} must be between a batch ({batch}) and duration.images ({total})")
    if scheduler.kind == "pb2":
        found += [
            f"space.{one.key}: pb2 explores ranges that always exist; search it with pbt"
            for one in plan.space.dimensions
            if one.kind == "choice" or one.when
        ]
    if scheduler.kind in POPULATIONS:
        found += [
            f"space.{one.key}: can't change within a trial, so {scheduler.kind} can't explore it; search it with asha"
            for one in plan.space.dimensions
            if any(_touches(one.key, section) for section in FIXED_IN_A_RUN)
        ]
        objectives = [plan.config(values).objective for _, _, values in plan.space.corners(plan.base)]
        kinds = {getattr(getattr(one, "weighting", None), "kind", None) for one in objectives}
        if "learned" in kinds and len(kinds) > 1:
            found.append(
                f"space: weighting.kind 'learned' has weights that others lack, so {scheduler.kind} can't exchange them"
            )
    if scheduler.kind != "none":
        for _, _, values in plan.corners():
            config = plan.config(values)
            if config.scaling.range[1] > 1 and config.optimizer.schedule == "cosine":
                found.append(
                    "optimizer.schedule: a cosine ends with the run, and trials of several workers are stopped by "
                    "ending it; use constant or inverse_sqrt, or scaling.workers=1"
                )
                break
    return found


def check_plugins(plan: StudyPlan) -> None:
    """Raises a UserError with what searcher, scheduler and callbacks refuse, a line each: an option, a kind of
    dimension, a package that is missing.

    Imports Ray, which reads its environment at that moment: call it when that is set, so not as a sweep is loaded.
    """
    parts: list[Callable[[], Any]] = [partial(searcher, plan, ()), partial(scheduler, plan)]
    parts += [partial(callback, plan, name) for name in plan.sweep.callbacks]
    if mistakes := [line for make in parts for line in refused(make)]:
        raise refusal("sweep", mistakes)


def refused(make: Callable[[], Any]) -> list[str]:
    """The mistakes of the UserError that `make` raises, without a heading; none where it raises none."""
    try:
        make()
    except UserError as error:
        lines = [line.strip().removeprefix("config: ") for line in str(error).splitlines()]
        return [line for line in lines if not re.fullmatch(r"\d+ mistakes", line)]
    return []


def _draws(key: str, names: Sequence[str]) -> bool:
    """Whether a key of how samples are drawn can change one of these metrics."""
    if of_samples(names) or (key == "sample.ema" and set(names) & set(OF_HELD_OUT)):
        return True
    return "nfe" in names and key not in ("sample.ema", "sample.guidance")


def _touches(key: str, section: str) -> bool:
    """Whether a searched key changes a section: it is the section, or one contains the other."""
    return inside(key, section) or inside(section, key)
