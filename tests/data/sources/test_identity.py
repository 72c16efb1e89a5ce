"""The same pack again is recognised, and no other: by contents, by every option, and by what is really there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

import scoreray.data.packing.pack as module
import scoreray.data.sources.identity as identity_module
from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.pack import pack
from scoreray.data.packing.plan import PackedShard
from scoreray.data.packing.shards import encode
from scoreray.data.packing.verify import verify
from scoreray.data.reading.manifest import Manifest
from scoreray.data.sources.identity import identity
from scoreray.data.sources.source import open_source
from scoreray.data.storage.store import open_store

SMALL_SHARDS = {"samples_per_shard": 3, "seed": 3}


def bitmap(path: Path, seed: int) -> None:
    """Pictures whose files have one size in bytes, whatever they show."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path, "BMP")


def folder(root: Path) -> Path:
    for i in range(4):
        bitmap(root / "cat" / f"{i}.bmp", i)
        bitmap(root / "dog" / f"{i}.bmp", 10 + i)
    return root


def tars(root: Path, swapped: bool = False) -> Path:
    root.mkdir(exist_ok=True)
    for tar in range(2):
        with webdataset.TarWriter(str(root / f"{tar}.tar"), mtime=0) as writer:
            for i in range(4):
                image = np.random.default_rng(10 * tar + i).integers(0, 256, (8, 8, 3), np.uint8)
                writer.write({"__key__": f"{tar}{i}", "png": encode(image, "png"), "cls": (i + swapped) % 2})
    return root


def contents(url: str | Path) -> dict[str, bytes]:
    store = open_store(url)
    return {key: store.get(key) for key, _ in store.list()}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the shards that are made, appended as they are made."""
    numbers, real = [], module.make_shard
    monkeypatch.setattr(module, "make_shard", lambda plan, number: numbers.append(number) or real(plan, number))
    return numbers


def swap_classes(root: Path) -> None:
    (root / "cat").rename(root / "x")
    (root / "dog").rename(root / "cat")
    (root / "x").rename(root / "dog")


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, Any]]] = {
    "a picture of the same name and size": (lambda root: bitmap(root / "cat" / "2.bmp", 99), {}),
    "classes the other way round": (swap_classes, {}),
    "a name": (lambda root: (root / "cat" / "2.bmp").rename(root / "cat" / "9.bmp"), {}),
    "one less": (lambda root: (root / "cat" / "2.bmp").unlink(), {}),
    "no classes": (lambda root: None, {"labelled": False}),
    "channels": (lambda root: None, {"channels": 3}),
    "grey": (lambda root: None, {"channels": 1}),
    "size": (lambda root: None, {"image_size": 8}),
    "format": (lambda root: None, {"image_format": "npy"}),
    "shards": (lambda root: None, {"samples_per_shard": 4}),
    "seed": (lambda root: None, {"seed": 4}),
    "the name of the set": (lambda root: None, {"name": "other"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_pack_at_the_same_url_is_refused_finished_or_not(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished one goes on where only its source has changed, and makes what a pack of that source makes."""
    source, (change, options) = folder(tmp_path / "in"), CHANGES[what]
    pack(source, tmp_path / "out", **SMALL_SHARDS)
    stopped_at_shard(2, monkeypatch, source, tmp_path / "begun", **SMALL_SHARDS)
    before = contents(tmp_path / "out")
    change(source)
    with pytest.raises(UserError, match=r"out: holds another data set .*give another URL, or remove what is there"):
        pack(source, tmp_path / "out", **{**SMALL_SHARDS, **options})
    assert contents(tmp_path / "out") == before
    if options:
        with pytest.raises(UserError, match="a pack of another source, or with other arguments, has begun here"):
            pack(source, tmp_path / "begun", **{**SMALL_SHARDS, **options})
    else:
        pack(source, tmp_path / "begun", **SMALL_SHARDS)
        pack(source, tmp_path / "fresh", **SMALL_SHARDS)
        assert contents(tmp_path / "begun") == contents(tmp_path / "fresh")


def stopped_at_shard(number: int, monkeypatch: pytest.MonkeyPatch, source: Path, url: Path, **options: Any) -> None:
    """A pack that is stopped when it has made the shards before this one."""
    real = module.make_shard

    def make(plan: module.SourcePlan, shard: int) -> tuple[bytes | None, PackedShard]:
        if shard == number:
            raise KeyboardInterrupt
        return real(plan, shard)

    with monkeypatch.context() as patched:
        patched.setattr(module, "make_shard", make)
        with pytest.raises(KeyboardInterrupt):
            pack(source, url, **options)


