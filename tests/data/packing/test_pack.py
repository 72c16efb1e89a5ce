"""Packing: every source, the same bytes each time, tars that stock webdataset reads, safe to kill, clear mistakes."""

from __future__ import annotations

import gc
import gzip
import io
import os
import re
import struct
import tarfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

import scoreray.data.packing.pack as module
from scoreray.data import fashion_mnist_path
from scoreray.data.errors import DataError, ScorerayError, UserError
from scoreray.data.fields.field import plain_fields
from scoreray.data.fields.record_layout import RECORD
from scoreray.data.packing.inspect import picture_grid, spread
from scoreray.data.packing.pack import pack
from scoreray.data.packing.shards import ShardWriter, encode
from scoreray.data.packing.verify import verify
from scoreray.data.reading.manifest import MANIFEST, Manifest
from scoreray.data.reading.samples import read_samples
from scoreray.data.storage.store import open_store


def contents(url: str | Path) -> dict[str, bytes]:
    store = open_store(url)
    return {key: store.get(key) for key, _ in store.list()}


def test_the_same_pack_gives_the_same_bytes_in_any_number_of_threads(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "a", samples_per_shard=50)
    reported: list[tuple[int, int]] = []
    pack(source, tmp_path / "b", samples_per_shard=50, workers=3, progress=lambda n, total: reported.append((n, total)))
    assert reported == [(n, 501) for n in (*range(50, 501, 50), 501)]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(contents(tmp_path / "a"))[:3] == ["index.bin", MANIFEST, "shards/000000.tar"]
    pack(source, tmp_path / "c", samples_per_shard=50, seed=1)
    assert contents(tmp_path / "a")["shards/000000.tar"] != contents(tmp_path / "c")["shards/000000.tar"]


def test_stock_webdataset_reads_our_tars(source: Path, packed: tuple[str, Manifest]) -> None:
    url, manifest = packed
    original = np.load(source)["images"]
    tars = [f"{url}/{shard.name}" for shard in manifest.shards]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("l8"))
    assert len(samples) == manifest.num_samples
    ours = read_samples(url, range(manifest.num_samples)).numpy()
    for number, sample in enumerate(samples):
        assert sample["__key__"] == f"{number:08d}"
        image = sample["png"]
        assert (image == ours[number, 0]).all()
        which = int(image[0, 0]) * 256 + int(image[0, 1])
        assert (image == original[which]).all()
        assert sample["cls"] == which % 7


def test_a_shard_is_plain_ustar_of_the_samples_alone() -> None:
    """Byte by byte, so that no version of webdataset or tarfile changes what the same pack makes."""
    image, expected, offsets = np.zeros((4, 4, 1), np.uint8), b"", []
    png = encode(image, "png")
    for name, data in (("0.png", png), ("0.cls", b"3"), ("0.json", b"{}"), ("1.png", png), ("x/2.png", png)):
        header = tarfile.TarInfo(name)
        header.size = len(data)
        expected += header.tobuf(tarfile.USTAR_FORMAT)
        offsets += [len(expected)] if data == png else []
        expected += data + bytes(-len(data) % 512)
    file = io.BytesIO()
    writer = ShardWriter(file, plain_fields((1, 4, 4), "uint8", ["0"], [0], [], []))
    writer.add("0", {"image": image, "label": 3}, b"{}")
    writer.add("1", {"image": image, "label": -1})
    writer.add("x/2", {"image": image, "label": -1})
    shard = writer.finish("a.tar")
    assert file.getvalue() == expected + bytes(1024)
    assert (shard.shard.bytes, shard.shard.sha256) == (len(file.getvalue()), sha256(file.getvalue()).hexdigest())
    assert np.frombuffer(shard.records, RECORD)["offset"].tolist() == offsets


