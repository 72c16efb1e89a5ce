"""Prompts, negative prompts, and OpenAI's images endpoint, by OpenAI's own client against a service on a port."""

from __future__ import annotations

import base64
import io
import json
import random
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from waiting import PATIENCE_S

from scoreray.cluster.cli import main as cli
from scoreray.data.errors import UserError
from scoreray.sampling.service.access import hash_of
from scoreray.sampling.service.config import Limits, ServeConfig
from scoreray.sampling.service.service import Service
from scoreray.trainer.diffusion.condition import ConditionSpec

SECRET = "a-secret-of-thirty-characters!"
TEXTS = {"caption": ConditionSpec("text", (40,)), "hue": ConditionSpec("vector", (1,))}
LIMITS = Limits(max_count=4, max_steps=50, token_requests=2)


@pytest.fixture(scope="module")
def urls(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Runs of pictures given a text, given a class, given nothing, given two texts; and of points."""
    folder = tmp_path_factory.mktemp("runs")
    two = {"caption": ConditionSpec("text", (40,)), "title": ConditionSpec("text", (40,))}
    made: dict[str, dict[str, Any]] = {
        "texts": {"conditions": TEXTS, "shape": (3, 8, 12)},
        "classes": {"classes": ["cat", "big dog", "bird"]},
        "plain": {"classes": 0},
        "two": {"conditions": two},
        "points": {"classes": 0, "shape": (2,)},
    }
    return {name: new_run(str(folder / name), **settings) for name, settings in made.items()}


@pytest.fixture(scope="module")
def service(urls: dict[str, str], served: Any) -> Iterator[tuple[str, Service]]:
    tokens = (("me", hash_of(SECRET)),)
    config = ServeConfig(
        tuple(urls.items()), precision="fp32", compile="off", tokens=tokens, limits=LIMITS, max_models=8
    )
    with served(config) as (url, running):
        yield url, running


@pytest.fixture
def client(service: tuple[str, Service]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service[0]}v1", api_key=SECRET, max_retries=0, timeout=PATIENCE_S)


def opened(picture: str | None) -> Image.Image:
    assert picture is not None
    return Image.open(io.BytesIO(base64.b64decode(picture)))


def ours(service: tuple[str, Service], **fields: Any) -> dict[str, Any]:
    """The answer of `POST /v1/samples`."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {SECRET}"}
    request = urllib.request.Request(f"{service[0]}v1/samples", json.dumps(fields).encode(), headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return json.load(answer)


def test_openais_client_draws_what_our_own_endpoint_draws(service: tuple[str, Service], client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["texts", "classes", "plain", "two", "points"]
    how = {"steps": 4, "seed": 7, "guidance": 3.0, "negative_prompt": "blue", "sampler": "euler"}
    reply = client.images.generate(
        model="texts", prompt="a red square", n=2, size="12x8", quality="high", user="u", extra_body=how
    )
    wanted = ours(service, model="texts", condition={"caption": "a red square"}, count=2, **how)
    assert reply.data is not None
    assert [one.b64_json for one in reply.data] == [one["b64_json"] for one in wanted["data"]]
    assert opened(reply.data[0].b64_json).size == (12, 8)
    assert (reply.size, reply.output_format, reply.background) == ("12x8", "png", "opaque")
    assert reply.model_extra is not None
    assert reply.model_extra["scoreray"]["seed"] == 7
    for form in ("jpeg", "webp"):
        other = client.images.generate(prompt="a red square", output_format=form, extra_body=how).data  # type: ignore[call-overload]
        assert opened(other[0].b64_json).format == form.upper()
        grey = [np.asarray(opened(one.b64_json).convert("L"), float) for one in (other[0], reply.data[0])]
        assert np.abs(grey[0] - grey[1]).mean() < 6
    url = client.images.generate(prompt="a red square", response_format="url", extra_body=how).data
    assert url is not None
    with urllib.request.urlopen(str(url[0].url)) as picture:
        assert picture.read() == base64.b64decode(wanted["data"][0]["b64_json"])


def test_a_prompt_names_a_class_where_no_text_is_taken_and_is_empty_where_nothing_is(
    service: tuple[str, Service], client: openai.OpenAI
) -> None:
    how = {"steps": 3, "seed": 3}
    named = client.images.generate(model="classes", prompt="Big Dog", extra_body=how).data
    assert named is not None
    assert named[0].b64_json == ours(service, model="classes", class_label=1, **how)["data"][0]["b64_json"]
    nothing = client.images.generate(model="plain", prompt="", extra_body=how).data
    assert nothing is not None
    assert nothing[0].b64_json == ours(service, model="plain", **how)["data"][0]["b64_json"]


def test_a_stream_has_partial_pictures_and_ends_in_the_picture(
    service: tuple[str, Service], client: openai.OpenAI
) -> None:
    how = {"steps": 12, "seed": 3}
    for most in (0, 2):
        stream = client.images.generate(
            prompt="a red square", stream=True, partial_images=most, output_format="webp", extra_body=how
        )
        events = list(stream)
        kinds = [event.type for event in events]
        assert kinds == ["image_generation.partial_image"] * most + ["image_generation.completed"]
        assert [opened(event.b64_json).size for event in events] == [(12, 8)] * (most + 1)
        assert [getattr(event, "partial_image_index", None) for event in events] == [*range(most), None]
        assert [event.output_format for event in events] == ["png"] * most + ["webp"]
        wanted = ours(service, prompt="a red square", format="webp", **how)["data"][0]["b64_json"]
        assert events[-1].b64_json == wanted


def test_every_mistake_is_one_line_in_openais_form(service: tuple[str, Service], client: openai.OpenAI) -> None:
    bad, missing = openai.BadRequestError, openai.NotFoundError
    cases: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str | None, str]] = [
        ({"prompt": "x" * 1_000_000}, bad, "invalid", "prompt", "1,000,000 characters, at most 32,000"),
        ({"prompt": "x" * 41}, bad, "invalid", "prompt", "prompt: condition 'caption': a text of 41 bytes"),
        ({"prompt": "a\u0007b"}, bad, "invalid", "prompt", "control character U+0007 at character 2; remove it"),
        ({"prompt": " "}, bad, "invalid", "prompt", "prompt: is empty; write what to draw"),
        ({"prompt": "", "model": "classes"}, bad, "invalid", "prompt", "name a class; accepted: big dog, bird, cat"),
        ({"prompt": "big dgo", "model": "classes"}, bad, "invalid", "prompt", "did you mean 'big dog'?"),
        ({"prompt": "a cat", "model": "plain"}, bad, "invalid", "prompt", "takes no text (no conditions); leave it"),
        ({"prompt": "a cat", "model": "two"}, bad, "invalid", "prompt", "texts of its own for caption, title"),
        ({"prompt": "", "model": "points"}, bad, "invalid", "model", "no pictures: use /v1/samples"),
        ({"prompt": "a cat", "model": "dall-e-3"}, missing, "model_not_found", "model", "accepted: classes, plain"),
        ({"prompt": "a cat", "n": 5}, bad, "too_many", "n", "n = 5: at most 4"),
        ({"prompt": "a cat", "n": 0}, bad, "invalid", "n", "n = 0: must be a whole number, 1 or more"),
        ({"prompt": "a cat", "size": "512x512"}, bad, "invalid", "size", "this model draws 12x8; give that, or auto"),
        ({"prompt": "a cat", "n": 2, "stream": True}, bad, "invalid", "n", "a stream has one picture"),
        ({"prompt": "a cat", "background": "transparent"}, bad, "invalid", "background", '"auto" or "opaque"'),
        ({"prompt": "a cat", "output_format": "gif"}, bad, "invalid", "output_format", '"png" or "jpeg" or "webp"'),
        ({"prompt": "a cat", "extra_body": {"guidance": 101}}, bad, "invalid", "guidance", "from -100 to 100"),
        ({"prompt": "a cat", "extra_body": {"stpes": 3}}, bad, "invalid", "stpes", "did you mean 'steps'?"),
        ({"prompt": "a cat", "extra_body": {"negative_prompt": "b"}}, bad, "invalid", "negative_prompt",
         "does nothing at guidance 1"),
        ({"prompt": "a cat", "extra_body": {"condition": {"caption": "b"}}}, bad, "invalid", "prompt",
         "prompt and condition.caption: leave one of them out"),
    ]  # fmt: skip
    for fields, kind, code, param, words in cases:
        with pytest.raises(kind) as raised:
            client.images.generate(**fields)
        error = raised.value
        assert (error.code, error.param, error.type) == (code, param, "invalid_request_error"), (fields, error.body)
        assert words in str(error), (fields, error)
        assert "\n" not in error.message
    with pytest.raises(bad, match="prompt is missing: must be a string"):
        client.post("/images/generations", body={"n": 1}, cast_to=object)
    with pytest.raises(openai.AuthenticationError) as raised:
        client.with_options(api_key="sk-wrong").images.generate(prompt="a cat")
    assert raised.value.code == "invalid_api_key"
    with pytest.raises(missing, match="no such path"):
        client.post("/images/edits", body={}, cast_to=object)


