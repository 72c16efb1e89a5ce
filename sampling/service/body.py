"""The body of a request for samples: its fields, and the checked request that they make on a model.

Every mistake is one Refused that names its field.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from scoreray.data.errors import nearest, shortened
from scoreray.data.own_code import is_own
from scoreray.sampling.guidance.steering import Guidance, learned_weight
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.prompts import prompted
from scoreray.sampling.offline.generate import Request, RequestError
from scoreray.sampling.samplers.budget import LARGEST_BUDGET
from scoreray.sampling.samplers.sample import SAMPLERS, check_options, num_calls, sampler_of
from scoreray.sampling.service.answers import can_be_pictures
from scoreray.sampling.service.config import Limits, Refused, refused_at
from scoreray.sampling.service.models import ServedModel
from scoreray.sampling.service.request import Origin, SampleRequest
from scoreray.sampling.service.ticket import terms_of
from scoreray.trainer.config import MAX_GUIDANCE
from scoreray.trainer.config.condition_values import (
    VALUE_SCHEMA,
    VALUE_WORDS,
    ConditionValue,
    condition_of,
    from_json,
)
from scoreray.trainer.diffusion.condition import Condition, class_name_of
from scoreray.trainer.diffusion.levels import with_guidance_weight

KEY = re.compile(r"[\x21-\x7e]{1,255}")
OptionValue = bool | int | float | str | None
Weight = Annotated[float, Field(ge=-MAX_GUIDANCE, le=MAX_GUIDANCE)]


class DrawFields(BaseModel):
    """Fields of a request that say how samples are drawn, whichever path it comes by."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    negative_prompt: Annotated[
        str | None,
        Field(description="what guidance leads away from, instead of from no prompt; needs `guidance` and a prompt"),
    ] = None
    guidance: Annotated[
        Weight | Annotated[dict[str, Weight], Field(max_length=64)],
        Field(
            description="classifier-free, from -100 to 100; 1 is none, above strengthens class and conditions; or a "
            'weight for each by name, {"caption": 7, "label": 2}, 1 where left out. Costs two rows a sample, and one '
            "more for each further weight",
        ),
    ] = 1.0
    condition: Annotated[
        dict[str, Any],
        Field(
            max_length=64,
            description="what the samples are drawn for, by the names under `conditions` of `/v1/model`, in the data's "
            f"own units: {VALUE_WORDS}, as is a name left out",
            json_schema_extra={"additionalProperties": VALUE_SCHEMA},
        ),
    ] = {}
    sampler: Annotated[
        str | None,
        Field(
            max_length=64,
            description="heun, euler, ddim, dpmpp_2m, edm_sde, ...; if left out, what fits the model: heun for most, "
            "`/v1/model` says under `defaults` which",
        ),
    ] = None
    steps: Annotated[
        int | None, Field(ge=1, description="noise levels; if left out, what fits the sampler: 18 for heun")
    ] = None
    max_calls: Annotated[
        int | None,
        Field(
            ge=1,
            le=LARGEST_BUDGET,
            description="calls of the network that a sample may take: the best sampler, steps and grid that fit, as "
            "docs/sampling.md describes; those that are named must fit. Guidance costs rows, not calls",
        ),
    ] = None
    grid: Annotated[
        Annotated[str, Field(max_length=64)] | list[float] | None,
        Field(
            description="noise levels as karras, geometric, linear, interior (without the smallest), process (even "
            "in its t), or optimised, one of `optimised_grids` of `/v1/model`; or the levels themselves, as [80, 2.5]; "
            "if left out, what fits the sampler",
        ),
    ] = None
    options: Annotated[
        dict[str, OptionValue | Annotated[dict[str, OptionValue | list[float]], Field(max_length=16)]],
        Field(
            max_length=16,
            description="the sampler's own, by name, as under `samplers` of `/v1/model`; a process by its kind, or as "
            '`{"kind": "vp", "beta_max": 10}`',
        ),
    ] = {}
    seed: Annotated[
        int | None,
        Field(
            ge=0,
            lt=2**31,
            description="sample i of a seed is always the same, and the one that `scoreray sample --seed` draws (up to "
            "rounding); chosen if left out",
        ),
    ] = None
    model: Annotated[str | None, Field(max_length=256, description="one of `/v1/model`; the first if left out")] = None
    adapter: Annotated[
        str | None,
        Field(max_length=256, description="a LoRA of those under `adapters` of `/v1/model`; none if left out"),
    ] = None
    ema: Annotated[
        float | Annotated[str, Field(max_length=32)] | None,
        Field(
            description='EMA length in any spelling (0.05, "0.050", ".05"); `none` for raw weights; if left out, the '
            "model's default"
        ),
    ] = None
    idempotency_key: Annotated[
        str | None,
        Field(
            pattern=f"^{KEY.pattern}$",
            description="the same as the header `Idempotency-Key`: a retry with it is neither drawn nor billed twice",
        ),
    ] = None

    @field_validator("condition", mode="before")
    @classmethod
    def _condition(cls, given: Any) -> Any:
        """From JSON to what each value means. Raises Refused, which names the condition."""
        if not isinstance(given, dict):
            return given
        found: dict[str, ConditionValue] = {}
        for name, value in given.items():
            try:
                found[name] = from_json(value)
            except ValueError as error:
                name = shortened(name, 64)
                raise Refused("invalid", f"condition '{name}': {error}", field=f"condition.{name}") from None
        return found

    @property
    def ema_length(self) -> str | None:
        """`ema` as text: a JSON number is one spelling of a length."""
        return None if self.ema is None else str(self.ema)


