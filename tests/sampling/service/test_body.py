"""A body ends in a checked request or in one Refused that a client can read; nothing else is raised."""

from __future__ import annotations

import base64
import io
import json
import pickle
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scoreray.sampling.http.parse import parse
from scoreray.sampling.samplers.options import options_of
from scoreray.sampling.samplers.sample import SAMPLERS
from scoreray.sampling.service.body import SampleBody, make_request
from scoreray.sampling.service.config import ERRORS, Limits, Refused
from scoreray.sampling.service.draw import SampleAnswer
from scoreray.sampling.service.models import ServedModel, look_up
from scoreray.sampling.service.request import Completed, SampleRequest
from scoreray.trainer.config.condition_values import condition_of
from scoreray.trainer.diffusion.condition import Condition, ConditionSpec

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
SPECS = {
    "caption": ConditionSpec("text", (16,)),
    "place": ConditionSpec("vector", (2,)),
    "coarse": ConditionSpec("concat", (1, 2, 2)),
    "tokens": ConditionSpec("sequence", (3, 2)),
    "hue": ConditionSpec("class", classes=("red", "green")),
}


def npy(array: np.ndarray, **how: Any) -> dict[str, str]:
    file = io.BytesIO()
    np.save(file, array, **how)
    return {"npy": base64.b64encode(file.getvalue()).decode()}


NESTED: Any = [1]
for _ in range(200):
    NESTED = [NESTED]
CONDITIONS: tuple[Any, ...] = (
    *VALUES,
    "a red square",
    "green",
    NESTED,
    [1, 2],
    [[1, 2], [3, 4]],
    [[1, 2], [3]],
    [True, 1],
    [None],
    ["1", "2"],
    ["x" * 60_000, *range(100)],
    [10**400],
    [1e308, 1],
    [[]],
    npy(np.ones(2, np.float16)),
    npy(np.ones((1, 2, 2))),
    npy(np.full((3, 2), np.nan)),
    npy(np.array([object()]), allow_pickle=True),
    npy(np.ones((2, 2)).T[::-1]),
    npy(np.ones(3, "c16")),
    npy(np.zeros((0, 2))),
    {"npy": base64.b64encode(b"\x93NUMPY\x01\x00\xff\xff{").decode()},
    {"npy": "====", "more": 1},
    {"npy": 1},
)
SPLICES = (b"9" * 50, b"1e999", b"NaN", b"[", b"{", b'"', b"\\ud800", b"\xff", b"\x00", b"", b",", b":")


