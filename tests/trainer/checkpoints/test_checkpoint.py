"""A checkpoint is committed or it does not exist; damaged ones are refused by name; fragments fit any partition."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from scoreray.data.errors import DataError, StorageError, UserError
from scoreray.data.scratch import scratch_file
from scoreray.data.seal import sealed
from scoreray.data.storage.lease import LeaseRemoved, TakenOver
from scoreray.data.storage.store import PathStore, Store, open_store
from scoreray.sampling.model.describe import describe
from scoreray.sampling.model.export import export
from scoreray.sampling.model.load import load_model
from scoreray.trainer.checkpoints import writer as checkpoint_writer
from scoreray.trainer.checkpoints.checkpoint import MARKER, committed, find, latest, open_checkpoint
from scoreray.trainer.checkpoints.marker import DataSet, Marker
from scoreray.trainer.checkpoints.tensor_file import write_tensors
from scoreray.trainer.checkpoints.writer import CheckpointWriter, kept
from scoreray.trainer.optim.fragments import Fragment, StoredFragment, overlaps, parameter_shapes

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


def marker_at(
    images: int, steps: int, shapes: dict[str, list[int]] = SHAPES, state_keys: Sequence[str] = ("exp_avg",)
) -> Marker:
    """As a loop gives it to its writer, which fills in the rest."""
    return Marker(images, steps, {}, shapes, list(state_keys), {}, 1)


def write(store: Store, images: int, *, world: int = 2, attempt: str = "one", keep: int = 2) -> None:
    module = torch.nn.Module()
    module.register_buffer("table", torch.arange(3.0) + images)
    writers = [CheckpointWriter(store, attempt=attempt, rank=r, world_size=world, keep=keep) for r in range(world)]
    for rank, writer in reversed(list(enumerate(writers))):
        writer.save(marker_at(images, images // 10), fragments(state(images), rank, world), module)
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


def test_the_newest_committed_is_read_and_old_ones_are_removed(tmp_path: Path) -> None:
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
    old, new = (CheckpointWriter(store, attempt=name, rank=0, world_size=1, keep=2) for name in ("old", "new"))
    old.save(marker_at(100, 10), fragments(state(100), 0, 1), torch.nn.Module())
    with pytest.raises(UserError, match=r"another start of this run \(new\)"):
        old.wait()
    assert latest(store) is None
    new.save(marker_at(110, 11), fragments(state(110), 0, 1), torch.nn.Module())
    new.wait()
    newest = latest(store)
    assert newest is not None
    assert newest.images_seen == 110


def test_a_rank_that_never_arrives_is_no_commit(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    writer = CheckpointWriter(store, attempt="one", rank=0, world_size=2, keep=2, timeout_s=0.2)
    writer.save(marker_at(100, 10), fragments(state(100), 0, 2), torch.nn.Module())
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
    with pytest.raises(DataError, match=rf"it has 50 bytes, .* without the folder {newest.url} the one at 100 images"):
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
    ["", "null", "[]", "{}", '{"format": 1}', '{"format": 99}', "\x00\xff", '{"format": 1, "images_seen": "x"}',
     "[" * 100_000, '{"format": 2, "sha256": "0"}', '{"images_seen": 1e999}'],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_bytes_that_are_no_marker_are_refused(tmp_path: Path, text: str) -> None:
    store = open_store(tmp_path)
    store.put(f"checkpoints/000000000100-x/{MARKER}", text.encode("latin-1"))
    with pytest.raises(DataError, match="000000000100-x") as caught:
        latest(store)
    assert "\n" not in str(caught.value)


def real_marker(tmp_path: Path) -> tuple[Store, str, Marker]:
    """The store, the key and the value of a marker with all that one can hold."""
    store = open_store(tmp_path)
    write(store, 100)
    key = f"checkpoints/000000000100-one/{MARKER}"
    plain = Marker.from_json(store.get(key), key)
    config = {"process": {"sigma_max": 80.0}, "denoiser": {"sigma_data": 0.5}}
    marker = replace(
        plain, image_shape=[3, 8, 8], classes=["cat", "d\u00f6g"], data=DataSet(64, "0" * 64), config=config
    )
    store.put(key, marker.to_json())
    return store, key, marker


def read(data: bytes) -> Marker | str:
    """The marker, or the line that refuses it."""
    try:
        return Marker.from_json(data, "checkpoints/x/COMMITTED.json")
    except DataError as error:
        return str(error)


def test_no_flipped_bit_of_a_marker_has_another_meaning(tmp_path: Path) -> None:
    store, key, marker = real_marker(tmp_path)
    data = bytearray(store.get(key))
    assert read(bytes(data)) == marker
    found = []
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        found.append(read(bytes(data)))
        data[bit // 8] ^= 1 << bit % 8
    refused = [one for one in found if isinstance(one, str)]
    assert all(one == marker for one in found if not isinstance(one, str))
    assert len(refused) > 8 * (len(data) - 10)
    assert not [line for line in refused if "\n" in line or len(line) > 600]
    assert all(isinstance(read(bytes(data[:end])), str) for end in range(len(data) - 4))


def changed(value: Any, path: tuple[Any, ...], to: Any) -> Any:
    """A JSON value with what is at `path` removed (to is ...) or replaced."""
    if not path:
        return to
    keys = value if isinstance(value, dict) else range(len(value))
    items = {key: changed(value[key], path[1:], to) if key == path[0] else value[key] for key in keys}
    items = {key: item for key, item in items.items() if item is not ...}
    return items if isinstance(value, dict) else list(items.values())


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield above
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths(value[key], (*above, key))


def test_a_marker_of_other_keys_or_types_is_refused_in_one_line(tmp_path: Path) -> None:
    """Every key removed, and every value replaced by one of each type; sealed again after the change, or not."""
    store, key, _ = real_marker(tmp_path)
    whole = json.loads(store.get(key))
    del whole["sha256"]
    others = [..., None, True, -1, 0, 1, 2**70, 1.5, float("inf"), "x", "", [], {}, [[]], {"a": 1}]
    values = [changed(whole, path, other) for path in paths(whole) if path for other in others]
    bare = [read(json.dumps(value).encode()) for value in values]
    resealed = [read(sealed([f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]).encode())
                for value in values]  # fmt: skip
    assert all(isinstance(one, str) for one in bare)
    lines = [one for one in bare + resealed if isinstance(one, str)]
    assert not [line for line in lines if "\n" in line or len(line) > 600]
    wrong = {"images_seen": "x", "format": True, "files": [], "shapes": {"b": [[]]}, "world_size": 0, "time": None}
    for name, other in wrong.items():
        value = changed(whole, (name,), other)
        line = read(sealed([f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]).encode())
        assert isinstance(line, str)
        assert f": {name}" in line


def test_markers_cannot_point_outside(tmp_path: Path) -> None:
    store, key, marker = real_marker(tmp_path)
    file, *_ = marker.files.values()
    for name in ("../../config.yaml", "/etc/passwd", "a\0b"):
        bad = sealed([f'"{field}": {json.dumps(value)}' for field, value in asdict(marker).items() if field != "files"]
                     + [f'"files": {json.dumps({name: asdict(file)})}'])  # fmt: skip
        store.put(key, bad.encode())
        with pytest.raises(DataError, match="bad entry"):
            latest(store)
    with pytest.raises(ValueError, match=r"a\.weight has no \[6, 13\)"):
        replace(marker, files={"f": replace(file, fragments=[("a.weight", 6, 7)])})


def test_a_damaged_marker_says_which_older_checkpoint_there_is(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for images in (100, 200, 300):
        write(store, images, keep=3)
    url = {n: store.url(f"checkpoints/000000000{n}-one") for n in (200, 300)}
    for n in (300, 200):
        file = Path(url[n], MARKER)
        file.write_bytes(file.read_bytes().replace(b'"images_seen": ', b'"images_seen": 1', 1))
        without, older = (f"folder {url[300]}", 200) if n == 300 else (f"folders {url[300]} and {url[200]}", 100)
        readers = [lambda: latest(store), lambda: find(str(tmp_path)), lambda: find(url[300]),
                   lambda: open_checkpoint(store, "checkpoints/000000000300-one"), lambda: load_model(str(tmp_path)),
                   lambda: describe(url[300]), lambda: export(str(tmp_path), str(tmp_path / "out"))]  # fmt: skip
        for read in readers:
            with pytest.raises(DataError, match="damaged") as caught:
                read()
            assert f"without the {without} the one at {older} images is the newest" in str(caught.value)
    shutil.rmtree(url[300])
    shutil.rmtree(url[200])
    left = latest(store)
    assert left is not None
    assert left.images_seen == 100


def test_a_marker_from_before_seals_is_read_with_one_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, key, marker = real_marker(tmp_path)
    unsealed = replace(marker, format=1, data=None)
    old = asdict(unsealed)
    del old["data"]
    for _ in range(2):
        store.put(key, json.dumps(old).encode())
        found = latest(store)
        assert found is not None
        assert found.marker == unsealed
        assert torch.equal(found.full_state()["b"], state(100)["master/b"])
    assert len([record for record in caplog.records if "seal" in record.message]) == 1
    for text in (unsealed.to_json(), json.dumps(old | {"format": 2}).encode()):
        with pytest.raises(DataError, match="damaged"):  # an older format number does not bypass the seal
            Marker.from_json(text, key)


def test_a_url_may_name_a_run_or_one_checkpoint(tmp_path: Path) -> None:
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


def test_leftovers_of_killed_starts_are_removed_even_if_none_committed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for attempt in range(5):
        store.put(f"checkpoints/000000000100-dead{attempt}/rank-00000.safetensors", b"half a checkpoint")
        Path(tmp_path, f"checkpoints/000000000100-dead{attempt}/.part-rank-00001.safetensors-abcd").write_bytes(b"half")
        Path(tmp_path, f".part-owner-{attempt}").write_bytes(b"half")
    writer = CheckpointWriter(store, attempt="one", rank=0, world_size=2, keep=2, timeout_s=0.2)
    writer.save(marker_at(100, 10), fragments(state(100), 0, 2), torch.nn.Module())
    with pytest.raises(StorageError, match="did not arrive"):  # nor can this start commit: rank 1 is missing
        writer.wait()
    left = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {("owner",), ("checkpoints", "000000000100-one")}


def test_unfinished_uploads_of_killed_starts_are_aborted(s3_url: str) -> None:
    """S3 keeps the parts of an upload that was never completed, and bills them, where no listing shows them."""
    from scoreray.data.storage.s3_access import client

    store = open_store(s3_url)
    bucket, prefix = s3_url[5:].split("/", 1)
    place = {"Bucket": bucket, "Key": f"{prefix}/checkpoints/000000000100-dead/rank-00000.safetensors"}
    upload = client().create_multipart_upload(**place)["UploadId"]
    client().upload_part(**place, UploadId=upload, PartNumber=1, Body=b"x" * 1000)
    assert client().list_multipart_uploads(Bucket=bucket, Prefix=place["Key"]).get("Uploads")
    write(store, 100, world=1)
    assert not client().list_multipart_uploads(Bucket=bucket, Prefix=place["Key"]).get("Uploads")


@pytest.mark.parametrize("kills", [25, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_while_checkpoints_are_written(kills: int, tmp_path: Path, run_forked: Callable[..., str]) -> None:
    """SIGKILL at random moments: the newest committed checkpoint always loads, and what is left never piles up."""
    helper = Path(__file__).with_name("checkpoint_kills.py")
    facts = json.loads(run_forked(helper, str(tmp_path), str(kills)).splitlines()[-1])
    assert facts["kills"] == kills
    assert facts["commits"] >= kills // 20  # the writers came far enough for kills to fall anywhere
    assert facts["killed while writing"] >= kills // 4
    assert facts["most folders"] <= 12  # 2 that stay, and those of starts that died before they had cleaned up
    assert facts["most files"] <= 60


def test_a_full_disk_leaves_the_newest_checkpoint_whole(tmp_path: Path) -> None:
    """Files that may grow to 40 KB only (RLIMIT_FSIZE gives the error that a full disk gives, at any user id)."""
    store = open_store(tmp_path)
    write(store, 100, world=1)
    writer = CheckpointWriter(store, attempt="two", rank=0, world_size=1, keep=2)
    big = {"master": torch.zeros(20_000), "exp_avg": torch.zeros(20_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        writer.save(marker_at(200, 20, {"a": [20_000]}), [Fragment("a", 0, 20_000, big)], torch.nn.Module())
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
    writer = CheckpointWriter(store, attempt="two", rank=0, world_size=1, keep=2)
    module = torch.nn.Module()
    module.register_buffer("table", torch.arange(3.0))
    writer.save(marker_at(200, 20), fragments(state(200), 0, 1), module)
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


class Two(torch.nn.Module):
    """A module of two parameters (and maybe a buffer), of given shapes."""

    def __init__(self, **shapes: list[int]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            if name == "table":
                self.register_buffer(name, torch.zeros(shape))
            else:
                self.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"a": [3, 4], "b": [5], "table": [3]}, ""),
        ({"a": [3, 4], "b": [4], "table": [3]}, r"parameter b has the shape \[5\], \[4\] is wanted"),
        ({"a": [3, 4], "b": [6], "table": [3]}, r"parameter b has the shape \[5\], \[6\] is wanted"),
        ({"a": [4, 3], "b": [5], "table": [3]}, r"parameter a has the shape \[3, 4\], \[4, 3\] is wanted"),
        ({"a": [12], "b": [5], "table": [3]}, r"parameter a has the shape"),
        ({"a": [3, 4], "table": [3]}, "parameter b is of another network"),
        ({"a": [3, 4], "b": [5], "c": [1], "table": [3]}, "parameter c is not stored there"),
        ({"a": [3, 4], "b": [5], "table": [1]}, r"buffer table has the shape \[3\], \[1\] is wanted"),
        ({"a": [3, 4], "b": [5], "table": [2, 3]}, r"buffer table has the shape"),
    ],
)
def test_what_is_not_of_the_same_shape_is_not_restored(tmp_path: Path, shapes: dict[str, Any], reason: str) -> None:
    """A shorter parameter took the first values of a longer one, and a buffer was broadcast, without a word."""
    store, stored = open_store(tmp_path), Two(a=[3, 4], b=[5], table=[3])
    named = [(name, p.numel()) for name, p in stored.named_parameters()]
    writer = CheckpointWriter(store, attempt="one", rank=0, world_size=1, keep=1)
    marker = marker_at(8, 1, parameter_shapes(stored), [])
    writer.save(marker, [Fragment(name, 0, n, {"master": torch.ones(n)}) for name, n in named], stored)
    writer.wait()
    checkpoint, module = latest(store), Two(**shapes)
    assert checkpoint is not None
    fragments = [Fragment(name, 0, p.numel(), {"master": p.detach().view(-1)}) for name, p in module.named_parameters()]
    if not reason:
        checkpoint.restore(fragments, module)
        assert all(bool((p == 1).all()) for p in module.parameters())
        return
    with pytest.raises(DataError, match=reason):
        checkpoint.restore(fragments, module)


@pytest.mark.parametrize("remote", [False, True])
def test_of_several_starts_at_once_exactly_the_newest_goes_on(
    tmp_path: Path, request: pytest.FixtureRequest, run_forked: Callable[..., str], remote: bool
) -> None:
    """Processes that take one run over within 50 ms: all but the last to do so end as taken over, the last commits."""
    url, rounds, starts = (request.getfixturevalue("s3_url"), 2, 2) if remote else (str(tmp_path / "run"), 3, 4)
    helper = Path(__file__).with_name("racing_starts.py")
    output = run_forked(helper, url, str(rounds), str(starts))
    facts = json.loads(output.splitlines()[-1])
    assert facts["failed"] == 0, output[-3000:]
    assert facts["taken over"] == rounds * (starts - 1)
    assert facts["went on"] == facts["whole"] == facts["records"] == rounds
    assert facts["most folders"] == 2


def one_save(store: Store, world: int, **options: Any) -> CheckpointWriter:
    """A writer of rank 0 that is at work on a first save."""
    writer = CheckpointWriter(store, attempt="old", rank=0, world_size=world, keep=2, **options)
    writer.save(marker_at(100, 10), fragments(state(100), 0, world), torch.nn.Module())
    return writer


def test_a_rank_that_waits_for_others_finds_that_its_run_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waited for half an hour for a share that the newer start had removed."""
    monkeypatch.setattr(checkpoint_writer, "WAITING_EVERY_S", 0.0)
    store = open_store(tmp_path)
    old = one_save(store, 2)
    write(store, 100, attempt="new")
    with pytest.raises(TakenOver, match=r"another start of this run \(new\) has taken over from this one \(old\)"):
        old.wait()
    newest = latest(store)
    assert newest is not None
    assert newest.folder.endswith("-new")


