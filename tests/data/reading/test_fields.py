"""Samples of several fields: every kind and type bit for bit, and for all of them what holds for one image."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field, FieldRequest
from scoreray.data.reading.batches import Batch
from scoreray.data.reading.field_values import FieldDecoder
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.quarantine import Quarantine
from scoreray.data.reading.reader import Reader
from scoreray.data.reading.samples import SampleReader
from scoreray.data.reading.stream import Stream
from scoreray.data.seal import sealed
from scoreray.data.storage.store import open_store

COUNT, BATCH = 150, 24  # 1, 2, 3, 4, 6 and 8 divide the batch
LONGEST = 6  # of sequences; every seventh is empty
PNG = Field("image", "image", [3, 4, 5], "uint8", "png", mean=[1.0] * 3, std=[1.0] * 3)
FIELDS = [
    PNG,
    Field("latent", "array", [4, 2, 2], "float16", "latent.npy"),
    Field("codes", "array", [5, 2, 3], "uint8", "codes.npy"),  # neither colours nor channels last
    Field("row", "array", [3], "uint8", "row.raw"),
    Field("volume", "array", [1, 2, 2, 2], "float64", "volume.npy"),
    Field("weights", "array", [2, 3], "bfloat16", "weights.raw"),
    Field("counts", "vector", [3], "int16", "counts.raw"),
    Field("bounds", "vector", [4], "float32", "json", path="box.corners"),
    Field("place", "scalar", [], "float64", "json", path="lat"),
    Field("year", "scalar", [], "int64", "json", path="year"),
    Field("label", "class", [], "int64", "cls", classes=["a", "b"], class_counts=[COUNT // 2] * 2),
    Field("t5", "sequence", [LONGEST, 3], "float32", "t5.npy"),
    Field("clip", "sequence", [LONGEST, 2], "bfloat16", "clip.raw"),
    Field("track", "sequence", [LONGEST, 2], "float64", "json", path="track"),
    Field("caption", "text", [40], "uint8", "txt"),
    Field("title", "text", [40], "uint8", "json", path="title"),
    Field("note", "json", [400], "uint8", "json"),
]
READ = [FieldRequest(field.name) for field in FIELDS if field.kind != "json"]


@functools.cache
def values(i: int) -> dict[str, Any]:
    """Those of sample i, as they should come out, without padding; bfloat16 as its bits."""
    chance, length = np.random.default_rng(i), i % (LONGEST + 1)
    image = chance.integers(0, 256, (3, 4, 5), np.uint8)
    image[0, 0, :2] = i // 256, i % 256
    return {
        "image": image,
        "latent": chance.standard_normal((4, 2, 2)).astype(np.float16),
        "codes": chance.integers(0, 256, (5, 2, 3), np.uint8),
        "row": chance.integers(0, 256, 3, np.uint8),
        "volume": chance.standard_normal((1, 2, 2, 2)),
        "weights": chance.integers(0, 1 << 14, (2, 3)).astype(np.uint16),
        "counts": chance.integers(-9, 9, 3).astype(np.int16),
        "bounds": chance.standard_normal(4).astype(np.float32),
        "place": np.array([i + 0.125]),
        "year": np.array([2**53 + 1 + i]),
        "label": np.array(i % 2),
        "t5": chance.standard_normal((length, 3)).astype(np.float32),
        "clip": chance.integers(0, 1 << 14, (length, 2)).astype(np.uint16),
        "track": chance.standard_normal((length, 2)),
        "caption": np.frombuffer(f"Bär {i} ".encode() * length, np.uint8)[:40],
        "title": np.frombuffer(("\u20ac" * length).encode(), np.uint8),
    }


def stored(i: int) -> dict[str, Any]:
    found, out = values(i), io.BytesIO()
    Image.fromarray(found["image"].transpose(1, 2, 0)).save(out, "PNG")
    text = json.dumps({
        "box": {"corners": [float(value) for value in found["bounds"]]}, "track": found["track"].tolist(),
        "title": found["title"].tobytes().decode(), "lat": float(found["place"][0]), "year": int(found["year"][0]),
    }).encode()  # fmt: skip
    sample: dict[str, Any] = {
        "image": ("png", out.getvalue()), "place": found["place"][0], "year": found["year"][0],
        "label": found["label"], "caption": ("txt", found["caption"].tobytes().decode(errors="ignore").encode()),
    }  # fmt: skip
    sample |= dict.fromkeys(("bounds", "track", "title", "note"), ("json", text))
    for name in ("latent", "codes", "volume", "t5"):
        out = io.BytesIO()
        np.save(out, found[name])
        sample[name] = ("npy", out.getvalue())
    return sample | {name: ("raw", found[name].tobytes()) for name in ("row", "weights", "counts", "clip")}


@pytest.fixture(scope="module")
def fields_set(write_fields: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> str:
    """150 samples of every kind in three shards. Not to be written to."""
    url = tmp_path_factory.mktemp("fields") / "set"
    write_fields(url, FIELDS, [stored(i) for i in range(COUNT)], samples_per_shard=50)
    return str(url)


@pytest.fixture
def copied(fields_set: str, tmp_path: Path) -> Path:
    shutil.copytree(fields_set, tmp_path / "copy")
    return tmp_path / "copy"


def check(fields: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], index: Sequence[int]) -> None:
    """Every value of every field is that sample's, bit for bit, and padding is zero under a mask."""
    for row, number in enumerate(index):
        for name, expected in values(number).items():
            if name == "caption":
                expected = np.frombuffer(expected.tobytes().decode(errors="ignore").encode(), np.uint8)
            found = fields[name][row]
            found = (found.view(torch.uint16) if found.dtype == torch.bfloat16 else found).numpy()
            if name in masks:
                mask = masks[name][row].numpy()
                assert mask.tolist() == [place < len(expected) for place in range(len(found))]
                assert not found[len(expected) :].any()
                found = found[: len(expected)]
            assert found.dtype == expected.dtype, name
            assert found.tobytes() == expected.tobytes(), name


