"""Members of shards by ranged reads: neighbours in one request, each member verified by its digest."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from scoreray.data.errors import DataError, StorageError
from scoreray.data.fields.record_layout import CHUNK, digest
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
GROUP = 8  # samples that follow each other in a shard and have one tag
SMALL_GROUP_BYTES = GROUP * 4096  # most of a group up to this is headers and padding: its tag is of the members alone
MAX_TAG_BYTES = 64 << 20
WORTH_A_VIEW = 0.75  # of a request's bytes: a view of one member keeps all of them in memory
# A member to be read: which of the shard's samples it is of, the column of the record, and what that says of it.
WANTED = np.dtype([("place", "i8"), ("column", "i4"), ("offset", "u8"), ("size", "u4"), ("digest", "u8")])


class Tags:
    """Tags of what this process has read and verified by SHA-256. In later epochs they verify the same bytes at a tenth
    of its cost: of members of 8 KB 0.5 us each and not 5.0, on a CPU with instructions for both.

    A tag is the first 64 bits of AES-GMAC (NIST SP 800-38D) of GROUP samples, under a key that is drawn for this
    object; the nonce is where they begin. Neither key nor tags leave the process, so bytes that changed since, by a
    fault or on purpose, pass with a probability of at most (bytes / 16) 2^-64.

    Memory: a byte a sample.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        """counts: samples of each shard."""
        groups = -(-np.asarray(counts, np.int64) // GROUP)
        self._counts, self._first_groups = counts, np.concatenate([np.zeros(1, np.int64), np.cumsum(groups)])
        self._tags = np.zeros(int(groups.sum()), np.uint64)  # 0: none yet. Pages are taken when first written to
        self._encrypt = AESGCM(AESGCM.generate_key(128)).encrypt

    def groups(self, shard: int, wanted: np.ndarray, num_columns: int) -> list[tuple[int, int, int]]:
        """(number, i, j) of each group that is whole in members i to j - 1 of `wanted`, which are of a shard."""
        number = wanted["place"] // GROUP
        cuts = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(number)]
        first, count = int(self._first_groups[shard]), self._counts[shard]
        return [
            (first + group, i, j)
            for group, (i, j) in zip(number[cuts[:-1]].tolist(), itertools.pairwise(cuts), strict=True)
            if j - i == min(GROUP, count - group * GROUP) * num_columns
        ]

    def has(self, group: int, offset: int, data: bytes | memoryview) -> bool:
        """Whether these are the bytes of the group, which begins at `offset` of its shard, that were kept."""
        known = int(self._tags[group])
        return known != 0 and known == self._tag(offset, data)

    def keep(self, group: int, offset: int, data: bytes | memoryview) -> None:
        self._tags[group] = self._tag(offset, data)

    def _tag(self, offset: int, data: bytes | memoryview) -> int:
        return int.from_bytes(self._encrypt(offset.to_bytes(12, "little"), b"", data)[:8], "little")


class Reader:
    """Reads ranges of samples from a data set's shards; used by several threads.

    epochs: samples will be read again and again, and are then verified by `Tags`.
    views: members that take up WORTH_A_VIEW of a request are views of it, in place of copies: 1 us less for 8 KB.

    Memory: `records_kept` records, of 32 bytes where a sample has one member, the tags, and what read() returns.
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
        epochs: bool = False,
        views: bool = False,
    ) -> None:
        self.cache, self._views = cache, views
        self.store, self.manifest, self.stats, self.quarantine = store, manifest, stats, quarantine
        self._get = HedgedGet(store.get, stats) if store.is_remote else store.get
        self.first_samples = manifest.first_samples()
        self._attempts = 1 + (REREADS if store.is_remote else int(cache is not None))
        has_tags = epochs and manifest.num_samples <= MAX_TAG_BYTES
        self._tags = Tags([shard.num_samples for shard in manifest.shards]) if has_tags else None
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
        places = list(zip(begins.tolist(), (begins + wanted["size"]).tolist(), strict=True))
        as_views = self._views and int(wanted["size"].sum()) >= WORTH_A_VIEW * (high - low)
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
            whole = memoryview(data) if as_views else data
            found: list[bytes] = [whole[begin:end] for begin, end in places]  # type: ignore[misc]  # any bytes-like
            if self._are_right(shard, wanted, found, places, data):
                return found, data  # type: ignore[return-value]
            for i in bad:
                members[i] = found[i] if digest(found[i]) == wanted["digest"][i] else None
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

    def _are_right(
        self, shard: int, wanted: np.ndarray, members: list[bytes], places: list[tuple[int, int]], data: bytes
    ) -> bool:
        """Whether the members are those of the index, by the tags of groups that were read before, else by SHA-256.
        places: (begin, end) of each in `data`."""
        tags, left, fresh = self._tags, list(range(len(wanted))), []
        if tags is not None:
            columns = int((wanted["place"] == wanted["place"][0]).sum())
            for group, i, j in reversed(tags.groups(shard, wanted, columns)):
                begin, end = places[i][0], places[j - 1][1]
                small = end - begin <= SMALL_GROUP_BYTES
                span = int(wanted["offset"][i]), b"".join(members[i:j]) if small else memoryview(data)[begin:end]
                if tags.has(group, *span):
                    del left[i:j]
                else:
                    fresh.append((group, span))
        if b"".join([sha256(members[i]).digest()[:8] for i in left]) != wanted["digest"][left].tobytes():
            return False
        if tags is not None:
            for group, span in fresh:
                tags.keep(group, *span)
        return True

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
