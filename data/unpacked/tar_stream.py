"""The batches of one rank straight from tars without a manifest, through a pipeline of webdataset.

What no index can promise, this does not: samples are counted by the shard. An epoch goes over all tars, each read by
one rank; a resume goes on with those that were not finished, whatever the world size, and reads each that was open
again from its start.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset

from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.tar_samples import TarSample, TarSamples
from scoreray.data.reading.batches import Batch, BatchStream, RankLanes
from scoreray.data.reading.blocks import BUFFER_BYTES
from scoreray.data.reading.field_values import FieldTensors
from scoreray.data.reading.quarantine import Quarantine, Unreadable
from scoreray.data.reading.tars import WINDOW_BYTES, Tape
from scoreray.data.storage.hedge import HedgedGet
from scoreray.data.storage.stats import counting
from scoreray.data.storage.store import NotFound
from scoreray.data.unpacked.tars import NO_CLASSES, UnpackedTars

STRIDE = 1_000_000
"""Sample n of the tar at place k of the list has the number k STRIDE + n, as nobody has counted those before."""
SHUFFLED = 1000  # samples that are shuffled at once where they are small


@dataclass(frozen=True)
class FinishedTar:
    """A tar all of whose samples were handed out in the epoch: its place in the list."""

    epoch: int
    tar: int


@dataclass
class _Visit:
    """A tar that is being read. It is finished when all of its `total` samples were handed out or quarantined."""

    epoch: int
    tar: int
    total: int | None = None
    num_done: int = 0


class _Sample(NamedTuple):
    visit: _Visit
    number: int
    found: TarSample


class _Decoded(NamedTuple):
    visit: _Visit
    number: int
    array: np.ndarray
    label: int


class TarStream(BatchStream):
    """Endless batches for rank `rank` of `world_size` from `tars`; positions, seeds and sizes are those of `Stream`.

    Args:
      shuffle_block: samples that are shuffled at once. None: as many as fit 128 MB of all ranks together, at most 1000.
      quarantine: takes samples that can't be read, and the rest of a tar that is damaged as one entry, as what it held
        is not known. None: the first one raises.
      finished: the run's finished tars, of all ranks.

    `finished` are those of this stream. Raises UserError for sizes that do not divide, and for fewer tars than ranks.
    Iterating raises DataError (tar, sample, offset) and StorageError.
    """

    def __init__(
        self,
        tars: UnpackedTars,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        position: int = 0,
        num_lanes: int | None = None,
        shuffle_block: int | None = None,
        prefetch_batches: int = 4,
        pin_memory: bool = False,
        quarantine: Quarantine | None = None,
        finished: Iterable[FinishedTar] = (),
    ) -> None:
        super().__init__(
            RankLanes.of(global_batch_size, rank, world_size, num_lanes),
            seed=seed,
            position=position,
            prefetch_batches=prefetch_batches,
            pin_memory=pin_memory,
            quarantine=quarantine,
        )
        check_world_size(tars, world_size)
        self.tars, self.finished = tars, list[FinishedTar]()
        fitting = int(BUFFER_BYTES / (2 * world_size * tars.bytes_per_sample))
        self.shuffle_block = shuffle_block or max(16, min(SHUFFLED, fitting))
        self._known: dict[int, set[int]] = {}
        for one in finished:
            self._known.setdefault(one.epoch, set()).add(one.tar)
        self._get = HedgedGet(self._get_counted, self.stats)
        self._ahead: ThreadPoolExecutor | None = None
        self._open: list[_Visit] = []
        self._passed_over: list[int] = []  # since the last batch
        # Of each batch that waits: the tars that it finishes, and the numbers that it passes over.
        self._news: deque[tuple[list[FinishedTar], list[int]]] = deque()
        self._since_good: set[int] = set()  # the numbers passed over since a sample could be read

    def close(self) -> None:
        super().close()
        self._get.close()
        if self._ahead is not None:
            self._ahead.shutdown(wait=False, cancel_futures=True)

    def handed_out(self, batch: Batch) -> None:
        finished, passed_over = self._news.popleft()
        self.finished += finished
        if self._quarantine is not None and passed_over:
            self._quarantine.settle(np.asarray(passed_over))

    def batches(self, start: int) -> Iterator[Batch]:
        counting.set(self.stats)
        self._ahead = ThreadPoolExecutor(2, "scoreray-ahead")
        shuffled = webdataset.shuffle(
            self.shuffle_block,
            initial=self.shuffle_block,
            rng=random.Random(f"samples {self.seed} {self.lanes.rank} {start}"),
        )
        pipeline = webdataset.DataPipeline(
            partial(self._tars, start),
            self._samples,
            shuffled,
            webdataset.map(self._decoded),
            webdataset.batched(self.lanes.batch_size, collation_fn=None),
        )
        for samples in pipeline:
            if self.stopping.is_set():  # what is still shuffled is not wanted
                return
            yield self._batch(samples, self.lanes.positions(start, 1))
            start += self.lanes.global_batch_size

    def _tars(self, start: int) -> Iterator[_Visit]:
        """This rank's tars, epoch after epoch."""
        epoch = 0
        while len(self._known.get(epoch, ())) == len(self.tars.tars):
            epoch += 1
        while True:
            done = self._known.get(epoch, ())
            seed = f"tars {self.seed} {epoch} {start}"
            for tar in deal(len(self.tars.tars), seed, epoch, done, self.lanes.rank, self.lanes.world_size):
                yield _Visit(epoch, tar)
            epoch += 1

    def _samples(self, visits: Iterator[_Visit]) -> Iterator[_Sample]:
        """The samples of each tar, in its order; the first bytes of the next tar are fetched meanwhile."""
        ahead = map(self._opened, visits)
        following = next(ahead)
        while True:
            (visit, tape), following = following, next(ahead)
            self._open.append(visit)
            number, end = visit.tar * STRIDE, (visit.tar + 1) * STRIDE
            try:
                for found in TarSamples(tape, self.tars.settings.num_classes != 0, NO_CLASSES):
                    if self.stopping.is_set():
                        return
                    if number == end:
                        raise DataError(f"byte {tape.position}: over {STRIDE:,} samples in a tar are not read")
                    yield _Sample(visit, number, found)
                    number += 1
                if number == visit.tar * STRIDE:
                    raise DataError("byte 0: holds no sample")
            except (DataError, NotFound) as error:
                self._pass_over(visit, number, "", error, "; the rest of this tar is left out")
            visit.total = number - visit.tar * STRIDE

    def _opened(self, visit: _Visit) -> tuple[_Visit, Tape]:
        tar = self.tars.tars[visit.tar]
        if not tar.store.is_remote:
            return visit, Tape(partial(self._get_counted, str(visit.tar)), tar.bytes)
        assert self._ahead is not None
        return visit, Tape(_ReadAhead(partial(self._get, str(visit.tar)), tar.bytes, self._ahead), tar.bytes)

    def _get_counted(self, place: str, start: int, end: int) -> bytes:
        """Bytes of the tar at this place of the list."""
        tar = self.tars.tars[int(place)]
        data = tar.store.get(tar.key, start, end)
        self.stats.add(bytes_read=len(data), num_requests=1)
        return data

    def _decoded(self, sample: _Sample) -> _Decoded | None:
        """None for a sample that is quarantined."""
        try:
            array, label = self.tars.read(sample.found)
        except DataError as error:
            sample.visit.num_done += 1
            self._pass_over(sample.visit, sample.number, sample.found.key, error)
            return None
        self._since_good.clear()
        return _Decoded(sample.visit, sample.number, array, label)

    def _pass_over(self, visit: _Visit, number: int, key: str, error: Exception, more: str = "") -> None:
        """Quarantines a sample. Raises DataError where that is not wanted, or when the budget is used up."""
        url = self.tars.tars[visit.tar].url
        if self._quarantine is None:
            raise DataError(str(error) if url in str(error) else f"{url}: {error}") from error
        found = re.match(r"byte (\d+): (.*)", str(error), re.DOTALL)
        offset, reason = (int(found[1]), found[2]) if found else (0, str(error))
        self._quarantine.add(Unreadable(url, number, 1, offset, key, reason + more))
        self._passed_over.append(number)
        if number in self._since_good:
            raise DataError(f"{url}: no sample can be read of all tars of rank {self.lanes.rank}; the last: {error}")
        self._since_good.add(number)

    def _batch(self, samples: list[_Decoded], positions: np.ndarray) -> Batch:
        images = np.stack([sample.array for sample in samples])
        if images.dtype == np.uint8:
            images = images.transpose(0, 3, 1, 2)  # a view: converting the bytes copies them anyway
        labels, index = (np.array([sample[i] for sample in samples], np.int64) for i in (3, 1))
        for sample in samples:
            sample.visit.num_done += 1
        finished = [FinishedTar(visit.epoch, visit.tar) for visit in self._open if visit.num_done == visit.total]
        self._open = [visit for visit in self._open if visit.num_done != visit.total]
        self._news.append((finished, self._passed_over))
        self._passed_over = []
        target, *label = [one.name for one in self.tars.fields]
        fields = {target: torch.from_numpy(images), **{name: torch.from_numpy(labels) for name in label}}
        return self._made(FieldTensors(fields, {}), index, positions, target, label[0] if label else None)


