"""Inputs of a network that are no data: the noise level that a step ends at, and the weight of guidance.

Both are conditions of kind `level`, built, stored and grown as any other, and neither is anything that a user's data
has: its name is reserved, samplers and requests set it. A condition holds the number itself; the denoiser makes an
angle of it, which is bounded, on the way to the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from scoreray.trainer.diffusion.condition import Condition, Conditions, ConditionSpec

TARGET_LEVEL = "target_level"
"""rho <= sigma, the level that one step is to reach (`mean_flow`). Rows without it have rho = sigma, at which
D(x, sigma, rho) is the plain E[x_0 | x]."""
GUIDANCE_WEIGHT = "guidance_weight"
"""The weight of the guidance that the network is to act under; rows without it have weight 1, no guidance."""
LEVELS = (TARGET_LEVEL, GUIDANCE_WEIGHT)
LEVEL = ConditionSpec("level", (1,))


def with_levels(conditions: Conditions, names: Iterable[str]) -> Conditions:
    """What a network is built for that is conditioned by data and takes these levels."""
    return {**conditions, **dict.fromkeys(names, LEVEL)}


def data_conditions(conditions: Conditions) -> Conditions:
    """Those of a network's conditions that are data."""
    return {name: spec for name, spec in conditions.items() if spec.kind != "level"}


def level_names(conditions: Conditions) -> tuple[str, ...]:
    """Those of a network's conditions that are levels."""
    return tuple(name for name, spec in conditions.items() if spec.kind == "level")


def with_target_level(condition: Condition | None, rho: Tensor | float, x: Tensor) -> Condition:
    """`condition` of the rows of x [B, ...], with the level that their step is to reach: a number, or [B]."""
    return _with(condition, TARGET_LEVEL, rho, x)


def with_guidance_weight(condition: Condition | None, weight: Tensor | float, x: Tensor) -> Condition:
    """`condition` of the rows of x [B, ...], with the weight of guidance that the network acts under: a number, or
    [B]."""
    return _with(condition, GUIDANCE_WEIGHT, weight, x)


def as_angles(condition: Condition | None, known: Conditions, sigma: Tensor, sigma_data: float) -> Condition | None:
    """`condition` of rows at sigma [B] as a network built for `known` takes it: rho as 2/pi atan(rho / sigma_data), the
    weight of guidance w as 2/pi atan(w - 1).

    A row without a target level has that of its own sigma, and one without a weight of guidance weight 1: so D is
    continuous where rho comes up to sigma, as it would not be with a null that is learnt beside it.
    """
    if TARGET_LEVEL in known:
        rho = _filled(condition, TARGET_LEVEL, sigma)
        condition = with_target_level(condition, 2 / math.pi * (rho / sigma_data).atan(), sigma)
    if GUIDANCE_WEIGHT in known:
        weight = _filled(condition, GUIDANCE_WEIGHT, torch.ones_like(sigma))
        condition = with_guidance_weight(condition, 2 / math.pi * (weight - 1).atan(), sigma)
    return condition


def _filled(condition: Condition | None, name: str, without: Tensor) -> Tensor:
    """A level of each row [B], and `without` [B] in rows that have none."""
    if condition is None or name not in condition.values:
        return without
    return torch.where(condition.mask(name), condition.values[name][:, 0].to(without), without)


def _with(condition: Condition | None, name: str, value: Tensor | float, x: Tensor) -> Condition:
    """One number a row of x, float32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    found = torch.as_tensor(value, dtype=dtype, device=x.device).expand(x.shape[0])[:, None]
    values, masks = ({}, {}) if condition is None else (condition.values, condition.masks)
    there = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    return Condition({**values, name: found}, {**masks, name: there})
