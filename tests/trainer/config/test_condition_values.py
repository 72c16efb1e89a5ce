"""Conditions from plain values: what is accepted of each kind, and what is refused in one line."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.data.fields.normalisation import Normaliser
from scoreray.trainer.config.condition_values import condition_of, from_json
from scoreray.trainer.diffusion.condition import ConditionSpec
from scoreray.trainer.diffusion.condition_shapes import check_condition

SPECS = {
    "label": ConditionSpec("class", classes=("cat", "dog")),
    "place": ConditionSpec("vector", (2,), normaliser=Normaliser("channel", (10.0, 0.0), (2.0, 4.0))),
    "hour": ConditionSpec("vector", (1,)),
    "rain": ConditionSpec("vector", (1,), normaliser=Normaliser("channel", (0.0,), (0.5,))),
    "coarse": ConditionSpec("concat", (1, 4, 4), normaliser=Normaliser("range", (5.0,), (5.0,))),
    "tokens": ConditionSpec("sequence", (3, 2), normaliser=Normaliser("channel", (1.0, 0.0), (1.0, 2.0))),
    "caption": ConditionSpec("text", (8,)),
}


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_values_in_the_datas_units_become_what_the_network_takes() -> None:
    values = {
        "label": "dog",
        "place": [12, 4.0],
        "hour": 7,
        "coarse": npy(np.full((6, 5), 10.0, np.float32)),
        "tokens": torch.tensor([[2.0, 4.0]], dtype=torch.bfloat16),
        "caption": "ein Ö",
    }
    found = condition_of(values, SPECS)
    assert found is not None
    check_condition(found, SPECS, 1)
    assert found.values["label"].tolist() == [1]
    assert found.values["place"].tolist() == [[1.0, 1.0]]
    assert found.values["hour"].tolist() == [[7.0]]
    assert found.values["coarse"].shape == (1, 1, 4, 4)
    assert bool((found.values["coarse"] == 1).all())
    assert found.values["tokens"].tolist() == [[[1.0, 2.0]]]
    assert found.masks["tokens"].tolist() == [[True]]
    assert bytes(found.values["caption"][0].tolist()).decode() == "ein Ö"
    assert all(value.dtype == torch.float32 for value in found.values.values() if value.is_floating_point())


def test_nothing_no_text_and_no_tokens_are_the_null() -> None:
    assert condition_of({}, SPECS) is None
    assert condition_of({"caption": None}, SPECS) is None
    for tokens in (np.zeros((0, 2)), [], from_json([])):
        found = condition_of({"caption": "", "tokens": tokens, "label": -1}, SPECS)
        assert found is not None
        check_condition(found, SPECS, 1)
        assert not any(bool(found.mask(name).any()) for name in ("caption", "tokens", "label"))


def test_a_list_that_is_no_array_is_refused_in_plain_words() -> None:
    with pytest.raises(ValueError, match=r"^lists of unequal lengths; give lists of one length"):
        from_json([[1, 2], [3]])
    with pytest.raises(ValueError, match="an integer in the list is too large for a float"):
        from_json([10**400])


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("color", 1, "condition 'color': this network was not built for it; it takes label, place, hour"),
        ("label", "bird", "condition 'label': class 'bird' is unknown"),
        ("label", npy(np.zeros(2)), "condition 'label': 144 bytes, this model takes one of "),
        ("rain", 3e38, "condition 'rain': numbers too large for float32 once normalised"),
        ("place", "a red square", "condition 'place': text 'a red square', this model takes 2 numbers"),
        ("place", [1, 2, 3], "condition 'place': numbers of shape [3], this model takes 2 numbers"),
        (
            "place",
            [1, [2]],
            "condition 'place': a value of type list can't be read as numbers: lists of unequal lengths",
        ),
        ("place", [1, float("nan")], "condition 'place': nan at index [1]; give finite numbers"),
        ("hour", [True], "condition 'hour': a value of type list, this model takes a number"),
        ("hour", 10**400, "condition 'hour': a value of type int, this model takes a number"),
        ("coarse", np.full((1, 4, 4), 1e300), "'coarse': 1e+300 at index [0, 0, 0]; give"),
        ("coarse", np.zeros((2, 4, 4)), "of shape [2, 4, 4], this model takes numbers of shape [1, 4, 4], of any size"),
        ("coarse", np.zeros((1, 0, 4)), "of shape [1, 0, 4]"),
        ("coarse", np.array([object()]), "an array of object [1], this model takes"),
        ("coarse", b"\x93NUMPY junk", "condition 'coarse': 11 bytes can't be read as numbers"),
        ("coarse", npy(np.zeros((1, 4, 4), complex)), "condition 'coarse': 384 bytes, this model takes"),
        ("tokens", np.zeros((4, 2)), "condition 'tokens': 4 tokens, this model takes at most 3; cut it"),
        ("tokens", np.zeros((3, 3)), "this model takes numbers of shape [up to 3, 2]"),
        ("caption", 7, "condition 'caption': 7, this model takes a text"),
        ("caption", "too long it is", "condition 'caption': a text of 14 bytes (UTF-8), this model takes at most 8"),
        ("caption", "\ud800", "is not Unicode that UTF-8 can hold"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_condition(name: str, value: Any, line: str) -> None:
    with pytest.raises(UserError) as raised:
        condition_of({name: value}, SPECS)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)