def test_a_shard_that_is_given_up_writes_nothing_to_its_closed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unraisable: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", unraisable.append)
    with open(tmp_path / "a.tar", "wb") as file:
        writer = ShardWriter(file, plain_fields((1, 4, 4), "uint8", ["0"], [0], [], []))
        writer.add("0", {"image": np.zeros((4, 4, 1), np.uint8), "label": 3})
    del writer
    gc.collect()
    assert unraisable == []


def test_statistics_are_those_of_the_images_in_the_models_range(source: Path, packed: tuple[str, Manifest]) -> None:
    values = np.load(source)["images"] / 127.5 - 1
    manifest = packed[1]
    assert manifest.mean == pytest.approx([values.mean()], rel=1e-9)
    assert manifest.sigma_data == pytest.approx(values.std(), rel=1e-9)
    assert manifest.class_counts == np.bincount(np.arange(501) % 7).tolist()


def test_a_killed_pack_is_finished_by_the_same_command_and_keeps_what_is_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(source, tmp_path / "whole", samples_per_shard=50)
    real, made = module.make_shard, []

    def killed(plan: module.SourcePlan, number: int) -> tuple[bytes | None, module.PackedShard]:
        if number == 6:
            raise KeyboardInterrupt
        return real(plan, number)

    monkeypatch.setattr(module, "make_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "set", samples_per_shard=50)
    assert not (tmp_path / "set" / MANIFEST).exists(), "the manifest is the commit"
    with pytest.raises(UserError, match="a pack has begun there: run it again"):
        Manifest.load(open_store(tmp_path / "set"))
    with pytest.raises(UserError, match="a pack of another source, or with other arguments, has begun here"):
        pack(source, tmp_path / "set", samples_per_shard=49)
    (tmp_path / "set" / "shards" / "000002.tar").write_bytes(b"damaged since")

    monkeypatch.setattr(module, "make_shard", lambda plan, number: made.append(number) or real(plan, number))
    pack(source, tmp_path / "set", samples_per_shard=50)
    assert sorted(made) == [2, 6, 7, 8, 9, 10]
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
    made.clear()
    again = pack(source, tmp_path / "set", samples_per_shard=50)
    assert made == []
    assert again == Manifest.load(open_store(tmp_path / "set"))
    with pytest.raises(UserError, match="holds another data set"):
        pack(source, tmp_path / "set", samples_per_shard=51)


def test_a_folder_of_images_is_resized_cropped_and_labelled_by_subfolder(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, size in [
        ("cat/a.png", (40, 20)),
        ("cat/b.jpg", (20, 30)),
        ("dog/c.png", (16, 16)),
        ("dog/sub/d.bmp", (50, 51)),
    ]:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    Image.fromarray(np.full((16, 16), 200, np.uint8)).save(tmp_path / "images" / "dog" / "grey.png")
    for image_format in ("png", "jpg", "npy"):
        url = tmp_path / image_format
        manifest = pack(tmp_path / "images", url, image_size=16, image_format=image_format)
        assert (manifest.shape, manifest.classes, manifest.class_counts) == ([3, 16, 16], ["cat", "dog"], [2, 3])
        assert verify(str(url)) == []
        images = read_samples(str(url), range(5)).numpy()
        assert any((abs(image.astype(int) - 200) <= 1).all() for image in images)
        if image_format != "jpg":
            c = np.asarray(Image.open(tmp_path / "images" / "dog" / "c.png")).transpose(2, 0, 1)
            assert any((image == c).all() for image in images), "an image of the right size is not touched"


def test_idx_files_are_read_with_the_labels_beside_them(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 6, 6), np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 3
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">HBBIII", 0, 8, 3, 20, 6, 6) + images.tobytes())
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb") as file:
        file.write(struct.pack(">HBBI", 0, 8, 1, 20) + labels.tobytes())
    manifest = pack(tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "set")
    assert manifest.class_counts == [7, 7, 6]
    found = read_samples(str(tmp_path / "set"), range(20)).numpy()
    assert sorted(image.tobytes() for image in found[:, 0]) == sorted(image.tobytes() for image in images)


