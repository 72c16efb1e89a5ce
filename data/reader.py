"""Members of shards by ranged reads: neighbours in one request, each member verified by its digest."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from scoreray.data.errors import DataError
from scoreray.data.manifest import RECORD, Manifest, digest, read_records
from scoreray.data.order import Run
from scoreray.data.store import NotFound, Store

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_GAP_BYTES = 64 << 10  # what lies between two members is read along with them up to this
MAX_REQUEST_BYTES = 16 << 20
REREADS = 3  # of bytes that are not what the index says: the fault may be the network's


@dataclass
class Stats:
    """What a stream has done so far. `stall_s` is how long its consumer waited."""

    samples: int = 0
    bytes_read: int = 0
    requests: int = 0
    rereads: int = 0
    stall_s: float = 0.0


class Reader:
    """Reads runs of samples from a data set's shards; used by several threads.

    Memory: the records of `shards_kept` shards (32 bytes a sample), and what read() returns.
    """

    def __init__(self, store: Store, manifest: Manifest, stats: Stats, shards_kept: int = 16) -> None:
        self.store, self.manifest, self.stats = store, manifest, stats
        self.first_samples = manifest.first_samples()
        self._shards_kept = shards_kept
        self._records: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def records(self, shard: int) -> np.ndarray:
        """The shard's records, RECORD [num_samples], verified."""
        with self._lock:
            if shard in self._records:
                self._records.move_to_end(shard)
                return self._records[shard]
        try:
            found = self._again(partial(read_records, self.store, self.manifest, shard, int(self.first_samples[shard])))
        except NotFound as error:
            raise DataError(f"{error}; the manifest lists it: is the data set whole?") from error
        self._count(found.nbytes, 1)
        with self._lock:
            self._records[shard] = found
            while len(self._records) > self._shards_kept:
                self._records.popitem(last=False)
        return found

    def read(self, runs: list[Run]) -> tuple[list[bytes], np.ndarray]:
        """(members, records) of the runs' samples, in their order. Raises DataError naming shard, sample, offset."""
        members: list[bytes] = []
        parts = []
        for run in runs:
            records = self.records(run.shard)[run.first : run.first + run.count]
            parts.append(records)
            for i, j in _requests(records):
                first = run.first + i
                members += self._again(partial(self._read, run.shard, first, records[i:j]))
        return members, np.concatenate(parts) if parts else np.zeros(0, RECORD)

    def _read(self, shard: int, first: int, records: np.ndarray) -> list[bytes]:
        name = self.manifest.shards[shard].name
        starts, sizes = records["offset"].tolist(), records["size"].tolist()
        low, high = starts[0], max(starts[-1] + sizes[-1], starts[0])
        try:
            data = self.store.get(name, low, high)
        except NotFound as error:
            raise DataError(f"{error}; the manifest lists this shard: is the data set whole?") from error
        self._count(len(data), 1)
        members = [data[start - low : start - low + size] for start, size in zip(starts, sizes, strict=True)]
        for i, (member, expected) in enumerate(zip(members, records["digest"].tolist(), strict=True)):
            if digest(member) != expected:
                cut = " (the shard is cut)" if len(data) < high - low else ""
                raise DataError(f"{self.name(shard, first + i)}: its bytes are not those of the index{cut}")
        return members

    def name(self, shard: int, place: int) -> str:
        """What a sample is called in messages: shard, number, offset."""
        offset = int(self.records(shard)["offset"][place])
        number = int(self.first_samples[shard]) + place
        return f"{self.store.url(self.manifest.shards[shard].name)}: sample {number} at byte {offset}"

    def name_of(self, sample: int) -> str:
        shard = int(np.searchsorted(self.first_samples, sample, side="right")) - 1
        return self.name(shard, sample - int(self.first_samples[shard]))

    def _again(self, read: Callable[[], T]) -> T:
        """read(), a few times while the bytes are wrong: what a network damaged is whole the next time."""
        for attempt in range(REREADS + 1):
            try:
                return read()
            except DataError as error:
                if attempt == REREADS or isinstance(error.__cause__, NotFound):
                    raise
                log.warning("reading again (%d): %s", attempt + 1, error)
                with self._lock:
                    self.stats.rereads += 1
                time.sleep(0.05 * 2**attempt)
        raise AssertionError("unreachable")

    def _count(self, num_bytes: int, requests: int) -> None:
        with self._lock:
            self.stats.bytes_read += num_bytes
            self.stats.requests += requests


def _requests(records: np.ndarray) -> Iterator[tuple[int, int]]:
    """Record ranges [i, j) to read in one request each: no large gap inside, none above the request limit."""
    if not len(records):
        return
    starts = records["offset"].astype(np.int64)
    ends = starts + records["size"]
    gaps = starts[1:] - ends[:-1]
    cuts = (np.flatnonzero((gaps > MAX_GAP_BYTES) | (gaps < 0)) + 1).tolist()
    for i, j in zip([0, *cuts], [*cuts, len(records)], strict=True):
        while i < j:
            k = max(i + 1, i + int(np.searchsorted(ends[i:j], starts[i] + MAX_REQUEST_BYTES, side="right")))
            yield i, min(k, j)
            i = min(k, j)
