"""Samples that a run could not read (`data.on_error: quarantine`): gathered over ranks, committed with checkpoints."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import TypeAdapter

from scoreray.data.errors import DataError
from scoreray.data.reading.batches import BatchStream
from scoreray.data.reading.quarantine import Entries, Quarantine, Unreadable, over_budget
from scoreray.data.storage.store import Store
from scoreray.trainer.checkpoints.checkpoint import Checkpoint
from scoreray.trainer.checkpoints.segments import Segments
from scoreray.trainer.config import DataSection
from scoreray.trainer.ranks import from_all_ranks, from_rank_0

FOLDER = "quarantined"  # under the run: one file of JSON lines for each checkpoint that found more
QUARANTINED = Segments(FOLDER, TypeAdapter(Unreadable))


def read_quarantined(run: Store, newest: Checkpoint | None = None) -> list[Unreadable]:
    """What a run could not read up to its newest committed checkpoint, by sample."""
    return list(Entries(QUARANTINED.read(run, newest)))


class QuarantineLog:
    """The run's list on every rank, the same on all after `gather()`; on a run that stops at the first error, nothing.

    Entries are keyed by sample and follow from the positions gone through, so those that a run meets again, after a
    restart or in its next epoch, count once.
    """

    def __init__(
        self, run: Store, data: DataSection, rank: int, world_size: int, newest: Checkpoint | None = None
    ) -> None:
        """Every rank makes one; rank 0 alone reads. `newest`: the checkpoint that the run resumes from."""
        self.quarantine: Quarantine | None = None
        self._world_size, self._budget = world_size, data.quarantine_budget
        self._found, self._committed = Entries(), set[Unreadable]()
        if data.on_error == "quarantine":
            known = read_quarantined(run, newest) if rank == 0 else []
            self._found = Entries(from_rank_0(known, world_size))
            self._committed = set(self._found)
            self.quarantine = Quarantine(self._budget, self._found)

    def gather(self, stream: BatchStream, note: Callable[[str], None]) -> int:
        """The number of samples quarantined in the run so far; every rank calls it. `note` gets a line for each entry
        that is new. Raises DataError, on every rank, when those of all ranks together are above the budget."""
        if self.quarantine is None:
            return 0
        for entry in from_all_ranks(stream.quarantined, self._world_size):
            if self._found.add(entry):
                note(f"quarantined: {entry.text()}")
                if self._found.num_samples > self._budget:
                    raise DataError(over_budget(self._budget, entry))
        return self._found.num_samples

    def objects(self, images_seen: int) -> list[tuple[str, bytes]]:
        """(key, bytes) of what was found since the last call, to be put with the checkpoint; empty if nothing was."""
        fresh = [entry for entry in self._found if entry not in self._committed]
        self._committed |= set(fresh)
        return [QUARANTINED.write(images_seen, fresh)] if fresh else []
