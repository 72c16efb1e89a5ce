"""Guidance: wrappers that make one denoiser out of others. Every sampler takes the result like any denoiser.

All strengthen D_base towards D_strong, denoised = D_base + weight (D_strong - D_base): weight 0 is the base, 1 is the
strong one, above 1 is guidance. (Ho & Salimans 2022 write w = weight - 1.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.samplers.ode import Steps

Denoise = Callable[..., Tensor]


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance: from the estimate without a class towards the one with it (Ho & Salimans 2022, eq. 6).

    Both come of one call with twice the rows (with as many at weight 0 or 1). The denoiser must have been trained with
    label dropout, so that it knows the null label -1. Raises UserError without class labels or classes.
    """

    denoiser: Denoise
    weight: float

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        if getattr(getattr(self.denoiser, "network", None), "num_classes", None) == 0:
            raise UserError(f"guidance {self.weight:g}: this network has no classes; leave guidance out")

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        if class_labels is None:
            raise UserError(f"guidance {self.weight:g} needs class_labels: give one class per row")
        if self.weight == 1:
            return self.denoiser(x, sigma, class_labels)
        null = torch.full_like(class_labels, -1)
        if self.weight == 0:
            return self.denoiser(x, sigma, null)
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([class_labels, null]))
        strong, base = both.chunk(2)
        return torch.lerp(base, strong, self.weight)


@dataclass(frozen=True)
class Autoguidance:
    """Guidance by a worse version of the model: smaller, trained less, or of a shorter EMA (Karras 2024, autoguidance).

    `weak` may also be an unconditional model: guidance across models. Works with and without class labels.
    """

    denoiser: Denoise
    weak: Denoise
    weight: float

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        arguments = (x, sigma) if class_labels is None else (x, sigma, class_labels)
        return torch.lerp(self.weak(*arguments), self.denoiser(*arguments), self.weight)


@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by a classifier of noisy data: score + weight grad log p(class | x; sigma) (Dhariwal & Nichol 2021).

    log_probability: `(x [B, ...], sigma [B], class_labels [B]) -> [B]`, differentiable in x. Weight 1 is Bayes' rule.
    """

    denoiser: Denoise
    log_probability: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight: float

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        if class_labels is None:
            raise UserError("classifier guidance needs class_labels: give one class per row")
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_probability(leaf, sigma, class_labels).sum(), leaf)
        variance = sigma.to(x.dtype).square().view(-1, *[1] * (x.ndim - 1))
        return self.denoiser(x, sigma) + self.weight * variance * gradient


@dataclass(frozen=True)
class Interval:
    """Guidance at noise levels in [low, high] only, the plain denoiser outside (Kynkaanniemi 2024): rows that are not
    guided do not cost the second estimate. Asks the device for its noise levels at each call."""

    guided: Denoise
    denoiser: Denoise
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise UserError(f"guidance interval [{self.low:g}, {self.high:g}]: must be 0 <= low < high")

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        arguments = (x, sigma) if class_labels is None else (x, sigma, class_labels)
        inside = (sigma >= self.low) & (sigma <= self.high)
        if bool(inside.all()):
            return self.guided(*arguments)
        if not bool(inside.any()):
            return self.denoiser(*arguments)
        out = torch.empty_like(x)
        for rows, denoiser in ((inside, self.guided), (~inside, self.denoiser)):
            out[rows] = denoiser(*(argument[rows] for argument in arguments))
        return out


def classifier_free_steps(steps: Steps, weight: float) -> Steps:
    """A sampler's generator under classifier-free guidance: it yields both halves, [x, x], and merges what comes back.

    For a batcher, in which each request has a weight of its own; the labels of its rows are `doubled_labels`.
    """
    try:
        x, sigma = next(steps)
        while True:
            both = yield torch.cat([x, x]), torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) else sigma
            strong, base = both.chunk(2)
            x, sigma = steps.send(torch.lerp(base, strong, weight))
    except StopIteration as end:
        return end.value


def doubled_labels(class_labels: Tensor) -> Tensor:
    """The labels of the rows that `classifier_free_steps` yields: the classes, then as many null labels."""
    return torch.cat([class_labels, torch.full_like(class_labels, -1)])


def _check_weight(weight: float) -> None:
    if not math.isfinite(weight):
        raise UserError(f"guidance weight {weight}: must be a finite number; 1 is no guidance, above 1 strengthens it")