def test_a_pack_that_stopped_at_a_bad_file_goes_on_when_it_is_fixed(tmp_path: Path, made: list[int]) -> None:
    """The shards that were made are kept; so are all but one where --skip-bad had left the file out."""
    source = folder(tmp_path / "in")
    pack(source, tmp_path / "fresh", **SMALL_SHARDS)
    order = np.concatenate(made_of := [module_numbers(source, shard) for shard in range(3)])
    name = sorted(str(path.relative_to(source)) for path in source.rglob("*.bmp"))[int(order[-1])]
    assert len(made_of[-1]) == 2
    good = (source / name).read_bytes()
    (source / name).write_bytes(bytes(len(good)))
    with pytest.raises(DataError, match=f"{name}: .*fix or remove it, or --skip-bad N leaves out"):
        pack(source, tmp_path / "out", **SMALL_SHARDS)
    with pytest.raises(UserError, match="a pack has begun there: run it again"):
        Manifest.load(open_store(tmp_path / "out"))
    shutil.copytree(tmp_path / "out", tmp_path / "skipped")
    made.clear()
    assert pack(source, tmp_path / "skipped", **SMALL_SHARDS, skip_bad=1).num_left_out == 1
    assert made == [2]
    (source / name).write_bytes(good)
    made.clear()
    pack(source, tmp_path / "out", **SMALL_SHARDS)
    assert made == [2]
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def module_numbers(source: Path, shard: int) -> np.ndarray:
    """Which of the source's samples are in a shard."""
    opened = open_source(source)
    return module.SourcePlan("", "", opened, SMALL_SHARDS["samples_per_shard"], "png", SMALL_SHARDS["seed"]).numbers(
        shard
    )


def test_shards_that_a_smaller_source_does_not_have_are_removed_but_never_the_users_tars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "in")
    one = {"samples_per_shard": 1}
    stopped_at_shard(7, monkeypatch, source, tmp_path / "begun", **one)
    for name in ("cat/0.bmp", "cat/1.bmp", "dog/0.bmp"):
        (source / name).unlink()
    for name in ("cat/2.bmp", "cat/3.bmp"):  # shards of bad samples only
        (source / name).write_bytes(b"damaged")
    pack(source, tmp_path / "begun", **one, skip_bad=2)
    pack(source, tmp_path / "fresh", **one, skip_bad=2)
    assert contents(tmp_path / "begun") == contents(tmp_path / "fresh")

    place = tmp_path / "place"
    tars(place).mkdir(exist_ok=True)
    (place / "shards").mkdir()
    for i, path in enumerate(sorted(place.glob("*.tar"))):
        path.rename(place / "shards" / f"{i:06d}.tar")
    (place / "shards" / "000002.tar").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"000002\.tar: "):
        pack(place, place)
    (place / "shards" / "000000.tar").rename(place / "shards" / "000002.tar")
    assert pack(place, place).num_samples == 8
    assert sorted(path.name for path in (place / "shards").iterdir()) == ["000001.tar", "000002.tar"]
    assert verify(str(place)) == []


def test_two_packs_of_a_source_that_changes_meanwhile_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that began first sees that its shards are another's by now, and commits nothing."""
    source, real = folder(tmp_path / "in"), module.make_shard

    def overtaken(plan: module.SourcePlan, shard: int) -> tuple[bytes | None, PackedShard]:
        if shard == 2:
            monkeypatch.setattr(module, "make_shard", real)
            bitmap(source / "cat" / "2.bmp", 99)
            stopped_at_shard(2, monkeypatch, source, tmp_path / "out", **SMALL_SHARDS)
        return real(plan, shard)

    monkeypatch.setattr(module, "make_shard", overtaken)
    with pytest.raises(UserError, match="another start of this pack, of a source that has changed since"):
        pack(source, tmp_path / "out", **SMALL_SHARDS)
    pack(source, tmp_path / "out", **SMALL_SHARDS)
    assert verify(str(tmp_path / "out")) == []


def test_a_copy_with_other_times_is_the_same_pack_and_nothing_is_made(tmp_path: Path, made: list[int]) -> None:
    source = folder(tmp_path / "a" / "in")
    manifest = pack(source, tmp_path / "out", **SMALL_SHARDS)
    assert made == [0, 1, 2]
    shutil.copytree(source, tmp_path / "b" / "in")
    os.utime(tmp_path / "b" / "in" / "cat" / "1.bmp", (1, 1))
    assert pack(tmp_path / "b" / "in", tmp_path / "out", **SMALL_SHARDS) == manifest
    assert pack((tmp_path / "b" / "in").as_uri(), tmp_path / "out", **SMALL_SHARDS, workers=2) == manifest
    assert made == [0, 1, 2]


