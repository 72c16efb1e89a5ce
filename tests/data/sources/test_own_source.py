"""Data sources of somebody else's: packed as any other, the same bytes from any process; mistakes in one line."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.pack import pack
from scoreray.data.reading.samples import SampleReader
from scoreray.data.sources.own_source import open_own_source

SOURCE = """
from dataclasses import dataclass
import numpy as np
from scoreray.data.fields.field import Field

@dataclass(frozen=True)
class Ramp:
    count: int = 10
    slope: float = 2.0

    @property
    def fields(self):
        return [
            Field("wave", "array", [2, 3], "float32", "npy"),
            Field("caption", "text", [1], "uint8", "txt"),
            Field("label", "class", [], "int64", "", classes=["even", "odd"], class_counts=[0, 0]),
        ]

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        wave = np.full((2, 3), self.slope * number, np.float32)
        return {"wave": wave, "caption": f"number {number}", "label": number % 2}

WRONG = {
    "wide": {"wave": np.zeros((2, 4), np.float32)},
    "hole": {"wave": np.full((2, 3), np.nan)},
    "words": {"wave": np.full((2, 3), "x")},
    "many": {"label": 2},
    "named": {"label": "odd"},
    "number": {"caption": 7},
    "half": {"picture": np.full((2, 2, 3), 0.5)},
    "flat": {"picture": np.zeros((2, 2), np.uint8)},
}

@dataclass(frozen=True)
class Bad(Ramp):
    how: str = "raises"

    @property
    def fields(self):
        return [*super().fields, Field("picture", "image", [3, 2, 2], "uint8", "png")]

    def __getitem__(self, number):
        if number == 7 and self.how == "raises":
            raise KeyError("seven")
        values = {**super().__getitem__(number), "picture": np.full((2, 2, 3), number, np.uint8)}
        if number == 7 and self.how in WRONG:
            return {**values, **WRONG[self.how]}
        return {"wave": values["wave"]} if number == 7 else values

@dataclass(frozen=True)
class Hole(Ramp):
    @property
    def fields(self):
        return [Field("array", "array", [2, 3], "float32", "npy")]

    def __getitem__(self, number):
        return {"array": np.full((2, 3), number if number != 7 else np.inf)}

@dataclass(frozen=True)
class NoLength:
    fields = ()
    def __getitem__(self, number): ...

@dataclass(frozen=True)
class NoFields(Ramp):
    fields = ()
"""


def test_a_source_is_packed_by_any_process_to_the_same_bytes(own_package: Callable[..., Path], tmp_path: Path) -> None:
    own_package("theirs", data=SOURCE)
    one = pack("theirs.data:Ramp", tmp_path / "one", source_options={"count": 12}, samples_per_shard=5)
    two = pack("theirs.data:Ramp", tmp_path / "two", source_options={"count": 12}, samples_per_shard=5, workers=3)
    assert one.shards == two.shards
    assert (one.name, one.num_samples, [field.kind for field in one.fields]) == ("ramp", 12, ["array", "text", "class"])
    assert pack("theirs.data:Ramp", tmp_path / "one", source_options={"count": 12}, samples_per_shard=5) == one
    samples, labels = SampleReader(str(tmp_path / "one")).read(np.arange(12))
    assert sorted(samples[:, 0, 0].tolist()) == [2.0 * number for number in range(12)]
    assert all(int(value) / 2 % 2 == label for value, label in zip(samples[:, 0, 0], labels, strict=True))
    source = open_own_source("theirs.data:Ramp", {"slope": 3})
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint != open_own_source("theirs.data:Ramp", {}).fingerprint
    with pytest.raises(UserError, match="another"):
        pack("theirs.data:Ramp", tmp_path / "one", source_options={"count": 13}, samples_per_shard=5)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("Ramp", {"cuont": 3}, "theirs.data:Ramp: --option cuont: unknown; did you mean 'count'?"),
        ("Ramp", {"count": "x"}, "--option count: Input should be a valid integer"),
        ("Ramp", {"count": 0}, "holds no samples"),
        ("NoLength", {}, "is no data source: it has no __len__"),
        ("NoFields", {}, "`fields` must be a list of one or more"),
        ("Absent", {}, "theirs.data has no 'Absent'"),
    ],
)
def test_what_is_no_source_is_one_line(
    own_package: Callable[..., Path], tmp_path: Path, kind: str, options: dict[str, object], message: str
) -> None:
    own_package("theirs", data=SOURCE)
    with pytest.raises(UserError, match=message) as refused:
        pack(f"theirs.data:{kind}", tmp_path / "packed", source_options=options)
    assert "\n" not in str(refused.value)


def test_a_bad_sample_is_named_or_left_out(own_package: Callable[..., Path], tmp_path: Path) -> None:
    own_package("theirs", data=SOURCE)
    wide = r"theirs.data:Bad: sample 7: 'wave' has the shape \[2, 4\], its Field says \[2, 3\]"
    for how, message in (
        ("raises", "sample 7: KeyError: 'seven'"),
        ("lacks", "sample 7: has no 'caption'"),
        ("wide", wide),
        ("hole", r"sample 7: field 'wave': nan at \[0, 0\]; all must be finite"),
        ("words", "sample 7: 'wave' is <U1 with values that float32 can't hold"),
        ("many", "sample 7: 'label' is 2; its Field has classes 0 to 1, and -1 means none"),
        ("named", "sample 7: 'label' is <U3 with values that int64 can't hold: 'odd'"),
        ("number", "sample 7: 'caption' is 7; a text is str"),
        ("half", "sample 7: 'picture' is float64 with values that uint8 can't hold"),
        ("flat", r"sample 7: 'picture' has the shape \[2, 2\]; a picture is uint8 \[height, width, channels\]"),
    ):
        with pytest.raises(DataError, match=message):
            pack("theirs.data:Bad", tmp_path / how, source_options={"how": how})
        manifest = pack("theirs.data:Bad", tmp_path / f"{how}-skipped", source_options={"how": how}, skip_bad=1)
        assert manifest.num_samples == 9
    with pytest.raises(DataError, match=r"sample 7: field 'array': inf at \[0, 0\]"):  # as the older format stores it
        pack("theirs.data:Hole", tmp_path / "hole-alone")


def test_nothing_is_packed_of_what_was_not_brought(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'nowhere\.data:Ramp' is code of somebody else's"):
        pack("nowhere.data:Ramp", tmp_path / "packed")
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 2, 2), np.uint8))
    with pytest.raises(UserError, match="--option count: is for a source of yours"):
        pack(tmp_path / "x.npz", tmp_path / "packed", source_options={"count": 3})
