"""Reads the blocks of a rank's lanes ahead of time: the rows that a stream's batches are made of.

While a lane hands out one block, its next one is being read. Nothing in this module runs on the training thread.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from scoreray.data.errors import DataError
from scoreray.data.reading.decode import decode_into, decode_rows
from scoreray.data.reading.order import BlockKey, Order, RecordRange
from scoreray.data.reading.reader import Reader

READ_THREADS = 8
BUFFER_BYTES = 256 << 20  # of encoded samples, in all ranks together: what a lane reads from, and what it reads next
REQUEST_BYTES = 1 << 20  # a lane's small blocks are read from a remote store several at once, up to this
MOST_BLOCKS = 16
SUBSTITUTES = 16  # samples that are tried in the place of a quarantined one


@dataclass(frozen=True)
class ReadBlock:
    """A block that was read, in the order in which it is handed out. A quarantined member is None; `members` is empty
    when all are in the cache."""

    samples: np.ndarray
    labels: np.ndarray
    formats: np.ndarray
    members: list[bytes | None] = field(default_factory=list)


@dataclass(frozen=True)
class Rows:
    """Samples in the order of their positions; `members` is empty when they are in the cache."""

    positions: np.ndarray
    index: np.ndarray
    labels: np.ndarray
    formats: np.ndarray
    members: list[bytes | None]

    def part(self, start: int, end: int) -> Rows:
        return Rows(
            self.positions[start:end],
            self.index[start:end],
            self.labels[start:end],
            self.formats[start:end],
            self.members[start:end],
        )


class BlockReader:
    """The blocks of given positions, and the next ones of their lanes, read by several threads.

    A data set that decoded takes up to `cache_bytes` is kept decoded, as far as it has been read.
    """

    def __init__(self, reader: Reader, order: Order, cache_bytes: int) -> None:
        self.reader, self.order = reader, order
        manifest = reader.manifest
        self.dtype = np.dtype(manifest.dtype)
        self.shape = tuple(manifest.shape)
        self.stored_shape = (*self.shape[1:], self.shape[0]) if self.dtype == np.uint8 else self.shape  # channels last
        num_bytes = manifest.num_samples * int(np.prod(self.shape)) * self.dtype.itemsize
        self._cache = _Cache(manifest.num_samples, self.stored_shape, self.dtype) if num_bytes <= cache_bytes else None
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
            samples = self.order.samples(positions)
            return Rows(positions, samples, self._cache.labels[samples], np.zeros(0, np.uint8), [])
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
        index, labels, formats = (list[np.ndarray]() for _ in range(3))
        members: list[bytes | None] = []
        for key, _, places in groups:
            block = self._wait(key, stop)
            first, end = int(places[0]), int(places[-1]) + 1  # a lane's positions that follow each other
            index.append(block.samples[first:end])
            labels.append(block.labels[first:end])
            formats.append(block.formats[first:end])
            members += block.members[first:end]
        back = np.argsort(order)
        if self._cache is None:
            members = [members[i] for i in back.tolist()]
        for key in passed:
            del self._requested[key]
        codes = np.concatenate(formats)[back] if self._cache is None else np.zeros(0, np.uint8)
        return Rows(positions, np.concatenate(index)[back], np.concatenate(labels)[back], codes, members)

    def decode(self, rows: Rows, out: np.ndarray) -> None:
        """The rows' samples into `out` [n, H, W, C] or [n, ...]. Where one replaces a quarantined sample, the index
        and label in `rows` become its own. Raises DataError."""
        if self._cache is not None:
            np.take(self._cache.values, rows.index, axis=0, out=out)
            rows.index[:] = self._cache.source[rows.index]
        else:
            self._decode(rows.index, rows.labels, rows.formats, rows.members, out)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._requested.clear()

    def _decode(
        self, index: np.ndarray, labels: np.ndarray, formats: np.ndarray, members: list[bytes | None], out: np.ndarray
    ) -> None:
        for row in decode_rows(members, formats, out):
            sample, member = int(index[row]), members[row]
            try:
                if member is None:
                    raise DataError(f"{self.reader.name_of(sample)}: quarantined")
                decode_into(out[row], member, int(formats[row]), partial(self.reader.name_of, sample))
            except DataError as error:
                if self.reader.quarantine is None:
                    raise
                self.reader.put_aside(sample, str(error))
                index[row], labels[row] = self._substitute(sample, out[row])

    def _substitute(self, sample: int, out: np.ndarray) -> tuple[int, int]:
        """Decodes another sample in the place of `sample`: a function of its number, so the same on every rank."""
        n = self.reader.manifest.num_samples
        step = max(1, int(n * 0.6180339887))  # golden section: away from a shard that is bad as a whole
        for k in range(1, SUBSTITUTES + 1):
            other = (sample + k * step) % n
            name = partial(self.reader.name_of, other)
            try:
                member, code, label = self.reader.read_one(other)
                decode_into(out, member, code, name)
                return other, label
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
            return [ReadBlock(block.samples, cache.labels[block.samples], np.zeros(0, np.uint8)) for block in blocks]
        read, records = self.reader.read(_joined([part for block in blocks for part in block.ranges]))
        labels, formats = records["label"].astype(np.int64), records["format"]
        made, first = [], 0
        for block in blocks:
            slots = first + block.slots
            members = [read[i] for i in slots.tolist()]
            made.append(self._block(block.samples, labels[slots], formats[slots], members))
            first += len(slots)
        return made

    def _block(
        self, samples: np.ndarray, labels: np.ndarray, formats: np.ndarray, members: list[bytes | None]
    ) -> ReadBlock:
        if self._cache is None:
            return ReadBlock(samples, labels, formats, members)
        source = samples.copy()
        values = np.empty((len(source), *self.stored_shape), self.dtype)
        self._decode(source, labels, formats, members, values)
        self._cache.put(samples, source, labels, values)
        return ReadBlock(samples, labels, np.zeros(0, np.uint8))


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

    def __init__(self, num_samples: int, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.values = np.empty((num_samples, *shape), dtype)  # pages are taken when first written to
        self.labels = np.empty(num_samples, np.int64)
        self.source = np.arange(num_samples)
        self.has = np.zeros(num_samples, bool)
        self._missing = num_samples
        self._lock = threading.Lock()

    @property
    def is_whole(self) -> bool:
        return self._missing == 0

    def put(self, samples: np.ndarray, source: np.ndarray, labels: np.ndarray, values: np.ndarray) -> None:
        self.values[samples], self.labels[samples], self.source[samples] = values, labels, source
        with self._lock:
            self._missing -= int((~self.has[samples]).sum())
            self.has[samples] = True