def bad_sources(folder: Path) -> dict[str, tuple[object, str]]:
    """name -> (arguments, what the message says)"""
    images = np.zeros((4, 8, 8), np.uint8)
    images[0] = 9
    save = lambda name, **arrays: np.savez(folder / name, **arrays) or folder / name  # noqa: E731
    (folder / "empty").mkdir()
    (folder / "mixed").mkdir()
    for name, size in [("a.png", 8), ("b.png", 9)]:
        Image.fromarray(np.zeros((size, size), np.uint8)).save(folder / "mixed" / name)
    (folder / "broken").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / "broken" / "a.png")
    (folder / "broken" / "b.png").write_bytes((folder / "broken" / "a.png").read_bytes()[:45])
    (folder / "deep").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(folder / "deep" / "a.png")
    (folder / "not.npz").write_bytes(b"PK\x03\x04 nonsense")
    (folder / "x.txt").write_text("x")
    (folder / "bad-idx3-ubyte").write_bytes(struct.pack(">HBBIII", 0, 8, 3, 20, 6, 6))
    return {
        "missing": ((folder / "none",), "there is no such file"),
        "kind": ((folder / "x.txt",), "can't tell what this is; accepted"),
        "empty": ((folder / "empty",), "no images in this folder"),
        "mixed": ((folder / "mixed",), r"b.png: 9 x 9 pixels, the first image has 8 x 8; give --image-size"),
        "broken": ((folder / "broken",), r"b.png: can't be decoded: .*; fix or remove it, or --skip-bad"),
        "deep": ((folder / "deep",), r"a.png: more than 8 bits"),
        "npz": ((folder / "not.npz",), "no readable .npz"),
        "names": ((save("n.npz", other=images, more=images),), "say which columns are packed.* it has other, more"),
        "pickle": ((save("p.npz", images=np.array([{}, {}])),), "no readable .npz of plain arrays"),
        "lengths": ((save("l.npz", images=images, labels=np.zeros(3, int)),), r"4 samples, but labels of shape \(3,\)"),
        "negative": ((save("m.npz", images=images, labels=-np.ones(4, int)),), "labels must be whole numbers from 0"),
        "none": ((save("e.npz", images=images[:0]),), "holds no samples"),
        "same": ((save("s.npz", images=images[1:]),), "all samples are the same"),
        "nan": ((save("f.npz", points=np.array([[0.0], [np.nan]])),), "sample 1 holds a value that is not finite"),
        "wide": ((save("w.npz", images=np.zeros((4, 8, 9), np.uint8)),), "8 x 9; give --image-size"),
        "idx": ((folder / "bad-idx3-ubyte",), "no readable IDX file"),
        "format": ((save("g.npz", images=images), "gif"), "--image-format 'gif': .*accepted: jpg, npy, png"),
    }  # fmt: skip


def test_every_bad_source_is_one_line_that_says_what_is_wrong(tmp_path: Path) -> None:
    for name, (arguments, message) in bad_sources(tmp_path).items():
        path, *image_format = arguments  # type: ignore[misc]
        with pytest.raises(ScorerayError, match=message) as caught:
            pack(path, tmp_path / "out" / name, **({"image_format": image_format[0]} if image_format else {}))
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, UserError | DataError)


def test_verify_lists_every_problem_by_name(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path, samples_per_shard=100)
    assert verify(str(tmp_path)) == []
    (tmp_path / "shards" / "000001.tar").unlink()
    data = bytearray((tmp_path / "shards" / "000003.tar").read_bytes())
    data[600] ^= 1
    (tmp_path / "shards" / "000003.tar").write_bytes(data)
    problems = verify(str(tmp_path))
    assert len(problems) == 3
    assert "000001.tar: no such file" in problems[0]
    assert "000003.tar: its SHA-256" in problems[1]
    assert "000003.tar: sample 300 at byte 512: its bytes" in problems[2]


