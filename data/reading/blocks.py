"""Reads the blocks of a rank's lanes ahead of time: the rows that a stream's batches are made of.

While a lane hands out one block, its next one is being read. Nothing in this module runs on the training thread.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from scoreray.data.errors import DataError
from scoreray.data.reading.field_values import FieldArrays, FieldDecoder, Members
from scoreray.data.reading.order import BlockKey, Order, RecordRange
from scoreray.data.reading.reader import Reader
from scoreray.data.reading.records import joined, taken

READ_THREADS = 8
BUFFER_BYTES = 256 << 20  # of encoded samples, in all ranks together: what a lane reads from, and what it reads next
REQUEST_BYTES = 1 << 20  # a lane's small blocks are read from a remote store several at once, up to this
MOST_BLOCKS = 16
SUBSTITUTES = 16  # samples that are tried in the place of a quarantined one


@dataclass(frozen=True)
class ReadBlock:
    """A block that was read, in the order in which it is handed out: its samples' numbers and records, and the members
    of each column that the decoder reads. A quarantined member is None; all but `samples` is empty when they are in
    the cache."""

    samples: np.ndarray
    records: np.ndarray
    members: list[list[bytes | None]]


@dataclass(frozen=True)
class Rows:
    """Samples in the order of their positions; all but their numbers (`index`) is empty when they are in the cache."""

    positions: np.ndarray
    index: np.ndarray
    records: np.ndarray
    members: list[list[bytes | None]]

    def part(self, start: int, end: int) -> Rows:
        members = [column[start:end] for column in self.members]
        return Rows(self.positions[start:end], self.index[start:end], self.records[start:end], members)


class BlockReader:
    """The blocks of given positions, and the next ones of their lanes, read by several threads.

    A data set whose requested fields take up to `cache_bytes` decoded is kept decoded, as far as it has been read.
    """

    def __init__(self, reader: Reader, order: Order, decoder: FieldDecoder, cache_bytes: int) -> None:
        self.reader, self.order, self._decoder = reader, order, decoder
        manifest = reader.manifest
        fits = manifest.num_samples * decoder.bytes_per_sample <= cache_bytes
        self._cache = _Cache(manifest.num_samples, decoder) if fits else None
        self._columns = decoder.columns
        self._no_records, self._no_members = np.zeros(0, manifest.record), [list[bytes | None]() for _ in self._columns]
        self._inline = self._cache is None and reader.cache is None and not reader.store.is_remote
        self._at_once = blocks_at_once(order, manifest.bytes_per_sample) if reader.store.is_remote else 1
        # A block, or the future that will hold it, or None: to be read when its turn comes.
        self._requested: dict[BlockKey, tuple[Future[list[ReadBlock]], int] | ReadBlock | None] = {}
        self._newest: dict[int, BlockKey] = {}  # of each lane
        self._threads: ThreadPoolExecutor | None = None

    def rows(self, positions: np.ndarray, stop: threading.Event) -> Rows:
        """The samples at `positions` (ascending), waiting for them to be read."""
        if self._cache is not None and self._cache.is_whole:
            self._requested.clear()
            return Rows(positions, self.order.samples(positions), self._no_records, self._no_members)
        groups = self.order.by_block(positions)
        passed = []
        for key, _, _ in groups:
            self._request(key)
            lane = key[1]
            if self._newest.get(lane) != key:
                if lane in self._newest:
                    passed.append(self._newest[lane])
                self._newest[lane] = key
                self._request(self._next(key), ahead=True)
        order = np.concatenate([rows for _, rows, _ in groups])
        index, records = list[np.ndarray](), list[np.ndarray]()
        members: list[list[bytes | None]] = [[] for _ in self._columns]
        for key, _, places in groups:
            block = self._wait(key, stop)
            first, end = int(places[0]), int(places[-1]) + 1  # a lane's positions that follow each other
            index.append(block.samples[first:end])
            records.append(block.records[first:end])
            for column, found in zip(members, block.members, strict=True):
                column += found[first:end]
        back = np.argsort(order)
        for key in passed:
            del self._requested[key]
        if self._cache is not None:
            return Rows(positions, np.concatenate(index)[back], self._no_records, self._no_members)
        places = back.tolist()
        members = [[column[i] for i in places] for column in members]
        return Rows(
            positions, np.concatenate(index)[back], taken(joined(records, self._no_records.dtype), back), members
        )

    def decode(self, rows: Rows, out: FieldArrays) -> None:
        """The rows' samples into `out`. Where one replaces a quarantined sample, the index in `rows` becomes its own.
        Raises DataError, and UserError for what is longer than is requested."""
        if self._cache is not None:
            self._cache.values.take(rows.index, out)
            rows.index[:] = self._cache.source[rows.index]
        else:
            self._decode(rows.index, rows.records, rows.members, out)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._requested.clear()

    def _decode(self, index: np.ndarray, records: np.ndarray, members: Members, out: FieldArrays) -> None:
        for row in self._decoder.decode_rows(records, members, out):
            sample, found = int(index[row]), [column[row] for column in members]
            try:
                self._decoder.decode_row(records[row], found, out, row, partial(self.reader.name_of, sample))
            except DataError as error:
                if self.reader.quarantine is None:
                    raise
                self.reader.put_aside(sample, str(error))
                index[row] = self._substitute(sample, out, row)

    def _substitute(self, sample: int, out: FieldArrays, row: int) -> int:
        """Decodes another sample in the place of `sample`: a function of its number, so the same on every rank."""
        n = self.reader.manifest.num_samples
        step = max(1, int(n * 0.6180339887))  # golden section: away from a shard that is bad as a whole
        for k in range(1, SUBSTITUTES + 1):
            other = (sample + k * step) % n
            try:
                members, record = self.reader.read_one(other, self._columns)
                self._decoder.decode_row(record, members, out, row, partial(self.reader.name_of, other))
                return other
            except DataError:
                continue
        raise DataError(f"{self.reader.name_of(sample)}: quarantined, and so are {SUBSTITUTES} that could replace it")

    def _request(self, key: BlockKey, *, ahead: bool = False) -> None:
        """Has a block read; from a disk of this machine only when its turn comes (a thread that reads from there costs
        the decoding one more than it saves), but the kernel is advised to read it."""
        if key in self._requested:
            return
        if self._inline:
            if ahead:
                self.reader.advise(self.order.block(*key).ranges)
            self._requested[key] = None
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(READ_THREADS, "scoreray-read")
        epoch, lane, block = key
        end = min(block + self._at_once, self.order.num_blocks(epoch, lane))
        keys = list(
            itertools.takewhile(lambda k: k not in self._requested, ((epoch, lane, b) for b in range(block, end)))
        )
        read = self._threads.submit(self._read, keys)
        self._requested.update((key, (read, i)) for i, key in enumerate(keys))

    def _wait(self, key: BlockKey, stop: threading.Event) -> ReadBlock:
        block = self._requested[key]
        if block is None:
            block = self._read([key])[0]
        elif isinstance(block, tuple):
            read, i = block
            while not read.done() and not stop.is_set():
                wait([read], timeout=0.2)
            block = read.result(timeout=0)[i]
        self._requested[key] = block
        return block

    def _next(self, key: BlockKey) -> BlockKey:
        epoch, lane, block = key
        while block + 1 >= self.order.num_blocks(epoch, lane):  # a lane may have no sample in a short epoch
            epoch, block = epoch + 1, -1
        return epoch, lane, block + 1

    def _read(self, keys: list[BlockKey]) -> list[ReadBlock]:
        """Blocks that follow each other in a lane. Runs in a reading thread."""
        blocks, cache = [self.order.block(*key) for key in keys], self._cache
        if cache is not None and all(cache.has[block.samples].all() for block in blocks):
            return [self._cached(block.samples) for block in blocks]
        read, records = self.reader.read(_joined([part for block in blocks for part in block.ranges]), self._columns)
        made, first = [], 0
        for block in blocks:
            slots = first + block.slots
            places = slots.tolist()
            made.append(
                self._block(block.samples, taken(records, slots), [[column[i] for i in places] for column in read])
            )
            first += len(slots)
        return made

    def _block(self, samples: np.ndarray, records: np.ndarray, members: list[list[bytes | None]]) -> ReadBlock:
        if self._cache is None:
            return ReadBlock(samples, records, members)
        source, values = samples.copy(), self._decoder.empty(len(samples))
        self._decode(source, records, members, values)
        self._cache.put(samples, source, values)
        return self._cached(samples)

    def _cached(self, samples: np.ndarray) -> ReadBlock:
        return ReadBlock(samples, self._no_records, self._no_members)


def blocks_at_once(order: Order, bytes_per_sample: float) -> int:
    """How many small blocks of a lane make a request that is worth its cost to the store, within BUFFER_BYTES."""
    most_bytes = min(REQUEST_BYTES, BUFFER_BYTES / (2 * order.num_lanes))
    return max(1, min(MOST_BLOCKS, int(most_bytes / (order.shuffle_block * bytes_per_sample))))


def _joined(ranges: list[RecordRange]) -> list[RecordRange]:
    """`ranges`, with neighbours joined into one."""
    joined: list[RecordRange] = []
    for part in ranges:
        if joined and joined[-1].shard == part.shard and joined[-1].first + joined[-1].count == part.first:
            joined[-1] = replace(joined[-1], count=joined[-1].count + part.count)
        else:
            joined.append(part)
    return joined


class _Cache:
    """A small data set, decoded, as far as it has been read. `source`: the sample whose value is kept."""

    def __init__(self, num_samples: int, decoder: FieldDecoder) -> None:
        self.values = decoder.empty(num_samples)  # pages are taken when first written to
        self.source = np.arange(num_samples)
        self.has = np.zeros(num_samples, bool)
        self._missing = num_samples
        self._lock = threading.Lock()

    @property
    def is_whole(self) -> bool:
        return self._missing == 0

    def put(self, samples: np.ndarray, source: np.ndarray, values: FieldArrays) -> None:
        self.values.put(samples, values)
        self.source[samples] = source
        with self._lock:
            self._missing -= int((~self.has[samples]).sum())
            self.has[samples] = True
