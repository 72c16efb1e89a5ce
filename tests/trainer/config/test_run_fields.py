"""Which fields a run models and is conditioned by, and every mistake in naming them, in one line each."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from scoreray.data.errors import UserError
from scoreray.data.fields.encoding import Encoding
from scoreray.data.fields.field import Field, FieldRequest
from scoreray.data.fields.normalisation import Normaliser
from scoreray.data.unpacked.tars import TarSettings, UnpackedTars
from scoreray.trainer.config.run_fields import RunFields, run_fields
from scoreray.trainer.config.sections import AutoencoderSection, DataSection
from scoreray.trainer.diffusion.condition import ConditionSpec

FINE = Field("fine", "array", [2, 8, 8], "float32", "fine.npy", mean=[280.0, 1.0], std=[10.0, 3.0],
             low=[250.0, -8.0], high=[310.0, 8.0], log_mean=[5.0, 0.5], log_std=[0.1, 2.0])  # fmt: skip
FIELDS = (
    Field("photo", "image", [3, 8, 8], "uint8", "png", mean=[128.0] * 3, std=[60.0] * 3),
    FINE,
    replace(FINE, name="coarse", shape=[2, 4, 4], member="coarse.npy", normalisation="channel"),
    Field("dead", "vector", [2], "float32", "dead.npy", mean=[1.0, 4.0], std=[2.0, 0.0], low=[0, 4], high=[3, 4]),
    Field("cls", "class", [], "int64", "cls", classes=["cat", "dog"], class_counts=[3, 4]),
    Field("place", "vector", [2], "float32", "json", "latlon", mean=[45.0, 8.0], std=[9.0, 90.0]),
    Field("hour", "scalar", [], "float64", "json", "hour", mean=[12.0], std=[4.0]),
    Field("t5", "sequence", [77, 16], "bfloat16", "t5.raw"),
    Field("clip", "array", [5, 16], "float16", "clip.npy", mean=[0.0] * 5, std=[1.0] * 5),
    Field("text", "text", [300], "uint8", "txt"),
    Field("novel", "text", [90_000], "uint8", "novel.txt"),
    Field("meta", "json", [100], "uint8", "json"),
)


def resolved(autoencoder: AutoencoderSection | None = None, **section: Any) -> RunFields:
    data: Any = SimpleNamespace(
        fields=FIELDS, shape=[3, 8, 8], dtype="uint8", classes=["cat", "dog"], std=[0.47] * 3, sigma_data=0.47,
        channel_means=lambda: [0.0] * 3,
    )  # fmt: skip
    return run_fields(DataSection(url="set", **section), data, autoencoder)


def test_a_section_that_names_nothing_takes_the_image_and_its_classes() -> None:
    found = resolved()
    assert (found.target.name, found.target.normaliser, found.shape) == ("photo", None, [3, 8, 8])
    assert found.conditions == {"label": ConditionSpec("class", classes=("cat", "dog"))}
    assert found.sources == {"label": "cls"}
    assert found.sigma_data == 0.47
    assert found.requests == (FieldRequest("photo"), FieldRequest("cls"))
    assert not resolved(conditions={}).conditions


def test_tars_without_a_manifest_have_an_image_and_a_label() -> None:
    tars = UnpackedTars("x.tar", TarSettings(2), (), [3, 4, 4], "uint8", ["0", "1"], [0.0], [1.0], 0.5, 1.0, 1, 0)
    found = run_fields(DataSection(url="x.tar"), tars)
    assert (found.target.kind, found.sources) == ("image", {"label": "label"})
    with pytest.raises(UserError, match=r"no field 'text'; accepted: image, label"):
        run_fields(DataSection(url="x.tar", conditions={"caption": {"field": "text"}}), tars)


def test_every_kind_of_field_becomes_the_condition_that_it_can_be() -> None:
    found = resolved(
        target="fine",
        normalisation="channel",
        conditions={
            "coarse": {},
            "place": {"normalisation": "channel", "dropout": 0.25},
            "hour": {"normalisation": "channel"},
            "caption": {"field": "t5", "max_length": 20, "too_long": "cut"},
            "clip": {"kind": "sequence"},
            "text": {},
            "label": {"field": "cls"},
        },
    )
    assert found.target.normaliser == Normaliser("channel", (280.0, 1.0), (20.0, 6.0))
    assert (found.mean, found.std, found.sigma_data) == ([0.0, 0.0], [0.5, 0.5], 0.5)
    kinds = {name: (spec.kind, spec.shape) for name, spec in found.conditions.items()}
    assert kinds == {
        "coarse": ("concat", (2, 4, 4)), "place": ("vector", (2,)), "hour": ("vector", (1,)),
        "caption": ("sequence", (20, 16)), "clip": ("sequence", (5, 16)),
        "text": ("text", (300,)), "label": ("class", ()),
    }  # fmt: skip
    assert found.conditions["coarse"].normaliser == Normaliser("channel", (280.0, 1.0), (10.0, 3.0))
    assert found.conditions["caption"].normaliser == Normaliser("none")
    assert FieldRequest("t5", 20, "cut") in found.requests
    assert FieldRequest("text", 300) in found.requests
    assert found.dropout["place"] == 0.25


def test_the_statistics_of_a_normalised_target_are_those_of_its_values() -> None:
    found = resolved(target="fine", normalisation="range", conditions={})
    assert found.target.normaliser == Normaliser("range", (280.0, 0.0), (30.0, 8.0))
    assert found.mean == [0.0, 0.125]
    assert found.std == [10 / 30, 3 / 8]
    assert found.sigma_data == pytest.approx((((10 / 30) ** 2 + (3 / 8) ** 2) / 2 + 0.0625**2) ** 0.5)
    logs = resolved(target="fine", normalisation="log1p", conditions={})
    assert logs.target.normaliser == Normaliser("log1p", (5.0, 0.5), (0.2, 4.0))
    assert logs.sigma_data == 0.5


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"target": "foto"}, "data.target: the data set has no field 'foto'; did you mean 'photo'?"),
        ({"target": "text"}, "data.target: field 'text' is of kind text; what is modelled must be one of"),
        ({"normalisation": "channel"}, "data.normalisation: 'channel' of field 'photo', and images always go"),
        ({"target": "dead", "normalisation": "channel"}, "normalisation: 'channel' of field 'dead': channel 1 has"),
        ({"conditions": {"dead": {"normalisation": "range"}}}, "dead.normalisation: 'range' of field 'dead'"),
        ({"conditions": {"t5": {"normalisation": "log1p"}}}, "needs statistics that the data set was packed without"),
        ({"conditions": {"photo": {}}}, "data.conditions.photo: field 'photo' is what the run models"),
        ({"conditions": {"cpation": {"field": "texts"}}}, "has no field 'texts'; did you mean 'text'?"),
        ({"conditions": {"meta": {}}}, "field 'meta' is of kind json [100]; it can't condition a network"),
        ({"conditions": {"place": {"kind": "text"}}}, "place.kind: text: field 'place' is of kind vector [2]; "),
        ({"conditions": {"clip": {"kind": "concat"}}}, "and the samples [3, 8, 8]; accepted: sequence"),
        ({"conditions": {"novel": {}}}, "novel.max_length: missing, and the longest 'novel' has 90,000 bytes"),
        ({"conditions": {"t5": {"max_length": 9}}}, "t5.max_length: 9, and the longest 't5' has 77 tokens"),
        ({"conditions": {"t5": {"max_length": 1025}}}, "t5.max_length: 1,025, and the longest 't5' has 77 tokens: "),
        ({"conditions": {"place": {"max_length": 9}}}, "place.max_length: is for sequences and text"),
        ({"conditions": {"cls": {"normalisation": "range"}}}, "cls.normalisation: 'range' is for numbers, and"),
        ({"conditions": {"clip": {"normalisation": "channel"}}}, "pack it as a sequence"),
        ({"conditions": {"a.b": {"field": "text"}}}, "data.conditions.a.b: a condition's name is"),
        ({"conditions": {"target_level": {"field": "place"}}}, "data.conditions.target_level: the name is reserved"),
        ({"conditions": {"place": {"kind": "level"}}}, "place.kind: level: field 'place' is of kind vector [2]; "),
        ({"conditions": {"a": {"field": "text"}, "b": {"field": "text"}}}, "b: field 'text' conditions the network"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_key_and_field(section: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as raised:
        resolved(**section)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(UserError) as raised:
        resolved(conditions={"a": {}, "b": {}})
    assert str(raised.value).count("\n") == 1


LATENT = Field(
    "latent", "array", [4, 2, 2], "float16", "latent.npy", mean=[1.0, 2.0], std=[4.0, 5.0], normalisation="channel",
    encoding=Encoding("diffusers", "here", "a" * 64, "photo", "image", [1, 4, 4], moments=True),
)  # fmt: skip


def of_latents(**section: Any) -> RunFields:
    data: Any = SimpleNamespace(fields=[LATENT])
    chosen = DataSection(url="set", conditions={}, **section.pop("data", {}))
    return run_fields(chosen, data, AutoencoderSection(**section) if section else None)


def test_latents_are_scaled_to_what_the_network_expects_and_drawn_from_moments() -> None:
    found = of_latents()
    assert found.shape == [2, 2, 2]
    assert found.target.normaliser == Normaliser("channel", (1.0, 2.0), (8.0, 10.0))
    assert found.std == [0.5, 0.5]
    assert found.target.encoding == LATENT.encoding


def test_a_config_names_another_place_of_the_autoencoder_and_another_scale() -> None:
    assert LATENT.encoding is not None
    moved = of_latents(path="there")
    assert moved.target.encoding == replace(LATENT.encoding, path="there")
    assert moved.target.same_values(of_latents().target)
    assert of_latents(scale=0.25).target.normaliser == Normaliser("channel", (0.0, 0.0), (4.0, 4.0))
    both = of_latents(scale=[0.5, 0.25], shift=1).target.normaliser
    assert both == Normaliser("channel", (1.0, 1.0), (2.0, 4.0))
    for section, message in (
        ({"scale": [1, 2, 3]}, "autoencoder.scale: 3 numbers, and latents 'latent' have 2 channels"),
        ({"scale": 2, "data": {"normalisation": "none"}}, "data.normalisation is another scale"),
    ):
        with pytest.raises(UserError, match=message):
            of_latents(**section)
    with pytest.raises(UserError, match="autoencoder: field 'photo' of the data set was made by none"):
        resolved(autoencoder=AutoencoderSection(path="there"))