def test_verify_reports_a_cut_shard_in_two_lines(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(source, tmp_path, samples_per_shard=100)
    path = tmp_path / "shards" / "000002.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 // 512 * 512])
    for window in (1 << 23, 700):
        monkeypatch.setattr("scoreray.data.packing.verify.WINDOW_BYTES", window)
        problems = verify(str(tmp_path))
        assert len(problems) == 2
        assert (
            f"000002.tar: {len(whole) // 2 // 512 * 512} bytes, the manifest says {len(whole)}: it is cut"
            in problems[0]
        )
        assert re.search(r"000002.tar: samples 2\d\d to 299, from byte \d+: their bytes are not those", problems[1])
        path.write_bytes(whole)
        assert verify(str(tmp_path)) == []
        path.write_bytes(whole[: len(whole) // 2 // 512 * 512])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('"version": 2|"version": 1', "version"),
        ('"num_samples": 501|"num_samples": 502', "num_samples is not the sum"),
        ('shards/000003.tar|../../etc/passwd', "can't be the key"),
        ('shards/000003.tar|/etc/passwd', "can't be the key"),
        ('shards/000003.tar|shards/000002.tar', "same name"),
        ('"dtype": "uint8"|"dtype": "object"', "dtype"),
        ('"packing"|"__class__"', "__class__"),
        ('[1, 12, 12]|[1, 1000000, 1000000]', "above the limit"),
        ('[1, 12, 12]|[1, -12, 12]', "greater than 0"),
        ('"version": 2|"version": "2"', "version"),
        ('{|[', "the whole"),
        ('"sigma_data": 0.|"sigma_data": 1.', "the manifest is damaged"),
        (']|  ]', "the manifest is damaged"),
    ],
)  # fmt: skip
def test_a_manifest_from_outside_is_checked(change: str, message: str, packed: tuple[str, Manifest]) -> None:
    old, new = change.split("|")
    text = packed[1].to_json()
    assert old in text
    assert Manifest.from_json(text) == packed[1]
    with pytest.raises(DataError, match=message):
        Manifest.from_json(text.replace(old, new, 1))


def test_the_images_that_travel_with_the_package_are_whole(tmp_path: Path) -> None:
    assert os.path.getsize(fashion_mnist_path()) < 5_800_000
    assert fashion_mnist_path().with_suffix(".LICENSE").read_text().count("Copyright (c) 2017 Zalando SE") == 1
    with np.load(fashion_mnist_path(), allow_pickle=False) as archive:
        assert archive["images"].shape == (12_000, 28, 28)
        assert np.bincount(archive["labels"]).tolist() == [1200] * 10
        assert len(archive["classes"]) == 10


def test_of_large_samples_only_some_are_in_memory_at_once(packed: tuple[str, Manifest]) -> None:
    small = packed[1]
    assert list(spread(small, 1000)) == list(range(501))
    assert list(spread(small, 100)) == list(range(0, 501, 5))
    large = replace(small, shape=[3, 4096, 4096])
    assert 2 <= len(spread(large, 1000)) <= 4


def test_a_picture_grid_enlarges_by_whole_factors() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8), np.uint8)
    picture = np.asarray(picture_grid(images, columns=3))
    scale = 720 // 24
    assert picture.shape == (2 * (8 * scale + 20) + 20, 3 * (8 * scale + 20) + 20, 3)
    first = picture[20 : 20 + 8 * scale : scale, 20 : 20 + 8 * scale : scale, 0]
    assert (first == images[0, 0]).all()
    as_floats = picture_grid((images / 127.5 - 1).astype(np.float32), columns=3)
    assert (np.asarray(as_floats) == picture).all()
    with pytest.raises(ValueError, match="N, C, H, W"):
        picture_grid(images[0])
    blank, umlaut, other, greek = (
        np.asarray(picture_grid(images[:1], captions=[caption])) for caption in ("", "ö", "ü", "π")
    )
    assert len({picture.tobytes() for picture in (blank, umlaut, other, greek)}) == 4, "letters beyond ASCII are seen"
