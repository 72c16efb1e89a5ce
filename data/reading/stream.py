"""The batches of one rank, in the run's order: prefetched, verified and decoded off the training thread.

The position is the whole state. A stream opened at the same position, with the same manifest, seed, number of lanes
and block size, hands out the same samples at any world size.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from scoreray.data.errors import UserError
from scoreray.data.fields.field import FieldRequest
from scoreray.data.fields.record_layout import CHUNK
from scoreray.data.reading.batches import Batch, BatchStream, RankLanes
from scoreray.data.reading.blocks import BUFFER_BYTES, BlockReader, Rows, blocks_at_once
from scoreray.data.reading.disk_cache import DiskCache
from scoreray.data.reading.field_values import FieldDecoder
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.order import Order
from scoreray.data.reading.quarantine import Quarantine
from scoreray.data.reading.reader import Reader
from scoreray.data.storage.stats import ReadStats
from scoreray.data.storage.store import open_store
from scoreray.data.traces import span

CACHE_BYTES = 256 << 20  # a data set that decoded is no larger is kept in memory
CACHE_DIR_BYTES = 64 << 30
LOOK_UP = 32  # samples of a lane that are looked up in the order at once


def default_shuffle_block(manifest: Manifest, num_lanes: int, num_sets: int = 1) -> int:
    """Samples that a lane shuffles at once: as many as fit BUFFER_BYTES, from 16 to 1024. Part of the run's order.
    num_sets: data sets that are read side by side, which share these bytes. A block may then be longer than what a lane
    has of a small one in an epoch, which the lanes' stagger seldom cuts in two so: half as many blocks to read."""
    fitting = int(BUFFER_BYTES / (2 * num_lanes * manifest.bytes_per_sample * num_sets))
    longest = 1024 if num_sets > 1 else min(1024, -(-manifest.num_samples // num_lanes))
    return max(1, 16 // num_sets, min(longest, fitting))


class RankRows:
    """Which encoded samples a rank gets, a batch at a time, in the run's order; arguments as Stream's.

    Raises UserError for sizes that do not divide.
    """

    def __init__(
        self,
        url: str,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        num_lanes: int | None = None,
        shuffle_block: int | None = None,
        manifest: Manifest | None = None,
    ) -> None:
        self.lanes = lanes = RankLanes.of(global_batch_size, rank, world_size, num_lanes)
        self._url = url
        self.manifest = manifest or Manifest.load(open_store(url))
        self.order = Order(
            [shard.num_samples for shard in self.manifest.shards],
            seed=seed,
            num_lanes=lanes.num_lanes,
            shuffle_block=shuffle_block or default_shuffle_block(self.manifest, lanes.num_lanes),
        )

    def reader(
        self,
        stats: ReadStats,
        quarantine: Quarantine | None = None,
        disk_cache: DiskCache | None = None,
        kind: type[Reader] = Reader,
        views: bool = False,
    ) -> Reader:
        """A reader of the data set that keeps the records of the blocks that the rank's lanes are in."""
        read_at_once = self.order.shuffle_block * blocks_at_once(self.order, self.manifest.bytes_per_sample)
        records_kept = 2 * self.lanes.count * (read_at_once + 2 * CHUNK) + 16 * CHUNK
        return kind(open_store(self._url), self.manifest, stats, records_kept, quarantine, disk_cache, True, views)

    def batches(self, blocks: BlockReader, start: int, stop: threading.Event) -> Iterator[Rows]:
        """The rank's parts of the global batches from position `start` on. Several at once are looked up in the order,
        so that a lane has a few samples in each look-up, but hardly more than an epoch, of which `Order` keeps few."""
        lanes, samples = self.lanes, min(LOOK_UP * self.lanes.num_lanes, self.manifest.num_samples)
        at_once = -(-samples // lanes.global_batch_size)
        while not stop.is_set():
            mine = lanes.positions(start, at_once)
            rows = blocks.rows(mine, stop)
            for i in range(0, len(mine), lanes.batch_size):
                yield rows.part(i, i + lanes.batch_size)
            start += at_once * lanes.global_batch_size


class Stream(BatchStream):
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
      cache_bytes: a data set that decoded is no larger is kept in memory.
      cache_dir: a folder of this machine that keeps what was read, up to `cache_dir_bytes`; ranks share it.
      pin_memory: page-locked batches, for a copy to a GPU that overlaps with work.
      quarantine: takes the samples that can't be read, up to its budget: each is logged, listed in `.quarantined`, and
        another replaces it (its number is in Batch.index). None: the first one raises.
      fields: what a batch holds. None: the data set's target and its class. No other member is read or verified.
      part_of: the stream that this one is read through, which counts its reads and ends it.

    Memory: what a lane reads from and what it reads next, encoded (256 MB in all ranks together, by default), the
    waiting batches, the records of the shards in use, and, up to `cache_bytes`, a decoded data set.

    Raises UserError for sizes that do not divide and fields that are not there. Iterating raises DataError (shard,
    sample, offset), StorageError, and UserError for a sample that is longer than a request takes.
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
        cache_dir: str | None = None,
        cache_dir_bytes: int = CACHE_DIR_BYTES,
        pin_memory: bool = False,
        quarantine: Quarantine | None = None,
        manifest: Manifest | None = None,
        fields: Sequence[FieldRequest] | None = None,
        part_of: BatchStream | None = None,
    ) -> None:
        if decode_threads < 1:
            raise UserError(f"decode_threads {decode_threads} must be at least 1")
        with span("data.open", url=url, rank=rank, position=position):
            self._rows = RankRows(
                url, global_batch_size=global_batch_size, rank=rank, world_size=world_size, seed=seed,
                num_lanes=num_lanes, shuffle_block=shuffle_block, manifest=manifest,
            )  # fmt: skip
        super().__init__(
            self._rows.lanes,
            seed=seed,
            position=position,
            prefetch_batches=prefetch_batches,
            pin_memory=pin_memory,
            quarantine=quarantine,
            part_of=part_of,
        )
        self.manifest, self.order = self._rows.manifest, self._rows.order
        self._decoder, label = FieldDecoder(self.manifest, fields), self.manifest.label
        self._names = self.manifest.target.name, label.name if label else None
        self.shuffle_block, self._num_decoders = self.order.shuffle_block, decode_threads
        disk_cache = DiskCache(cache_dir, cache_dir_bytes, self.stats) if cache_dir else None
        self._reader = self._rows.reader(self.stats, quarantine, disk_cache, views=self._decoder.takes_views)
        self._blocks = BlockReader(self._reader, self.order, self._decoder, cache_bytes)

    def close(self) -> None:
        super().close()
        self._blocks.close()
        self._reader.close()

    def handed_out(self, batch: Batch) -> None:
        if self._quarantine is not None and not self._quarantine.is_empty:
            wanted = self.order.samples(batch.position.numpy())
            self._quarantine.settle(wanted[wanted != batch.index.numpy()])

    def batches(self, start: int) -> Iterator[Batch]:
        decoders = ThreadPoolExecutor(self._num_decoders, "scoreray-decode") if self._num_decoders > 1 else None
        try:
            for rows in self._rows.batches(self._blocks, start, self.stopping):
                yield self._batch(rows, decoders)
        finally:
            if decoders:
                decoders.shutdown(wait=False, cancel_futures=True)

    def _batch(self, rows: Rows, decoders: ThreadPoolExecutor | None) -> Batch:
        n = len(rows.positions)
        arrays = self._decoder.empty(n)
        if decoders:
            cuts = [n * i // self._num_decoders for i in range(self._num_decoders + 1)]
            list(
                decoders.map(lambda i, j: self._blocks.decode(rows.part(i, j), arrays.part(i, j)), cuts[:-1], cuts[1:])
            )
        else:
            self._blocks.decode(rows, arrays)
        # Copies, as a batch must not keep the rows of its neighbours alive.
        return self._made(self._decoder.tensors(arrays), rows.index.copy(), rows.positions.copy(), *self._names)
