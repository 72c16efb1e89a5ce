"""How a model of few steps is drawn from by default, and what is refused of it, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scoreray.data.own_code import is_own
from scoreray.sampling.guidance.steering import Guidance
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.samplers.sample import OF_MAPS
from scoreray.sampling.samplers.sigmas import Grid

TARGET = "target"  # the option of `consistency` for networks that take the level to reach
CONSISTENCY, FLOW_MAP = "consistency", "flow_map"
OWN_SAMPLERS = {"consistency": CONSISTENCY, "flow_map": FLOW_MAP, "progressive": "euler"}  # by `ModelInfo.map`
NUM_STEPS = 2


def few_step_defaults(info: ModelInfo) -> tuple[str, int, str]:
    """Sampler, steps and grid of a request that names none; of a model of the mean, Heun on 18 of Karras' levels."""
    if info.map == "none":
        return "heun", 18, "karras"
    steps, grid = NUM_STEPS, "interior"
    if info.map == "progressive":  # the steps that it was distilled to
        steps, grid = getattr(info.config.objective, "steps", steps), getattr(info.config.objective, "grid", grid)
    return OWN_SAMPLERS[info.map], steps, grid


def draws_by_map(info: ModelInfo, sampler: str) -> bool:
    """Whether a sampler takes from the network the map that it learned; else it takes the mean E[x_0 | x]."""
    return bool(info.instead_of_mean) or (info.map == "flow_map" and sampler in OF_MAPS)


def few_step_mistake(
    info: ModelInfo,
    sampler: str,
    steps: int | None,
    grid: Grid | None,
    options: Mapping[str, Any],
    guidance: Guidance,
    is_measured: bool,
) -> tuple[str, str] | None:
    """(message, field) where a request asks for what a model's network does not give; None where it fits.

    Own samplers are taken as they are: they may be made for such a model.
    """
    own, kind = OWN_SAMPLERS.get(info.map), info.config.objective.kind
    if info.map != "flow_map" and (sampler == FLOW_MAP or (sampler == CONSISTENCY and options.get(TARGET))):
        what, field = (f"sampler '{FLOW_MAP}'", "sampler") if sampler == FLOW_MAP else (f"{TARGET} = true", "options")
        return f"{what} needs a network that takes the level to reach; objective.kind '{kind}' trains none", field
    allowed = [own, *(["ddim"] if info.map == "progressive" and not options.get("eta") else [])]
    if info.instead_of_mean and sampler not in allowed and not is_own(sampler):
        return f"sampler '{sampler}' needs E[x_0 | x]: {info.instead_of_mean}; choose {own}", "sampler"
    if info.map == "progressive":
        _, own_steps, own_grid = few_step_defaults(info)
        for name, given, learned in (("steps", steps, own_steps), ("grid", grid, own_grid)):
            if given not in (None, learned):
                return f"{name} = {given}: {info.instead_of_mean}, {name} = {learned}; leave {name} out", name
    if info.guidance_range is not None and not guidance.does_nothing:
        low, high = info.guidance_range
        if guidance != Guidance(guidance.weight):
            return "guidance is one weight, an input of this model's network: leave all else of it out", "guidance"
        if not low <= guidance.weight <= high:
            return f"guidance = {guidance.weight:g}: this model learned weights from {low:g} to {high:g}", "guidance"
    if not draws_by_map(info, sampler):
        return None
    if not guidance.does_nothing and info.guidance_range is None:
        without = f"guidance adds up means E[x_0 | x], which sampler '{sampler}' does not take of this model"
        return f"{without}; leave it out, or train with objective.teacher.guidance", "guidance"
    if is_measured:
        how = "; choose --sampler heun" if info.map == "flow_map" else ""
        without = f"--inpaint and --inverse correct means E[x_0 | x], which sampler '{sampler}' does not take"
        return f"{without} of this model{how}", "sampler"
    return None