class SampleBody(DrawFields):
    """What `POST /v1/samples` takes. Everything has a default; an empty object draws one sample."""

    count: Annotated[int, Field(ge=1, description="how many samples")] = 1
    prompt: Annotated[
        str | None,
        Field(
            description="a text for the conditions that take one (`prompt` of `/v1/model` names them), or of a model "
            "without such a class's name; an empty one of a model that takes neither"
        ),
    ] = None
    size: Annotated[
        str | None,
        Field(
            max_length=16,
            description="of samples, WIDTHxHEIGHT, one of `sizes` of `/v1/model`; if left out, the first of them",
        ),
    ] = None
    class_label: Annotated[
        int | Annotated[str, Field(max_length=256)] | None,
        Field(
            description="a class's number (a JSON number), or its name or number (a string: exact before any other "
            "case; `name:2`, `index:2` where it is the name of one class and the number of another); -1 for no class; "
            "if left out, all classes in turn, or none where there is a condition"
        ),
    ] = None
    format: Annotated[
        Literal["png", "jpeg", "webp", "npy"] | None,
        Field(
            description="of each sample: png, jpeg or webp (of fields by a colour map), or npy (float32, in the data's "
            "own units; of pictures from -1 to 1); if left out, png for pictures"
        ),
    ] = None
    raw: Annotated[
        bool,
        Field(description="of a model of latents: as they are, unscaled, as npy; else they are decoded"),
    ] = False
    stream: Annotated[bool, Field(description="server-sent events, with previews of the denoised estimate")] = False
    previews: Annotated[int, Field(ge=1, le=32, description="how many previews a stream shows at most")] = 8

    def fingerprint(self, media: str) -> str:
        """Of what the answer depends on: the same for a retry, whether it streams or not."""
        fields = self.model_dump(exclude={"stream", "previews", "idempotency_key", "condition"})
        for name in ("adapter", "max_calls", "prompt", "negative_prompt", "size", "raw"):
            if fields[name] in (None, False):
                del fields[name]  # as of versions that did not know it, whose keys are stored
        found = hashlib.sha256(json.dumps([media, fields], sort_keys=True).encode())
        for name, value in sorted(self.condition.items()):
            if isinstance(value, np.ndarray):
                found.update(json.dumps([name, value.shape]).encode() + value.tobytes())
            elif isinstance(value, bytes):
                found.update(json.dumps([name, len(value), "npy"]).encode() + value)
            else:
                found.update(json.dumps([name, value]).encode())
        return found.hexdigest()