def test_a_busy_service_says_when_to_come_again_and_a_key_is_billed_once(
    service: tuple[str, Service], client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, running = service
    headers = {"Idempotency-Key": f"k{random.random()}"}
    first = client.images.with_raw_response.generate(prompt="a cat", extra_headers=headers)
    again = client.images.with_raw_response.generate(prompt="a cat", extra_headers=headers)
    assert again.headers["idempotent-replayed"] == "true"
    assert first.parse().data == again.parse().data
    with pytest.raises(openai.BadRequestError) as reused:
        client.images.generate(prompt="a dog", extra_headers=headers)
    assert reused.value.code == "key_reused"
    monkeypatch.setattr(running, "draining", True)
    with pytest.raises(openai.InternalServerError) as busy:
        client.images.generate(prompt="a cat")
    assert (busy.value.status_code, busy.value.code, busy.value.type) == (503, "draining", "server_error")
    assert busy.value.response.headers["retry-after"] == "5"
    monkeypatch.setattr(running, "draining", False)
    under_way = running.access.under_way
    with under_way("me", 1), under_way("me", 1), pytest.raises(openai.RateLimitError) as limited:
        client.images.generate(prompt="a cat")
    assert (limited.value.code, limited.value.response.headers["retry-after"]) == ("rate_limit_exceeded", "1")


def test_the_command_line_draws_the_same_for_the_same_prompts(
    urls: dict[str, str], service: tuple[str, Service], tmp_path: Any
) -> None:
    words = ["sample", urls["texts"], "--count=2", "--steps=4", "--seed=7", f"--out={tmp_path / 'out'}"]
    words += ["--format=png", "--precision=fp32", "--compile=off", "--prompt=a red square"]
    cli.app([*words, "--negative-prompt=blue", "--guidance=3"], standalone_mode=False)
    wanted = ours(service, prompt="a red square", negative_prompt="blue", guidance=3, count=2, steps=4, seed=7)
    for number, one in enumerate(wanted["data"]):
        drawn = np.asarray(Image.open(tmp_path / f"out/{number:06d}.png"), int)
        assert np.abs(drawn - np.asarray(opened(one["b64_json"]), int)).max() <= 1
    plain = ["sample", urls["plain"], "--prompt=a red square"]
    for wrong, message in (
        ([*words, "--negative-prompt=blue"], "--negative-prompt does nothing at guidance 1"),
        ([*words, "--condition=caption=b"], "--prompt and --condition caption: leave one of them out"),
        (plain, r"--prompt: this model takes no text \(no conditions\); leave it empty"),
    ):
        with pytest.raises(UserError, match=message):
            cli.app([*wrong, f"--out={tmp_path / 'b'}"], standalone_mode=False)
