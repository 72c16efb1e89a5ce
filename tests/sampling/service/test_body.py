"""A body ends in a checked request or in one Refused that a client can read; nothing else is raised."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scoreray.sampling.http.parse import parse
from scoreray.sampling.samplers.options import options_of
from scoreray.sampling.samplers.sample import SAMPLERS
from scoreray.sampling.service.body import SampleBody, make_request
from scoreray.sampling.service.config import ERRORS, Limits, Refused
from scoreray.sampling.service.models import ServedModel, look_up
from scoreray.sampling.service.request import SampleRequest

LIMITS = Limits(max_count=2, max_steps=6, max_calls=40)
NUMBERS = (0, 1, -1, 2, 100, 2**31, 2**63, 10**39, 10**30, 0.5, -0.0, 1e308, 1e300, -1e300, 1e-320, 1e30, 1e31, 1e-45)
WORDS = (
    "",
    "heun",
    "²",
    "--5",
    "-",
    "+1",
    "1",
    "-1",
    "١",
    "1e3",
    "NaN",
    "none",
    "0.050",
    "gibbs",
    "karras",
    "png",
    "a" * 300,
)
OTHERS = (None, True, False, "\u0000", "\ud800", "💥", "x" * 60_000, [], {}, [1], {"a": 1}, [[]])
VALUES: tuple[Any, ...] = (*NUMBERS, *WORDS, *OTHERS)
SPLICES = (b"9" * 50, b"1e999", b"NaN", b"[", b"{", b'"', b"\\ud800", b"\xff", b"\x00", b"", b",", b":")


@pytest.fixture(scope="module")
def models(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> list[ServedModel]:
    """Pictures with classes, points without, and classes whose names look like numbers."""
    folder = tmp_path_factory.mktemp("runs")
    pictures = look_up("small", new_run(str(folder / "small")))
    points = look_up("points", new_run(str(folder / "points"), shape=(2,), classes=0))
    names = ("2", "10", "²", "--5", "Cat", "cat", "-1", "0", "١")
    return [pictures, points, replace(pictures, info=replace(pictures.info, classes=names))]


def answer(body: bytes, served: ServedModel, media: str = "application/json", seed: int = 0) -> SampleRequest | Refused:
    """What a body leads to, checked for what every refusal holds."""
    try:
        parsed = parse(body)
        parsed.fingerprint(media)
        return make_request(parsed, served, LIMITS, media, seed)
    except Refused as error:
        refused = error
    assert 400 <= ERRORS[refused.code][0] < 500, body
    assert 0 < len(refused.message) < 700, body
    assert "\n" not in refused.message
    json.dumps(refused.page("id"))
    return refused


def strange_body(rng: random.Random) -> bytes:
    names = [*SampleBody.model_fields, "cuont", "", "\ud800"]
    fields = {rng.choice(names): rng.choice(VALUES) for _ in range(rng.randint(0, 2))}
    if rng.random() < 0.7:
        sampler = fields["sampler"] = rng.choice(list(SAMPLERS))
        known = [*options_of(SAMPLERS[sampler]), "s_churm"]
        fields["options"] = {rng.choice(known): rng.choice(VALUES) for _ in range(rng.randint(0, 2))}
    if rng.random() < 0.5:
        fields["steps"] = rng.randint(1, 6)
    body = json.dumps(fields).encode()
    if rng.random() < 0.2:
        at = rng.randrange(len(body))
        body = body[:at] + rng.choice(SPLICES) + body[at + rng.randint(0, 4) :]
    return body


def test_ten_thousand_strange_bodies_are_a_request_or_one_refusal_each(models: list[ServedModel]) -> None:
    rng, found = random.Random(0), Counter[str]()
    for _ in range(10_000):
        one = answer(strange_body(rng), rng.choice(models), rng.choice(["application/json", "image/png"]), 2**31 - 1)
        found["request" if isinstance(one, SampleRequest) else one.code] += 1
    assert {"request", "bad_json", "invalid", "too_many"} <= set(found), found
    assert found["request"] > 300, found


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from(list(SampleBody.model_fields)), values, max_size=4) | values | st.binary())
def test_any_json_and_any_bytes_are_a_request_or_one_refusal(models: list[ServedModel], body: Any) -> None:
    answer(body if isinstance(body, bytes) else json.dumps(body).encode(), models[0])


def test_any_depth_is_one_refusal(models: list[ServedModel]) -> None:
    for depth in (1, 10, 50, 100, 200, 240, 300, *range(900, 1010, 3), 5000, 30_000):
        for opened, closed in (("[", "]"), ('{"a":', "}")):
            for field in ("count", "options", "class_label", "nothing"):
                body = f'{{"{field}": {opened * depth}1{closed * depth}}}'.encode()
                assert isinstance(answer(body, models[0]), Refused)


@pytest.mark.parametrize(
    ("body", "code", "field", "words"),
    [
        ({"class_label": "²"}, "invalid", "class_label", "'²'"),
        ({"class_label": "--5"}, "invalid", "class_label", "'--5'"),
        ({"class_label": "١"}, "invalid", "class_label", "'١'"),
        ({"sampler": "langevin", "options": {"step_size": 1e300}}, "invalid", "options", "step_size = 1e+300: must be"),
        ({"sampler": "ncsn", "options": {"epsilon": 1e300}}, "invalid", "options", "epsilon = 1e+300: must be"),
        ({"sampler": "edm_sde", "options": {"s_noise": 1e300}}, "invalid", "options", "s_noise = 1e+300: must be"),
        ({"sampler": "predictor_corrector", "options": {"snr": 1e300}}, "invalid", "options", "snr = 1e+300: must be"),
        ({"sampler": "edm_sde", "options": {"s_churn": 10**39}}, "invalid", "options", "s_churn = 1000"),
        (
            {"sampler": "edm_sde", "options": {"s_churn": True}},
            "invalid",
            "options",
            "s_churn = True: must be a number",
        ),
        ({"sampler": "edm_sde", "options": {"s_churn": "x" * 9999}}, "invalid", "options", "characters): must be"),
        ({"options": {"x" * 9999: 1}}, "invalid", "options", "characters)': "),
        ({"cou\ud800nt": 1}, "bad_json", None, r"'cou\ud800nt' is not of whole Unicode characters"),
        ({"options": {"\ud800": 1}}, "bad_json", None, "is not of whole Unicode characters"),
        ({"model\ud800" * 9999: 1}, "bad_json", None, "characters) is not of whole"),
    ],
)
def test_what_was_a_500_names_its_field(
    models: list[ServedModel], body: dict[str, Any], code: str, field: str | None, words: str
) -> None:
    refused = answer(json.dumps({"steps": 2, **body}).encode(), models[0])
    assert isinstance(refused, Refused)
    assert (refused.code, refused.field) == (code, field)
    assert words in refused.message
