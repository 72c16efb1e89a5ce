"""The batches of one rank out of a data set in buckets: each global batch of one bucket, read by a `Stream` of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from scoreray.data.buckets.batch_order import BatchOrder
from scoreray.data.buckets.bucketed import BucketedSet
from scoreray.data.errors import UserError
from scoreray.data.fields.field import FieldRequest
from scoreray.data.reading.batches import Batch, BatchStream, RankLanes
from scoreray.data.reading.field_values import FieldDecoder
from scoreray.data.reading.quarantine import Quarantine, Unreadable
from scoreray.data.reading.stream import CACHE_BYTES, Stream, default_shuffle_block


class BucketStream(BatchStream):
    """Endless batches for rank `rank` of `world_size`; batch k of the run holds positions [k B, (k + 1) B), all of one
    bucket (`BatchOrder`). Arguments as Stream's.

    The position is the whole state, and a multiple of B: a batch has one size. `Batch.index` numbers samples through
    all buckets, `Batch.position` is the run's, by which noise is keyed.

    Memory: that of a Stream, shared out among the buckets: with many of them a lane shuffles fewer samples at once.

    Raises UserError for sizes that do not divide. Iterating raises as Stream does.
    """

    def __init__(
        self,
        data: BucketedSet,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        position: int = 0,
        num_lanes: int | None = None,
        shuffle_block: int | None = None,
        prefetch_batches: int = 4,
        cache_bytes: int = CACHE_BYTES,
        pin_memory: bool = False,
        quarantine: Quarantine | None = None,
        fields: Sequence[FieldRequest] | None = None,
        **options: Any,
    ) -> None:
        lanes = RankLanes.of(global_batch_size, rank, world_size, num_lanes)
        if position % global_batch_size:
            raise UserError(
                f"position {position:,} is within a batch of {global_batch_size}, and each batch of a data set in "
                "buckets is of one bucket; go on with the global_batch_size that the run began with"
            )
        super().__init__(
            lanes, seed=seed, position=position, prefetch_batches=prefetch_batches, pin_memory=False,
            quarantine=quarantine,
        )  # fmt: skip
        self.data, self.order = data, BatchOrder(data.counts, global_batch_size=global_batch_size, seed=seed)
        self._first_samples = data.first_samples.tolist()
        decoded = sum(one.num_samples * FieldDecoder(one, fields).bytes_per_sample for one in data.manifests)
        self._streams = [
            Stream(
                data.bucket_url(number),
                global_batch_size=global_batch_size,
                rank=rank,
                world_size=world_size,
                seed=seed,
                num_lanes=lanes.num_lanes,
                shuffle_block=shuffle_block or default_shuffle_block(manifest, lanes.num_lanes, len(data.manifests)),
                cache_bytes=cache_bytes if decoded <= cache_bytes else 0,
                pin_memory=pin_memory,
                quarantine=None if quarantine is None else _BucketQuarantine(quarantine, data, number),
                manifest=manifest,
                fields=fields,
                part_of=self,
                **options,
            )
            for number, manifest in enumerate(data.manifests)
        ]

    def close(self) -> None:
        super().close()
        for stream in self._streams:
            stream.close()

    def batches(self, start: int) -> Iterator[Batch]:
        size = self.lanes.global_batch_size
        opened: dict[int, Iterator[Batch]] = {}
        try:
            for number in itertools.count(start // size):
                bucket, place = self.order.locate(number)
                if bucket not in opened:
                    opened[bucket] = self._streams[bucket].batches(place * size)
                batch = next(opened[bucket], None)
                if batch is None:  # it was closed
                    return
                yield _moved(batch, self._first_samples[bucket], (number - place) * size)
        finally:
            for each in opened.values():
                each.close()  # type: ignore[attr-defined]

    def handed_out(self, batch: Batch) -> None:
        size = self.lanes.global_batch_size
        number = int(batch.position[0]) // size
        bucket, place = self.order.locate(number)
        self._streams[bucket].handed_out(_moved(batch, -self._first_samples[bucket], (place - number) * size))


def _moved(batch: Batch, samples: int, positions: int) -> Batch:
    """A bucket's batch by the numbers of the whole set, or, where both are negative, back."""
    return replace(batch, index=batch.index + samples, position=batch.position + positions)


class _BucketQuarantine(Quarantine):
    """Adds what a bucket's stream can't read to the run's quarantine, with the names and numbers of the whole set."""

    def __init__(self, whole: Quarantine, data: BucketedSet, number: int) -> None:
        super().__init__(whole.budget)
        self._whole, self._folder, self._first = whole, data.folders[number], int(data.first_samples[number])

    @property
    def is_empty(self) -> bool:
        return self._whole.is_empty

    def add(self, entry: Unreadable) -> None:
        if entry.count > 1:
            self.missing.add(entry.shard)
        self._whole.add(replace(entry, shard=f"{self._folder}/{entry.shard}", sample=entry.sample + self._first))

    def settle(self, samples: Any) -> None:
        self._whole.settle(samples + self._first)