def make_request(body: SampleBody, served: ServedModel, limits: Limits, media: str, seed: int) -> SampleRequest:
    """A body as a checked request to a model. Raises Refused. Counts calls for milliseconds: not on an event loop."""
    if body.count > limits.max_count:
        raise Refused("too_many", f"count = {body.count}: at most {limits.max_count} in one request", field="count")
    with refused_at("size"):
        info = served.info.at_size(body.size)
    with refused_at("raw"):
        info = info.as_latents() if body.raw else info
    body = _with_prompt(body, info)
    negative = condition_of(_prompted(body.negative_prompt, info, "negative_prompt"), info.conditions)
    format_ = body.format or ("png" if info.is_picture else "npy")
    if (format_ != "npy" or media == "image/png") and not can_be_pictures(info.sample_shape):
        raise Refused(
            "invalid", f"samples of shape {list(info.sample_shape)} are no pictures: ask for npy", field="format"
        )
    if body.guidance != 1 and not info.conditions:
        raise Refused("invalid", "this model takes no conditions: leave guidance out", field="guidance")
    if is_own(body.sampler) and body.sampler not in served.samplers:  # a request is no reason to import anything
        known = nearest(str(body.sampler), (*SAMPLERS, *served.samplers))
        raise Refused("invalid", f"unknown sampler '{shortened(str(body.sampler))}': {known}", field="sampler")
    request = _fitted(body, info, seed)
    assert request.sampler is not None
    assert request.steps is not None
    assert request.grid is not None
    if request.steps > limits.max_steps:
        given = "steps" if isinstance(request.grid, str) else "grid"
        fitting = f", as sampler '{request.sampler}' takes them on this model" if getattr(body, given) is None else ""
        message = f"steps = {request.steps}{fitting}: at most {limits.max_steps}"
        raise Refused("too_many", message, field=given)
    sigmas = tuple(info.sigmas(request.steps, request.grid).tolist())
    options = check_options(request.sampler, sampler_of(request.sampler), request.options)
    counted = ((name, value) for name, value in sorted(options.items()) if isinstance(value, OptionValue))
    calls = _calls(request.sampler, sigmas, tuple(counted), limits.max_calls)  # which no process changes
    if calls > limits.max_calls:
        message = f"a sample would take more than {limits.max_calls} calls of the network: fewer steps"
        raise Refused("too_many", message, field="options" if body.options else "steps")
    ema = served.ema(body.ema_length)
    condition = _condition(body, request, info, limits)
    if info.guidance_range is not None:
        weight = learned_weight(request.guided.weight, info.guidance_range)
        condition = with_guidance_weight(condition, weight, torch.empty(body.count))
    fitted = SampleRequest(
        seeds=tuple(request.sample_seeds(0, body.count).tolist()),
        shape=info.image_shape,
        sigmas=sigmas,
        sampler=request.sampler,
        options=options,
        condition=condition,
        negative=negative,
        guidance=body.guidance if isinstance(body.guidance, float) else 1.0,
        weights=body.guidance if isinstance(body.guidance, dict) else {},
        expected_calls=calls,
        calls_limit=limits.max_calls,
        origin=Origin(served.name, info.url, info.images_seen, seed),
        ema=ema,
        adapter=served.adapter(body.adapter, ema),
        grid=request.grid,
        grid_checkpoint=request.grid_checkpoint,
        media=media,
        format=format_,
        previews=body.previews if body.stream else 0,
        raw=body.raw,
    )
    with refused_at("negative_prompt" if negative else "guidance"):
        terms_of(fitted)
    return fitted


