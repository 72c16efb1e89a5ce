"""A packed data set as a source of webdataset pipelines: its samples in the run's exactly-once order.

The sample at a position is the one that `Stream` hands out at it, whatever the world size and the number of workers.
docs/data.md has an example.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from scoreray.data.classes import NO_CLASS
from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import FieldRequest
from scoreray.data.packing.tar_samples import sample_members
from scoreray.data.reading.blocks import BlockReader, Rows
from scoreray.data.reading.decode import decode_class
from scoreray.data.reading.disk_cache import DiskCache
from scoreray.data.reading.field_values import FieldDecoder
from scoreray.data.reading.order import RecordRange
from scoreray.data.reading.reader import MAX_REQUEST_BYTES, Reader, requests, wanted_members
from scoreray.data.reading.records import taken
from scoreray.data.reading.stream import CACHE_DIR_BYTES, RankRows
from scoreray.data.reading.tars import BLOCK, Tape, members
from scoreray.data.storage.stats import ReadStats

END = bytes(2 * BLOCK)  # of a tar
PLACES = struct.Struct("<QQ")  # before a span: where in the shard it begins, and the image in it


def shards(
    url: str,
    *,
    global_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    position: int = 0,
    epochs: int | None = None,
    num_lanes: int | None = None,
    shuffle_block: int | None = None,
    cache_dir: str | None = None,
    cache_dir_bytes: int = CACHE_DIR_BYTES,
) -> SampleSource:
    """The samples of rank `rank` of `world_size` as dicts: `__key__`, `__url__` (of the shard), `__position__` (its
    place in the run), `__index__` (its number in the manifest), and all of its members as bytes (`png`, `cls`, ...).

    Args:
      url: of a packed data set.
      global_batch_size: B, of all ranks together: in k steps the ranks take positions [position, position + k B), each
        B / world_size of a step. A run goes on at position + k B, at any world size that divides B.
      epochs: ends before position epochs N, N the number of samples; None: endless.
      others: as Stream's, and fixed for a run as there.

    In a DataLoader or WebLoader with n workers each worker yields every n-th batch of B / world_size samples, so that
    batches of this size (`wds.batched(B // world_size)`) come in the same order for every n. Workers are for decoding
    that is slow: each reads what its rank reads, so give a remote data set's workers a `cache_dir`, which they share.

    Members of fields and `.cls` are checked against the index; for others it has no digest, only tar headers have a
    checksum (`scoreray data verify` checks whole shards). Where names of a tar have dots in them (`img_0.05.png`) a
    sample has those of its members that are beside its image.

    Raises UserError for sizes that do not divide. Iterating raises DataError (shard, sample, offset), StorageError.
    """
    if position < 0 or (epochs is not None and epochs < 1):
        raise UserError(f"position {position} must not be negative, and epochs {epochs} must be at least 1")
    rank_rows = RankRows(
        url, global_batch_size=global_batch_size, rank=rank, world_size=world_size, seed=seed,
        num_lanes=num_lanes, shuffle_block=shuffle_block,
    )  # fmt: skip
    return SampleSource(rank_rows, position, epochs, cache_dir, cache_dir_bytes)


@dataclass(frozen=True)
class SampleSource(IterableDataset[dict[str, Any]]):
    """What shards() gives; each iteration starts at `position`. Picklable, for workers that are started by spawning."""

    rank_rows: RankRows
    position: int
    epochs: int | None
    cache_dir: str | None
    cache_dir_bytes: int

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        stats, manifest = ReadStats(), self.rank_rows.manifest
        cache = DiskCache(self.cache_dir, self.cache_dir_bytes, stats) if self.cache_dir else None
        reader = self.rank_rows.reader(stats, None, cache, TarSpanReader)
        assert isinstance(reader, TarSpanReader)
        decoder = FieldDecoder(manifest, [FieldRequest(manifest.target.name)])  # of one column; nothing is decoded
        blocks, stop = BlockReader(reader, self.rank_rows.order, decoder, cache_bytes=-1), threading.Event()
        end = None if self.epochs is None else self.epochs * manifest.num_samples
        try:
            batches = self.rank_rows.batches(blocks, self.position, stop)
            for rows in itertools.islice(batches, first, None, step):
                yield from reader.samples(rows, end)
                if end is not None and rows.positions[-1] >= end - 1:
                    return
        finally:
            stop.set()
            blocks.close()
            reader.close()


class TarSpanReader(Reader):
    """Reads, in the place of a sample's members, its span: what is between the members that the index knows of its
    neighbours in the tar, with PLACES before it and END behind. All of its members are in it, in whichever order; those
    that the index knows are verified."""

    def samples(self, rows: Rows, end: int | None) -> Iterator[dict[str, Any]]:
        """The samples of rows that were read by this reader, up to position `end`."""
        shards = np.searchsorted(self.first_samples, rows.index, side="right") - 1
        field, labels = self.manifest.label, [NO_CLASS] * len(rows.index)
        if field is not None:
            labels = rows.records[self.manifest.column(field)].tolist()
        kind = field.member if field is not None and field.member and not field.path else "cls"
        columns = (rows.positions.tolist(), rows.index.tolist(), labels, shards.tolist(), rows.members[0])
        for position, sample, label, shard, span in zip(*columns, strict=True):
            if end is not None and position >= end:
                return
            assert span is not None  # nothing is quarantined here
            try:
                key, found = _members(span)
                if label != NO_CLASS and kind in found and decode_class(found[kind]) != label:
                    raise DataError(f"its class is {found[kind]!r}, the index says {label}")
            except DataError as error:
                raise DataError(f"{self.name_of(sample)}: {error}") from error
            url = self.store.url(self.manifest.shards[shard].name)
            yield {"__key__": key, "__url__": url, "__position__": position, "__index__": sample, **found}

    def _members(self, part: RecordRange, records: np.ndarray, columns: Sequence[int]) -> list[list[bytes | None]]:
        """A column of spans, whatever `columns`: all members that the index knows are verified, and put into them."""
        n = len(self.manifest.members)  # of a sample
        begins, ends = self._spans(part)
        wanted = wanted_members(records, part.first, range(n))
        firsts = wanted["offset"][::n].tolist()
        wanted = taken(wanted, np.argsort(wanted["offset"], kind="stable"))  # a sample's may be in any order in a tar
        offsets, places = wanted["offset"].tolist(), list(zip(firsts, begins.tolist(), ends.tolist(), strict=True))
        spans: list[bytes | None] = []
        # Spans of neighbours overlap, by the members that either may have: a request goes from span to span.
        for i, j in requests(begins, np.diff(begins, append=ends[-1:]), MAX_REQUEST_BYTES):
            low, high = int(begins[i]), int(ends[j - 1])
            found, data = self._verified(part.shard, wanted[n * i : n * j], low, high)
            if len(data) != high - low:
                raise DataError(f"{self.name(part.shard, part.first + i)}: the shard is cut")
            members = zip(offsets[n * i : n * j], found, strict=True)
            for first, begin, end in places[i:j]:
                its = itertools.islice(members, n)
                spans.append(_span(data[begin - low : end - low], begin, first, its))
        return [spans]

    def _spans(self, part: RecordRange) -> tuple[np.ndarray, np.ndarray]:
        """(begins, ends) int64 [count]: from behind the members of the sample before to the header of the next one's
        first, of the members that the index knows."""
        entry, first, count = self.manifest.shards[part.shard], part.first, part.count
        low, high = max(0, first - 1), min(entry.num_samples, first + count + 1)
        records = self.records(part.shard, low, high - low)
        offsets, sizes = (records[name].astype(np.int64).reshape(len(records), -1) for name in ("offset", "size"))
        after = (offsets + sizes + -sizes % BLOCK).max(1)
        offsets = offsets.min(1)
        if (np.diff(offsets) < 0).any() or (offsets[1:] < after[:-1]).any():
            raise DataError(
                f"{self.name(part.shard, first)}: samples are not in the tar's order; make new tars of these"
            )
        begins = np.append(0, after)[:count] if first == 0 else after[:count]
        ends = np.append(offsets - BLOCK, entry.bytes)[first - low + 1 :][:count]
        return begins, ends


def _span(data: bytes, begin: int, first: int, members: Iterable[tuple[int, bytes | None]]) -> bytes:
    """PLACES, the bytes of a shard from `begin` on with these members (their offsets, ascending) as they were verified,
    END. first: where the sample's first member of the index begins."""
    parts, at = [PLACES.pack(begin, first)], begin
    for offset, member in members:
        assert member is not None  # nothing is quarantined here
        parts += [data[at - begin : offset - begin], member]
        at = offset + len(member)
    return b"".join([*parts, data[at - begin :], END])


def _members(span: bytes) -> tuple[str, dict[str, bytes]]:
    """(key, members by kind) of the sample that a span is of."""
    begin, image_offset = PLACES.unpack_from(span)
    before = begin - PLACES.size
    tape = Tape(lambda start, end: span[start - before : end - before], before + len(span), begin)
    return sample_members(members(tape), image_offset)
