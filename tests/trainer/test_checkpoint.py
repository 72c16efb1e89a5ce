"""A checkpoint is committed or it does not exist; damaged ones are refused by name; fragments fit any partition."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from scoreray.data.errors import DataError, StorageError, UserError
from scoreray.data.scratch import scratch_file
from scoreray.data.store import PathStore, Store, open_store
from scoreray.trainer.checkpoint import MARKER, committed, find, latest, open_checkpoint
from scoreray.trainer.checkpoint_writer import CheckpointWriter, kept
from scoreray.trainer.fragments import Fragment, StoredFragment, overlaps
from scoreray.trainer.tensor_file import write_tensors

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


def test_a_damaged_checkpoint_says_which_older_one_there_is(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for images in (100, 200):
        write(store, images)
    newest = latest(store)
    assert newest is not None
    file = Path(newest.url) / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match=rf"50 bytes are there.* without the folder {newest.url} the one at 100 images"):
        newest.full_state()
    shutil.rmtree(newest.url)
    older = latest(store)
    assert older is not None
    assert torch.equal(older.full_state()["b"], state(100)["master/b"])


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


@pytest.mark.parametrize(
    ("images", "keep", "every", "stay"),
    [
        ([100, 200, 300, 400], 2, None, [300, 400]),
        ([320, 640, 960, 1280, 1600, 1920, 2240, 2560], 2, 1000, [1280, 2240, 2560]),
        ([1280, 2240, 2560, 2880, 3200], 1, 1000, [1280, 2240, 3200]),  # the same again when those between are gone
        ([999, 1000, 1001], 1, 1000, [1000, 1001]),
        ([5000], 1, 1000, [5000]),
    ],
)
def test_the_newest_and_the_first_of_each_interval_stay(
    images: list[int], keep: int, every: int | None, stay: list[int]
) -> None:
    folders = [f"checkpoints/{n:012d}-abc" for n in images]
    assert kept(folders, keep, every) == {f"checkpoints/{n:012d}-abc" for n in stay}


def test_what_killed_starts_left_goes_even_if_none_ever_committed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for attempt in range(5):
        store.put(f"checkpoints/000000000100-dead{attempt}/rank-00000.safetensors", b"half a checkpoint")
        Path(tmp_path, f"checkpoints/000000000100-dead{attempt}/.part-rank-00001.safetensors-abcd").write_bytes(b"half")
        Path(tmp_path, f".part-owner-{attempt}").write_bytes(b"half")
    writer = CheckpointWriter(store, attempt="one", rank=0, world_size=2, keep=2, timeout_s=0.2)
    about = {"config": {}, "shapes": SHAPES, "state_keys": ["exp_avg"]}
    writer.save(100, 10, fragments(state(100), 0, 2), torch.nn.Module(), about)
    with pytest.raises(StorageError, match="did not arrive"):  # this start is no luckier: rank 1 is missing
        writer.wait()
    left = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {("owner",), ("checkpoints", "000000000100-one")}


def test_unfinished_uploads_of_killed_starts_are_aborted(s3_url: str) -> None:
    """S3 keeps the parts of an upload that was never completed, and bills them, where no listing shows them."""
    from scoreray.data.store_s3 import client

    store = open_store(s3_url)
    bucket, prefix = s3_url[5:].split("/", 1)
    place = {"Bucket": bucket, "Key": f"{prefix}/checkpoints/000000000100-dead/rank-00000.safetensors"}
    upload = client().create_multipart_upload(**place)["UploadId"]
    client().upload_part(**place, UploadId=upload, PartNumber=1, Body=b"x" * 1000)
    assert client().list_multipart_uploads(Bucket=bucket, Prefix=place["Key"]).get("Uploads")
    write(store, 100, world=1)
    assert not client().list_multipart_uploads(Bucket=bucket, Prefix=place["Key"]).get("Uploads")


def test_200_kills_while_checkpoints_are_written(tmp_path: Path) -> None:
    """SIGKILL at random moments: the newest committed checkpoint always loads, and what is left never piles up."""
    helper = Path(__file__).with_name("checkpoint_kills.py")
    done = subprocess.run(
        [sys.executable, str(helper), str(tmp_path), "200"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout)
    assert facts["kills"] == 200
    assert facts["commits"] >= 10  # the writers came far enough for kills to fall anywhere
    assert facts["killed while writing"] >= 50
    assert facts["most folders"] <= 12  # 2 that stay, and those of starts that died before they had cleaned up
    assert facts["most files"] <= 60


def test_a_full_disk_leaves_the_newest_checkpoint_whole(tmp_path: Path) -> None:
    """Files that may grow to 40 KB only (RLIMIT_FSIZE gives the error that a full disk gives, at any user id)."""
    store = open_store(tmp_path)
    write(store, 100, world=1)
    writer = CheckpointWriter(store, attempt="two", rank=0, world_size=1, keep=2)
    big = {"master": torch.zeros(20_000), "exp_avg": torch.zeros(20_000)}
    about = {"config": {}, "shapes": {"a": [20_000]}, "state_keys": ["exp_avg"]}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        writer.save(200, 20, [Fragment("a", 0, 20_000, big)], torch.nn.Module(), about)
        with pytest.raises(StorageError, match=r"temporary folder .*\(ulimit -f\); raise the limit"):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    newest = latest(store)
    assert newest is not None
    assert newest.images_seen == 100
    assert torch.equal(newest.full_state()["b"], state(100)["master/b"])


class _Failing(PathStore):
    """A store whose writes fail from the n-th on."""

    left = 0

    def put(self, key: str, data: bytes | Path) -> None:
        if type(self).left == 0:
            raise StorageError(f"{self.url(key)}: the server went away")
        type(self).left -= 1
        super().put(key, data)


@pytest.mark.parametrize("after", range(4))
def test_a_store_that_fails_midway_leaves_the_newest_checkpoint_whole(tmp_path: Path, after: int) -> None:
    """After the owner's token, a share, its table or the buffers are stored, but before the marker is."""
    write(open_store(tmp_path), 100, world=1)
    store = _Failing(str(tmp_path))
    _Failing.left = 1 + after
    about = {"config": {}, "shapes": SHAPES, "state_keys": ["exp_avg"]}
    writer = CheckpointWriter(store, attempt="two", rank=0, world_size=1, keep=2)
    module = torch.nn.Module()
    module.register_buffer("table", torch.arange(3.0))
    writer.save(200, 20, fragments(state(200), 0, 1), module, about)
    with pytest.raises(StorageError, match="went away"):
        writer.wait()
    newest = latest(open_store(tmp_path))
    assert newest is not None
    assert newest.images_seen == 100
    assert torch.equal(newest.full_state()["b"], state(100)["master/b"])
    write(open_store(tmp_path), 300, world=1, attempt="three")
    assert not [key for key, _ in open_store(tmp_path).list() if "-two/" in key]


def test_any_tensor_comes_back_from_a_file(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "flag": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "strided": torch.arange(12.0).view(3, 4).t(),
    }
    with scratch_file() as (file, path):
        size, digest = write_tensors(file, tensors)
        data = path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
        loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