def deal(num_tars: int, seed: str, epoch: int, done: Collection[int], rank: int, world_size: int) -> list[int]:
    """The tars that a rank reads in an epoch: of those not `done`, shuffled, every `world_size`-th. Where they don't
    divide, other ranks have one more in the next epoch."""
    left = [tar for tar in range(num_tars) if tar not in done]
    random.Random(seed).shuffle(left)
    return left[(rank + epoch) % world_size :: world_size]


def check_world_size(tars: UnpackedTars, world_size: int) -> None:
    """Raises UserError where a rank would have no tar."""
    if len(tars.tars) < world_size:
        raise UserError(
            f"data.url: {len(tars.tars)} tars can't be shared by {world_size} workers, each of which takes whole ones; "
            f"at most scaling.workers={len(tars.tars)}, or a data set with a manifest (scoreray data pack)"
        )


class _ReadAhead:
    """`get(start, end)` of an object that is read from its start to its end: the next window is fetched beforehand."""

    def __init__(self, get: Callable[[int, int], bytes], size: int, pool: ThreadPoolExecutor) -> None:
        self._get, self._size, self._pool, self._end = get, size, pool, 0
        self._next = self._fetch()

    def _fetch(self) -> Any:
        return self._pool.submit(self._get, self._end, min(self._size, self._end + WINDOW_BYTES))

    def __call__(self, start: int, end: int) -> bytes:
        assert start == self._end, "a tape goes on where its window ends"
        data: bytes = self._next.result()
        self._end += len(data)
        if data and self._end < self._size:
            self._next = self._fetch()
        return data
