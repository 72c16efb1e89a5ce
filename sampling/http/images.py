"""OpenAI's images endpoint beside ours: its body as one for samples, its answers, events and errors.

Its clients find their own field names and forms, and none of its picture models: `model` is one that is served here.
"""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal

from fastapi import Response
from pydantic import Field

from scoreray.data.buckets.sizes import size_text
from scoreray.sampling.http.stream import event
from scoreray.sampling.service.body import DrawFields, SampleBody
from scoreray.sampling.service.config import HEADERS, Limits, Refused
from scoreray.sampling.service.draw import Draw, SampleAnswer
from scoreray.sampling.service.models import ServedModel
from scoreray.sampling.service.request import Preview

GENERATIONS = "/v1/images/generations"
CODES = {"no_token": "invalid_api_key", "no_model": "model_not_found", "token_busy": "rate_limit_exceeded"}
"""Codes that OpenAI's clients know by another name than ours."""
NO_TOKENS = {
    "total_tokens": 0, "input_tokens": 0, "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}  # fmt: skip
NOT_USED = "taken, and changes nothing"
Word = Annotated[str | None, Field(max_length=256, description=NOT_USED)]


class ImagesBody(DrawFields):
    """What `POST /v1/images/generations` takes: OpenAI's fields, and those of ours that say how samples are drawn."""

    prompt: Annotated[
        str,
        Field(
            description="a text; of a model with classes alone the name of one; an empty one of a model that takes "
            "neither"
        ),
    ]
    n: Annotated[int | None, Field(ge=1, description="how many pictures; 1 if left out, and in a stream")] = None
    size: Annotated[
        str | None, Field(max_length=32, description="`auto`, or the size of the model's pictures, as `256x256`")
    ] = None
    response_format: Annotated[
        Literal["b64_json", "url"] | None,
        Field(description="b64_json if left out; the url is a data: URL, nothing is stored to be fetched later"),
    ] = None
    output_format: Annotated[Literal["png", "jpeg", "webp"] | None, Field(description="png if left out")] = None
    background: Annotated[Literal["auto", "opaque"] | None, Field(description="of a picture: never transparent")] = None
    stream: Annotated[bool | None, Field(description="server-sent events, the last one the picture")] = None
    partial_images: Annotated[
        int | None, Field(ge=0, le=3, description="of a stream: how many denoised estimates it shows at most")
    ] = None
    output_compression: Annotated[int | None, Field(ge=0, le=100, description=NOT_USED)] = None
    quality: Word = None
    style: Word = None
    moderation: Word = None
    complexity: Word = None
    user: Word = None
    safety_identifier: Word = None

    def as_samples(self, served: ServedModel, limits: Limits) -> SampleBody:
        """The request for samples that is meant. Raises Refused, which names the field by OpenAI's name."""
        info, count = served.info, self.n or 1
        if not info.is_picture:
            message = f"model '{served.name}' draws values of shape {list(info.sample_shape)}, and no pictures"
            raise Refused("invalid", f"{message}: use /v1/samples", field="model")
        if count > limits.max_count:
            raise Refused("too_many", f"n = {count}: at most {limits.max_count} in one request", field="n")
        if self.stream and count > 1:
            raise Refused("invalid", f"n = {count}: a stream has one picture; leave n or stream out", field="n")
        size = None if self.size == "auto" else self.size
        if size not in (None, *served.info.sizes):
            message = f"size = {self.size}: this model draws {' or '.join(served.info.sizes)}; give that, or auto"
            raise Refused("invalid", message, field="size")
        shared = {name: getattr(self, name) for name in DrawFields.model_fields}
        stream = bool(self.stream and self.partial_images)  # of the draw: without previews its answer is one message
        return SampleBody.model_construct(
            **shared, prompt=self.prompt, count=count, class_label=None, size=size, format=self.output_format or "png",
            stream=stream, previews=self.partial_images or 1,
        )  # fmt: skip


class ImagesForm:
    """Of `POST /v1/images/generations`: OpenAI's answer and events."""

    media = "application/json"

    def __init__(self, body: ImagesBody, served: ServedModel) -> None:
        self._as_url = body.response_format == "url"
        self._num_partial = 0
        self._about = {
            "created": int(time.time()),
            "background": "opaque",
            "output_format": body.output_format or "png",
            "quality": body.quality or "auto",
            "size": body.size if body.size in served.info.sizes else size_text(served.info.sample_shape[:0:-1]),
        }

    def whole(self, answer: SampleAnswer, request_id: str) -> Response:
        page = {**self._about, "usage": NO_TOKENS, "scoreray": {"id": request_id, **answer.about}}
        data = answer.body
        if self._as_url:
            prefix = f"data:image/{self._about['output_format']};base64,"
            data = json.dumps([{"url": prefix + one["b64_json"]} for one in json.loads(data)]).encode()
        body = json.dumps(page)[:-1].encode() + b', "data": ' + data + b"}"
        return Response(body, media_type=self.media, headers=HEADERS)

    def start(self, draw: Draw, request_id: str) -> bytes:
        return b""

    def preview(self, preview: Preview) -> bytes:
        number, self._num_partial = self._num_partial, self._num_partial + 1
        more = {"b64_json": preview.b64_json, "partial_image_index": number, "output_format": "png"}
        return self._event("partial_image", more)

    def done(self, answer: SampleAnswer, request_id: str) -> bytes:
        picture = json.loads(answer.body)[0]["b64_json"]
        about = {"id": request_id, **answer.about}
        return self._event("completed", {"b64_json": picture, "usage": NO_TOKENS, "scoreray": about})

    def error(self, refusal: Refused, request_id: str) -> bytes:
        return event("error", error_page(refusal))

    def _event(self, name: str, data: dict[str, Any]) -> bytes:
        type_ = f"image_generation.{name}"
        return event(type_, {"type": type_, "created_at": self._about["created"], **self._about, **data})


def is_openais(path: str) -> bool:
    """Whether a path is of OpenAI's API, whose errors are of its form."""
    return path == "/v1/models" or path.startswith("/v1/images/")


def status_of(status: int) -> int:
    """OpenAI refuses what is wrong with a request's fields by 400, which its clients know as BadRequestError."""
    return 400 if status == 422 else status


def error_page(refusal: Refused) -> dict[str, Any]:
    """The JSON of a refusal in OpenAI's form."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    code = CODES.get(refusal.code, refusal.code)
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.field, "code": code}}


def models_page(models: list[ServedModel], created: int) -> dict[str, Any]:
    """The JSON of GET /v1/models. created: in seconds since 1970, when the service started."""
    data = [{"id": one.name, "object": "model", "created": created, "owned_by": "scoreray"} for one in models]
    return {"object": "list", "data": data}