def _with_prompt(body: SampleBody, info: ModelInfo) -> SampleBody:
    """A body whose prompt is the conditions that it means. Raises Refused."""
    words = _prompted(body.prompt, info, "prompt")
    if twice := [name for name in words if name in body.condition]:
        raise Refused("invalid", f"prompt and condition.{twice[0]}: leave one of them out", field="prompt")
    return body.model_copy(update={"condition": {**body.condition, **words}})


def _prompted(text: str | None, info: ModelInfo, field: str) -> dict[str, str]:
    """The conditions that a prompt means; none where it is left out. Raises Refused."""
    with refused_at(field):
        return {} if text is None else prompted(text, info, field)


def _condition(body: SampleBody, request: Request, info: ModelInfo, limits: Limits) -> Condition | None:
    """What the samples are drawn for, a row for each: values of all, and the classes. Raises Refused."""
    values, masks = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in body.condition.items():
        field = f"condition.{shortened(name, 64)}"
        num_bytes = _num_bytes(value)
        if num_bytes > limits.max_condition_bytes:
            message = f"condition '{name}' has {num_bytes:,} bytes: at most {limits.max_condition_bytes:,}"
            raise Refused("condition_too_large", message, field=field)
        with refused_at(field):
            one = condition_of({name: value}, info.conditions)
        if one is not None:
            row = one.expand(body.count)
            values.update(row.values)
            masks.update(row.masks)
    classes = class_name_of(info.conditions)
    if body.class_label is not None and (classes is None or classes in body.condition):
        several = [name for name, spec in info.conditions.items() if spec.kind == "class"]
        message = "this model was trained without classes: leave it out"
        if several:
            message = f"this model's classes are conditions: give {' or '.join(several)} under `condition` alone"
        raise Refused("invalid", message, field="class_label")
    in_turn = not body.condition  # all classes, as `scoreray sample` draws them
    if classes is not None and classes not in body.condition and (in_turn or body.class_label is not None):
        with refused_at("class_label"):
            values[classes] = request.labels(0, body.count, info)
    return Condition(values, masks) if values else None


def _num_bytes(value: ConditionValue) -> int:
    """Of a condition's value: UTF-8 of a text, an .npy, numbers as float32."""
    if isinstance(value, str):
        return len(value.encode(errors="surrogatepass"))
    return len(value) if isinstance(value, bytes) else 4 * getattr(value, "size", 1)


def made_from(request: SampleRequest, origin: Origin) -> SampleRequest:
    """The same request to another checkpoint of its model, or from another seed."""
    seeds = Request(len(request.seeds), seed=origin.seed).sample_seeds(0, len(request.seeds))
    return replace(request, origin=origin, seeds=tuple(seeds.tolist()))


def _fitted(body: SampleBody, info: ModelInfo, seed: int) -> Request:
    """The request that `scoreray sample` makes of the same words. Raises Refused."""
    try:
        request = Request(
            count=body.count,
            sampler=body.sampler,
            steps=body.steps,
            max_calls=body.max_calls,
            grid=body.grid,
            seed=seed,
            class_label=body.class_label,
            guidance=Guidance(weights=body.guidance) if isinstance(body.guidance, dict) else body.guidance,
            options=dict(body.options),
        )
        return request.fitted(info)
    except RequestError as error:
        raise Refused("invalid", str(error), field=error.field) from None
    except (ArithmeticError, ValueError) as error:  # of a dry run, for `max_calls`
        raise _not_finite(str(body.sampler), error) from None


def _not_finite(sampler: str, error: Exception) -> Refused:
    return Refused("not_finite", f"sampler '{sampler}' with these options: {error}", field="options")


@functools.lru_cache(1024)
def _calls(sampler: str, sigmas: tuple[float, ...], options: tuple[tuple[str, Any], ...], most: int) -> int:
    """Calls of the network for one sample, `most` + 1 where it takes more. Raises Refused."""
    try:
        return num_calls(sampler, sigmas, most=most, **dict(options))
    except (ArithmeticError, ValueError) as error:
        raise _not_finite(sampler, error) from None
