"""Which bucket each global batch of a run is of: a pure function of (samples of each bucket, batch size, seed).

A run goes through a bucket in that bucket's own `Order`, as through a data set of its own: its j-th batch holds the
bucket's positions [j B, (j + 1) B), so its epochs follow each other without a gap, and what does not fill a batch at
the end of one goes on in the next. Round e of the run takes the batches that end in (e n, (e + 1) n] of every bucket of
n samples, floor((e + 1) n / B) - floor(e n / B) of them, in an order that a permutation keyed by (seed, e) gives. So

* after round e, a bucket has handed out floor((e + 1) n / B) B positions: all of its first e + 1 epochs but for fewer
  than B samples, which come first in the next rounds;
* the batches of rounds before e are sum over buckets of floor(e n / B), from which batch k is located without state;
* a bucket with fewer samples than a batch has one in some of the rounds, which then holds a sample several times.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_KEY = 0xB0C4  # of the words that permute batches


class BucketBatch(NamedTuple):
    """Batch `number` of the run: the `place`-th of bucket `bucket`."""

    bucket: int
    place: int


class BatchOrder:
    """Order of the global batches of buckets with `counts` samples."""

    def __init__(self, counts: Sequence[int], *, global_batch_size: int, seed: int) -> None:
        self.counts, self.global_batch_size, self.seed = tuple(counts), global_batch_size, seed
        self._num_samples = sum(counts)
        self._lock = threading.Lock()
        self._round = lru_cache(2)(self._made)  # the producer's and the consumer's may differ

    def locate(self, number: int) -> BucketBatch:
        """Which bucket the run's batch `number` is of, and which of its batches."""
        epoch = self._round_of(number)
        with self._lock:
            buckets, places = self._round(epoch)
        i = number - self.first_batch(epoch)
        return BucketBatch(int(buckets[i]), int(places[i]))

    def first_batch(self, epoch: int) -> int:
        """The batches before this round."""
        return sum(self._before(epoch))

    def _before(self, epoch: int) -> list[int]:
        return [epoch * count // self.global_batch_size for count in self.counts]

    def _round_of(self, number: int) -> int:
        """The last round that begins at or before the batch. Of e N / B batches fewer than one a bucket are missing."""
        size = self.global_batch_size
        low = number * size // self._num_samples
        high = (number + len(self.counts)) * size // self._num_samples + 2
        return low + bisect.bisect_right(range(low, high), number, key=self.first_batch) - 1

    def _made(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(bucket, which of the bucket's batches) of each batch of a round, int64."""
        before, after = self._before(epoch), self._before(epoch + 1)
        numbers = [b - a for a, b in zip(before, after, strict=True)]
        buckets = np.repeat(np.arange(len(numbers)), numbers)
        counter = [0, 0, 0, epoch]  # raw words, which never change with numpy's version, as those of `Order`
        words = np.random.Philox(counter=counter, key=[self.seed % (1 << 64), _KEY]).random_raw(len(buckets))
        buckets = buckets[np.argsort(words, kind="stable")]
        places = np.empty(len(buckets), np.int64)
        by_bucket = np.argsort(buckets, kind="stable")
        places[by_bucket] = np.concatenate([np.arange(a, b) for a, b in zip(before, after, strict=True)])
        return buckets, places
