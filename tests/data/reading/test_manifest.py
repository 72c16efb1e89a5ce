"""Manifests: of version 2, written as ever, and of version 3, whose samples have fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field
from scoreray.data.fields.record_layout import RECORD, record_dtype
from scoreray.data.reading.manifest import Manifest

FIELDS = [
    Field("image", "image", [3, 4, 4], "uint8", "png", mean=[127.5, 0.0, 255.0], std=[25.5, 51.0, 0.0]),
    Field("t5", "sequence", [7, 5], "bfloat16", "t5.raw"),
    Field("place", "scalar", [], "float64", "json", "where.lat"),
    Field("label", "class", [], "int64", "cls", classes=["a", "b"], class_counts=[1, 0]),
    Field("caption", "text", [12], "uint8", "txt"),
    Field("tokens", "text", [12], "uint8", "txt"),
]


@pytest.fixture
def manifest(tmp_path: Path, write_fields: Callable[..., Manifest]) -> Manifest:
    sample = {"image": ("png", b""), "t5": ("raw", b""), "place": 1.5, "label": 0, "caption": ("txt", b"a")}
    return write_fields(tmp_path / "set", FIELDS, [sample | {"tokens": ("txt", b"a")}])


def test_a_record_has_a_column_for_each_member_and_inline_value() -> None:
    record = record_dtype(FIELDS)
    assert record.itemsize == 3 * (8 + 4 + 1 + 8) + 8 + 4
    assert record.names == ("offset", "size", "format", "digest", "value:place", "value:label")
    assert record["offset"].shape == (3,)
    assert record["value:place"] == np.float64


def test_what_version_2_says_of_its_samples_follows_from_the_fields_of_version_3(
    manifest: Manifest, tmp_path: Path
) -> None:
    text = (tmp_path / "set" / "manifest.json").read_text()
    again = Manifest.from_json(text)
    assert again == manifest
    assert again.to_json() == text
    assert not {"shape", "dtype", "sigma_data", "mean"} & json.loads(text).keys()
    assert (again.target, again.label, again.members) == (FIELDS[0], FIELDS[3], ["png", "t5.raw", "txt"])
    assert (again.shape, again.dtype, again.classes, again.class_counts) == ([3, 4, 4], "uint8", ["a", "b"], [1, 0])
    assert (again.mean, again.std) == ([0.0, -1.0, 1.0], [0.2, 0.4, 0.0])
    values = np.concatenate([[-0.2, 0.2], [-1.4, -0.6], [1.0, 1.0]])  # of these means and standard deviations
    assert again.sigma_data == pytest.approx(values.std())
    assert again.identity != replace(again, fields=[replace(FIELDS[0], name="other"), *FIELDS[1:]]).identity


def test_fields_follow_from_what_version_2_says(packed: tuple[str, Manifest]) -> None:
    url, manifest = packed
    image, label = manifest.fields
    assert (manifest.version, image.name, image.kind, image.shape, label.name) == (
        2,
        "image",
        "image",
        [1, 12, 12],
        "label",
    )
    assert image.mean[0] == pytest.approx((manifest.mean[0] + 1) * 127.5)
    assert label.class_counts == manifest.class_counts
    assert manifest.record == RECORD
    assert manifest.to_json() == Path(url, "manifest.json").read_text()
    assert "fields" not in manifest.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fields": [*FIELDS, FIELDS[0]]}, "two fields have the name 'image'"),
        ({"fields": FIELDS[1:2]}, "none of the fields is an image"),
        ({"fields": [replace(FIELDS[0], member="")]}, "no member"),
        ({"fields": [replace(FIELDS[0], mean=[], std=[])]}, "no mean and std"),
        ({"fields": FIELDS[:1]}, "the index needs 21 bytes"),
        ({"fields": [FIELDS[0], replace(FIELDS[1], shape=[1 << 20, 1 << 20]), *FIELDS[2:]]}, "above the limits"),
        ({"fields": [replace(FIELDS[0], std=[0.0] * 3, mean=[1.0] * 3)]}, "all values are the same"),
    ],
)
def test_manifests_that_no_data_set_has_are_refused(manifest: Manifest, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(manifest, **change)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (("a", "image", [4, 2, 2], "uint8", "png"), "1 or 3 channels"),
        (("a", "image", [3, 2, 2], "float32", "png"), "is uint8, not float32"),
        (("a", "class", [1], "int64", "cls"), r"can't have the shape \[1\]"),
        (("a", "vector", [2, 2], "float32", "npy"), "can't have the shape"),
        (("a", "array", [], "float32", "npy"), "can't have the shape"),
    ],
)
def test_fields_that_can_not_be_are_refused(field: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Field(*field)


def test_a_field_that_is_not_there_is_named_with_those_that_are(manifest: Manifest, tmp_path: Path) -> None:
    assert manifest.find_field("t5", "data.target") == FIELDS[1]
    with pytest.raises(
        UserError, match=r"data.target: the data set 'set' has no field 'clip'; it has image, t5, place"
    ):
        manifest.find_field("clip", "data.target")
    text = manifest.to_json().replace('"kind": "text"', '"kind": "pickle"', 1)
    with pytest.raises(DataError, match=r"fields.4.kind"):
        Manifest.from_json(text)
