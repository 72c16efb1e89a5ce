"""Request options that modify sampling, as wrappers of the denoiser: guidance, inpainting, inverse problems.

`steered` makes the denoiser that a request asks for. Everything in a request is a word, a number or a URL, so that it
can travel; what a URL names is read where the samples are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from scoreray.data.errors import UserError, nearest, shortened
from scoreray.data.fields.normalisation import Normaliser
from scoreray.sampling.guidance.guidance import (
    Autoguidance,
    ClassifierFree,
    Denoise,
    Interval,
    LearnedGuidance,
    guidance_terms,
)
from scoreray.sampling.guidance.inverse import MOST_NOISE_STD, LinearInverse, inpaint
from scoreray.sampling.guidance.known_pixels import KnownPixels
from scoreray.sampling.guidance.observations import parse_value_range, read_observed
from scoreray.sampling.guidance.operators import OPERATORS, Operator, make_operator
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.load import LoadedDenoiser, load
from scoreray.sampling.model.prompts import prompted
from scoreray.trainer.config import MAX_GUIDANCE
from scoreray.trainer.config.condition_values import condition_of
from scoreray.trainer.diffusion.condition import encoded
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective

Method = Literal["projection", "jacobian"]


@dataclass(frozen=True)
class Guidance:
    """What samples are led towards: with `weight` from a weaker estimate to the model's own (1: the model alone).

    The weaker one is the model without its conditions (classifier-free), or with `checkpoint` another model, or with
    `ema` the same (or that) model at another EMA length (autoguidance). `weights`: of single conditions by name, where
    they are not `weight` (classifier-free alone). `negative`: a prompt that samples are led away from, instead of from
    no condition (classifier-free alone). `interval`: noise levels (low, high) between which it acts; None for all.
    """

    weight: float = 1.0
    checkpoint: str | None = None
    ema: str | None = None
    interval: tuple[float, float] | None = None
    weights: dict[str, float] = field(default_factory=dict)
    negative: str | None = None

    @property
    def auto(self) -> bool:
        return self.checkpoint is not None or self.ema is not None

    @property
    def does_nothing(self) -> bool:
        return all(weight == 1 for weight in (self.weight, *self.weights.values()))

    def __post_init__(self) -> None:
        for weight in (self.weight, *self.weights.values()):
            if not -MAX_GUIDANCE <= weight <= MAX_GUIDANCE:
                raise UserError(
                    f"guidance weight {weight}: must be in [{-MAX_GUIDANCE:g}, {MAX_GUIDANCE:g}]; 1 is none, above 1 "
                    "strengthens it"
                )
        if self.auto and self.weights:
            raise UserError("guidance by another model has one weight; leave --guidance NAME=WEIGHT out")
        if self.auto and self.negative is not None:
            raise UserError("--negative-prompt: guidance by another model leads away from that one; leave it out")
        given = {
            "--autoguide": self.checkpoint,
            "--guide-ema": self.ema,
            "--interval": self.interval,
            "--negative-prompt": self.negative,
        }
        if self.does_nothing and (useless := [name for name, value in given.items() if value is not None]):
            raise UserError(f"{useless[0]} does nothing at guidance 1; give --guidance a weight such as 2")
        if self.interval is not None:
            low, high = self.interval
            if not 0 <= low < high:
                raise UserError(f"--interval {low:g},{high:g}: must be two noise levels, 0 <= low < high")


def parse_guidance(words: Sequence[str]) -> tuple[float, dict[str, float]]:
    """(weight, weights by condition) of words WEIGHT and NAME=WEIGHT. Raises UserError."""
    weight, weights = 1.0, dict[str, float]()
    for word in words:
        name, equals, number = word.rpartition("=")
        try:
            value = float(number)
            if bool(equals) != bool(name):
                raise ValueError("a '=' without a name")
        except ValueError:
            hint = "write a weight, such as 3, or NAME=WEIGHT for one condition"
            raise UserError(f"--guidance {shortened(word)}: {hint}") from None
        if name:
            weights[name] = value
        else:
            weight = value
    return weight, weights


def untrained_estimate(info: ModelInfo, given: Iterable[str], guidance: Guidance) -> str | None:
    """A line on an estimate that guidance takes and the run never learned; None where each was learned.

    Every term of `guidance_terms` is an estimate without some of the conditions, and a network knows E[x0 | the others]
    only if training dropped just these and kept the others (Brooks 2023, section 3.2.1, drops each alone and both):
    `objective.label_dropout` p drops all at once, `data.conditions.NAME.dropout` d_k each on its own, so that exactly
    the set S is dropped with probability p [S is all] + (1 - p) prod_S d_k prod_others (1 - d_k). Where this is 0
    nothing defines the estimate but the network's way of generalising. It is a line and no error: samples of the data
    set may lack a condition, and weights may have come from another run.
    """
    given, rates, together = list(given), own_dropout(info), joint_dropout(info)
    if guidance.does_nothing or guidance.auto or not given or info.guidance_range is not None:
        return None
    instead = {} if guidance.negative is None else prompted(guidance.negative, info, "--negative-prompt")
    for term in guidance_terms(guidance.weight, given, guidance.weights):
        without = [name for name in term.without if name not in instead]
        dropped = [name for name in rates if name in without or name not in given]
        kept = [name for name in rates if name not in dropped]
        separately = all(rates[name] > 0 for name in dropped) and all(rates[name] < 1 for name in kept)
        if dropped and not (separately and together < 1) and not (together > 0 and not kept):
            zero = [f"data.conditions.{name}.dropout" for name in dropped if not rates[name]]
            key = ", ".join(zero) if kept else "objective.label_dropout"
            which = f"{', '.join(dropped)} beside {', '.join(kept)}" if kept else ", ".join(dropped)
            return (
                f"guidance takes estimates without {which}, which this run never met ({key} is 0): samples may be "
                "arbitrary; train with it above 0"
            )
    return None


def joint_dropout(info: ModelInfo) -> float:
    """The share of a run's samples that lost all conditions at once."""
    objective = info.config.objective
    return 0.0 if isinstance(objective, AutoencodingObjective) else objective.label_dropout


