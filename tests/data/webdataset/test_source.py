"""A data set behind webdataset's stages: Stream's order exactly once, at any world size, with any number of workers."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import re
import tarfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field, FieldRequest
from scoreray.data.packing.pack import pack
from scoreray.data.packing.shards import encode
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.order import RecordRange
from scoreray.data.reading.stream import Stream
from scoreray.data.storage.stats import ReadStats
from scoreray.data.storage.store import open_store
from scoreray.data.webdataset import SampleDecoder, shards
from scoreray.data.webdataset.source import TarSpanReader

BATCH = 24
Ledger = dict[int, tuple[int, np.ndarray, int]]  # position -> (sample, image, class)


def pipeline(url: str, world_size: int = 1, **options: Any) -> wds.DataPipeline:
    source = shards(url, global_batch_size=BATCH, world_size=world_size, seed=7, **options)
    fields = wds.to_tuple("__position__", "__index__", "png", "cls")
    return wds.DataPipeline(source, wds.map(SampleDecoder()), fields, wds.batched(BATCH // world_size))


def taken(url: str, num_batches: int, world_size: int = 1, **options: Any) -> Ledger:
    """What all ranks get in `num_batches` steps through a pipeline, each position once."""
    found: Ledger = {}
    for rank in range(world_size):
        for batch in itertools.islice(pipeline(url, world_size, rank=rank, **options), num_batches):
            assert len(batch[0]) == BATCH // world_size
            for position, sample, image, label in zip(*batch, strict=True):
                assert position not in found
                found[int(position)] = (int(sample), image[..., 0], int(label))
    return found


def streamed(url: str, num_batches: int) -> Ledger:
    with Stream(url, global_batch_size=BATCH, rank=0, world_size=1, seed=7) as stream:
        batches = list(itertools.islice(stream, num_batches))
    columns = ((b.position.tolist(), b.index.tolist(), b.images[:, 0].numpy(), b.labels.tolist()) for b in batches)
    return {p: (i, image, label) for column in columns for p, i, image, label in zip(*column, strict=True)}


def assert_same(found: Ledger, expected: Ledger) -> None:
    assert sorted(found) == sorted(expected)
    for position, (sample, image, label) in expected.items():
        assert (found[position][0], found[position][2]) == (sample, label)
        assert (found[position][1] == image).all()


def test_a_pipeline_goes_on_at_other_world_sizes_with_each_sample_once_in_the_streams_order(
    packed: tuple[str, Manifest],
) -> None:
    url, manifest = packed
    n, found, position = manifest.num_samples, Ledger(), 0
    for world_size in (1, 2, 3, 8, 4, 1, 6):  # 7 steps each: changes in the middle of epochs
        found |= taken(url, 7, world_size, position=position)
        position += 7 * BATCH
    assert position > 2 * n
    assert_same(found, streamed(url, position // BATCH))
    for epoch in range(2):
        assert sorted(found[p][0] for p in range(epoch * n, (epoch + 1) * n)) == list(range(n))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_of_a_loader_change_neither_batches_nor_their_order(
    num_workers: int, packed: tuple[str, Manifest]
) -> None:
    url, manifest = packed
    stages = pipeline(url, 2, rank=1, position=3 * BATCH, epochs=1)
    alone = list(stages)
    loader = wds.WebLoader(stages, batch_size=None, num_workers=num_workers)
    together = list(loader)
    assert len(together) == len(alone) == -(-manifest.num_samples // BATCH) - 3
    for a, b in zip(alone, together, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_workers_read_a_remote_data_set_through_a_cache_that_they_share(
    s3_url: str, packed: tuple[str, Manifest], tmp_path: Path
) -> None:
    local = open_store(packed[0])
    for key, _ in local.list():
        open_store(s3_url).put(key, local.get(key))
    stages = pipeline(s3_url, 2, epochs=1, cache_dir=str(tmp_path))
    batches = list(wds.WebLoader(stages, batch_size=None, num_workers=2))
    for a, b in zip(batches, pipeline(packed[0], 2, epochs=1), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    ends = np.cumsum([shard.num_samples for shard in packed[1].shards])
    read = {int(np.searchsorted(ends, index, "right")) for batch in batches for index in batch[1]}
    cached = {file.name.removesuffix("-0") for file in tmp_path.glob("*/*-0")}
    assert cached >= {packed[1].shards[number].sha256 for number in read}
    assert len(read) > len(packed[1].shards) // 2  # one of two ranks need not meet every shard


def test_neighbours_are_read_in_one_request_whatever_members_are_between_them(packed: tuple[str, Manifest]) -> None:
    rank_rows = shards(packed[0], global_batch_size=BATCH).rank_rows
    stats = ReadStats()
    reader = rank_rows.reader(stats, kind=TarSpanReader)
    reader.records(0)
    before = stats.num_requests
    spans, _ = reader.read([RecordRange(0, 1, 5), RecordRange(0, 8, 2)])
    assert len(spans[0]) == 7
    assert stats.num_requests == before + 2


def test_an_epoch_ends_and_the_ranks_together_had_each_sample_once(packed: tuple[str, Manifest]) -> None:
    url, manifest = packed
    sources = [shards(url, global_batch_size=BATCH, rank=rank, world_size=3, epochs=1) for rank in range(3)]
    samples = [sample for source in sources for sample in pickle.loads(pickle.dumps(source))]
    assert sorted(sample["__index__"] for sample in samples) == list(range(manifest.num_samples))
    assert sorted(sample["__position__"] for sample in samples) == list(range(manifest.num_samples))
    assert {sample["__key__"] for sample in samples} == {f"{i:08d}" for i in range(manifest.num_samples)}
    assert {sample["__url__"] for sample in samples} == {f"{url}/{shard.name}" for shard in manifest.shards}
    assert all(list(sample)[4:] == ["png", "cls"] for sample in samples)


def test_the_example_of_the_docs_runs_and_gives_the_streams_tenth_batch(packed: tuple[str, Manifest]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    (example,) = re.findall(r"^    import webdataset as wds\n(?:(?:    .*)?\n)*", page, re.MULTILINE)
    names: dict[str, Any] = {}
    exec(textwrap.dedent(example).replace("s3://bucket/photos", packed[0]), names)
    with Stream(packed[0], global_batch_size=256, rank=0, world_size=4, seed=0) as stream:
        tenth = list(itertools.islice(stream, 10))[-1]
    assert names["position"] == stream.position == 2560
    assert (np.asarray(names["positions"]) == tenth.position.numpy()).all()
    assert (np.stack(names["images"]) == tenth.images.permute(0, 2, 3, 1).numpy()).all()
    assert (np.asarray(names["labels"]) == tenth.labels.numpy()).all()


def tar_of(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def image(number: int) -> bytes:
    return encode(np.full((4, 4, 1), number, np.uint8), "png")


KEYS = {
    "sorted": ("a/{0:03d}", ["cls", "json", "png", "txt"]),
    "the image first": ("{0:03d}", ["png", "txt", "cls", "seg.npy", "json"]),
    "the image last": ("./{0:03d}", ["txt", "json", "cls", "png"]),
    "long names": ("x" * 99 + "/" + "y" * 90 + "/{0:03d}", ["cls", "png", "txt"]),
    "names with dots": ("img_0.{0:03d}", ["cls", "png", "txt"]),
    "another picture": ("{0:03d}", ["1.png", "png", "2.png", "txt"]),
    "a large member between": ("{0:03d}", ["bin", "png", "txt"]),
}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", KEYS)
def test_all_members_of_tars_of_others_come_in_whatever_order_they_are(name: str, format: int, tmp_path: Path) -> None:
    named, kinds = KEYS[name]
    expected: dict[str, dict[str, bytes]] = {}
    for tar in range(3):
        members = []
        for i in range(tar * 10, tar * 10 + 10):
            values = {"cls": str(i % 3).encode(), "txt": f"a picture of {i}, café".encode(), "bin": bytes([i]) * 70_000,
                      "json": json.dumps({"i": i}).encode(), "png": image(i), "1.png": image(i + 1),
                      "2.png": image(i + 2), "seg.npy": encode(np.full(5, i, np.float32), "npy")}  # fmt: skip
            key = named.format(i)
            members += [(f"{key}.{kind}", values[kind]) for kind in kinds]
            expected[key.removeprefix("./")] = {kind: values[kind] for kind in kinds}
        tar_of(tmp_path / "t" / f"{tar}.tar", members, format)
    pack(tmp_path / "t", tmp_path / "t")
    source = shards(str(tmp_path / "t"), global_batch_size=6, num_lanes=2, shuffle_block=4, epochs=2)
    samples = list(source)
    assert [sample["__position__"] for sample in samples] == list(range(60))
    for sample in samples:
        own = {kind: value for kind, value in sample.items() if not kind.startswith("__")}
        assert own == expected[sample["__key__"]]
        assert own["png"] == image(sample["__index__"])
    decoded = [SampleDecoder()(sample) for sample in samples]
    if "txt" in kinds:
        assert all(sample["txt"] == f"a picture of {sample['__index__']}, café" for sample in decoded)


def damaged(url: Path, change: dict[bytes, bytes]) -> str:
    path = url / "0.tar"
    data = path.read_bytes()
    for old, new in change.items():
        assert old in data
        data = data.replace(old, new)
    path.write_bytes(data)
    return str(url)


def renamed(old: str, new: str) -> dict[bytes, bytes]:
    """A member's header for one of the same size with another name."""
    headers = []
    for name in (old, new):
        header = tarfile.TarInfo(name)
        header.size = len(b"a cat")
        headers.append(header.tobuf(tarfile.USTAR_FORMAT))
    return {headers[0]: headers[1]}