@pytest.mark.parametrize("damage", ["gone", "cut", "all gone", "index gone", "index cut"])
def test_what_is_lost_of_a_finished_pack_is_made_again(damage: str, tmp_path: Path, made: list[int]) -> None:
    source = folder(tmp_path / "in")
    pack(source, tmp_path / "out", **SMALL_SHARDS)
    before = contents(tmp_path / "out")
    made.clear()
    shards, index = tmp_path / "out" / "shards", tmp_path / "out" / "index.bin"
    if damage == "gone":
        (shards / "000001.tar").unlink()
    elif damage == "cut":
        os.truncate(shards / "000001.tar", 1024)
    elif damage == "all gone":
        shutil.rmtree(shards)
    elif damage == "index gone":
        index.unlink()
    else:
        os.truncate(index, 64)
    reported: list[tuple[int, int]] = []
    pack(source, tmp_path / "out", **SMALL_SHARDS, progress=lambda n, total: reported.append((n, total)))
    assert contents(tmp_path / "out") == before
    assert made == ([1] if damage in ("gone", "cut") else [0, 1, 2])
    assert reported[-1] == ((3, 3) if damage in ("gone", "cut") else (8, 8))


def test_a_lost_shard_that_becomes_another_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder(tmp_path / "in")
    pack(source, tmp_path / "out", **SMALL_SHARDS)
    (tmp_path / "out" / "shards" / "000001.tar").unlink()
    monkeypatch.setattr("scoreray.data.packing.shards.encode", lambda array, kind: encode(array, "png") + b" ")
    with pytest.raises(DataError, match=r"000001\.tar: was gone or cut, and is not the same when it is made again"):
        pack(source, tmp_path / "out", **SMALL_SHARDS)


def test_what_was_left_out_is_asked_for_again(tmp_path: Path) -> None:
    source = folder(tmp_path / "in")
    (source / "cat" / "2.bmp").write_bytes(bytes(246))
    manifest = pack(source, tmp_path / "out", **SMALL_SHARDS, skip_bad=2)
    assert manifest.num_left_out == 1
    assert pack(source, tmp_path / "out", **SMALL_SHARDS, skip_bad=1) == manifest
    with pytest.raises(UserError, match=r"out: is packed, without 1 samples .*accept that with --skip-bad 1"):
        pack(source, tmp_path / "out", **SMALL_SHARDS)


@pytest.mark.parametrize("place", ["path", "s3"])
def test_tars_of_other_labels_and_the_same_sizes_are_others(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = str(tmp_path / "tars")
    tars(Path(source))
    if place == "s3":
        source = request.getfixturevalue("s3_url")
        for path in (tmp_path / "tars").iterdir():
            open_store(source).put(path.name, path)
    target = str(tmp_path / "new")
    first, new = pack(source, source), pack(source, target, image_size=8)
    assert (pack(source, source), pack(source, target, image_size=8)) == (first, new)
    sizes = open_store(source).list()
    tars(tmp_path / "tars", swapped=True)
    if place == "s3":
        for path in (tmp_path / "tars").glob("*.tar"):
            open_store(source).put(path.name, path)
    assert open_store(source).list() == sizes, "no size changed"
    for url, options in ((source, {}), (target, {"image_size": 8})):
        with pytest.raises(UserError, match="holds another data set"):
            pack(source, url, **options)
    open_store(source).delete(["manifest.json", "index.bin"])
    assert pack(source, source).class_counts == [4, 4]
    assert verify(source) == []


def test_a_large_folder_is_known_by_times_and_by_some_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity_module, "READ_WHOLE_BYTES", 1000)
    monkeypatch.setattr(identity_module, "NUM_SAMPLED", 2)
    store = open_store(folder(tmp_path / "in"))
    sizes = dict(store.list())
    read: list[str] = []
    get = type(store).get
    monkeypatch.setattr(type(store), "get", lambda self, key, *ends: read.append(key) or get(self, key, *ends))
    before = identity(store, sizes)
    assert set(read) == {"cat/0.bmp", "dog/3.bmp"}
    assert identity(store, sizes) == before
    os.utime(tmp_path / "in" / "cat" / "2.bmp", ns=(1, 1))
    touched = identity(store, sizes)
    assert touched != before
    at = os.stat(tmp_path / "in" / "cat" / "0.bmp").st_mtime_ns
    bitmap(tmp_path / "in" / "cat" / "0.bmp", 99)
    os.utime(tmp_path / "in" / "cat" / "0.bmp", ns=(at, at))
    assert identity(store, sizes) != touched, "contents that are looked at count whatever the times say"


def test_a_folder_in_s3_has_the_identity_of_a_local_one(tmp_path: Path, s3_url: str) -> None:
    source = open_store(folder(tmp_path / "in"))
    remote = open_store(s3_url)
    for key, _ in source.list():
        remote.put(key, source.get(key))
    sizes = dict(source.list())
    assert identity(source, sizes) == identity(remote, sizes)
    remote.put("cat/1.bmp", bytes(sizes["cat/1.bmp"]))
    assert identity(source, sizes) != identity(remote, sizes)