def read(
    url: str | Path, num_batches: int, *, position: int = 0, world_size: int = 1, batch: int = BATCH, **options: Any
) -> list[Batch]:
    batches = []
    for rank in range(world_size):
        with Stream(
            str(url), global_batch_size=batch, rank=rank, world_size=world_size, seed=7, position=position,
            shuffle_block=8, **({"fields": READ} | options),
        ) as stream:  # fmt: skip
            batches += itertools.islice(stream, num_batches)
    return batches


@pytest.mark.parametrize(
    "options", [{"cache_bytes": 0}, {"cache_bytes": 0, "decode_threads": 2}, {"decode_threads": 2}]
)
def test_what_went_in_comes_out_bit_for_bit(fields_set: str, options: dict[str, int]) -> None:
    for batch in read(fields_set, 8, **options):  # more than an epoch: with a cache the last come from it
        check(batch.fields, batch.masks, batch.index.tolist())
        assert torch.equal(batch.images, batch.fields["image"])
        assert torch.equal(batch.labels, batch.fields["label"])


def test_samples_are_read_by_number_and_without_a_request_target_and_class(fields_set: str) -> None:
    reader, numbers = SampleReader(fields_set), [0, 3, 49, 50, 51, 149]
    found = reader.read_fields(numbers, READ)
    check(found.fields, found.masks, numbers)
    images, labels = reader.read(numbers)
    assert torch.equal(images, found.fields["image"])
    assert images.is_contiguous()
    assert torch.equal(labels, found.fields["label"])
    (batch,) = read(fields_set, 1, fields=None)
    assert set(batch.fields) == {"image", "label"}


