"""Which errors end a run, which start its workers again, and the line that says why. Needs no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import ray
from ray.train import UserCallback

from scoreray.data.errors import DataError, MachineError, ScorerayError, StorageError, Unanswered, UserError
from scoreray.trainer.monitoring.monitor import GroupState
from scoreray.trainer.monitoring.stopping import NonFiniteError, Preempted

FINAL_ERRORS = (UserError, DataError, NonFiniteError, StorageError)  # a restart would only meet them again
# Ray Train's names of what befell a worker, compared as text: its classes are private, and only lines depend on them.
HUNG, DIED, NOT_STARTED = "WorkerHealthCheckTimeoutError", "WorkerHealthCheckFailedError", "WorkerGroupStartup"


class Resized(ScorerayError):
    """This start of Ray Train ends because the run goes on with another number of workers. Not a failure."""


def is_final(error: BaseException) -> bool:
    """Whether a restart would only meet this error again; a store that did not answer may answer later."""
    return isinstance(error, FINAL_ERRORS) and not isinstance(error, Unanswered)


def cause(errors: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """The rank whose error explains the others', and that error: when one rank ends, the others lose a peer."""

    def weight(error: BaseException) -> int:
        if isinstance(error, ScorerayError):
            return 3 if is_final(error) else 2
        return 1 if type(error).__name__ in (HUNG, DIED) else 0

    return max(errors.items(), key=lambda entry: weight(entry[1]))


def reason_of(rank: int, error: BaseException) -> str:
    """One line of why workers are started again."""
    if type(error).__name__ == HUNG:
        return f"rank {rank} hung (no answer for scaling.hang_timeout_s) and was ended"
    if type(error).__name__ == DIED:
        return f"rank {rank} died"
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class RestartPolicy(UserCallback):
    """In Ray Train's controller: raises what ends the run, which Ray Train does not start again; else reports why the
    workers are started again. Ray's own `FailureConfig` retries without end.

    `max_failures` counts failures without a commit in between, so that a long run is not ended by its length: Ray's own
    count is of the whole run, and a year of training meets more than three dead nodes. Preemptions are no failures.
    `elastic`: the next workers may be fewer, which the driver finds out. Here the cluster's nodes don't say: a worker
    of a dead node is known to be dead before the node is.
    """

    def __init__(self, monitor: Any, max_failures: int, elastic: bool) -> None:
        self._monitor, self._max_failures, self._elastic, self._decided = monitor, max_failures, elastic, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        state = GroupState()
        with contextlib.suppress(ray.exceptions.RayActorError):  # without a monitor Ray's errors have to do
            state = ray.get(self._monitor.group_state.remote())
        if state.ending is not None:
            raise state.ending
        if state.starts and state.starts == self._decided:  # a group on a node that goes away may fail for a while
            return
        self._decided = state.starts
        rank, error = cause({**worker_exceptions, **state.errors})
        if is_final(error):
            raise error
        reason = reason_of(rank, error)
        if not isinstance(error, Preempted):
            self._count(reason, error)
        if self._elastic:
            raise Resized(reason)
        self._monitor.restarted.remote(reason)

    def _count(self, reason: str, error: BaseException) -> None:
        failures = 0
        with contextlib.suppress(ray.exceptions.RayActorError):
            failures = ray.get(self._monitor.count_failure.remote())
        if not 0 <= self._max_failures < failures:
            return
        if type(error).__name__ not in (HUNG, DIED):
            raise error
        raise MachineError(
            f"{reason}; that is failure {failures} since the last commit, scaling.max_failures is "
            f"{self._max_failures}; the same command goes on from what is committed"
        )
