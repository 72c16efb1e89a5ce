"""Quarantine of samples that can't be read: each is logged once, counted against a budget, listed in the summary."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from scoreray.data.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unreadable:
    """One sample of a shard (`sample`: its number in the manifest, `offset`: the byte of the shard where it begins,
    `key`: its name in the tar), or, when the shard itself is missing, all of its `count` samples from `sample` on."""

    shard: str
    sample: int
    count: int
    offset: int
    key: str
    reason: str

    def text(self) -> str:
        if self.count > 1:
            return f"{self.shard}: samples {self.sample} to {self.sample + self.count - 1}: {self.reason}"
        key = f" (key '{self.key}')" if self.key else ""
        return f"{self.shard}: sample {self.sample}{key} at byte {self.offset}: {self.reason}"


class Entries:
    """Unreadable samples and shards without what comes twice or belongs to a shard that is listed as a whole."""

    def __init__(self, entries: Iterable[Unreadable] = ()) -> None:
        self.num_samples = 0
        self._samples: dict[int, Unreadable] = {}
        self._shards: dict[str, Unreadable] = {}
        for entry in entries:
            self.add(entry)

    def add(self, entry: Unreadable) -> bool:
        """False if it was there."""
        if entry.shard in self._shards or (entry.count == 1 and entry.sample in self._samples):
            return False
        if entry.count > 1:
            for sample in [s for s in self._samples if entry.sample <= s < entry.sample + entry.count]:
                del self._samples[sample]
                self.num_samples -= 1
            self._shards[entry.shard] = entry
        else:
            self._samples[entry.sample] = entry
        self.num_samples += entry.count
        return True

    def of(self, sample: int) -> Unreadable | None:
        """The entry that `sample` belongs to."""
        whole = (e for e in self._shards.values() if e.sample <= sample < e.sample + e.count)
        return self._samples.get(sample) or next(whole, None)

    def __iter__(self) -> Iterator[Unreadable]:
        return iter(sorted([*self._samples.values(), *self._shards.values()], key=lambda e: e.sample))


class Quarantine:
    """What can't be read, up to `budget` samples. Used by several threads.

    Blocks are read ahead, and how far depends on chance; so an entry counts as found only once `settle()` has met its
    sample in a batch that was handed out. `found` is then a function of the positions that a stream went through.

    Args:
      known: entries of an earlier part of the run; they count, and are not logged again.
    """

    def __init__(self, budget: int, known: Iterable[Unreadable] = ()) -> None:
        self.budget = budget
        self.missing: set[str] = set()  # shards that are not requested again
        known = list(known)
        self._met, self._found = Entries(known), Entries(known)
        self._lock = threading.Lock()

    @property
    def is_empty(self) -> bool:
        return self._met.num_samples == 0

    def add(self, entry: Unreadable) -> None:
        """Counts and logs an entry once. Raises DataError when the budget is used up."""
        with self._lock:
            if entry.count > 1:
                self.missing.add(entry.shard)
            if not self._met.add(entry):
                return
            count = self._met.num_samples
        log.warning("quarantined (%d of at most %d): %s", count, self.budget, entry.text())
        if count > self.budget:
            raise DataError(over_budget(self.budget, entry))

    def settle(self, samples: np.ndarray) -> None:
        """Takes the samples that others replaced in a batch that is handed out."""
        with self._lock:
            for sample in samples.tolist():
                if entry := self._met.of(sample):
                    self._found.add(entry)

    @property
    def found(self) -> list[Unreadable]:
        """The entries met in batches that were handed out, by sample."""
        with self._lock:
            return list(self._found)


def over_budget(budget: int, last: Unreadable) -> str:
    return f"more than {budget} samples (the budget) are quarantined; the last: {last.text()}"
