"""Guidance: wrappers that make one denoiser out of others. Every sampler takes the result like any denoiser.

All strengthen D_base towards D_strong, denoised = D_base + weight (D_strong - D_base): weight 0 is the base, 1 is the
strong one, above 1 is guidance. (Ho & Salimans 2022 write w = weight - 1.)

With a weight for each condition the conditions enter one after another, c_1 to c_K, each step with its own weight
(Brooks 2023, "InstructPix2Pix", eq. 3, for two):

    denoised = D(null) + sum_k w_k (D(c_1 .. c_k) - D(c_1 .. c_k-1))

A negative prompt is a condition that stands in the place of null wherever a term leaves that condition out.

So all weights 1 are the model itself, and equal weights are guidance by all conditions together, which the other form
in use, D(null) + sum_k w_k (D(c_k) - D(null)) (Liu 2022, "Composable diffusion"), is only where conditions are
independent given the sample. Conditions of equal weight enter together, in one row more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, overload

import torch
from torch import Tensor

from scoreray.data.errors import UserError, nearest
from scoreray.sampling.samplers.ode import DenoiserCall, Steps
from scoreray.trainer.diffusion.condition import LABEL, AnyCondition, Condition, encoded
from scoreray.trainer.diffusion.levels import LEVELS, with_guidance_weight

Denoise = Callable[..., Tensor]


@dataclass(frozen=True)
class Term:
    """One of the estimates that classifier-free guidance adds up: its coefficient, and the conditions it is made
    without."""

    coefficient: float
    without: tuple[str, ...] = ()


Terms = tuple[Term, ...]


def guidance_terms(weight: float, names: Iterable[str], weights: Mapping[str, float] = MappingProxyType({})) -> Terms:
    """The estimates of classifier-free guidance by the conditions `names`, all of them first, none of them last.

    weight: of every name that `weights` leaves out. Names enter from the least weight above or at 1 to the greatest,
    then those below 1 downwards, so that weight 1 is a condition that is always given, and 0 one that never is.
    The coefficients add up to 1; estimates that would have 0 are left out, so one weight for all is 2 terms, 1 at
    weight 0 or 1. Raises UserError where `weights` has another name.
    """
    names = list(names)
    for name in weights:
        if name not in names:
            raise UserError(
                f"guidance {name}={weights[name]:g}: no condition '{name}' is given; {nearest(name, names)}"
            )
    steps = sorted(
        ((weights.get(name, weight), name) for name in names), key=lambda step: (step[0] < 1, abs(step[0] - 1))
    )
    in_force = [1.0, *(step[0] for step in steps), 0.0]
    terms = []
    for given in range(len(steps), -1, -1):
        coefficient = in_force[given] - in_force[given + 1]
        if coefficient:
            terms.append(Term(coefficient, tuple(name for _, name in steps[given:])))
    return tuple(terms)


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance: from the estimate without a condition towards the one with it (Ho & Salimans 2022,
    eq. 6), by `weight`, or by `weights` of conditions (`guidance_terms`).

    All estimates come of one call with as many rows for each. The denoiser must have been trained with the conditions
    dropped, so that it knows their nulls. negative: one row of what is taken instead of these, of some names (a
    negative prompt); on the denoiser's device. Raises UserError without a condition.
    """

    denoiser: Denoise
    weight: float
    weights: Mapping[str, float] = field(default_factory=dict)
    negative: Condition | None = None

    def __post_init__(self) -> None:
        for weight in (self.weight, *self.weights.values()):
            _check_weight(weight)
        known = getattr(self.denoiser, "conditions", None)
        if known is not None and not known:
            raise UserError(f"guidance {self.weight:g}: this network has no classes or other conditions; leave it out")

    def encode(self, condition: Condition) -> Condition:
        return encoded(self.denoiser, condition)

    def __call__(self, x: Tensor, sigma: Tensor, condition: AnyCondition = None) -> Tensor:
        names = () if condition is None else condition_names(condition)
        if condition is None or not names:
            raise UserError(f"guidance {self.weight:g} needs class_labels, or another condition: give one per row")
        terms = guidance_terms(self.weight, names, self.weights)
        if self.negative is not None:
            check_negative(self.negative.values, terms)
        rows = term_rows(condition, terms, self.negative)
        return merged(self.denoiser(torch.cat([x] * len(terms)), torch.cat([sigma] * len(terms)), rows), terms)


@dataclass(frozen=True)
class LearnedGuidance:
    """Guidance that a network learned from its teacher: the weight is an input, and each sample costs one row."""

    denoiser: Denoise
    weight: float

    def encode(self, condition: Condition) -> Condition:
        return encoded(self.denoiser, condition)

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        return self.denoiser(x, sigma, with_guidance_weight(condition, self.weight, x))


def condition_names(condition: Condition | Tensor) -> tuple[str, ...]:
    """What guidance calls the conditions that are given, of the data; `label` of a plain tensor of labels."""
    if isinstance(condition, Tensor):
        return (LABEL,)
    return tuple(name for name in condition.values if name not in LEVELS)


def check_negative(names: Iterable[str], terms: Terms) -> None:
    """Raises UserError where no term leaves out any of `names`, so that what is given instead would never be used."""
    without = {name for term in terms for name in term.without}
    if not without.intersection(names):
        raise UserError("a negative prompt does nothing at guidance 1, or without a prompt; give guidance, such as 4")