CHANGES = {
    "a pickle": (renamed("3.txt", "3.pkl"), r"byte \d+: '3.pkl' is a pickle, which can run code: not read"),
    "a name that leaves": (renamed("3.txt", "../x.txt"), r"the name '../x.txt' leaves the tar: not read"),
    "a header": ({tarfile.TarInfo("3.cls").tobuf()[:20]: b"3.clx" + bytes(15)}, r"the header's checksum is wrong"),
    "an image": ({image(3)[40:]: image(3)[41:] + b"x"}, r"its bytes are not those of the index"),
}


def test_what_was_changed_since_packing_is_one_line(tmp_path: Path) -> None:
    for name, (change, message) in CHANGES.items():
        members = [(f"{i}.{k}", v) for i in range(9) for k, v in (("cls", b"1"), ("png", image(i)), ("txt", b"a cat"))]
        tar_of(tmp_path / name / "0.tar", members)
        pack(tmp_path / name, tmp_path / name)
        url = damaged(tmp_path / name, change)
        with pytest.raises(DataError, match=rf"0\.tar: sample \d at byte \d+: .*{message}") as caught:
            list(shards(url, global_batch_size=3, epochs=1))
        assert "\n" not in str(caught.value)


def test_a_class_that_is_not_the_indexs_is_refused(tmp_path: Path) -> None:
    tar_of(
        tmp_path / "t" / "0.tar", [(f"{i}.{k}", v) for i in range(3) for k, v in (("cls", b"12"), ("png", image(i)))]
    )
    pack(tmp_path / "t", tmp_path / "t")
    url = damaged(tmp_path / "t", {b"12" + bytes(510): b"13" + bytes(510)})
    with pytest.raises(DataError, match=r"sample \d at byte \d+: its class is b'13', the index says 12"):
        list(shards(url, global_batch_size=3, epochs=1))