@pytest.fixture(scope="module")
def models(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> list[ServedModel]:
    """Pictures with classes, points without, and classes whose names look like numbers."""
    folder = tmp_path_factory.mktemp("runs")
    pictures = look_up("small", new_run(str(folder / "small")))
    points = look_up("points", new_run(str(folder / "points"), shape=(2,), classes=0))
    names = ("2", "10", "²", "--5", "Cat", "cat", "-1", "0", "١")
    conditions = {"label": ConditionSpec("class", classes=names), **SPECS}
    return [pictures, points, replace(pictures, info=replace(pictures.info, classes=names, conditions=conditions))]


def answer(
    body: bytes, served: ServedModel, media: str = "application/json", seed: int = 0, limits: Limits = LIMITS
) -> SampleRequest | Refused:
    """What a body leads to, checked for what every refusal holds."""
    try:
        parsed = parse(body)
        parsed.fingerprint(media)
        return make_request(parsed, served, limits, media, seed)
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
    if rng.random() < 0.3:
        known = [*SPECS, "label", "", "\ud800"]
        fields["condition"] = {rng.choice(known): rng.choice(CONDITIONS) for _ in range(rng.randint(0, 3))}
        fields["guidance"] = rng.choice([2, {"caption": 2.5}, {"place": 1, "hue": 0}, {"": 1}, 101, {"hue": "1"}])
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
            for field in ("count", "options", "class_label", "nothing", "condition", "guidance"):
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
        ({"sampler": "reverse_sde", "options": {"process": "vq"}}, "invalid", "options", "process = 'vq': accepted:"),
        (
            {"sampler": "reverse_sde", "options": {"process": {"kind": "vp", "beta": 1}}},
            "invalid",
            "options",
            "process.beta",
        ),
        ({"sampler": "edm_sde", "options": {"s_churn": 10**39}}, "invalid", "options", "s_churn = 1000"),
        (
            {"sampler": "edm_sde", "options": {"s_churn": True}},
            "invalid",
            "options",
            "s_churn = True: must be a number",
        ),
        ({"sampler": "edm_sde", "options": {"s_churn": "x" * 9999}}, "invalid", "options", "characters): must be"),
        ({"options": {"x" * 9999: 1}}, "invalid", "options", "characters)': "),
        ({"steps": None, "grid": [0.8, 80]}, "invalid", "grid", "0.8 is followed by 80"),
        ({"steps": None, "grid": [1e308]}, "invalid", "grid", "must be from 1e-09 to 1e+09"),
        ({"steps": None, "grid": list(range(9, 0, -1))}, "too_many", "grid", "steps = 9: at most 6"),
        ({"steps": 2, "grid": "9,8,7"}, "invalid", "steps", "has 3 noise levels; leave steps out"),
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


def test_levels_are_a_grid_and_the_answer_repeats_them(models: list[ServedModel]) -> None:
    found = answer(b'{"grid": [80, 0.8]}', models[0])
    assert isinstance(found, SampleRequest)
    assert found.sigmas == (80.0, 0.8, 0.0)
    about = SampleAnswer.of(found, Completed(b"[]", "fp32", 0.0, 0.0)).about
    assert json.loads(json.dumps({"grid": about["grid"], "steps": about["steps"]})) == {"grid": [80.0, 0.8], "steps": 2}
    assert answer(json.dumps({"grid": about["grid"], "steps": 2}).encode(), models[0]) == found


@pytest.mark.parametrize(
    ("condition", "code", "field", "words"),
    [
        ({"colour": 1}, "invalid", "condition.colour", "was not built for it; it takes label, caption, place"),
        ({"caption": "seventeen letters"}, "invalid", "condition.caption", "17 bytes (UTF-8), this model takes"),
        ({"caption": 7}, "invalid", "condition.caption", "7, this model takes a text"),
        ({"caption": "\ud800"}, "invalid", "condition.caption", "is not Unicode"),
        ({"place": [1, 2, 3]}, "invalid", "condition.place", "numbers of shape [3], this model takes 2 numbers"),
        ({"place": [[1], [2, 3]]}, "invalid", "condition.place", "lists of unequal lengths; give lists of one length"),
        ({"place": ["1", "2"]}, "invalid", "condition.place", '"1" in a list: must be numbers'),
        ({"place": NESTED}, "invalid", "condition.place", "more than 8 deep"),
        ({"place": {"npy": "!"}}, "invalid", "condition.place", "is not base64"),
        ({"place": {"npx": ""}}, "invalid", "condition.place", "an object: must be a text, a number"),
        ({"tokens": npy(np.full((2, 2), np.nan))}, "invalid", "condition.tokens", "nan at index [0, 0]"),
        ({"tokens": npy(np.ones((4, 2)))}, "invalid", "condition.tokens", "4 tokens, this model takes at most 3"),
        ({"coarse": npy(np.array([object()]), allow_pickle=True)}, "invalid", "condition.coarse", "plain numbers"),
        ({"coarse": npy(np.ones((1, 20, 20)))}, "condition_too_large", "condition.coarse", "bytes: at most 1,000"),
        ({"coarse": [[[0] * 20] * 20]}, "condition_too_large", "condition.coarse", "1,600 bytes: at most 1,000"),
        ({"hue": "blue"}, "invalid", "condition.hue", "class 'blue' is unknown"),
        ([], "invalid", "condition", "must be an object of at most 64 values: each a text, a num"),
    ],
)  # fmt: skip
def test_a_condition_that_does_not_fit_is_refused_by_its_name(
    models: list[ServedModel], condition: Any, code: str, field: str, words: str
) -> None:
    body = json.dumps({"condition": condition, "steps": 2}).encode()
    refused = answer(body, models[2], limits=replace(LIMITS, max_condition_bytes=1000))
    assert isinstance(refused, Refused)
    assert (refused.code, refused.field) == (code, field)
    assert words in refused.message


def test_a_condition_is_a_row_for_each_sample_and_a_label_may_be_one_of_its_names(models: list[ServedModel]) -> None:
    served = models[2]
    conditions = {name: spec for name, spec in served.info.conditions.items() if name != "hue"}
    served = replace(served, info=replace(served.info, conditions=conditions))

    def condition(**fields: Any) -> Condition | None:
        body = parse(json.dumps({"count": 2, "steps": 2, **fields}).encode())
        found = make_request(body, served, LIMITS, "application/json", 0)
        again = pickle.loads(pickle.dumps(found))
        assert again.condition is None or len(again.condition) == 2
        return again.condition

    by_list, by_npy = ({"place": value, "caption": "ö"} for value in ([1, 2.5], npy(np.float32([1, 2.5]))))
    for values in (by_list, by_npy):
        found = condition(condition=values)
        assert found.values["place"].tolist() == [[1.0, 2.5]] * 2
        assert found.values["caption"].tolist() == [list("ö".encode())] * 2
        assert "label" not in found.values, "classes are drawn in turn where nothing else is given"
    assert condition().values["label"].tolist() == [0, 1]
    assert condition(condition={"caption": "x"}, class_label=2).values["label"].tolist() == [2, 2]
    for named in ({"class_label": "Cat"}, {"condition": {"label": "Cat"}}, {"condition": {"label": 4}}):
        assert condition(**named).values["label"].tolist() == [4, 4]
    assert condition(condition={"label": None}) is None
    with pytest.raises(Refused, match="give label under `condition` alone"):
        condition(class_label=1, condition={"label": 1})
    with pytest.raises(Refused, match="no condition 'place' is given"):
        condition(guidance={"place": 2})


def test_what_is_shared_by_samples_travels_as_one_row() -> None:
    grid = condition_of({"coarse": np.ones((1, 200, 200), np.float32)}, SPECS)
    many = SampleRequest(range(256), (1, 8, 8), (1.0, 0.0), condition=grid.expand(256))
    assert len(pickle.dumps(many)) < 200_000


def test_the_fingerprint_of_a_request_covers_its_condition_and_is_as_before_without_one() -> None:
    def of(**fields: Any) -> str:
        return parse(json.dumps(fields).encode()).fingerprint("image/png")

    conditions = [{"a": value} for value in (1, "1", [1], [1, 2], [[1, 2]], npy(np.ones(1)), None)]
    assert len({of(condition=one) for one in ({"b": 1}, *conditions)}) == 1 + len(conditions)
    assert of(condition={"a": [1, 2], "b": 1}) == of(condition={"b": 1, "a": [1.0, 2.0]})
    assert of(count=2) == of(count=2, condition={})
    assert of(count=2) == "9e4c381b131e6b68ec0a4a5c08323b175753a18a87e19e5b26fb8cfeddbae45d"  # as stored in Redis
