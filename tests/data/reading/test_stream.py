"""The stream: exactly once at any world size, the position is the whole state, no wrong byte gets through."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from waiting import wait_until

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field
from scoreray.data.fields.record_layout import CHUNK, RECORD, record_dtype
from scoreray.data.packing.pack import pack
from scoreray.data.reading.batches import Batch
from scoreray.data.reading.blocks import blocks_at_once
from scoreray.data.reading.manifest import MANIFEST, Manifest
from scoreray.data.reading.order import Order
from scoreray.data.reading.reader import Reader, Tags, wanted_members
from scoreray.data.reading.stream import Stream
from scoreray.data.storage.stats import ReadStats
from scoreray.data.storage.store import open_store

TWO_MEMBERS = [Field("image", "image", [3, 8, 8], "uint8", "png"), Field("clip", "vector", [4], "float32", "npy")]
BATCH = 24  # 1, 2, 3, 4, 6 and 8 divide it


def read(
    url: str, num_batches: int, *, position: int = 0, world_size: int = 1, seed: int = 7, **options
) -> list[Batch]:
    """What all ranks together get, rank after rank."""
    batches = []
    for rank in range(world_size):
        with Stream(
            url, global_batch_size=BATCH, rank=rank, world_size=world_size, seed=seed, position=position,
            shuffle_block=16, **options,
        ) as stream:  # fmt: skip
            batches += itertools.islice(stream, num_batches)
    return batches


def ledger(batches: list[Batch]) -> dict[int, int]:
    """position -> sample, having checked that the images and labels are those samples'."""
    seen: dict[int, int] = {}
    for batch in batches:
        numbers = batch.images[:, 0, 0, 0].long() * 256 + batch.images[:, 0, 0, 1].long()
        assert torch.equal(numbers % 7, batch.labels)
        for position, sample in zip(batch.position.tolist(), batch.index.tolist(), strict=True):
            assert position not in seen, f"position {position} was handed out twice"
            seen[position] = sample
    return seen


