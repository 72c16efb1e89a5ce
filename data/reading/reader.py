"""Members of shards by ranged reads: neighbours in one request, each member verified by its digest."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from scoreray.data.errors import DataError, StorageError
from scoreray.data.fields.record_layout import CHUNK
from scoreray.data.reading.disk_cache import DiskCache
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.order import RecordRange
from scoreray.data.reading.quarantine import Quarantine, Unreadable
from scoreray.data.reading.records import Records, joined, taken
from scoreray.data.reading.tars import BLOCK, key_in
from scoreray.data.storage.hedge import HedgedGet
from scoreray.data.storage.stats import ReadStats
from scoreray.data.storage.store import NotFound, Store

log = logging.getLogger(__name__)
sha256 = hashlib.sha256

MAX_REQUEST_BYTES = 16 << 20
REREADS = 8  # of bytes that are not what the index says, from a remote store: the fault may be the network's
REREAD_S = 0.5  # the longest pause before one
# A member to be read: which of the shard's samples it is of, the column of the record, and what that says of it.
WANTED = np.dtype([("place", "i8"), ("column", "i4"), ("offset", "u8"), ("size", "u4"), ("digest", "u8")])


class Reader:
    """Reads ranges of samples from a data set's shards; used by several threads.

    Memory: `records_kept` records, of 32 bytes where a sample has one member, and what read() returns.
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
        """Records [start, start + count) of the shard, verified. These can't be quarantined."""
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

    def read(
        self, ranges: list[RecordRange], columns: Sequence[int] = (0,)
    ) -> tuple[list[list[bytes | None]], np.ndarray]:
        """(members of each of `columns` of the records, records) of the samples in these ranges, in their order; None
        for a member that is quarantined.

        Raises DataError naming shard, sample and offset.
        """
        members: list[list[bytes | None]] = [[] for _ in columns]
        parts = []
        for part in ranges:
            records = self.records(part.shard, part.first, part.count)
            parts.append(records)
            for column, found in zip(members, self._members(part, records, columns), strict=True):
                column += found
        return members, parts[0] if len(parts) == 1 else joined(parts, self.manifest.record)

    def _members(self, part: RecordRange, records: np.ndarray, columns: Sequence[int]) -> list[list[bytes | None]]:
        """The members of each column of the part's records: neighbours in one request."""
        wanted = wanted_members(records, part.first, columns)
        # Those of a sample may be in any order in a tar. Of one column that is the records' own order.
        order = np.argsort(wanted["offset"], kind="stable") if len(columns) > 1 else None
        wanted = wanted if order is None else taken(wanted, order)
        found: list[bytes | None] = []
        for i, j in requests(wanted["offset"], wanted["size"], self.max_gap_bytes):
            low, high = int(wanted["offset"][i]), int(wanted["offset"][j - 1]) + int(wanted["size"][j - 1])
            found += self._verified(part.shard, wanted[i:j], low, high)[0]
        if order is None:
            return [found] * len(columns)
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return [[found[i] for i in back[column :: len(columns)].tolist()] for column in range(len(columns))]

    def advise(self, ranges: list[RecordRange]) -> None:
        """Says that these ranges will soon be read. Raises what records() does."""
        for part in ranges:
            records = self.records(part.shard, part.first, part.count)
            low, high = int(records["offset"].min()), int((records["offset"] + records["size"]).max())
            self.store.advise(self.manifest.shards[part.shard].name, low, high)

    def read_one(self, sample: int, columns: Sequence[int] = (0,)) -> tuple[list[bytes], np.ndarray]:
        """(a member of each of `columns`, record) of one sample. Raises DataError, whatever may be quarantined."""
        shard, place = self._place(sample)
        members, records = self.read([RecordRange(shard, place, 1)], columns)
        found = [column[0] for column in members]
        if None in found:
            raise DataError(f"{self.name(shard, place)}: quarantined")
        return found, records[0]  # type: ignore[return-value]

    def _verified(self, shard: int, wanted: np.ndarray, low: int, high: int) -> tuple[list[bytes | None], bytes]:
        """(the members of `wanted`, bytes [low, high) of the shard, which hold them) in one request, repeated while a
        member is wrong."""
        name, missing = self.manifest.shards[shard].name, False
        if self.quarantine is not None and name in self.quarantine.missing:
            return [None] * len(wanted), b""
        begins = wanted["offset"].astype(np.int64) - low
        places = (begins.tolist(), (begins + wanted["size"]).tolist())
        expected = wanted["digest"].tobytes()  # 8 bytes each
        problem, bad = "", list(range(len(wanted)))
        members: list[bytes | None] = [None] * len(wanted)
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
                log.warning("%s; reading again", self._bad_member(shard, wanted[bad[0]], problem))
                self._pause(attempt)
        if self.quarantine is None:
            raise DataError(problem if missing else self._bad_member(shard, wanted[bad[0]], problem))
        if missing:
            entry = self.manifest.shards[shard]
            self.quarantine.add(
                Unreadable(
                    entry.name, int(self.first_samples[shard]), entry.num_samples, 0, "", "there is no such shard"
                )
            )
            return [None] * len(wanted), b""
        for i in bad:
            sample = int(self.first_samples[shard]) + int(wanted["place"][i])
            self.put_aside(sample, self._bad_member(shard, wanted[i], problem))
        return members, data

    def _bad_member(self, shard: int, member: np.ndarray, problem: str) -> str:
        """A line about a member, which is named where a sample has several."""
        extension = f"member .{self.manifest.members[member['column']]}: " if len(self.manifest.members) > 1 else ""
        return f"{self.name(shard, int(member['place']))}: {extension}{problem}"

    def put_aside(self, sample: int, reason: str) -> None:
        """A sample into the quarantine. Raises DataError when its budget is used up."""
        assert self.quarantine is not None
        shard, place = self._place(sample)
        name = self.manifest.shards[shard].name
        offset = int(self.records(shard, place, 1)["offset"].min())
        try:
            key = key_in(self._get(name, max(0, offset - BLOCK), offset))
        except StorageError:
            key = ""
        self.quarantine.add(Unreadable(name, sample, 1, offset, key, reason.removeprefix(f"{self.name_of(sample)}: ")))

    def name(self, shard: int, place: int) -> str:
        """What a sample is called in messages: shard, number, offset."""
        offset = int(self.records(shard, place, 1)["offset"].min())
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


def wanted_members(records: np.ndarray, first: int, columns: Sequence[int]) -> np.ndarray:
    """WANTED [n x len(columns)]: the members of `columns` of each of a shard's records from place `first` on."""
    wanted = np.empty((len(records), len(columns)), WANTED)
    wanted["place"], wanted["column"] = np.arange(first, first + len(records))[:, None], columns
    for name in ("offset", "size", "digest"):
        values = records[name]
        wanted[name] = values[:, columns] if values.ndim == 2 else values[:, None]
    return wanted.reshape(-1)


def requests(offsets: np.ndarray, sizes: np.ndarray, max_gap_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges [i, j) of members to read in one request each: no large gap inside, none above the request limit."""
    if not len(offsets):
        return
    starts = offsets.astype(np.int64)
    ends = starts + sizes
    gaps = starts[1:] - ends[:-1]
    cuts = (np.flatnonzero((gaps > max_gap_bytes) | (gaps < 0)) + 1).tolist()
    for i, j in zip([0, *cuts], [*cuts, len(offsets)], strict=True):
        while i < j:
            k = max(i + 1, i + int(np.searchsorted(ends[i:j], starts[i] + MAX_REQUEST_BYTES, side="right")))
            yield i, min(k, j)
            i = min(k, j)
