"""A checkpoint is committed or it does not exist; damaged ones are refused by name; fragments fit any partition."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scoreray.data.errors import DataError, StorageError, UserError
from scoreray.data.store import Store, open_store
from scoreray.trainer.checkpoint import MARKER, CheckpointWriter, committed, find, latest, open_checkpoint
from scoreray.trainer.fragments import Fragment, StoredFragment, overlaps

SHAPES = {"a.weight": [3, 4], "b": [5]}


def state(images: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(images)
    return {f"{key}/{name}": torch.randn(shape, generator=generator).flatten() for key in ("master", "exp_avg")
            for name, shape in SHAPES.items()}  # fmt: skip


def fragments(values: dict[str, torch.Tensor], rank: int, world: int) -> list[Fragment]:
    """A partition of each parameter in `world` runs of unequal length."""
    found = []
    for name, shape in SHAPES.items():
        length = torch.Size(shape).numel()
        cuts = [0] + [length * (r + 1) // world for r in range(world)]
        start, end = cuts[rank], cuts[rank + 1]
        if end > start:
            tensors = {key: values[f"{key}/{name}"][start:end] for key in ("master", "exp_avg")}
            found.append(Fragment(name, start, end - start, tensors))
    return found


def write(store: Store, images: int, *, world: int = 2, attempt: str = "one", keep: int = 2) -> None:
    module = torch.nn.Module()
    module.register_buffer("table", torch.arange(3.0) + images)
    about = {"config": {}, "shapes": SHAPES, "state_keys": ["exp_avg"]}
    writers = [CheckpointWriter(store, attempt=attempt, rank=r, world_size=world, keep=keep) for r in range(world)]
    for rank, writer in reversed(list(enumerate(writers))):
        writer.save(images, images // 10, fragments(state(images), rank, world), module, about)
    for writer in writers:
        writer.wait()
        writer.close()


@pytest.mark.parametrize("writing", [1, 2, 3])
@pytest.mark.parametrize("reading", [1, 2, 4])
def test_any_partition_reads_any_other(tmp_path: Path, writing: int, reading: int) -> None:
    store = open_store(tmp_path)
    write(store, 100, world=writing)
    checkpoint = latest(store)
    assert checkpoint is not None
    module = torch.nn.Module()
    module.register_buffer("table", torch.zeros(3))
    got = {key: torch.zeros_like(value) for key, value in state(100).items()}
    for rank in range(reading):
        checkpoint.restore(fragments(got, rank, reading), module)
    assert all(torch.equal(got[key], value) for key, value in state(100).items())
    assert module.table.tolist() == [100.0, 101.0, 102.0]
    assert checkpoint.full_state()["a.weight"].shape == (3, 4)


@given(cuts=st.lists(st.integers(1, 99), unique=True, max_size=8), start=st.integers(0, 98), length=st.integers(1, 100))
@settings(max_examples=200, deadline=None)
def test_overlaps_cover_exactly_once(cuts: list[int], start: int, length: int) -> None:
    ends = [0, *sorted(cuts), 100]
    stored = [StoredFragment("p", a, b - a, "f") for a, b in pairwise(ends)]
    if start + length > 100:
        with pytest.raises(ValueError, match="in no file"):
            overlaps(start, length, stored)
        return
    filled = [start + place + i for piece, source, place, n in overlaps(start, length, stored) for i in range(n)
              if piece.start + source + i == start + place + i]  # fmt: skip
    assert filled == list(range(start, start + length))


def test_newest_committed_wins_and_old_ones_go(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for images in (100, 200, 300):
        write(store, images)
    assert [folder.rpartition("/")[2] for folder in committed(store)] == ["000000000200-one", "000000000300-one"]
    newest = latest(store)
    assert newest is not None
    assert (newest.images_seen, newest.num_steps) == (300, 30)
    assert not [key for key, _ in store.list() if "000000000100" in key]


def test_without_its_marker_a_checkpoint_does_not_exist(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, 100)
    write(store, 200)
    store.delete([f"checkpoints/000000000200-one/{MARKER}"])
    newest = latest(store)
    assert newest is not None
    assert newest.images_seen == 100
    with pytest.raises(UserError, match="no committed checkpoint"):
        open_checkpoint(store, "checkpoints/000000000200-one")
    write(store, 300, attempt="two")  # what the killed attempt left is removed after the next commit
    assert not [key for key, _ in store.list() if "000000000200" in key]


def test_an_older_start_of_the_run_cannot_commit(tmp_path: Path) -> None:
    """A worker group that was taken for dead and goes on, or the same command twice: the newest start has the run."""
    store = open_store(tmp_path)
    about = {"config": {}, "shapes": SHAPES, "state_keys": ["exp_avg"]}
    old, new = (CheckpointWriter(store, attempt=name, rank=0, world_size=1, keep=2) for name in ("old", "new"))
    old.save(100, 10, fragments(state(100), 0, 1), torch.nn.Module(), about)
    with pytest.raises(UserError, match=r"another start of this run \(new\)"):
        old.wait()
    assert latest(store) is None
    new.save(110, 11, fragments(state(110), 0, 1), torch.nn.Module(), about)
    new.wait()
    newest = latest(store)
    assert newest is not None
    assert newest.images_seen == 110


def test_a_rank_that_never_arrives_is_no_commit(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    writer = CheckpointWriter(store, attempt="one", rank=0, world_size=2, keep=2, timeout_s=0.2)
    about = {"config": {}, "shapes": SHAPES, "state_keys": ["exp_avg"]}
    writer.save(100, 10, fragments(state(100), 0, 2), torch.nn.Module(), about)
    with pytest.raises(StorageError, match="rank 1's share did not arrive"):
        writer.wait()
    assert latest(store) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "grow"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    store = open_store(tmp_path)
    write(store, 100)
    key = "checkpoints/000000000100-one/rank-00001.safetensors"
    data = bytearray(store.get(key))
    if damage == "remove":
        store.delete([key])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        store.put(key, bytes(data))
    else:
        store.put(key, bytes(data[:-1]) if damage == "cut" else bytes(data) + b"x")
    checkpoint = latest(store)
    assert checkpoint is not None
    if damage == "grow":  # bytes after the committed ones are not read
        assert torch.equal(checkpoint.full_state()["b"], state(100)["master/b"])
        return
    with pytest.raises(DataError, match=r"rank-00001\.safetensors"):
        checkpoint.full_state()


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "{}", '{"format": 1}', '{"format": 99}', "\x00\xff", '{"format": 1, "images_seen": "x"}'],
)
def test_bytes_that_are_no_marker_are_refused(tmp_path: Path, text: str) -> None:
    store = open_store(tmp_path)
    store.put(f"checkpoints/000000000100-x/{MARKER}", text.encode("latin-1"))
    with pytest.raises(DataError, match="000000000100-x"):
        latest(store)


def test_markers_cannot_point_outside(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, 100)
    key = f"checkpoints/000000000100-one/{MARKER}"
    marker = json.loads(store.get(key))
    marker["files"]["../../config.yaml"] = marker["files"].pop("rank-00000.safetensors")
    store.put(key, json.dumps(marker).encode())
    with pytest.raises(DataError, match="bad entry"):
        latest(store)


def test_what_a_person_may_point_at(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    write(store, 100)
    write(store, 200)
    assert find(str(tmp_path)).images_seen == 200
    assert find(str(tmp_path / "checkpoints" / "000000000100-one")).images_seen == 100
    with pytest.raises(UserError, match="neither a run"):
        find(str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"holds no .ema_0\.300.; it holds exp_avg, master"):
        find(str(tmp_path)).full_state("ema_0.300")
