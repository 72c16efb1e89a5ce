"""Members of shards by ranged reads: neighbours in one request, each member verified by its digest."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator
from functools import partial

import numpy as np

from scoreray.data.errors import DataError, StorageError
from scoreray.data.reading.disk_cache import DiskCache
from scoreray.data.reading.manifest import CHUNK, RECORD, Manifest
from scoreray.data.reading.order import RecordRange
from scoreray.data.reading.quarantine import Quarantine, Unreadable
from scoreray.data.reading.records import Records
from scoreray.data.reading.tars import BLOCK, key_in
from scoreray.data.storage.hedge import HedgedGet
from scoreray.data.storage.stats import ReadStats
from scoreray.data.storage.store import NotFound, Store

log = logging.getLogger(__name__)
sha256 = hashlib.sha256

MAX_REQUEST_BYTES = 16 << 20
REREADS = 8  # of bytes that are not what the index says, from a remote store: the fault may be the network's
REREAD_S = 0.5  # the longest pause before one


class Reader:
    """Reads ranges of samples from a data set's shards; used by several threads.

    Memory: `records_kept` records of 32 bytes, and what read() returns.
    """

    max_gap_bytes = 64 << 10  # a gap between two members is read along with them up to this

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        stats: ReadStats,
        records_kept: int = 1 << 16,
        quarantine: Quarantine | None = None,
        cache: DiskCache | None = None,
    ) -> None:
        self.cache = cache
        self.store, self.manifest, self.stats, self.quarantine = store, manifest, stats, quarantine
        self._get = HedgedGet(store.get, stats) if store.is_remote else store.get
        self.first_samples = manifest.first_samples()
        self._attempts = 1 + (REREADS if store.is_remote else int(cache is not None))
        index = store.url(manifest.index.name)
        self._records = Records(self._get_counted, manifest, index, -(-records_kept // CHUNK))

    def records(self, shard: int, start: int = 0, count: int | None = None) -> np.ndarray:
        """Records [start, start + count) of the shard, RECORD [count], verified. These can't be quarantined."""
        if count is None:
            count = self.manifest.shards[shard].num_samples - start
        for attempt in range(self._attempts):
            try:
                return self._records.read(shard, start, count)
            except (NotFound, DataError) as error:
                if attempt + 1 < self._attempts:
                    self._pause(attempt)
                elif isinstance(error, NotFound):
                    raise DataError(f"{error}; the manifest lists it: is the data set whole?") from error
                else:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _get_members(self, shard: int, start: int, end: int) -> bytes:
        entry = self.manifest.shards[shard]
        if self.cache is None:
            return self._get_counted(entry.name, start, end)
        return self.cache.get(entry.sha256, entry.bytes, start, end, partial(self._get_counted, entry.name))

    def _get_counted(self, key: str, start: int, end: int) -> bytes:
        data = self._get(key, start, end)
        self.stats.add(bytes_read=len(data), num_requests=1)
        return data

    def read(self, ranges: list[RecordRange]) -> tuple[list[bytes | None], np.ndarray]:
        """(members, records) of the samples in these ranges, in their order; None for a member that is quarantined.

        Raises DataError naming shard, sample and offset.
        """
        members: list[bytes | None] = []
        parts = []
        for part in ranges:
            records = self.records(part.shard, part.first, part.count)
            parts.append(records)
            for i, j in _requests(records, self.max_gap_bytes):
                members += self._read(part.shard, part.first + i, records[i:j])
        return members, parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, RECORD), *parts])

    def advise(self, ranges: list[RecordRange]) -> None:
        """Says that these ranges will soon be read. Raises what records() does."""
        for part in ranges:
            records = self.records(part.shard, part.first, part.count)
            low, high = int(records["offset"].min()), int(records["offset"].max()) + int(records["size"][-1])
            self.store.advise(self.manifest.shards[part.shard].name, low, high)

    def read_one(self, sample: int) -> tuple[bytes, int, int]:
        """(member, format, label) of one sample. Raises DataError, whatever may be quarantined."""
        shard, place = self._place(sample)
        record = self.records(shard, place, 1)
        member = self._read(shard, place, record)[0]
        if member is None:
            raise DataError(f"{self.name(shard, place)}: quarantined")
        return member, int(record["format"][0]), int(record["label"][0])

    def _read(self, shard: int, first: int, records: np.ndarray) -> list[bytes | None]:
        """The members of neighbouring records in one request."""
        low, high = int(records["offset"][0]), int(records["offset"][-1]) + int(records["size"][-1])
        return self._verified(shard, first, records, low, high)[0]

    def _verified(
        self, shard: int, first: int, records: np.ndarray, low: int, high: int
    ) -> tuple[list[bytes | None], bytes]:
        """(the records' members, bytes [low, high) of the shard, which hold them) in one request, repeated while a
        member is wrong."""
        name, missing = self.manifest.shards[shard].name, False
        if self.quarantine is not None and name in self.quarantine.missing:
            return [None] * len(records), b""
        begins = records["offset"].astype(np.int64) - low
        places = (begins.tolist(), (begins + records["size"]).tolist())
        expected = records["digest"].tobytes()  # 8 bytes each
        problem, bad = "", list(range(len(records)))
        members: list[bytes | None] = [None] * len(records)
        for attempt in range(self._attempts):
            try:
                data, missing = self._get_members(shard, low, high), False
            except NotFound as error:
                problem, missing = f"{error}; the manifest lists this shard: is the data set whole?", True
                if attempt + 1 < self._attempts:  # a store under stress may say so of what is there
                    self._pause(attempt)
                continue
            found = [data[begin:end] for begin, end in zip(*places, strict=True)]
            digests = b"".join([sha256(member).digest()[:8] for member in found])
            if digests == expected:
                return found, data  # type: ignore[return-value]
            for i in bad:
                members[i] = found[i] if digests[8 * i : 8 * i + 8] == expected[8 * i : 8 * i + 8] else None
            bad = [i for i in bad if members[i] is None]
            if not bad:
                return members, data
            if self.cache is not None:
                self.cache.forget(self.manifest.shards[shard].sha256, low, high)
            problem = "its bytes are not those of the index" + (" (the shard is cut)" if len(data) < high - low else "")
            if attempt + 1 < self._attempts:
                log.warning("%s: %s; reading again", self.name(shard, first + bad[0]), problem)
                self._pause(attempt)
        if self.quarantine is None:
            raise DataError(problem if missing else f"{self.name(shard, first + bad[0])}: {problem}")
        if missing:
            entry = self.manifest.shards[shard]
            self.quarantine.add(
                Unreadable(
                    entry.name, int(self.first_samples[shard]), entry.num_samples, 0, "", "there is no such shard"
                )
            )
            return [None] * len(records), b""
        for i in bad:
            self.put_aside(int(self.first_samples[shard]) + first + i, problem)
        return members, data

    def put_aside(self, sample: int, reason: str) -> None:
        """A sample into the quarantine. Raises DataError when its budget is used up."""
        assert self.quarantine is not None
        shard, place = self._place(sample)
        name = self.manifest.shards[shard].name
        offset = int(self.records(shard, place, 1)["offset"][0])
        try:
            key = key_in(self._get(name, max(0, offset - BLOCK), offset))
        except StorageError:
            key = ""
        self.quarantine.add(Unreadable(name, sample, 1, offset, key, reason.removeprefix(f"{self.name_of(sample)}: ")))

    def name(self, shard: int, place: int) -> str:
        """What a sample is called in messages: shard, number, offset."""
        offset = int(self.records(shard, place, 1)["offset"][0])
        number = int(self.first_samples[shard]) + place
        return f"{self.store.url(self.manifest.shards[shard].name)}: sample {number} at byte {offset}"

    def name_of(self, sample: int) -> str:
        return self.name(*self._place(sample))

    def _place(self, sample: int) -> tuple[int, int]:
        """(a sample's shard, which one of the shard's it is)."""
        shard = int(np.searchsorted(self.first_samples, sample, side="right")) - 1
        return shard, sample - int(self.first_samples[shard])

    def _pause(self, attempt: int) -> None:
        self.stats.add(num_rereads=1)
        time.sleep(min(REREAD_S, 0.05 * 2**attempt))

    def close(self) -> None:
        if isinstance(self._get, HedgedGet):
            self._get.close()


def _requests(records: np.ndarray, max_gap_bytes: int) -> Iterator[tuple[int, int]]:
    """Record ranges [i, j) to read in one request each: no large gap inside, none above the request limit."""
    if not len(records):
        return
    starts = records["offset"].astype(np.int64)
    ends = starts + records["size"]
    gaps = starts[1:] - ends[:-1]
    cuts = (np.flatnonzero((gaps > max_gap_bytes) | (gaps < 0)) + 1).tolist()
    for i, j in zip([0, *cuts], [*cuts, len(records)], strict=True):
        while i < j:
            k = max(i + 1, i + int(np.searchsorted(ends[i:j], starts[i] + MAX_REQUEST_BYTES, side="right")))
            yield i, min(k, j)
            i = min(k, j)
