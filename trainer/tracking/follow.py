"""Sends a run's committed records to trackers while it trains: a server that does not answer holds nothing up.

    log: {mlflow: "https://mlflow.example"}        a run of experiment MLFLOW_EXPERIMENT_NAME ("scoreray")
    log: {wandb: entity/project}                   or a project alone; WANDB_MODE=offline writes files

Only what was committed is sent, so a killed run plots nothing twice. Which run there is ours is stored in the run's
folder. Credentials come from the environment, as for these packages themselves.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from scoreray.trainer.config import Config
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_folder import run_store
from scoreray.trainer.tracking.base import RECORDS_AT_ONCE, Ending, Tracker
from scoreray.trainer.tracking.mlflow import MlflowTracker
from scoreray.trainer.tracking.wandb import WandbTracker

POLL_S, MOST_PAUSE_S = 5.0, 60.0
LAST_S, STOPPED_S = 15.0, 5.0  # for what is left when the run has ended, or was stopped


@contextlib.contextmanager
def tracked(config: Config, note: Callable[[str], None]) -> Iterator[None]:
    """Sends the run's records while the block trains it, and what is left at its end (for at most `LAST_S`).

    The first failure of a tracker is passed to `note`, and sending is tried again; the same command sends what is left
    at the end.
    """
    trackers: list[Tracker] = []
    if config.log.mlflow is not None:
        trackers.append(MlflowTracker(config, config.log.mlflow))
    if config.log.wandb is not None:
        trackers.append(WandbTracker(config, config.log.wandb))
    followers = [_Follower(config, tracker, note) for tracker in trackers]
    ending: Ending = "FAILED"
    patience_s = LAST_S
    try:
        yield
        ending = "FINISHED"
    except KeyboardInterrupt:
        ending, patience_s = "KILLED", STOPPED_S
        raise
    finally:
        deadline = time.monotonic() + patience_s
        for follower in followers:
            follower.end(ending)
        for follower in followers:
            follower.join(max(0.0, deadline - time.monotonic()))


class _Follower(threading.Thread):
    """The thread beside the run, one a tracker, whose package it imports at the first committed record: that takes
    seconds."""

    def __init__(self, config: Config, tracker: Tracker, note: Callable[[str], None]) -> None:
        super().__init__(name=tracker.key, daemon=True)
        self._run, self._tracker, self._note = run_store(config), tracker, note
        self._sent: int | None = None  # images of the newest record that is there; None before it is open
        self._ending: Ending = "FAILED"
        self._ended, self._warned = threading.Event(), False
        self.start()

    def end(self, ending: Ending) -> None:
        """No more records will come."""
        self._ending = ending
        self._ended.set()

    def run(self) -> None:
        pause_s = POLL_S
        while True:
            last = self._ended.wait(pause_s)
            try:
                self._send()
                if last and self._sent is not None:
                    self._tracker.close(self._ending)
                pause_s = POLL_S
            except Exception as error:
                pause_s = min(2 * pause_s, MOST_PAUSE_S)
                self._warn(error)
            if last:
                return

    def _send(self) -> None:
        records = read_metrics(self._run, after=self._sent or 0)
        if not records:
            return
        if self._sent is None:
            self._sent = self._tracker.open()
        records = [record for record in records if record.images > self._sent]
        for start in range(0, len(records), RECORDS_AT_ONCE):
            some = records[start : start + RECORDS_AT_ONCE]
            self._tracker.send(some)
            self._sent = some[-1].images

    def _warn(self, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        self._note(
            f"log.{self._tracker.key}: {self._tracker.place}: {reason}; training goes on, and what is missing there is "
            "sent when it answers, or by the same command later"
        )