@overload
def term_rows(condition: Condition, terms: Terms, negative: Condition | None = None) -> Condition: ...
@overload
def term_rows(condition: Tensor, terms: Terms, negative: Condition | None = None) -> Tensor: ...
def term_rows(condition: Condition | Tensor, terms: Terms, negative: Condition | None = None) -> Condition | Tensor:
    """The condition of a call for all terms: B rows for each, one term after another. negative: one row of what stands
    in the place of null, of some of a `Condition`'s names."""
    if isinstance(condition, Tensor):
        return torch.cat([torch.full_like(condition, -1) if term.without else condition for term in terms])
    instead = None if negative is None else negative.expand(len(condition))
    rows = [
        condition.null(term.without).updated(None if instead is None else instead.select(term.without))
        for term in terms
    ]
    found = Condition.cat(rows, [len(condition)] * len(terms))
    assert found is not None  # it has a name
    return found


def merged(denoised: Tensor, terms: Terms) -> Tensor:
    """The guided estimate [B, ...] of the estimates of all terms [len(terms) B, ...]."""
    parts = denoised.chunk(len(terms))
    if len(parts) == 1:
        return denoised
    if len(parts) == 2:
        return torch.lerp(parts[1], parts[0], terms[0].coefficient)
    total = parts[0] * terms[0].coefficient
    for term, part in zip(terms[1:], parts[1:], strict=True):
        total.add_(part, alpha=term.coefficient)
    return total


@dataclass(frozen=True)
class Autoguidance:
    """Guidance by a worse version of the model: smaller, trained less, or of a shorter EMA (Karras 2024, autoguidance).

    `weak` may also be a model that takes fewer conditions, or none: guidance across models. (It has no `encode`: each
    model reads a text in its own way, at every call.)
    """

    denoiser: Denoise
    weak: Denoise
    weight: float

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def __call__(self, x: Tensor, sigma: Tensor, condition: AnyCondition = None) -> Tensor:
        known = getattr(self.weak, "conditions", None)
        weaker = condition.select(known) if isinstance(condition, Condition) and known is not None else condition
        return torch.lerp(
            self.weak(x, sigma, *_given(weaker)), self.denoiser(x, sigma, *_given(condition)), self.weight
        )


@dataclass(frozen=True)
class ClassifierGuidance:
    """Guidance by a classifier of noisy data: score + weight grad log p(class | x; sigma) (Dhariwal & Nichol 2021).

    log_probability: `(x [B, ...], sigma [B], condition) -> [B]`, differentiable in x; condition: labels int64 [B], or
    any other that log p(condition | x) is known of. Weight 1 is Bayes' rule.
    """

    denoiser: Denoise
    log_probability: Callable[[Tensor, Tensor, Any], Tensor]
    weight: float

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def __call__(self, x: Tensor, sigma: Tensor, condition: AnyCondition = None) -> Tensor:
        if condition is None:
            raise UserError("classifier guidance needs class_labels, or another condition: give one per row")
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_probability(leaf, sigma, condition).sum(), leaf)
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

    def encode(self, condition: Condition) -> Condition:
        return encoded(self.guided, condition)

    def __call__(self, x: Tensor, sigma: Tensor, condition: AnyCondition = None) -> Tensor:
        arguments = (x, sigma, *_given(condition))
        inside = (sigma >= self.low) & (sigma <= self.high)
        if bool(inside.all()):
            return self.guided(*arguments)
        if not bool(inside.any()):
            return self.denoiser(*arguments)
        out = torch.empty_like(x)
        for rows, denoiser in ((inside, self.guided), (~inside, self.denoiser)):
            out[rows] = denoiser(*(argument[rows] for argument in arguments))
        return out


def classifier_free_steps(steps: Steps, terms: Terms) -> Steps:
    """A sampler's generator under classifier-free guidance: it yields x for each term and merges what comes back.

    For a batcher, in which each request has weights of its own; the condition of its rows is `term_rows`, of a sampler
    that is parallel in time `term_rows` for each of its copies.
    """

    def each(rows: Any, copies: int) -> Any:
        """Copies of rows -> copies of terms of rows; a number as it is."""
        if not isinstance(rows, Tensor):
            return rows
        return torch.cat([rows.unflatten(0, (copies, -1))] * len(terms), 1).flatten(0, 1)

    try:
        call = DenoiserCall(*next(steps))
        while True:
            x, sigma, target, copies = call
            denoised = yield DenoiserCall(each(x, copies), each(sigma, copies), each(target, copies), copies)
            by_term = denoised.unflatten(0, (copies, len(terms), -1)).transpose(0, 1).flatten(0, 2)
            call = DenoiserCall(*steps.send(merged(by_term, terms)))
    except StopIteration as end:
        return end.value


def _given(condition: AnyCondition) -> tuple[Condition | Tensor, ...]:
    """The arguments after x and sigma: a denoiser that knows no conditions need not take any."""
    return () if condition is None else (condition,)


def _check_weight(weight: float) -> None:
    if not math.isfinite(weight):
        raise UserError(f"guidance weight {weight}: must be a finite number; 1 is no guidance, above 1 strengthens it")
