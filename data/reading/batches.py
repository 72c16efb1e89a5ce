"""Batches of one rank, made ahead of training by a thread, whatever they are read from."""

from __future__ import annotations

import abc
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import torch

from scoreray.data.classes import NO_CLASS
from scoreray.data.errors import UserError
from scoreray.data.reading.field_values import FieldTensors
from scoreray.data.reading.order import default_lanes
from scoreray.data.reading.quarantine import Quarantine, Unreadable
from scoreray.data.storage.stats import ReadStats


@dataclass(frozen=True)
class Batch(FieldTensors):
    """index: int64 [b], the samples' numbers in the data set.  position: int64 [b], their places in the run, ascending.
    target, label: the names of the fields that are `images` and `labels`."""

    index: torch.Tensor
    position: torch.Tensor
    target: str = "image"
    label: str | None = None

    @property
    def images(self) -> torch.Tensor:
        """The data set's target, of images uint8 [b, C, H, W]."""
        return self.fields[self.target]

    @property
    def labels(self) -> torch.Tensor:
        """int64 [b]: the data set's (first) class field, -1 for none."""
        found = None if self.label is None else self.fields.get(self.label)
        return torch.full_like(self.index, NO_CLASS) if found is None else found


@dataclass(frozen=True)
class RankLanes:
    """A rank's positions: p belongs to lane p mod L, and rank r of W owns the lanes [r L/W, (r + 1) L/W)."""

    global_batch_size: int
    rank: int
    world_size: int
    num_lanes: int

    @staticmethod
    def of(global_batch_size: int, rank: int, world_size: int, num_lanes: int | None) -> RankLanes:
        """Raises UserError with the numbers that do not fit. num_lanes: None takes order.default_lanes."""
        return RankLanes(
            global_batch_size, rank, world_size, _check_sizes(global_batch_size, rank, world_size, num_lanes)
        )

    @property
    def batch_size(self) -> int:
        """Of the rank's part of a global batch."""
        return self.global_batch_size // self.world_size

    @property
    def count(self) -> int:
        """Of the rank's lanes."""
        return self.num_lanes // self.world_size

    def positions(self, start: int, num_batches: int) -> np.ndarray:
        """int64: the rank's positions of `num_batches` global batches from `start` on, ascending."""
        end, first = start + num_batches * self.global_batch_size, self.rank * self.count
        rounds = np.arange(start // self.num_lanes, -(-end // self.num_lanes), dtype=np.int64)[:, None]
        positions = (rounds * self.num_lanes + np.arange(first, first + self.count)).reshape(-1)
        return positions[(positions >= start) & (positions < end)]


class BatchStream(abc.ABC):
    """Endless batches of a rank: its share of positions [k B, (k + 1) B) for batch k of the run. `position` is where
    the next batch begins; the other arguments are described at `Stream`."""

    def __init__(
        self,
        lanes: RankLanes,
        *,
        seed: int,
        position: int,
        prefetch_batches: int,
        pin_memory: bool,
        quarantine: Quarantine | None,
        part_of: BatchStream | None = None,
    ) -> None:
        """part_of: the stream that this one is read through, which counts its reads and ends it."""
        if position < 0 or prefetch_batches < 1:
            raise UserError(
                f"position {position} must not be negative, prefetch_batches {prefetch_batches} must be at least 1"
            )
        self.lanes, self.seed, self.position = lanes, seed, position
        self.stats: ReadStats = ReadStats() if part_of is None else part_of.stats
        self._pin_memory, self._quarantine = pin_memory, quarantine
        self._ready: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()  # in C: no work for the consumer
        self._slots = threading.Semaphore(prefetch_batches)
        self.stopping: threading.Event = threading.Event() if part_of is None else part_of.stopping
        self._producer: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def quarantined(self) -> list[Unreadable]:
        """What could not be read in the batches that were handed out, by sample."""
        return self._quarantine.found if self._quarantine is not None else []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. Waits for it if it is not there yet; the waiting is counted in stats.stall_s."""
        if self._error is not None:
            raise self._error
        if self.stopping.is_set():
            raise StopIteration
        if self._producer is None:  # only now: a stream may be made before a fork
            self._producer = threading.Thread(target=self._produce, name="scoreray-stream", daemon=True)
            self._producer.start()
        started = time.perf_counter()
        ready = self._ready.get()
        self._slots.release()
        stall_s = time.perf_counter() - started
        if isinstance(ready, BaseException):
            self._error = ready
            self.close()
            raise ready
        self.position += self.lanes.global_batch_size
        self.stats.add(num_samples=len(ready.index), stall_s=stall_s)
        self.handed_out(ready)
        return ready

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the prefetching. The position stays readable."""
        self.stopping.set()
        if self._producer is not None:
            self._producer.join(timeout=30)

    @abc.abstractmethod
    def batches(self, start: int) -> Iterator[Batch]:
        """The rank's parts of the global batches from position `start` on; called in the prefetching thread."""

    @abc.abstractmethod
    def handed_out(self, batch: Batch) -> None:
        """Called in the consumer's thread with each batch that it gets."""

    def _made(
        self, found: FieldTensors, index: np.ndarray, position: np.ndarray, target: str, label: str | None
    ) -> Batch:
        """A batch of these, page-locked where that is wanted."""
        numbers = {"index": torch.from_numpy(index), "position": torch.from_numpy(position)}
        fields, masks = found.fields, found.masks
        if self._pin_memory:
            fields, masks, numbers = (
                {name: tensor.pin_memory() for name, tensor in each.items()} for each in (fields, masks, numbers)
            )
        return Batch(fields, masks, **numbers, target=target, label=label)

    def _produce(self) -> None:
        try:
            for batch in self.batches(self.position):
                self._hand_over(batch)
        except BaseException as error:
            self._hand_over(error)

    def _hand_over(self, ready: Batch | BaseException) -> None:
        while not self.stopping.is_set():
            if self._slots.acquire(timeout=0.2):
                self._ready.put(ready)
                return


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
