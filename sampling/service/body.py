"""The body of `POST /v1/samples`: its fields, and the checked request that they make on a model.

Every mistake is one Refused that names its field.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scoreray.data.errors import ScorerayError, UserError, nearest, shortened
from scoreray.data.reading.manifest import is_picture
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.offline.generate import Request, RequestError
from scoreray.sampling.samplers.noise import SampleNoise, TorchNoise
from scoreray.sampling.samplers.sample import ADAPTIVE, SAMPLERS, check_options, start
from scoreray.sampling.service.config import Limits, Refused
from scoreray.sampling.service.models import Served
from scoreray.sampling.service.request import Origin, SampleRequest
from scoreray.trainer.config import MAX_GUIDANCE

ADAPTIVE_COUNTED = 1000  # calls of rk45 that are counted beforehand; what takes more is only assumed to take these
LONGEST_NUMBER = 40
KEY = re.compile(r"[\x21-\x7e]{1,255}")

TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
}


class SampleBody(BaseModel):
    """What `POST /v1/samples` takes. Everything has a default; an empty object draws one sample."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    count: Annotated[int, Field(ge=1, description="how many samples")] = 1
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
    grid: Annotated[
        str | None,
        Field(
            max_length=64,
            description="noise levels as karras, geometric, linear, or process (even in its t); if left out, what "
            "fits the sampler",
        ),
    ] = None
    seed: Annotated[
        int | None,
        Field(
            ge=0,
            lt=2**31,
            description="sample i of a seed is always the same, and the one that `scoreray sample --seed` draws (up to "
            "rounding); chosen if left out",
        ),
    ] = None
    class_label: Annotated[
        int | Annotated[str, Field(max_length=256)] | None,
        Field(
            description="a class's number (a JSON number), or its name or number (a string: exact before any other "
            "case; `name:2`, `index:2` where it is the name of one class and the number of another); -1 for no class; "
            "all classes in turn if left out"
        ),
    ] = None
    guidance: Annotated[
        float,
        Field(
            ge=-MAX_GUIDANCE,
            le=MAX_GUIDANCE,
            description="classifier-free, from -100 to 100; 1 is none, above strengthens the class. Costs two rows a "
            "sample",
        ),
    ] = 1.0
    options: Annotated[
        dict[str, bool | int | float | str | None],
        Field(max_length=16, description="the sampler's own, by name, as under `samplers` of `/v1/model`"),
    ] = {}
    model: Annotated[str | None, Field(max_length=256, description="one of `/v1/model`; the first if left out")] = None
    ema: Annotated[
        float | Annotated[str, Field(max_length=32)] | None,
        Field(
            description='EMA length in any spelling (0.05, "0.050", ".05"); `none` for raw weights; if left out, the '
            "model's default"
        ),
    ] = None
    format: Annotated[
        Literal["png", "npy"] | None,
        Field(
            description="of each sample: png, or npy (float32, as the model gives them); if left out, png for pictures"
        ),
    ] = None
    stream: Annotated[bool, Field(description="server-sent events, with previews of the denoised estimate")] = False
    previews: Annotated[int, Field(ge=1, le=32, description="how many previews a stream shows at most")] = 8
    idempotency_key: Annotated[
        str | None,
        Field(
            pattern=f"^{KEY.pattern}$",
            description="the same as the header `Idempotency-Key`: a retry with it is neither drawn nor billed twice",
        ),
    ] = None

    @property
    def ema_length(self) -> str | None:
        """`ema` as text: a JSON number is one spelling of a length."""
        return None if self.ema is None else str(self.ema)

    def fingerprint(self, media: str) -> str:
        """Of what the answer depends on: the same for a retry, whether it streams or not."""
        fields = self.model_dump(exclude={"stream", "previews", "idempotency_key"})
        return hashlib.sha256(json.dumps([media, fields], sort_keys=True).encode()).hexdigest()


