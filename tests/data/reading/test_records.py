"""The index by chunks: what is needed of a shard is read and verified, not the whole shard's records."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from scoreray.data.errors import DataError
from scoreray.data.fields.record_layout import CHUNK, RECORD, index_bytes
from scoreray.data.packing.pack import pack
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.records import Records
from scoreray.data.storage.store import open_store

COUNT = 20 * CHUNK + 7


@pytest.fixture(scope="module")
def one_shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    folder = tmp_path_factory.mktemp("records")
    np.savez(folder / "points.npz", points=np.random.default_rng(0).normal(size=(COUNT, 2)))
    return str(folder / "set"), pack(folder / "points.npz", folder / "set", samples_per_shard=COUNT)


class Counted:
    def __init__(self, url: str, manifest: Manifest, index: bytes | None = None, chunks_kept: int = 64) -> None:
        self.index = index if index is not None else open_store(url).get(manifest.index.name)
        self.bytes, self.requests, self.lock = 0, 0, threading.Lock()
        self.records = Records(self.get, manifest, "index.bin", chunks_kept)

    def get(self, key: str, start: int, end: int) -> bytes:
        with self.lock:
            self.bytes, self.requests = self.bytes + end - start, self.requests + 1
        return self.index[start:end]


def test_any_part_of_a_shard_is_what_the_index_holds_there(one_shard: tuple[str, Manifest]) -> None:
    url, manifest = one_shard
    whole = np.frombuffer(Path(url, "index.bin").read_bytes()[: COUNT * RECORD.itemsize], RECORD)
    rng = np.random.default_rng(1)
    for chunks_kept in (1, 64):
        records = Counted(url, manifest, chunks_kept=chunks_kept).records
        for _ in range(200):
            start, end = np.sort(rng.integers(0, COUNT + 1, 2)).tolist()
            if start < end:
                assert np.array_equal(records.read(0, start, end - start), whole[start:end])
        assert len(records._chunks) <= chunks_kept


def test_a_part_costs_its_chunks_and_their_digests(one_shard: tuple[str, Manifest]) -> None:
    url, manifest = one_shard
    assert manifest.index.bytes == index_bytes([COUNT]) == Path(url, "index.bin").stat().st_size
    part = Counted(url, manifest)
    part.records.read(0, 3 * CHUNK, CHUNK)
    assert (part.bytes, part.requests) == (CHUNK * RECORD.itemsize + 21 * 32, 2)
    whole = Counted(url, manifest)
    whole.records.read(0, 0, COUNT)
    assert (whole.bytes, whole.requests) == (COUNT * RECORD.itemsize, 1)


def test_what_several_threads_need_is_asked_once(one_shard: tuple[str, Manifest]) -> None:
    counted = Counted(*one_shard)
    threads = [threading.Thread(target=counted.records.read, args=(0, 5, 10)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.requests == 2


@pytest.mark.parametrize("at", [3 * CHUNK * 32 + 14, COUNT * 32 + 3 * 32 + 5])  # a label; the chunk's digest
def test_a_changed_byte_is_found_when_that_part_is_read(one_shard: tuple[str, Manifest], at: int) -> None:
    url, manifest = one_shard
    index = bytearray(Path(url, "index.bin").read_bytes())
    index[at] ^= 1
    with pytest.raises(DataError, match=r"the records of shard 'shards/000000.tar' .* are not those of the manifest"):
        Counted(url, manifest, bytes(index)).records.read(0, 3 * CHUNK + 4, 1)
    cut = Counted(url, manifest, bytes(index[: 3 * CHUNK * 32 + 100]))
    with pytest.raises(DataError, match="are not those of the manifest"):
        cut.records.read(0, 3 * CHUNK + 4, 1)