def test_a_rank_between_checkpoints_finds_that_its_run_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_writer, "LEASE_EVERY_S", 0.0)
    store = open_store(tmp_path)
    old = one_save(store, 1)
    old.wait()
    old.poll()
    CheckpointWriter(store, attempt="new", rank=0, world_size=1, keep=2)

    def poll_on() -> None:
        while True:  # one poll of the store, then its answer
            old.poll()

    with pytest.raises(TakenOver):
        poll_on()


@pytest.mark.parametrize("gone", ["owner", "run"])
@pytest.mark.parametrize("when", ["saving", "waiting", "training"])
def test_a_run_that_is_removed_while_it_goes_on_ends_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str, when: str
) -> None:
    monkeypatch.setattr(checkpoint_writer, "WAITING_EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint_writer, "LEASE_EVERY_S", 0.0)
    store = open_store(tmp_path / "run")
    writer = one_save(store, 2 if when == "waiting" else 1)
    if when != "waiting":
        writer.wait()
    while when == "waiting" and not any(key.endswith(".json") for key, _ in store.list("checkpoints/")):
        time.sleep(0.01)  # until this rank's share is whole: a file being written would keep its folder from going
    remove = (lambda: store.delete(["owner"])) if gone == "owner" else (lambda: shutil.rmtree(tmp_path / "run"))
    remove()

    def go_on() -> None:
        if when == "saving":
            writer.save(marker_at(200, 20), fragments(state(200), 0, 1), torch.nn.Module())
        while when == "training":
            writer.poll()
        writer.wait()

    with pytest.raises(LeaseRemoved, match=rf"{store.url()}/owner: was removed.*give the same command"):
        go_on()
    write(store, 300)
    newest = latest(store)
    assert newest is not None
    assert newest.images_seen == 300


def test_a_share_that_another_rank_stored_before_rank_0_had_begun_is_not_swept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("checkpoints/000000000050-old/rank-00000.safetensors", b"half a checkpoint of an earlier start")
    for rank in (1, 0):
        writer = CheckpointWriter(store, attempt="new", rank=rank, world_size=2, keep=2, timeout_s=5)
        writer.save(marker_at(100, 10), fragments(state(100), rank, 2), torch.nn.Module())
        writer.wait()
    assert [key for key, _ in store.list("checkpoints/000000000050")] == []
    newest = latest(store)
    assert newest is not None
    assert newest.images_seen == 100


def test_an_older_starts_sweep_does_not_meet_what_a_newer_one_writes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    old = CheckpointWriter(store, attempt="old", rank=0, world_size=1, keep=2)
    new = CheckpointWriter(store, attempt="new", rank=0, world_size=1, keep=2)
    share = "checkpoints/000000000100-new/rank-00000.safetensors"
    store.put(share, b"half a checkpoint")
    half = Path(tmp_path, "metrics", ".part-000000000100.jsonl-abcd")
    half.parent.mkdir()
    half.write_bytes(b"half")
    old.save(marker_at(100, 10), fragments(state(100), 0, 1), torch.nn.Module())
    with pytest.raises(TakenOver):
        old.wait()
    assert store.exists(share)
    assert half.exists()
    new.save(marker_at(100, 10), fragments(state(100), 0, 1), torch.nn.Module())
    new.wait()
    assert not half.exists()


def test_the_newest_checkpoint_is_looked_for_again_where_it_goes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing and the reading of its marker a start that was taken over withdraws it."""
    store = open_store(tmp_path)
    for images in (100, 200):
        write(store, images)
    get = PathStore.get

    def withdraw(self: PathStore, key: str, *at: int) -> bytes:
        if "000000000200" in key and self.exists(key):
            self.delete([key])
        return get(self, key, *at)

    monkeypatch.setattr(PathStore, "get", withdraw)
    newest = latest(store)
    assert newest is not None
    assert newest.images_seen == 100