def own_dropout(info: ModelInfo) -> dict[str, float]:
    """The share of a run's samples that lost each condition on its own, by name."""
    sections = info.config.data.conditions or {}
    return {name: sections[name].dropout if name in sections else 0.0 for name in info.conditions}


@dataclass(frozen=True)
class Measurement:
    """What is known of each sample: `observed` (a URL of a picture, npy or npz) is `operator` of it, plus noise.

    operator: "inpaint" with the URL of a `mask` (bright where the sample is known), "superresolution=FACTOR", "gray",
    or "matrix=URL" of an npy [m, d]. noise_std: of the measurement, for data in [-1, 1]. method: of `LinearInverse`.
    value_range: what black and white are in `observed`, "LOW,HIGH" or "model"; None for what its type says.
    See `observations.py` for what values mean.
    """

    operator: str
    observed: str
    mask: str | None = None
    noise_std: float = 0.0
    method: Method = "projection"
    value_range: str | None = None

    def __post_init__(self) -> None:
        name, _, value = self.operator.partition("=")
        if name not in OPERATORS:
            raise UserError(f"unknown operator '{name}': {nearest(name, OPERATORS)}")
        if OPERATORS[name].takes_value != bool(value):
            raise UserError(f"operator '{self.operator}': write {OPERATORS[name].usage}")
        if (name == "inpaint") != (self.mask is not None):
            raise UserError("--mask goes with --inpaint, and --inpaint needs it: a picture, bright where known")
        if not 0 <= self.noise_std <= MOST_NOISE_STD:
            raise UserError(f"--noise-std {self.noise_std}: must be a number from 0 to {MOST_NOISE_STD:g}")
        if self.method not in get_args(Method):
            raise UserError(f"--inverse-method '{self.method}': {nearest(self.method, get_args(Method))}")
        if self.value_range is not None:
            parse_value_range(self.value_range)


def measurement_of(
    inpaint: str | None,
    mask: str | None,
    inverse: str | None,
    measurement: str | None,
    noise_std: float,
    method: str,
    value_range: str | None = None,
) -> Measurement | None:
    """What the words of a command line say is known of the samples. Raises UserError where they do not go together."""
    if inpaint is not None and inverse is not None:
        raise UserError("--inpaint and --inverse: one measurement at a time; leave one of them out")
    if inpaint is not None:
        if measurement is not None:
            raise UserError("--measurement goes with --inverse; --inpaint names its picture itself")
        return Measurement("inpaint", inpaint, mask, noise_std, cast(Method, method), value_range)
    if inverse is not None:
        if inverse.partition("=")[0] == "inpaint":
            raise UserError("--inverse inpaint: write --inpaint IMAGE --mask MASK")
        if measurement is None:
            raise UserError("--inverse needs --measurement FILE, what was measured")
        return Measurement(inverse, measurement, mask, noise_std, cast(Method, method), value_range)
    lone = {
        "--mask": mask is not None,
        "--measurement": measurement is not None,
        "--noise-std": noise_std != 0,
        "--inverse-method": method != "projection",
        "--value-range": value_range is not None,
    }
    given = [name for name, is_given in lone.items() if is_given]
    if given:
        raise UserError(f"{', '.join(given)}: nothing is measured; give --inpaint IMAGE or --inverse OPERATOR")
    return None


def learned_weight(weight: float, learned: tuple[float, float]) -> float:
    """The weight that a network gets which learned those of a range: of none, which is 1, the nearest that it knows."""
    low, high = learned
    return min(max(weight, low), high)


def steered(denoiser: LoadedDenoiser, guidance: Guidance, measurement: Measurement | None = None) -> Denoise:
    """The denoiser that samples under `guidance` and given `measurement`; `denoiser` itself where neither says more.

    Raises UserError where they do not fit the model, DataError and StorageError where a file can't be read.
    """
    guided: Denoise = denoiser
    if denoiser.info.guidance_range is not None:
        guided = LearnedGuidance(denoiser, learned_weight(guidance.weight, denoiser.info.guidance_range))
    elif not guidance.does_nothing:
        guided = _guided(denoiser, guidance)
        if guidance.interval is not None:
            guided = Interval(guided, denoiser, *guidance.interval)
    return guided if measurement is None else _measured(denoiser, guided, measurement)


