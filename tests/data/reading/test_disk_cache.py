"""The cache on disk: shared by processes, within its limit, and never trusted; nothing in it can break a reader."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from waiting import PATIENCE_S

from scoreray.data.packing.pack import pack
from scoreray.data.reading.batches import Batch
from scoreray.data.reading.disk_cache import DiskCache
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.stream import Stream
from scoreray.data.storage.stats import ReadStats

PIECE = 1 << 16
SHARD_BYTES = 12 * PIECE + 1000

# Reads random ranges of three shards (each a pattern of its own), checks them, and says how many bytes it fetched.
PROCESS = f"""
import hashlib, random, sys
from scoreray.data.reading.disk_cache import DiskCache
from scoreray.data.storage.stats import ReadStats
folder, limit, seed, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
shards = [bytes([k]) * 7 + random.Random(k).randbytes({SHARD_BYTES} - 7) for k in range(3)]
names = [hashlib.sha256(shard).hexdigest() for shard in shards]
fetched = 0
def fetch(shard, start, end):
    global fetched
    fetched += end - start
    return shard[start:end]
cache, chance = DiskCache(folder, limit, ReadStats(), {PIECE}), random.Random(seed)
print("ready", flush=True)
for i in range(count):
    k = chance.randrange(3)
    start, end = sorted(chance.randrange({SHARD_BYTES} + 1) for _ in range(2))
    if count == 1:
        start, end = 0, {SHARD_BYTES}
    if start < end:
        found = cache.get(names[k], {SHARD_BYTES}, start, end, lambda a, b: fetch(shards[k], a, b))
        assert found == shards[k][start:end], (k, start, end)
print(fetched, flush=True)
"""


def start(folder: Path, limit: int, seed: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROCESS, str(folder), str(limit), str(seed), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def used(folder: Path) -> int:
    """Bytes on disk, counted under the lock that changes of the cache take."""
    total = 0
    with open(folder / "used", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.rglob("*-*"):
            with contextlib.suppress(FileNotFoundError):  # a .part, renamed since
                total += path.stat().st_size
    return total


def finish(process: subprocess.Popen[str]) -> int:
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    return int(output.split()[-1])


def test_processes_share_a_full_cache_and_some_are_killed(tmp_path: Path) -> None:
    """Every byte is right, the limit holds at every moment, and what the killed ones left goes."""
    limit, largest, chance = 20 * PIECE, 0, random.Random(0)
    stay = [start(tmp_path, limit, seed, 150) for seed in range(2)]
    for seed in range(4):
        victim = start(tmp_path, limit, 10 + seed, 10**6)
        assert victim.stdout
        victim.stdout.readline()
        deadline = time.monotonic() + chance.uniform(0.05, 0.25)
        while time.monotonic() < deadline:
            largest = max(largest, used(tmp_path))
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    for process in stay:
        finish(process)
    assert 0 < largest <= limit
    DiskCache(tmp_path, limit, ReadStats(), PIECE)._shrink(0)
    assert used(tmp_path) == 0


def test_what_several_processes_need_is_fetched_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, 1 << 30, 5, 1) for _ in range(4)]  # the same seed: the same shard
    assert sorted(map(finish, processes)) == [0, 0, 0, SHARD_BYTES]


def read(url: str, num_batches: int, folder: Path, **options) -> tuple[list[Batch], Stream]:
    with Stream(
        url, global_batch_size=24, rank=0, world_size=1, seed=7, shuffle_block=16, cache_bytes=0,
        cache_dir=str(folder), **options,
    ) as stream:  # fmt: skip
        return list(itertools.islice(stream, num_batches)), stream


def same(a: list[Batch], b: list[Batch]) -> bool:
    return all(torch.equal(x.images, y.images) and torch.equal(x.index, y.index) for x, y in zip(a, b, strict=True))


def test_a_second_stream_finds_the_shards_on_disk_and_damaged_ones_are_repaired(
    packed: tuple[str, Manifest], tmp_path: Path
) -> None:
    url, manifest = packed
    first, stream = read(url, 40, tmp_path)
    assert stream.stats.bytes_read < 1.2 * (sum(shard.bytes for shard in manifest.shards) + manifest.index.bytes)
    again, stream = read(url, 40, tmp_path)
    assert same(first, again)
    assert stream.stats.bytes_read <= manifest.index.bytes
    pieces = sorted(tmp_path.rglob("*-0"))
    assert len(pieces) == len(manifest.shards)
    pieces[0].write_bytes(bytes(pieces[0].stat().st_size))
    pieces[1].write_bytes(pieces[1].read_bytes()[:1000])
    damaged, _ = read(url, 40, tmp_path)
    assert same(first, damaged)
    sha256 = {shard.sha256 for shard in manifest.shards}
    assert {hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.rglob("*-0")} == sha256


def test_data_sets_with_the_same_names_do_not_meet(tmp_path: Path) -> None:
    found = []
    for name, seed in [("a", 0), ("b", 1)]:
        images = np.random.default_rng(seed).integers(0, 256, (48, 8, 8), np.uint8)
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "images.npz", images=images)
        pack(tmp_path / name / "images.npz", tmp_path / name / "set", samples_per_shard=48)
        batches, _ = read(str(tmp_path / name / "set"), 2, tmp_path / "cache")
        found.append({image.tobytes() for batch in batches for image in batch.images.numpy()})
        assert found[-1] == {image.tobytes() for image in images}
    assert found[0].isdisjoint(found[1])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_no_more_costs_one_warning(
    packed: tuple[str, Manifest],
    tmp_path: Path,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    expected, _ = read(packed[0], 30, tmp_path / "whole")
    monkeypatch.setattr(os, "pwrite" if code == errno.ENOSPC else "open", full if code == errno.ENOSPC else _refuse)
    with caplog.at_level(logging.WARNING):
        found, _ = read(packed[0], 30, tmp_path / "full")
    assert same(expected, found)
    said = [record.getMessage() for record in caplog.records if "data.cache_dir" in record.getMessage()]
    assert len(said) == 1
    assert os.strerror(code) in said[0]


_open = os.open


def _refuse(path: str | os.PathLike[str], flags: int, *rest: int) -> int:
    if flags & os.O_CREAT and "full" in os.fspath(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    return _open(path, flags, *rest)
