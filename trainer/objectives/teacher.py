"""The teacher of a few-step model: a trained denoiser that its objective asks for estimates along the noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, ConfigDict
from torch import Tensor

from scoreray.data import checks
from scoreray.data.errors import UserError, shortened
from scoreray.data.units import NumberAsText
from scoreray.trainer.diffusion.condition import (
    AnyCondition,
    Condition,
    Conditions,
    as_condition,
)
from scoreray.trainer.diffusion.denoiser import Denoiser, like
from scoreray.trainer.diffusion.levels import GUIDANCE_WEIGHT

MAX_GUIDANCE = 100.0  # of either sign; beyond it samples are noise or not finite


def _weight_or_range(value: Any) -> Any:
    """A number or two: one message, where pydantic would report a mistake for each member of the union."""
    ends = list(value) if isinstance(value, list | tuple) else [value]
    if len(ends) > 2 or not ends or not all(isinstance(e, int | float) and not isinstance(e, bool) for e in ends):
        raise ValueError(f"{shortened(repr(value))} is not accepted; it should be a weight, or [lowest, highest]")
    return tuple(map(float, ends)) if isinstance(value, list | tuple) else float(value)


@dataclass(frozen=True)
class TeacherConfig:
    """The model whose probability-flow ODE a student learns.

    checkpoint: a run (its newest checkpoint), one checkpoint's folder, or an exported or imported model.  ema: a length
    that it holds, or "weights" without averaging; None takes its first length.  guidance: the weight of
    classifier-free guidance that the student learns as its own (1 is none), or [lowest, highest]: drawn for each
    sample, and given to the student as its condition `guidance_weight`.
    """

    checkpoint: str
    ema: NumberAsText | None = None
    guidance: Annotated[float | tuple[float, float], BeforeValidator(_weight_or_range)] = 1.0

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        for weight in self.guidance if isinstance(self.guidance, tuple) else (self.guidance,):
            checks.between("objective.teacher", -MAX_GUIDANCE, MAX_GUIDANCE, guidance=weight)
        if self.guidance_range is not None:
            low, high = self.guidance_range
            if low >= high:
                raise UserError(
                    f"objective.teacher.guidance is [{low:g}, {high:g}]: the lowest weight must be below the highest"
                )

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """What a sample's weight is drawn from; None of a weight that is the same for all."""
        return self.guidance if isinstance(self.guidance, tuple) else None


class Teacher:
    """A frozen denoiser, guided. It is no module, so that an engine neither casts, shards nor stores it.

    denoiser: on the student's device, in the dtype that its weights are to be computed in.  guidance: the weight where
    a sample's condition has no `guidance_weight` (whose null is the weight 1).
    """

    def __init__(self, denoiser: Denoiser, guidance: float = 1.0) -> None:
        self.denoiser, self.guidance = denoiser.requires_grad_(False).eval(), guidance

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, condition: AnyCondition = None) -> Tensor:
        """D(null) + w (D(condition) - D(null)) [B, ...] at x [B, ...], sigma [B] (Ho & Salimans 2022, eq. 6).

        condition: the student's; of it the teacher gets what its own network was built for. A teacher that has learnt
        `guidance_weight` itself gets the weight as it is.
        """
        known = self.denoiser.conditions
        everything = as_condition(condition, known or {})
        given = everything if known is None or everything is None else everything.select(known)
        weight = self._weight(everything, known or {}, x)
        if weight is None or given is None:
            return self.denoiser.denoise(x, sigma, given)
        both = Condition.cat([given, given.null()], [len(x)] * 2)
        strong, base = self.denoiser.denoise(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return base + weight * (strong - base)

    def _weight(self, condition: Condition | None, known: Conditions, x: Tensor) -> float | Tensor | None:
        """Of each sample [B, 1, ...], or of all; None where it is 1 for all."""
        if condition is None or GUIDANCE_WEIGHT in known or GUIDANCE_WEIGHT not in condition.values:
            return None if self.guidance == 1 else self.guidance
        drawn = condition.values[GUIDANCE_WEIGHT].flatten().to(x)
        return like(drawn.where(condition.mask(GUIDANCE_WEIGHT), 1), x)
