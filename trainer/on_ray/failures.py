"""Which errors end a run, which start its workers again, and the line that says why. Needs no torch."""

from __future__ import annotations

import contextlib
from typing import Any

from scoreray.data.errors import DataError, ScorerayError, StorageError, Unanswered, UserError
from scoreray.data.storage.store import open_store
from scoreray.trainer.monitoring.stopping import NonFiniteError, Preempted
from scoreray.trainer.on_ray.hooks import (
    DefaultFailurePolicy,
    FailureDecision,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

MARKER = "/COMMITTED.json"  # of a checkpoint, whose folder's name begins with the images seen
FINAL_ERRORS = (UserError, DataError, NonFiniteError, StorageError)  # a restart would only meet them again


def cause(error: BaseException) -> BaseException:
    """The error of ours inside what Ray Train raises, else Ray's error itself."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [getattr(failure, "_base_exc", failure) for failure in failures.values()]
    ours = [one for one in causes if isinstance(one, ScorerayError)]
    lost = [one for one in causes if isinstance(one, (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError))]
    return next(iter([one for one in ours if is_final(one)] + ours + lost), error)


def is_final(error: BaseException) -> bool:
    """Whether a restart would only meet this error again; a store that did not answer may answer later."""
    return isinstance(error, FINAL_ERRORS) and not isinstance(error, Unanswered)


def reason_of(error: BaseException, training_failed_error: Any = None) -> str:
    """One line of why workers are started again."""
    failures = getattr(training_failed_error, "worker_failures", None) or {}
    ranks = [rank for rank, failure in failures.items() if getattr(failure, "_base_exc", failure) is error]
    who = f"rank {ranks[0]}" if ranks else "a worker"
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return f"{who} hung (no answer for scaling.hang_timeout_s) and was ended"
    if isinstance(error, WorkerHealthCheckFailedError):
        return f"{who} died"
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class RunFailurePolicy(DefaultFailurePolicy):
    """Restarts as Ray Train does, but never after an error that is final; reports to `monitor` why it restarts.

    `max_failures` counts failures without a commit in between, so that a long run is not ended by its length: Ray's own
    count is of the whole run, and a year of training meets more than three dead nodes. Preemptions are no failures.
    """

    def __init__(self, failure_config: Any, monitor: Any, run_url: str) -> None:
        super().__init__(failure_config)
        self._monitor, self._run_url, self._newest = monitor, run_url, ""

    def make_decision(self, training_failed_error: Any) -> Any:
        reason = cause(training_failed_error)
        if is_final(reason):
            return FailureDecision.RAISE
        if isinstance(reason, Preempted):
            decision = FailureDecision.RETRY
        else:
            with contextlib.suppress(ScorerayError):
                newest = max(
                    (key for key, _ in open_store(self._run_url).list("checkpoints/") if key.endswith(MARKER)),
                    default="",
                )
                if newest > self._newest:
                    self._newest, self._worker_group_failures = newest, 0
            decision = super().make_decision(training_failed_error)
        if decision == FailureDecision.RETRY:
            self._monitor.restarted.remote(reason_of(reason, training_failed_error))
        return decision
