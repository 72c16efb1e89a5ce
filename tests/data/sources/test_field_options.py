"""`--field`, `--kind` and `--normalise`: what they mean, and one line for each mistake."""

from __future__ import annotations

import pytest

from scoreray.cluster.cli import data
from scoreray.data.errors import UserError
from scoreray.data.fields.field_kinds import FIELD_KINDS
from scoreray.data.fields.normalisation import NORMALISATIONS
from scoreray.data.sources.field_options import FieldOption, parse_field_options


def test_kinds_and_normalisations_belong_to_the_field_of_their_name() -> None:
    found = parse_field_options(
        ["t5=t5.npy", "style=json:a.b"], ["style=class", "image=array"], ["t5=channel", "image=range"]
    )
    assert found.fields == (
        FieldOption("t5", "t5.npy", normalisation="channel"),
        FieldOption("style", "json", "a.b", kind="class"),
    )
    assert (found.kinds, found.normalisations) == ((("image", "array"),), (("image", "range"),))
    assert str(found.fields[1]) == "--field style=json:a.b"
    assert found
    assert not parse_field_options()


@pytest.mark.parametrize(
    ("fields", "kinds", "normalise", "message"),
    [
        (["text"], [], [], "--field text: NAME=WHERE or NAME=WHERE:PATH is needed"),
        (["text="], [], [], "--field text=: NAME=WHERE or NAME=WHERE:PATH is needed"),
        (["text=json:"], [], [], "--field text=json:: NAME=WHERE or NAME=WHERE:PATH is needed"),
        (["T-5=npy"], [], [], "'T-5' can't be a field's name"),
        (["a=txt", "a=json"], [], [], "--field a=json: a field 'a' is given already: --field a=txt"),
        (["a=txt"], ["a=word"], [], "--kind a=word: accepted: array, class, image, json"),
        (["a=txt"], ["a=text", "a=json"], [], "--kind a=json: 'a' is given twice"),
        (["a=txt"], [], ["a=log"], "--normalise a=log: did you mean 'log1p'?"),
    ],
)
def test_each_mistake_is_one_line(fields: list[str], kinds: list[str], normalise: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_field_options(fields, kinds, normalise)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_help_of_data_pack_names_all_kinds() -> None:
    assert data.KINDS.split(", ") == list(FIELD_KINDS)
    assert data.HOWS.split(", ") == list(NORMALISATIONS)


def test_a_kind_for_a_field_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(UserError, match="--kind imge=array: set has no such field; did you mean 'image'"):
        parse_field_options([], ["imge=array"]).check_names(["image", "label"], "set")