def test_each_sample_once_an_epoch_over_changes_of_the_world_size(fields_set: str) -> None:
    seen: dict[int, int] = {}
    position, some = 0, [FieldRequest(name) for name in ("image", "t5", "caption")]
    for world_size in (1, 2, 3, 4, 6, 8, 1):
        for batch in read(fields_set, 2, position=position, world_size=world_size, fields=some, cache_bytes=0):
            for row, (at, number) in enumerate(zip(batch.position.tolist(), batch.index.tolist(), strict=True)):
                assert at not in seen
                seen[at] = number
                assert int(batch.fields["image"][row, 0, 0, 1]) == number
                length = number % (LONGEST + 1)
                assert batch.masks["t5"][row].tolist() == [True] * length + [False] * (LONGEST - length)
        position += 2 * BATCH
    assert sorted(seen) == list(range(position))
    for epoch in range(position // COUNT):
        assert sorted(seen[epoch * COUNT + i] for i in range(COUNT)) == list(range(COUNT))


def test_from_odd_positions_a_quarantined_sample_moves_no_other_at_any_world_size(
    fields_set: str, copied: Path
) -> None:
    some = [FieldRequest("image"), FieldRequest("t5")]

    def seen(url: str | Path, num_batches: int, **options: Any) -> dict[int, int]:
        found: dict[int, int] = {}
        for batch in read(url, num_batches, batch=40, fields=some, **options):
            for row, (at, number) in enumerate(zip(batch.position.tolist(), batch.index.tolist(), strict=True)):
                assert at not in found
                found[at] = number
                assert int(batch.fields["image"][row, 0, 0, 1]) == number
                assert int(batch.masks["t5"][row].sum()) == number % (LONGEST + 1)
        return found

    whole = seen(fields_set, 8)
    spoil(copied, "t5.npy", 73)
    for world_size, start in ((1, 3), (2, 77), (5, 149), (8, 151)):  # 160 from there are more than an epoch
        rest = seen(copied, 4, position=start, world_size=world_size, quarantine=Quarantine(1))
        assert sorted(rest) == list(range(start, start + 160))
        assert 73 not in rest.values()
        assert [at for at in rest if rest[at] != whole[at]] == [at for at in rest if whole[at] == 73]


def test_what_is_too_long_is_cut_or_refused_by_the_sample_and_field(fields_set: str) -> None:
    def requests(too_long: Any) -> list[FieldRequest]:
        return [FieldRequest("t5", 4, too_long), FieldRequest("title", 8, too_long), FieldRequest("clip", 9)]

    for batch in read(fields_set, 7, fields=requests("cut"), cache_bytes=0):
        for row, number in enumerate(batch.index.tolist()):
            whole = values(number)
            kept = min(4, number % (LONGEST + 1))
            assert batch.fields["t5"].shape[1:] == (4, 3)
            assert batch.fields["t5"][row, :kept].numpy().tobytes() == whole["t5"][:4].tobytes()
            characters = min(2, number % (LONGEST + 1))  # of three bytes each: none is cut in two
            assert batch.masks["title"][row].sum() == 3 * characters
            assert bytes(batch.fields["title"][row, : 3 * characters].tolist()).decode() == "\u20ac" * characters
            assert batch.fields["clip"].shape[1] == 9
    with pytest.raises(
        UserError, match=r"sample \d+ at byte \d+: field 't5': has [56] tokens, max_length is 4; 6 takes"
    ):
        read(fields_set, 7, fields=requests("refuse"), cache_bytes=0)


def spoil(url: Path, extension: str, sample: int) -> Manifest:
    """Changes a bit of a sample's member."""
    manifest = Manifest.load(open_store(str(url)))
    records = np.fromfile(url / "index.bin", manifest.record, COUNT)
    tar = url / manifest.shards[sample // 50].name
    data = bytearray(tar.read_bytes())
    data[int(records["offset"][sample, manifest.members.index(extension)])] ^= 1
    tar.write_bytes(data)
    return manifest


@pytest.mark.parametrize("extension", ["png", "latent.npy", "row.raw", "json", "t5.npy", "txt"])
def test_a_broken_member_of_any_field_quarantines_its_sample(copied: Path, extension: str) -> None:
    manifest = spoil(copied, extension, 73)
    message = rf"000050.tar: sample 73 at byte \d+: member \.{extension}: its bytes are not those of the index"
    with pytest.raises(DataError, match=message):
        read(copied, 7)
    quarantine = Quarantine(1)
    batches = read(copied, 7, quarantine=quarantine, cache_bytes=0)
    (entry,) = quarantine.found
    assert (entry.sample, entry.key) == (73, "000073")
    for batch in batches:  # another takes its place with all its fields
        check(batch.fields, batch.masks, batch.index.tolist())
    unread = [request for request in READ if manifest.find_field(request.field, "").member != extension]
    read(copied, 7, fields=unread)  # what is not asked for is not read


def test_a_member_that_can_not_be_decoded_is_named_with_its_field(
    write_fields: Callable[..., Manifest], tmp_path: Path
) -> None:
    wrong = {
        "latent": (("npy", stored(0)["volume"][1]), r"holds float64 \(1, 2, 2, 2\), the manifest says float16"),
        "row": (("raw", b"ab"), "is 2 bytes, the manifest says uint8"),
        "bounds": (("json", b'{"box": {"corners": [1, 2, 3, "x"]}}'), "no list of float32 numbers"),
        "t5": (("npy", stored(0)["volume"][1]), "holds float64"),
        "clip": (("raw", b"abcde"), "is 5 bytes"),
        "caption": (("txt", b"\xff\xfe"), "is no UTF-8"),
        "title": (("json", b"{}"), "the JSON has no 'title'"),
        "image": (("png", b"no png"), "is no png"),
    }
    for name, (member, message) in wrong.items():
        url = tmp_path / name
        sample = {**stored(3), name: member}
        write_fields(url, [PNG, *(field for field in FIELDS[1:] if field.name == name)], [sample])
        with pytest.raises(DataError, match=rf"sample 0 at byte 512: field '{name}': .*{message}"):
            SampleReader(str(url)).read_fields([0], [FieldRequest(name)])


def test_a_value_that_is_not_finite_is_named_by_field_and_index(fields_set: str) -> None:
    found = SampleReader(fields_set).read_fields([5, 6], READ)
    assert found.not_finite(1) == ""
    found.fields["weights"][1, 1, 2] = -torch.inf
    assert found.not_finite(0) == ""
    assert found.not_finite(1) == "field 'weights': -inf at [1, 2]"


class CountingReader(Reader):
    def _get_members(self, shard: int, start: int, end: int) -> bytes:
        self.__dict__.setdefault("spans", []).append((shard, start, end))
        return super()._get_members(shard, start, end)


def test_members_of_a_sample_and_its_neighbours_are_one_request(
    fields_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = SampleReader(fields_set)
    reader._reader.__class__ = CountingReader
    reader.read_fields(range(10, 20), READ)
    ((shard, start, end),) = reader._reader.__dict__["spans"]
    assert shard == 0
    assert end - start < 11 * reader.manifest.bytes_per_sample
    reader._reader.__dict__["spans"].clear()
    reader.read_fields(range(10, 20), [FieldRequest("place"), FieldRequest("label")])
    assert reader._reader.__dict__["spans"] == []  # classes and scalars are in the index
    monkeypatch.setattr(Reader, "max_gap_bytes", 0)  # members that nobody wants are worth a request each
    reader.read_fields([10], [FieldRequest("image"), FieldRequest("caption")])
    assert len(reader._reader.__dict__["spans"]) == 2


def test_s3_a_disk_cache_and_a_folder_give_the_same_batches(fields_set: str, s3_url: str, tmp_path: Path) -> None:
    store = open_store(s3_url)
    for key, _ in open_store(fields_set).list():
        store.put(key, open_store(fields_set).get(key))
    local = read(fields_set, 7)
    for options in (
        {},
        {"cache_dir": str(tmp_path / "cache")},
        {"cache_dir": str(tmp_path / "cache"), "cache_bytes": 0},
    ):
        for a, b in zip(local, read(s3_url, 7, **options), strict=True):
            assert torch.equal(a.index, b.index)
            for mine, its in ((a.fields, b.fields), (a.masks, b.masks)):
                assert all(mine[name].equal(its[name]) for name in mine)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([FieldRequest("clap")], "no field 'clap'; it has image, latent"),
        ([FieldRequest("t5"), FieldRequest("t5")], "a field is requested twice"),
        ([FieldRequest("note")], "'note' is json, which is kept and not read"),
        ([FieldRequest("image", 7)], "max_length 7: 1 or more, of sequences and text alone"),
        ([FieldRequest("t5", 0)], "max_length 0: 1 or more"),
    ],
)
def test_requests_that_can_not_be_met_are_one_line(fields_set: str, requests: list[FieldRequest], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Stream(fields_set, global_batch_size=8, rank=0, world_size=1, seed=0, fields=requests)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["image", "int8", "json", "t5.npy", "../x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=8,
)


@settings(max_examples=100, deadline=5000, derandomize=True)
@given(data=st.data())
def test_a_manifest_whose_fields_say_something_else_is_refused_or_describes_samples(
    data: st.DataObject, fields_set: str
) -> None:
    """One entry of it is changed, and it is sealed again: a line, or fields that a decoder takes, and whose samples are
    read or refused in a line."""
    about = json.loads(Path(fields_set, "manifest.json").read_bytes())
    del about["sha256"]
    where = data.draw(st.sampled_from([about, *about["fields"], about["index"], about["shards"][1]]))
    where[data.draw(st.sampled_from([*sorted(where), "path", "classes", "std", "low"]))] = data.draw(json_values)
    text = sealed([f"{json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()])
    with contextlib.suppress(DataError, UserError):
        found = Manifest.from_json(text)
        decoder = FieldDecoder(found, [FieldRequest(one.name) for one in found.fields if one.kind != "json"])
        assert decoder.bytes_per_sample > 0
        assert len(found.mean) == len(found.std) == found.shape[0]
        SampleReader(fields_set, text.encode()).read_fields([3], READ)


def test_a_mutated_index_or_manifest_is_refused_or_the_same(copied: Path) -> None:
    """Of any bit that is not the same, in a quick sample of them."""
    chance, refused = random.Random(3), 0
    for name in ("index.bin", "manifest.json"):
        whole = (copied / name).read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            (copied / name).write_bytes(data[: chance.choice([len(data), chance.randrange(len(data))])])
            numbers = sorted(chance.sample(range(COUNT), 5))
            try:
                found = SampleReader(str(copied)).read_fields(numbers, READ)
                check(found.fields, found.masks, numbers)
            except (DataError, UserError):
                refused += 1
        (copied / name).write_bytes(whole)
    assert refused > 60


def test_mutated_tars_give_the_same_values_or_are_quarantined(copied: Path) -> None:
    manifest = Manifest.load(open_store(str(copied)))
    tar, chance, quarantined = copied / manifest.shards[0].name, random.Random(5), 0
    whole = tar.read_bytes()
    for case in range(9):
        data, at = bytearray(whole), 512 * chance.randrange(len(whole) // 512)
        kind = case % 3
        if kind == 0:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del data[at:]
        else:
            other = 512 * chance.randrange(len(whole) // 512)
            data[at : at + 512], data[other : other + 512] = data[other : other + 512], data[at : at + 512]
        tar.write_bytes(data)
        quarantine = Quarantine(50)
        for batch in read(copied, 6, quarantine=quarantine, cache_bytes=0):
            check(batch.fields, batch.masks, batch.index.tolist())
        quarantined += bool(quarantine.found)
    assert quarantined > 3