def parse(body: bytes) -> SampleBody:
    """The request in a body. Raises Refused (bad_json, invalid)."""
    try:
        text = body.decode("utf-8")
        data = json.loads(
            text, parse_constant=_no_constant, parse_int=_int, parse_float=_float, object_pairs_hook=_object
        )
    except RecursionError:
        raise Refused("bad_json", "the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise Refused("bad_json", f"the body is not UTF-8: byte {error.start}") from None
    except ValueError as error:
        raise Refused("bad_json", f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise Refused("invalid", 'the body must be a JSON object, such as {"count": 4}')
    try:
        return SampleBody.model_validate(data)
    except ValidationError as error:
        raise _refusal(error, data) from None


def _refusal(error: ValidationError, data: dict[str, Any]) -> Refused:
    """A body that does not fit, in plain words: each field that is wrong, its value, and what it may be."""
    mistakes = error.errors(include_url=False, include_context=False, include_input=False)
    first = mistakes[0]
    name = shortened(str(first["loc"][0])) if first["loc"] else "body"
    if first["type"] == "extra_forbidden":
        return Refused("invalid", f"field '{name}' is unknown; {nearest(name, SampleBody.model_fields)}", field=name)
    fields = _fields()
    wrong = list(dict.fromkeys(str(mistake["loc"][0]) for mistake in mistakes))
    mistakes_in_words = []
    for field in [field for field in wrong if field in fields][:4]:
        given, may_be = shortened(json.dumps(data[field])), in_words(fields[field])
        if any(m["type"] == "string_unicode" for m in mistakes if m["loc"][0] == field):
            may_be = "a string of whole Unicode characters"
        mistakes_in_words.append(f"{field} = {given}: must be {may_be}")
    return Refused("invalid", "; ".join(mistakes_in_words), field=name)


@functools.cache
def _fields() -> dict[str, Any]:
    return SampleBody.model_json_schema()["properties"]


def in_words(about: dict[str, Any]) -> str:
    """What a field of a JSON schema may be, in plain words: "a whole number from 1 to 32"."""
    return " or ".join(_variant(one) for one in about.get("anyOf", [about]) if one.get("type") != "null")


def _variant(one: dict[str, Any]) -> str:
    if "enum" in one:
        return " or ".join(json.dumps(value) for value in one["enum"])
    if "pattern" in one:
        return "a string of 1 to 255 printable ASCII characters, no spaces"  # the only pattern there is, KEY
    if "maxProperties" in one:
        return f"an object of at most {one['maxProperties']} values: numbers, strings, true, false or null"
    name = TYPES.get(one.get("type", ""), "a value")
    if "maxLength" in one:
        return f"{name} of at most {one['maxLength']} characters"
    low, high = one.get("minimum"), one.get("maximum")
    if "exclusiveMaximum" in one:
        high = one["exclusiveMaximum"] - 1  # of whole numbers only
    if low is None:
        return name
    return f"{name}, {low:,.0f} or more" if high is None else f"{name} from {low:,.0f} to {high:,.0f}"


def make_request(body: SampleBody, served: Served, limits: Limits, media: str, seed: int) -> SampleRequest:
    """A body as a checked request to a model. Raises Refused. Counts calls for milliseconds: not on an event loop."""
    if body.count > limits.max_count:
        raise Refused("too_many", f"count = {body.count}: at most {limits.max_count} in one request", field="count")
    info = served.info
    format_ = body.format or ("png" if is_picture(info.image_shape) else "npy")
    if (format_ == "png" or media == "image/png") and not is_picture(info.image_shape):
        raise Refused(
            "invalid", f"samples of shape {list(info.image_shape)} are no pictures: ask for npy", field="format"
        )
    if body.guidance != 1 and not info.classes:
        raise Refused("invalid", "this model was trained without classes: leave guidance out", field="guidance")
    request = _fitted(body, info, seed)
    assert request.sampler is not None
    assert request.steps is not None
    assert request.grid is not None
    if request.steps > limits.max_steps:
        fitting = "" if body.steps else f", as sampler '{request.sampler}' takes them on this model"
        message = f"steps = {request.steps}{fitting}: at most {limits.max_steps}"
        raise Refused("too_many", message, field="steps")
    sigmas = tuple(info.sigmas(request.steps, request.grid).tolist())
    options = check_options(request.sampler, SAMPLERS[request.sampler], request.options)
    calls = _calls(request.sampler, sigmas, tuple(sorted(options.items())), limits.max_calls)
    if calls > limits.max_calls:
        message = f"a sample would take more than {limits.max_calls} calls of the network: fewer steps"
        raise Refused("too_many", message, field="options" if body.options else "steps")
    try:
        labels = request.labels(0, body.count, info)
    except UserError as error:
        raise Refused("invalid", str(error), field="class_label") from None
    return SampleRequest(
        seeds=tuple(request.sample_seeds(0, body.count).tolist()),
        shape=info.image_shape,
        sigmas=sigmas,
        sampler=request.sampler,
        options=options,
        class_labels=tuple(labels.tolist()) if info.classes else None,
        guidance=body.guidance,
        expected_calls=calls,
        max_calls=limits.max_calls,
        origin=Origin(served.name, info.url, info.images_seen, seed),
        ema=served.ema(body.ema_length),
        grid=request.grid,
        media=media,
        format=format_,
        previews=body.previews if body.stream else 0,
    )


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
            grid=body.grid,
            seed=seed,
            class_label=body.class_label,
            guidance=body.guidance,
            options=dict(body.options),
        )
        return request.fitted(info)
    except RequestError as error:
        raise Refused("invalid", str(error), field=error.field) from None


@functools.lru_cache(1024)
def _calls(sampler: str, sigmas: tuple[float, ...], options: tuple[tuple[str, Any], ...], most: int) -> int:
    """Calls of the network for one sample, counted on a dry run that ends at `most` + 1.

    The dry run of rk45 denoises Gaussian numbers, as they are more like samples than zeros; a trained network on
    28 x 28 pictures took 1.0 to 1.2 times as many calls, at tolerances from 1e-2 to 1e-6.
    """
    calls, counted = 0, min(most, ADAPTIVE_COUNTED) if sampler in ADAPTIVE else most
    try:
        with torch.no_grad():
            x = sigmas[0] * SampleNoise([0]).normal((1, 64)) if sampler in ADAPTIVE else torch.zeros(1, 1)
            steps = start(sampler, x, sigmas, TorchNoise(torch.Generator()), **dict(options))
            x, sigma = next(steps)
            while (calls := calls + 1) <= counted:
                x, sigma = steps.send(x * (0.25 / (0.25 + sigma**2)) if sampler in ADAPTIVE else x)
    except StopIteration:
        pass
    except ScorerayError:
        pass  # more steps than it may take: the draw says so
    except (ArithmeticError, ValueError) as error:
        raise Refused("not_finite", f"sampler '{sampler}' with these options: {error}", field="options") from None
    return calls


def check_key(header: str | None, body: str | None) -> str | None:
    """The idempotency key of a request, which may come either way. Raises Refused."""
    if header is not None and body is not None and header != body:
        raise Refused("bad_header", "the header Idempotency-Key and the field idempotency_key differ")
    key = header if header is not None else body
    if key is not None and not KEY.fullmatch(key):
        raise Refused("bad_header", "an idempotency key has 1 to 255 printable ASCII characters, no spaces")
    return key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Refused("bad_json", f"the name '{shortened(name)}' stands twice in one object")
        if not name.isascii() and any(
            "\ud800" <= one <= "\udfff" for one in name
        ):  # pydantic can't say which name it is
            raise Refused("bad_json", f"the name {shortened(ascii(name))} is not of whole Unicode characters")
        found[name] = value
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _int(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float | int:
    """A number with a point or an exponent; 4.0 is the integer 4, as JSON has one kind of number only."""
    value = float(text) if len(text) <= LONGEST_NUMBER else math.inf
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:LONGEST_NUMBER]} is too large or too long")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
