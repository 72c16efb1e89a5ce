"""What every tracker has: one run at a tracking server, which the records of ours are sent to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from scoreray.trainer.monitoring.metrics import TrainingRecord

Ending = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Called from one thread of its own, so that it may block; whatever it raises is tried again.

    key: of `log` in the config.  place: the server, for messages.
    """

    key: str
    place: str

    def open(self) -> int:
        """Finds the run there, or makes it. Returns the images of the newest record that it has; 0 for none."""
        ...

    def send(self, records: Sequence[TrainingRecord]) -> None:
        """Some of them, oldest first, at most `RECORDS_AT_ONCE`; steps there are images seen."""
        ...

    def close(self, ending: Ending) -> None:
        """No more records will come from this start."""
        ...


RECORDS_AT_ONCE = 40  # MLflow's interface takes 1,000 values a call
