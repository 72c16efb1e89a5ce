"""Inputs of a network that are no data: the noise level that a step ends at, and the weight of guidance.

Both are conditions of kind `level`, built, stored and grown as any other, and neither is anything that a user's data
has: its name is reserved, samplers and requests set it. Each is an angle, so that any noise level is within [0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from scoreray.trainer.diffusion.condition import Condition, Conditions, ConditionSpec

TARGET_LEVEL = "target_level"
"""rho <= sigma, the level that one step is to reach (`mean_flow`). A denoiser gives rows without it that of sigma, at
which D(x, sigma, rho) is the plain E[x_0 | x]."""
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


def with_target_level(condition: Condition | None, rho: Tensor | float, x: Tensor, sigma_data: float) -> Condition:
    """`condition` of the rows of x [B, ...], with the level that their step is to reach: a number, or [B]."""
    return _with(condition, TARGET_LEVEL, _angle(_rows(rho, x) / sigma_data))


def with_guidance_weight(condition: Condition | None, weight: Tensor | float, x: Tensor) -> Condition:
    """`condition` of the rows of x [B, ...], with the weight of guidance that the network acts under, above 0: a
    number, or [B]."""
    return _with(condition, GUIDANCE_WEIGHT, _angle(_rows(weight, x) - 1))


def with_own_level(condition: Condition | None, sigma: Tensor, sigma_data: float) -> Condition:
    """`condition` where each row without a target level has that of its own sigma [B]: continuous in rho, as a null of
    its own would not be."""
    own = with_target_level(condition, sigma, sigma, sigma_data)
    if condition is None or TARGET_LEVEL not in condition.values:
        return own
    found = condition.values[TARGET_LEVEL]
    value = torch.where(condition.mask(TARGET_LEVEL)[:, None], found, own.values[TARGET_LEVEL].to(found.dtype))
    return replace(own, values={**own.values, TARGET_LEVEL: value})


def _rows(value: Tensor | float, x: Tensor) -> Tensor:
    """One number a row of x, float32 or wider: [B]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.as_tensor(value, dtype=dtype, device=x.device).expand(x.shape[0])


def _angle(value: Tensor) -> Tensor:
    return 2 / math.pi * value.atan()


def _with(condition: Condition | None, name: str, angle: Tensor) -> Condition:
    values, masks = ({}, {}) if condition is None else (condition.values, condition.masks)
    there = torch.ones_like(angle, dtype=torch.bool)
    return Condition({**values, name: angle[:, None]}, {**masks, name: there})