def test_samples_whose_images_are_not_in_the_order_of_their_names_are_refused_not_mixed(tmp_path: Path) -> None:
    members = [("0.png", image(0)), ("a.x.cls", b"1"), ("a.y.png", image(1)), ("a.x.png", image(2)), ("a.y.cls", b"2")]
    tar_of(tmp_path / "t" / "0.tar", members)
    pack(tmp_path / "t", tmp_path / "t")
    with pytest.raises(DataError, match=r"0\.tar: sample \d at byte \d+: samples are not in the tar's order; make new"):
        list(shards(str(tmp_path / "t"), global_batch_size=1, epochs=1))


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("pipe:cat /etc/passwd", {}, r"'pipe:cat /etc/passwd' is no URL that can be opened; accepted: s3://"),
        ("http://host/{000..009}.tar", {}, r"is no URL that can be opened; accepted: s3://"),
        ("nothing/there", {}, r"no data set here \(manifest.json is missing\)"),
        ("SET", {"world_size": 5}, r"global_batch_size 24 is not divisible by 5 workers; take 25"),
        ("SET", {"rank": 2, "world_size": 2}, r"rank 2 of world_size 2: out of range"),
        ("SET", {"position": -1}, r"position -1 must not be negative"),
        ("SET", {"epochs": 0}, r"epochs 0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_read(
    url: str, options: dict[str, int], message: str, packed: tuple[str, Manifest]
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        shards(packed[0] if url == "SET" else url, global_batch_size=BATCH, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_samples_of_several_fields_come_with_all_their_members_each_verified(
    write_fields: Callable[..., Manifest], tmp_path: Path
) -> None:
    fields = [
        Field("image", "image", [1, 2, 2], "uint8", "png", mean=[1.0], std=[1.0]),
        Field("latent", "array", [2], "float32", "latent.raw"),
        Field("caption", "text", [9], "uint8", "txt"),
        Field("label", "class", [], "int64", "cls", classes=["a"], class_counts=[9]),
    ]
    samples = [
        {"image": ("png", b"%d" % i), "latent": ("raw", bytes(8)), "caption": ("txt", b"c" * i), "label": 0}
        for i in range(9)
    ]
    manifest = write_fields(tmp_path / "set", fields, samples, samples_per_shard=4)
    found = list(shards(str(tmp_path / "set"), global_batch_size=3, epochs=1))
    with Stream(str(tmp_path / "set"), global_batch_size=9, rank=0, world_size=1, seed=0, num_lanes=3,
                fields=[FieldRequest("caption")]) as stream:  # fmt: skip
        lengths = next(stream).masks["caption"].sum(1).tolist()
    assert sorted(lengths) == sorted(len(sample["txt"]) for sample in found) == list(range(9))
    for sample in found:
        number = sample["__index__"]
        assert (sample["png"], sample["latent.raw"], sample["txt"]) == (b"%d" % number, bytes(8), b"c" * number)
    tar = tmp_path / "set" / manifest.shards[1].name
    tar.write_bytes(tar.read_bytes().replace(b"ccccc\0", b"cccdc\0"))
    with pytest.raises(DataError, match=r"sample 5 at byte \d+: member \.txt: its bytes are not those of the index"):
        list(shards(str(tmp_path / "set"), global_batch_size=3, epochs=1))
