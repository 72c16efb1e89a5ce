"""Samples with named fields: what a shard holds of them, their statistics, and one line for what can't be packed."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scoreray.data.packing.pack as module
from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field
from scoreray.data.fields.record_layout import CHUNK, FORMATS, column_of, digest
from scoreray.data.packing.commit import carry_out
from scoreray.data.packing.pack import SourcePlan
from scoreray.data.packing.shards import encode
from scoreray.data.reading.manifest import Manifest
from scoreray.data.storage.store import open_store

FIELDS = [
    Field("image", "image", [3, 4, 4], "uint8", "png"),
    Field("text", "text", [1], "uint8", "txt"),
    Field("t5", "sequence", [1, 3], "float16", "npy"),
    Field("latent", "array", [2, 2, 2], "bfloat16", "npy"),
    Field("place", "vector", [2], "float64", "npy"),
    Field("label", "class", [], "int64", "cls", classes=["cat", "dog"], class_counts=[0, 0]),
    Field("score", "scalar", [], "float64", "json"),
    Field("about", "json", [1], "uint8", "json"),
]


def samples(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (4, 4, 3), dtype=np.uint8),
            "text": "größe " * (i % 4),
            "t5": rng.normal(size=(i % 5, 3)).astype(np.float16),
            "latent": (rng.normal(size=(2, 2, 2)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
            "place": rng.normal(size=2) * 1e-3,
            "label": i % 3 - 1,
            "score": i / 7,
            "about": json.dumps({"n": i}).encode(),
        }
        for i in range(count)
    ]


@dataclass(frozen=True)
class ListSource:
    """Samples of a list, as a FieldSource."""

    samples: Sequence[Mapping[str, Any]]
    fields: Sequence[Field] = tuple(FIELDS)
    fingerprint: str = "f"
    path: str = "list"
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=lambda: {"column 'x'": 2})
    runs: np.ndarray | None = None

    @property
    def num_samples(self) -> int:
        return len(self.samples)

    def inputs(self, numbers: Sequence[int]) -> str:
        return self.fingerprint

    def check_visible(self) -> None: ...

    def check_readable(self, skip_bad: int) -> None: ...

    def read_all(self, numbers: Iterable[int]) -> Iterator[Mapping[str, Any] | DataError]:
        return iter([self.samples[number] for number in numbers])


def pack(source: ListSource, url: Path, per_shard: int = 60, skip_bad: int = 0, workers: int = 1) -> Manifest:
    plan = SourcePlan(str(url), "set", source, per_shard, "png", 0, skip_bad > 0, "origin")
    return carry_out(plan, workers=workers, map_shards=None, progress=None, skip_bad=skip_bad)


def test_the_members_of_a_sample_are_side_by_side_and_the_index_says_where(tmp_path: Path) -> None:
    source = ListSource(samples(150))
    manifest = pack(source, tmp_path / "set")
    assert (manifest.version, manifest.num_samples, len(manifest.shards)) == (3, 150, 3)
    assert manifest.members == ["png", "txt", "t5.npy", "latent.raw", "place.npy", "about.json"]
    assert Manifest.load(open_store(tmp_path / "set")) == manifest
    index = (tmp_path / "set" / "index.bin").read_bytes()
    records = np.frombuffer(index[: 150 * manifest.record.itemsize], manifest.record)
    assert len(index) == 150 * manifest.record.itemsize + 3 * 32
    assert CHUNK > 60
    order = np.argsort(np.random.Philox(key=[0, 0xDA7A]).random_raw(150), kind="stable")
    tars = [(tmp_path / "set" / shard.name).read_bytes() for shard in manifest.shards]
    for i, (record, number) in enumerate(zip(records, order.tolist(), strict=True)):
        sample, tar = source.samples[number], tars[i // 60]
        found = [tar[at : at + size] for at, size in zip(record["offset"], record["size"], strict=True)]
        assert [digest(data) for data in found] == record["digest"].tolist()
        assert record["format"].tolist() == [FORMATS[name] for name in ("png", "txt", "npy", "raw", "npy", "json")]
        assert (np.diff(record["offset"].astype(int)) > 0).all()
        assert found[0] == encode(sample["image"], "png")
        assert found[1].decode() == sample["text"]
        for data, name in ((found[2], "t5"), (found[4], "place")):
            array = np.load(io.BytesIO(data))
            assert array.dtype == sample[name].dtype
            assert (array == sample[name]).all()
        assert found[3] == sample["latent"].tobytes()
        assert found[5] == sample["about"]
        assert record[column_of(FIELDS[5])] == sample["label"]
        assert record[column_of(FIELDS[6])] == sample["score"]
    with tarfile.open(fileobj=io.BytesIO(tars[0])) as opened:  # as other readers see it
        groups = [member.name.partition(".") for member in opened.getmembers()]
    assert [key for key, _, _ in groups] == sorted(key for key, _, _ in groups)
    first = [kind for key, _, kind in groups if key == "00000000"]
    assert first == [*manifest.members, *["cls"] * (source.samples[int(order[0])]["label"] >= 0), "json"]


def test_statistics_are_those_of_all_values_in_their_own_units(tmp_path: Path) -> None:
    all_samples = samples(101)
    manifest = pack(ListSource(all_samples), tmp_path / "set")
    by_name = {one.name: one for one in manifest.fields}
    tokens = np.concatenate([sample["t5"] for sample in all_samples]).astype(float)
    latents = np.stack([(s["latent"].astype(np.uint32) << 16).view(np.float32) for s in all_samples]).astype(float)
    values = {
        "image": np.stack([sample["image"] for sample in all_samples]).reshape(-1, 3).astype(float),
        "t5": tokens,
        "latent": np.moveaxis(latents, 1, -1).reshape(-1, 2),
        "place": np.stack([sample["place"] for sample in all_samples]),
        "score": np.array([[sample["score"]] for sample in all_samples]),
    }
    for name, expected in values.items():
        found, logs = by_name[name], np.sign(expected) * np.log1p(np.abs(expected))
        assert found.low == expected.min(0).tolist()
        assert found.high == expected.max(0).tolist()
        for one, other in (
            (found.mean, expected.mean(0)), (found.log_mean, logs.mean(0)),
            (found.std, expected.std(0)), (found.log_std, logs.std(0)),
        ):  # fmt: skip
            assert one == pytest.approx(other.tolist(), rel=1e-9)
    assert by_name["t5"].shape == [4, 3]
    assert by_name["text"].shape == [len("größe ".encode()) * 3]
    assert by_name["label"].class_counts == [34, 33]
    assert manifest.sigma_data == pytest.approx((values["image"] / 127.5 - 1).std(), rel=1e-9)


def test_bytes_depend_on_the_samples_alone_and_a_killed_pack_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, make = ListSource(samples(150)), module.make_shard
    pack(source, tmp_path / "a", workers=3)

    def killed(plan: SourcePlan, number: int) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return make(plan, number)

    monkeypatch.setattr(module, "make_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "b")
    made: list[int] = []
    monkeypatch.setattr(module, "make_shard", lambda plan, number: made.append(number) or make(plan, number))
    # Another normalisation is another data set of the same shards: what is made is kept.
    fields = [replace(one, normalisation="channel") if one.name == "place" else one for one in FIELDS]
    normalised = pack(replace(source, fields=fields), tmp_path / "b")
    assert made == [1, 2]
    assert next(one for one in normalised.fields if one.name == "place").normalisation == "channel"
    for name in ["index.bin", *(shard.name for shard in normalised.shards)]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_value_that_is_not_finite_is_named_by_sample_field_and_index_and_can_be_left_out(tmp_path: Path) -> None:
    some = samples(8)
    some[5]["latent"][1, 0, 1] = 0x7FC0  # nan
    with pytest.raises(DataError, match=r"list: sample 5: field 'latent': nan at \[1, 0, 1\]"):
        pack(ListSource(some), tmp_path / "a")
    assert pack(ListSource(some), tmp_path / "b", skip_bad=1).num_left_out == 1


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("channel", 1.5, r"--normalise place=channel: channel 1 of 2 is 1.5 in all samples"),
        ("range", -2.0, r"--normalise place=range: channel 1 of 2 is -2 in all samples"),
        ("log1p", 0.0, r"--normalise place=log1p: channel 1 of 2 is 0 in all samples"),
    ],
)
def test_the_normalisation_of_a_constant_channel_is_refused(
    tmp_path: Path, kind: Any, value: float, message: str
) -> None:
    some = samples(8)
    for i, sample in enumerate(some):
        sample["place"] = np.array([i, value])
    fields = [replace(one, normalisation=kind) if one.name == "place" else one for one in FIELDS]
    with pytest.raises(UserError, match=message):
        pack(ListSource(some, fields), tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.json").exists()
