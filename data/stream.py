"""The stream that a rank reads: batches of the run's order, prefetched, verified and decoded off the training thread.

The position is the whole state. A stream opened at the same position, with the same manifest, seed, number of lanes
and block size, hands out the same samples at any world size.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import numpy as np
import torch

from scoreray.data.decode import decode
from scoreray.data.errors import UserError
from scoreray.data.manifest import Manifest
from scoreray.data.order import Order, default_lanes
from scoreray.data.reader import Reader, Stats
from scoreray.data.store import open_store

BUFFER_BYTES = 256 << 20  # of encoded samples, in all ranks together: two blocks a lane
CACHE_BYTES = 256 << 20  # a data set that decoded is no larger is kept in memory
READ_THREADS = 8

Key = tuple[int, int, int]  # epoch, lane, block


@dataclass(frozen=True)
class Batch:
    """images: uint8 [b, C, H, W] or float32 [b, ...].  labels: int64 [b], -1 for none.  index: int64 [b], the samples'
    numbers in the manifest.  position: int64 [b], their places in the run, ascending."""

    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    position: torch.Tensor


@dataclass(frozen=True)
class _Block:
    """A block that was read, in the order in which it is handed out. `members` is empty when the cache has them."""

    samples: np.ndarray
    labels: np.ndarray
    formats: np.ndarray
    members: list[bytes]


def default_shuffle_block(manifest: Manifest, num_lanes: int) -> int:
    """Samples that a lane shuffles at once: as many as fit BUFFER_BYTES, from 16 to 1024. Part of the run's order."""
    fitting = int(BUFFER_BYTES / (2 * num_lanes * manifest.bytes_per_sample))
    return max(16, min(1024, fitting, -(-manifest.num_samples // num_lanes)))


class Stream:
    """Endless batches for rank `rank` of `world_size`; batch k of the run holds positions [k B, (k + 1) B).

    Args:
      url: of a packed data set.
      global_batch_size: B, of all ranks together; each gets B / world_size.
      seed: of the run's order.
      position: the first position to hand out; `.position` of an earlier stream, to go on.
      num_lanes: L, fixed for a run: divides B, and every world size divides it. None: order.default_lanes(B).
      shuffle_block: samples that a lane shuffles at once, fixed for a run. None: from the manifest.
      prefetch_batches: decoded batches that wait.
      decode_threads: for one thread, the prefetching thread decodes itself.
      pin_memory: page-locked batches, for a copy to a GPU that overlaps with work.

    Memory: two blocks a lane of encoded samples (256 MB in all ranks together, by default), the waiting batches, the
    records of the shards in use, and, up to CACHE_BYTES, a decoded data set.

    Raises UserError for sizes that do not divide. Iterating raises DataError (shard, sample, offset) and StorageError.
    """

    def __init__(
        self,
        url: str,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        position: int = 0,
        num_lanes: int | None = None,
        shuffle_block: int | None = None,
        prefetch_batches: int = 4,
        decode_threads: int = 1,
        cache_bytes: int = CACHE_BYTES,
        pin_memory: bool = False,
        manifest: Manifest | None = None,
    ) -> None:
        self.num_lanes = _check_sizes(global_batch_size, rank, world_size, num_lanes)
        if position < 0 or prefetch_batches < 1 or decode_threads < 1:
            raise UserError(
                f"position {position} must not be negative, prefetch_batches {prefetch_batches} and decode_threads "
                f"{decode_threads} must be at least 1"
            )
        store = open_store(url)
        self.manifest = manifest or Manifest.load(store)
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self.seed, self.position = seed, position
        self.shuffle_block = shuffle_block or default_shuffle_block(self.manifest, self.num_lanes)
        self.stats = Stats()
        self.order = Order(
            [shard.num_samples for shard in self.manifest.shards],
            seed=seed,
            num_lanes=self.num_lanes,
            shuffle_block=self.shuffle_block,
        )
        self._num_decoders, self._prefetch_batches, self._pin_memory = decode_threads, prefetch_batches, pin_memory
        self._first_lane = rank * self.num_lanes // world_size
        self._end_lane = (rank + 1) * self.num_lanes // world_size
        self._reader = Reader(store, self.manifest, self.stats, shards_kept=2 * (self._end_lane - self._first_lane) + 4)
        shape, self._dtype = tuple(self.manifest.shape), np.dtype(self.manifest.dtype)
        self._is_image = self._dtype == np.uint8
        self._stored_shape = (*shape[1:], shape[0]) if self._is_image else shape
        num_bytes = self.manifest.num_samples * int(np.prod(shape)) * self._dtype.itemsize
        self._cache = _Cache(self.manifest, self._stored_shape, self._dtype) if num_bytes <= cache_bytes else None
        self._blocks: dict[Key, Future[_Block]] = {}
        self._ready: queue.Queue[Batch | BaseException] = queue.Queue(prefetch_batches)
        self._stop = threading.Event()
        self._producer: threading.Thread | None = None
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. Waits for it if it is not there yet; the waiting is counted in stats.stall_s."""
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise StopIteration
        if self._producer is None:  # only now: a stream may be made before a fork
            self._producer = threading.Thread(target=self._produce, name="scoreray-stream", daemon=True)
            self._producer.start()
        started = time.perf_counter()
        ready = self._ready.get()
        self.stats.stall_s += time.perf_counter() - started
        if isinstance(ready, BaseException):
            self._error = ready
            self.close()
            raise ready
        self.position += self.global_batch_size
        self.stats.samples += len(ready.index)
        return ready

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the prefetching. The position stays readable."""
        self._stop.set()
        if self._producer is not None:
            self._producer.join(timeout=30)
        self._blocks.clear()

    def _produce(self) -> None:
        readers = ThreadPoolExecutor(READ_THREADS, "scoreray-read")
        decoders = ThreadPoolExecutor(self._num_decoders, "scoreray-decode") if self._num_decoders > 1 else None
        position = self.position
        try:
            while not self._stop.is_set():
                batch = self._make(position, readers, decoders)
                position += self.global_batch_size
                self._hand_over(batch)
        except BaseException as error:
            self._hand_over(error)
        finally:
            readers.shutdown(wait=False, cancel_futures=True)
            if decoders:
                decoders.shutdown(wait=False, cancel_futures=True)

    def _hand_over(self, ready: Batch | BaseException) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(ready, timeout=0.2)
                return

    def _make(self, start: int, readers: ThreadPoolExecutor, decoders: ThreadPoolExecutor | None) -> Batch:
        """The rank's part of the global batch that begins at `start`."""
        positions = np.arange(start, start + self.global_batch_size, dtype=np.int64)
        lanes = positions % self.num_lanes
        positions = positions[(lanes >= self._first_lane) & (lanes < self._end_lane)]
        groups = _groups(self.order, positions)
        for key, _, _ in groups:
            self._ask(key, readers)
        for key, _, _ in groups:
            self._ask(self._next_block(key), readers)
        index = np.empty(len(positions), np.int64)
        labels = np.empty(len(positions), np.int64)
        images = np.empty((len(positions), *self._stored_shape), self._dtype)
        work: list[tuple[int, int, int, bytes]] = []  # row, sample, format, member
        for key, rows, places in groups:
            block = self._wait(key)
            index[rows], labels[rows] = block.samples[places], block.labels[places]
            if block.members:
                formats = block.formats
                work += [
                    (row, int(block.samples[place]), int(formats[place]), block.members[place])
                    for row, place in zip(rows.tolist(), places.tolist(), strict=True)
                ]
        if self._cache is not None:
            np.take(self._cache.values, index, axis=0, out=images)
        elif decoders:
            chunks = [work[i :: self._num_decoders] for i in range(self._num_decoders)]
            list(decoders.map(lambda chunk: self._decode(chunk, images), chunks))
        else:
            self._decode(work, images)
        self._forget({key for key, _, _ in groups})
        if self._is_image:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        arrays = [torch.from_numpy(array) for array in (images, labels, index, positions)]
        if self._pin_memory:
            arrays = [array.pin_memory() for array in arrays]
        return Batch(*arrays)

    def _decode(self, work: list[tuple[int, int, int, bytes]], out: np.ndarray) -> None:
        shape, dtype, name_of = tuple(self.manifest.shape), self._dtype, self._reader.name_of
        for row, sample, code, member in work:
            out[row] = decode(member, code, shape, dtype, partial(name_of, sample))

    def _ask(self, key: Key, readers: ThreadPoolExecutor) -> None:
        if key not in self._blocks:
            self._blocks[key] = readers.submit(self._read, key)

    def _wait(self, key: Key) -> _Block:
        while not self._blocks[key].done() and not self._stop.is_set():
            wait([self._blocks[key]], timeout=0.2)
        return self._blocks[key].result(timeout=0)

    def _next_block(self, key: Key) -> Key:
        epoch, lane, block = key
        while block + 1 >= self.order.num_blocks(epoch, lane):  # a lane may have no sample in a short epoch
            epoch, block = epoch + 1, -1
        return epoch, lane, block + 1

    def _forget(self, current: set[Key]) -> None:
        """Lets go of the blocks that come before the current ones of their lanes."""
        newest: dict[int, Key] = {}
        for key in current:
            newest[key[1]] = max(newest.get(key[1], key), key)
        for key in [key for key in self._blocks if key[1] in newest and key < newest[key[1]]]:
            del self._blocks[key]

    def _read(self, key: Key) -> _Block:
        """Runs in a reading thread."""
        block = self.order.block(*key)
        cache = self._cache
        if cache is not None and cache.has[block.samples].all():
            return _Block(block.samples, cache.labels[block.samples], block.slots, [])
        members, records = self._reader.read(block.runs)
        labels, formats = records["label"].astype(np.int64)[block.slots], records["format"][block.slots]
        members = [members[slot] for slot in block.slots.tolist()]
        if cache is None:
            return _Block(block.samples, labels, formats, members)
        work = list(zip(block.samples.tolist(), block.samples.tolist(), formats.tolist(), members, strict=True))
        self._decode(work, cache.values)
        cache.labels[block.samples] = labels
        cache.has[block.samples] = True
        return _Block(block.samples, labels, formats, [])


class _Cache:
    """A small data set, decoded, as far as it has been read."""

    def __init__(self, manifest: Manifest, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.values = np.empty((manifest.num_samples, *shape), dtype)  # pages are taken when first written to
        self.labels = np.empty(manifest.num_samples, np.int64)
        self.has = np.zeros(manifest.num_samples, bool)


def _groups(order: Order, positions: np.ndarray) -> list[tuple[Key, np.ndarray, np.ndarray]]:
    """The positions by the block that they lie in: (block, rows of the batch, places in the block)."""
    epoch, lane, block, place = order.locate(positions)
    by_block = np.lexsort((block, epoch, lane))
    epoch, lane, block, place = epoch[by_block], lane[by_block], block[by_block], place[by_block]
    changes = (np.diff(lane) != 0) | (np.diff(epoch) != 0) | (np.diff(block) != 0)
    cuts = [0, *(np.flatnonzero(changes) + 1).tolist(), len(positions)]
    return [
        ((int(epoch[i]), int(lane[i]), int(block[i])), by_block[i:j], place[i:j]) for i, j in itertools.pairwise(cuts)
    ]


def _check_sizes(global_batch_size: int, rank: int, world_size: int, num_lanes: int | None) -> int:
    """The number of lanes. Raises UserError with the numbers that do not fit."""
    if global_batch_size < 1 or world_size < 1 or not 0 <= rank < world_size:
        raise UserError(f"global_batch_size {global_batch_size}, rank {rank} of world_size {world_size}: out of range")
    if global_batch_size % world_size:
        raise UserError(
            f"global_batch_size {global_batch_size} is not divisible by {world_size} workers; "
            f"take {_nearest_multiple(global_batch_size, world_size)}"
        )
    lanes = default_lanes(global_batch_size) if num_lanes is None else num_lanes
    if lanes < 1 or global_batch_size % lanes:
        raise UserError(f"num_lanes {lanes} does not divide global_batch_size {global_batch_size}")
    if lanes % world_size:
        raise UserError(
            f"{world_size} workers can't share num_lanes {lanes} evenly; fix num_lanes for the run, for example to "
            f"{default_lanes(global_batch_size, [world_size])}"
        )
    return lanes


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)