def _guided(denoiser: LoadedDenoiser, guidance: Guidance) -> Denoise:
    info, device = denoiser.info, _device(denoiser)
    if not guidance.auto:
        negative = None
        if guidance.negative is not None:
            negative = condition_of(prompted(guidance.negative, info, "--negative-prompt"), info.conditions)
        if negative is not None:
            negative = encoded(denoiser, negative.to(device))
        return ClassifierFree(denoiser, guidance.weight, guidance.weights, negative)
    url = guidance.checkpoint or info.url
    weak = load(url, guidance.ema, device)
    if info.image_shape not in (weak.info.image_shape, *weak.info.image_shapes):
        raise UserError(
            f"--autoguide {url}: draws samples of shape {list(weak.info.image_shape)}, this model "
            f"{list(info.image_shape)}; a guide must be trained on the same data"
        )
    for condition, spec in weak.info.conditions.items():
        if not spec.same_values(info.conditions.get(condition)):
            what = "other classes" if spec.kind == "class" else f"another condition '{condition}'"
            raise UserError(f"--autoguide {url}: knows {what} than this model; take a guide of the same data")
    if weak.info.target and info.target and weak.info.target.normaliser != info.target.normaliser:
        raise UserError(f"--autoguide {url}: normalises samples otherwise than this model; take a guide of its units")
    if (weak.info.url, weak.info.ema) == (info.url, info.ema):
        raise UserError(
            f"--autoguide {url}: is this very model at EMA {info.ema}; take an earlier checkpoint or --guide-ema"
        )
    return Autoguidance(denoiser, weak, guidance.weight)


def known_pixels(info: ModelInfo, measurement: Measurement | None) -> KnownPixels | None:
    """What a measurement knows of the pictures that a model of latents is decoded to; None for other models, whose
    samples are drawn as they are known. Raises UserError where it is no inpainting."""
    if measurement is None or info.encoding is None:
        return None
    if measurement.mask is None:
        raise UserError(
            f"--inverse {measurement.operator}: {info.url} models latents, of which no measurement of pictures is a "
            "linear function; --inpaint is taken, and with --raw measurements of latents are"
        )
    if measurement.noise_std:
        raise UserError(
            f"--noise-std {measurement.noise_std:g}: {info.url} models latents, and what noise of pixels is in "
            "these is not known; leave it out"
        )
    return KnownPixels.read(info, measurement.observed, measurement.mask, measurement.value_range)


def _measured(denoiser: LoadedDenoiser, guided: Denoise, measurement: Measurement) -> Denoise:
    pixels = known_pixels(denoiser.info, measurement)
    if pixels is not None:
        latents, known = (values.to(_device(denoiser)) for values in pixels.latents(denoiser.info))
        return inpaint(guided, latents, known, data_std=denoiser.sigma_data, method=measurement.method)
    shape, device = denoiser.info.image_shape, _device(denoiser)
    name, _, value = measurement.operator.partition("=")
    operator = make_operator(name, measurement.mask or value, shape, device)
    expected = tuple(operator.apply(torch.zeros(1, *shape, device=device)).shape[1:])
    observed = read_observed(
        measurement.observed,
        expected,
        pictures=denoiser.info.is_picture and OPERATORS[name].of_images,
        noise_std=measurement.noise_std,
        value_range=measurement.value_range,
    ).to(device)
    if denoiser.info.target is not None and denoiser.info.target.normaliser is not None:
        observed = _normalised(observed, measurement.operator, operator, denoiser.info.target.normaliser, shape)
    return LinearInverse(guided, operator, observed, measurement.noise_std, denoiser.sigma_data, measurement.method)


def _device(denoiser: LoadedDenoiser) -> torch.device:
    return next(denoiser.parameters(), torch.empty(0)).device


def _normalised(
    observed: Tensor, word: str, operator: Operator, normaliser: Normaliser, shape: Sequence[int]
) -> Tensor:
    """A measurement of data in their own units as one of normalised data. Raises UserError where a linear operator of
    the ones is none of the others."""
    name = word.partition("=")[0]
    if name == "inpaint" or normaliser.kind == "none":
        return normaliser.apply(observed[None])[0]
    if normaliser.kind == "log1p":
        raise UserError(f"--inverse {word}: this model's data are on a scale of logarithms, on which it is not linear")
    if name == "superresolution":  # a mean of pixels is scaled as they are
        return normaliser.apply(observed[None])[0]
    if len(set(normaliser.scale)) > 1:
        raise UserError(f"--inverse {word}: the channels of this model's data are scaled differently; use inpaint")
    offset = normaliser.invert(observed.new_zeros(1, *shape))
    return (observed - operator.apply(offset)[0]) / normaliser.scale[0]