def test_each_sample_once_an_epoch_over_changes_of_the_world_size(packed: tuple[str, Manifest]) -> None:
    url, manifest = packed
    n = manifest.num_samples
    seen: dict[int, int] = {}
    position = 0
    for world_size in (1, 2, 3, 4, 6, 8, 3, 1, 8, 2, 6, 4):  # 7 batches each: changes mid-epoch
        part = ledger(read(url, 7, position=position, world_size=world_size))
        assert sorted(part) == list(range(position, position + 7 * BATCH))
        seen |= part
        position += 7 * BATCH
    for epoch in range(position // n):
        assert sorted(seen[p] for p in range(epoch * n, (epoch + 1) * n)) == list(range(n))
    unchanged = ledger(read(url, position // BATCH))
    assert seen == unchanged


def test_the_images_are_those_that_were_packed(packed: tuple[str, Manifest], source: Path) -> None:
    url, _ = packed
    originals = {image[0, 0] * 256 + image[0, 1]: image for image in np.load(source)["images"].astype(int)}
    for cache_bytes, threads in [(0, 1), (0, 2), (1 << 20, 1)]:
        for batch in read(url, 22, cache_bytes=cache_bytes, decode_threads=threads):
            assert batch.images.dtype == torch.uint8
            assert batch.images.shape == (BATCH, 1, 12, 12)
            for image in batch.images.numpy():
                assert (image[0] == originals[int(image[0, 0, 0]) * 256 + int(image[0, 0, 1])]).all()


def test_the_position_is_the_whole_state(packed: tuple[str, Manifest]) -> None:
    url, _ = packed
    with Stream(url, global_batch_size=BATCH, rank=1, world_size=2, seed=7, shuffle_block=16) as stream:
        first = list(itertools.islice(stream, 9))
        assert stream.position == 9 * BATCH, "what was prefetched is not counted"
        rest = list(itertools.islice(stream, 20))
    with Stream(
        url, global_batch_size=BATCH, rank=1, world_size=2, seed=7, shuffle_block=16, position=9 * BATCH
    ) as resumed:
        again = list(itertools.islice(resumed, 20))
    assert first[-1].position.max() < 9 * BATCH
    for a, b in zip(rest, again, strict=True):
        for name in ("images", "labels", "index", "position"):
            assert torch.equal(getattr(a, name), getattr(b, name))


def test_a_stream_may_begin_at_any_position(packed: tuple[str, Manifest]) -> None:
    url, _ = packed
    whole = ledger(read(url, 40))
    for position in (1, 13, 500, 501, 511):
        part = ledger(read(url, 3, position=position, world_size=3))
        assert part == {p: whole[p] for p in range(position, position + 3 * BATCH)}


# Forks a reader at each position that it is sent, so that torch is imported once. The reader prints its process id and
# then its samples, a batch a line; when it has died, "end".
READERS = """
import os, sys
from scoreray.data.reading.stream import Stream
for line in sys.stdin:
    if os.fork():
        os.wait()
        os.write(1, b"end\\n")
        continue
    os.write(1, b"%d\\n" % os.getpid())
    for batch in Stream(sys.argv[1], global_batch_size=24, rank=0, world_size=1, seed=7, position=int(line),
                        shuffle_block=16, cache_bytes=0):
        os.write(1, (" ".join(map(str, batch.index.tolist())) + "\\n").encode())
"""


def test_a_reader_killed_at_20_random_points_and_resumed_sees_the_same_samples(packed: tuple[str, Manifest]) -> None:
    """Each restart continues from the last position committed, maybe before what the killed reader had yielded."""
    url, _ = packed
    rng, lines = np.random.default_rng(0), list[list[int]]()
    with subprocess.Popen(
        [sys.executable, "-c", READERS, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        for _ in range(20):
            process.stdin.write(f"{len(lines) * BATCH}\n")
            process.stdin.flush()
            pid = int(process.stdout.readline())
            life = [process.stdout.readline() for _ in range(rng.integers(0, 20))]  # for 0: while it opens
            time.sleep(rng.uniform(0, 0.03))
            os.kill(pid, signal.SIGKILL)
            life += iter(process.stdout.readline, "end\n")
            life = life[: rng.integers(0, min(len(life), 40) + 1)]
            lines += [[int(word) for word in line.split()] for line in life]
    assert len(lines) > 50
    assert lines == [batch.index.tolist() for batch in read(url, len(lines))]


def test_arrays_pass_through_the_same_path(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(100, 2))
    np.savez(tmp_path / "points.npz", points=points)
    manifest = pack(tmp_path / "points.npz", tmp_path / "set", samples_per_shard=30)
    assert manifest.sigma_data == pytest.approx(points.std(), rel=1e-6)
    with Stream(str(tmp_path / "set"), global_batch_size=20, rank=0, world_size=1, seed=0) as stream:
        batches = list(itertools.islice(stream, 5))
    found = torch.cat([batch.images for batch in batches])
    assert found.dtype == torch.float32
    assert found.shape == (100, 2)
    assert torch.cat([batch.labels for batch in batches]).eq(-1).all()
    assert np.array_equal(np.sort(found.numpy(), 0), np.sort(points.astype(np.float32), 0))


def test_numbers_that_do_not_divide_are_refused_with_the_numbers(packed: tuple[str, Manifest]) -> None:
    url, _ = packed
    for sizes, message in [
        ({"global_batch_size": 10, "world_size": 4}, "global_batch_size 10 is not divisible by 4 workers; take 8"),
        ({"global_batch_size": 12, "world_size": 3, "num_lanes": 4}, r"3 workers can't share num_lanes 4 .* to 12"),
        ({"global_batch_size": 12, "world_size": 3, "num_lanes": 5}, "num_lanes 5 does not divide"),
        ({"global_batch_size": 12, "world_size": 0}, "out of range"),
    ]:
        with pytest.raises(UserError, match=message):
            Stream(url, rank=0, seed=0, **sizes)
    with pytest.raises(UserError, match="no data set here"):
        Stream(url + "-none", global_batch_size=8, rank=0, world_size=1, seed=0)


@pytest.fixture
def damaged(packed: tuple[str, Manifest], tmp_path: Path) -> tuple[str, Path]:
    """(url, the second shard's file) of a copy that may be damaged."""
    shutil.copytree(packed[0], tmp_path / "set")
    return str(tmp_path / "set"), tmp_path / "set" / packed[1].shards[1].name


def flip(path: Path, offset: int) -> None:
    """In place: a stream that reads on meanwhile would find a file that is being written cut short."""
    flipped = path.read_bytes()[offset] ^ 1
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes([flipped]))


def records(url: str, shard: int) -> np.ndarray:
    return np.frombuffer(Path(url, "index.bin").read_bytes(), RECORD)[shard * 64 : (shard + 1) * 64]


def test_a_flipped_byte_is_refused_by_shard_sample_and_offset(damaged: tuple[str, Path]) -> None:
    url, path = damaged
    offset = int(records(url, 1)["offset"][5])
    flip(path, offset + 40)
    with pytest.raises(
        DataError, match=rf"000001.tar: sample 69 at byte {offset}: its bytes are not those of the index"
    ):
        read(url, 40)


def test_later_epochs_take_tags_for_sha256_and_find_the_same_changes(
    damaged: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (url, path), hashed, real = damaged, list[int](), hashlib.sha256
    monkeypatch.setattr("scoreray.data.reading.reader.sha256", lambda data: hashed.append(len(data)) or real(data))
    n = Manifest.load(open_store(url)).num_samples

    def images() -> Iterator[tuple[int, torch.Tensor]]:
        for batch in itertools.islice(stream, n // 8):
            yield from zip(batch.index.tolist(), batch.images, strict=True)

    with Stream(url, global_batch_size=8, rank=0, world_size=1, seed=7, cache_bytes=0, num_lanes=1) as stream:
        first = dict(images())
        assert n <= len(hashed) < 1.5 * n  # of the next epoch some may be read already
        again = dict(images())
        assert len(hashed) < 1.5 * n  # those at a block's ends are of groups that are not whole in it
        assert all(torch.equal(first[i], again[i]) for i in first.keys() & again.keys())
        flip(path, int(records(url, 1)["offset"][20]) + 40)
        with pytest.raises(DataError, match=r"000001.tar: sample 84 at byte \d+: its bytes are not those of the index"):
            list(itertools.islice(stream, n // 4))


def test_a_tag_is_of_bytes_and_of_their_place() -> None:
    tags, data = Tags([20, 5]), memoryview(os.urandom(100))
    assert not tags.has(1, 512, data)
    tags.keep(1, 512, data)
    assert tags.has(1, 512, data)
    changed = memoryview(bytes([data[0] ^ 1]) + bytes(data[1:]))
    for other in ((1, 513, data), (2, 512, data), (1, 512, data[:99]), (1, 512, changed)):
        assert not tags.has(*other)


def test_only_groups_that_are_whole_in_a_request_have_a_tag() -> None:
    """Shards of 20 and 5 samples are 3 and 1 groups."""
    tags = Tags([20, 5])
    wanted = wanted_members(np.zeros(17, record_dtype(TWO_MEMBERS)), 3, (0, 1))  # samples 3 to 19
    assert tags.groups(0, wanted, 2) == [(1, 10, 26), (2, 26, 34)]
    assert tags.groups(1, wanted_members(np.zeros(5, RECORD), 0, (0,)), 1) == [(3, 0, 5)]
    assert tags.groups(1, wanted_members(np.zeros(4, RECORD), 0, (0,)), 1) == []


def test_a_cut_shard_is_refused(damaged: tuple[str, Path]) -> None:
    url, path = damaged
    path.write_bytes(path.read_bytes()[: 512 * 40])  # at a block boundary: tar readers take it for the end
    with pytest.raises(DataError, match=r"000001.tar: sample \d+ at byte \d+: .*the shard is cut"):
        read(url, 40)


def test_a_missing_shard_is_refused(damaged: tuple[str, Path]) -> None:
    url, path = damaged
    path.unlink()
    with pytest.raises(DataError, match=r"000001.tar: no such file; the manifest lists this shard"):
        read(url, 40)


def test_a_damaged_index_is_refused(damaged: tuple[str, Path]) -> None:
    url, _ = damaged
    flip(Path(url, "index.bin"), 64 * 32 + 3)
    with pytest.raises(DataError, match=r"index.bin: the records of shard 'shards/000001.tar'"):
        read(url, 40)


def test_a_member_that_does_not_decode_is_named(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import scoreray.data.packing.shards as module

    real = module.encode
    monkeypatch.setattr(
        module, "encode", lambda array, kind: real(array, kind)[:-30] if array[0, 0, 0] else real(array, kind)
    )
    pack(source, tmp_path / "set", samples_per_shard=64)
    with pytest.raises(DataError, match=r"shards/\d+.tar: sample \d+ at byte \d+: can't be decoded"):
        read(str(tmp_path / "set"), 40)


def test_an_error_is_raised_again_and_never_becomes_the_end_of_the_data(damaged: tuple[str, Path]) -> None:
    url, path = damaged
    path.unlink()
    stream = Stream(url, global_batch_size=BATCH, rank=0, world_size=1, seed=7)
    for _ in range(2):
        with pytest.raises(DataError):
            for _ in stream:
                pass


def test_a_closed_stream_ends_and_leaves_no_thread(packed: tuple[str, Manifest]) -> None:
    url, _ = packed
    before = set(threading.enumerate())
    stream = Stream(url, global_batch_size=BATCH, rank=0, world_size=1, seed=7, prefetch_batches=1)
    next(stream)
    stream.close()
    assert list(stream) == []
    ours = [thread for thread in threading.enumerate() if thread not in before and thread.name.startswith("scoreray-")]
    for thread in ours:
        thread.join(10)
    assert [thread.name for thread in ours if thread.is_alive()] == []


def test_what_is_read_is_what_is_needed(tmp_path: Path) -> None:
    """Bytes fetched, the index included, over bytes of the shards: an epoch of all ranks, few shards, many ranks."""
    images = np.random.default_rng(0).integers(0, 256, (6000, 16, 16), np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    manifest = pack(tmp_path / "images.npz", tmp_path / "set", samples_per_shard=1000)
    order = Order([shard.num_samples for shard in manifest.shards], seed=7, num_lanes=192, shuffle_block=32)
    for world_size in (1, 2, 3, 4, 6, 8, 16, 32, 64):
        fetched, lanes = 0, 192 // world_size
        for rank in range(world_size):
            stats = ReadStats()
            reader = Reader(open_store(tmp_path / "set"), manifest, stats, 2 * lanes * (32 + 2 * CHUNK) + 16 * CHUNK)
            for lane in range(rank * lanes, (rank + 1) * lanes):
                for block in range(order.num_blocks(0, lane)):
                    reader.read(order.block(0, lane, block).ranges)
            fetched += stats.bytes_read
        assert fetched / sum(shard.bytes for shard in manifest.shards) < 1.1


@pytest.mark.parametrize("remote", [False, True])
def test_what_waits_stays_within_the_stated_memory(
    packed: tuple[str, Manifest], remote: bool, request: pytest.FixtureRequest
) -> None:
    """Encoded samples of what a lane reads from and reads next, and `prefetch_batches` decoded ones (and the one in
    hand), however long the consumer waits."""
    url = packed[0]
    if remote:
        url = request.getfixturevalue("s3_url")
        for key, _ in open_store(packed[0]).list():
            open_store(url).put(key, open_store(packed[0]).get(key))
    with Stream(
        url, global_batch_size=BATCH, rank=0, world_size=1, seed=7, shuffle_block=8, num_lanes=6, cache_bytes=0,
        prefetch_batches=3,
    ) as stream:  # fmt: skip
        for _ in range(12):
            next(stream)
            time.sleep(0.1)
            at_once = blocks_at_once(stream.order, stream.manifest.bytes_per_sample) if remote else 1
            most = 2 * 6 * at_once + 6  # a look-up may span a lane's next block
            requested = stream._blocks._requested  # while a look-up is under way, its own too
            wait_until(lambda: len(requested) <= most, lambda: f"{len(requested)} blocks, at most {most}")  # noqa: B023
            assert at_once * 8 * stream.manifest.bytes_per_sample <= 1 << 20
            assert stream._ready.qsize() <= 3


def test_a_stream_of_1e9_samples_in_1e5_shards_opens_at_once_in_little_memory(tmp_path: Path) -> None:
    shards = [{"name": f"{i}.tar", "num_samples": 10_000, "bytes": 2 << 20, "sha256": f"{i:064x}",
               "records_sha256": f"{i:064x}"} for i in range(100_000)]  # fmt: skip
    head = {"version": 2, "name": "large", "shape": [1, 28, 28], "dtype": "uint8", "num_samples": 10**9, "classes": [],
            "class_counts": [], "mean": [0.0], "sigma_data": 0.5,
            "index": {"name": "index.bin", "bytes": 32 * (10**9 + 100_000 * 79), "sha256": "0" * 64}}  # fmt: skip
    text = json.dumps(head | {"shards": shards}).removesuffix("}") + ","
    (tmp_path / MANIFEST).write_text(f'{text}\n "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n')
    del shards, text

    found = subprocess.run([sys.executable, "-c", OPEN_LARGE, str(tmp_path)], capture_output=True, text=True)
    assert not found.returncode, found.stderr
    seconds, resident_bytes, distinct = map(float, found.stdout.split())
    assert seconds < 4  # of CPU time; under 1 where nothing else runs: what grew with the samples would take minutes
    assert resident_bytes < 300 << 20
    assert distinct == 256


OPEN_LARGE = """
import os, sys, time
from pathlib import Path
import numpy as np
from scoreray.data.reading.stream import Stream
def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, started = resident_bytes(), time.process_time()
stream = Stream(sys.argv[1], global_batch_size=256, rank=3, world_size=8, seed=0, position=7 * 10**9 + 256 * 12345)
samples = stream.order.samples(np.arange(stream.position, stream.position + 256))
print(time.process_time() - started, resident_bytes() - before, len(set(samples.tolist())))
"""


def test_s3_gives_the_same_batches_as_a_folder(packed: tuple[str, Manifest], s3_url: str) -> None:
    url, manifest = packed
    store = open_store(s3_url)
    for key, _ in open_store(url).list():
        store.put(key, open_store(url).get(key))
    assert Manifest.load(store) == manifest
    local, remote = read(url, 30), read(s3_url, 30)
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.index, b.index) for a, b in zip(local, remote, strict=True)
    )
    store.delete([MANIFEST])
    with pytest.raises(UserError, match=r"s3://.*no data set here"):
        read(s3_url, 1)
