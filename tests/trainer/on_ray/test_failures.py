"""Which errors end a run and which start its workers again, as Ray Train's controller decides it; no worker runs."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING
from unittest.mock import MagicMock

import pytest

from scoreray.data.errors import DataError, MachineError, StorageError, Unanswered, UserError
from scoreray.trainer.monitoring.monitor import GroupState
from scoreray.trainer.monitoring.stopping import NonFiniteError, Preempted

if TYPE_CHECKING:
    from scoreray.trainer.on_ray.failures import RestartPolicy

pytestmark = pytest.mark.usefixtures("ray_cluster")  # sets the environment that Ray reads when it is imported
WorkerHealthCheckFailedError = type("WorkerHealthCheckFailedError", (Exception,), {})
WorkerHealthCheckTimeoutError = type("WorkerHealthCheckTimeoutError", (Exception,), {})


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the Monitor answers."""
    from scoreray.trainer.on_ray import failures

    found = SimpleNamespace(answer=GroupState(), failures=1, monitor=MagicMock())
    found.monitor.group_state.remote = lambda: found.answer
    found.monitor.count_failure.remote = lambda: found.failures
    monkeypatch.setattr(failures.ray, "get", lambda reply: reply)
    return found


def policy(state: SimpleNamespace, max_failures: int = 3, elastic: bool = False) -> RestartPolicy:
    from scoreray.trainer.on_ray.failures import RestartPolicy

    return RestartPolicy(state.monitor, max_failures, elastic)


def reasons(state: SimpleNamespace) -> list[str]:
    return [call.args[0] for call in state.monitor.restarted.remote.call_args_list]


def test_only_transient_failures_are_tried_again() -> None:
    from scoreray.trainer.on_ray.failures import is_final

    for error in (UserError("x"), DataError("x"), NonFiniteError("x"), StorageError("no space left")):
        assert is_final(error)
    assert not is_final(Unanswered("busy"))
    assert not is_final(RuntimeError("connection reset by a peer that was killed"))


def test_a_final_error_is_raised_also_where_another_rank_died_of_it(state: SimpleNamespace) -> None:
    state.answer = GroupState(errors={1: DataError("shard 3 is damaged")})
    with pytest.raises(DataError, match="shard 3"):
        policy(state).after_exception(None, {0: WorkerHealthCheckFailedError("x"), 1: RuntimeError("wrapped")})
    assert reasons(state) == []


def test_each_restart_has_its_line(state: SimpleNamespace) -> None:
    one = policy(state, max_failures=-1)
    one.after_exception(None, {0: RuntimeError("connection closed"), 1: WorkerHealthCheckFailedError("x")})
    one.after_exception(None, {1: WorkerHealthCheckTimeoutError("x")})
    one.after_exception(None, {0: RuntimeError("first\n\nout of memory\n")})
    hung = "rank 1 hung (no answer for scaling.hang_timeout_s) and was ended"
    assert reasons(state) == ["rank 1 died", hung, "out of memory"]


def test_more_failures_than_allowed_without_a_commit_end_the_run(state: SimpleNamespace) -> None:
    one, died = policy(state, max_failures=2), {1: WorkerHealthCheckFailedError("x")}
    state.failures = 2
    one.after_exception(None, dict(died))
    state.failures = 3
    with pytest.raises(MachineError, match=r"rank 1 died; .* failure 3 since the last commit.*goes on from"):
        one.after_exception(None, dict(died))
    with pytest.raises(RuntimeError, match="out of memory"):
        one.after_exception(None, {0: RuntimeError("out of memory")})


def test_preemptions_are_no_failures(state: SimpleNamespace) -> None:
    state.answer, state.failures = GroupState(errors={0: Preempted("all was saved")}), 9
    one = policy(state, max_failures=0)
    for _ in range(3):
        one.after_exception(None, {0: RuntimeError("wrapped")})
    assert reasons(state) == ["all was saved"] * 3


def test_a_number_that_may_change_is_looked_at_again_after_each_failure(state: SimpleNamespace) -> None:
    from scoreray.trainer.on_ray.failures import Resized

    with pytest.raises(Resized, match="rank 1 died"):
        policy(state, elastic=True).after_exception(None, {1: WorkerHealthCheckFailedError("x")})
    assert reasons(state) == [], "the driver reports it"


def test_what_the_driver_ends_a_run_with_comes_first(state: SimpleNamespace) -> None:
    state.answer = GroupState(ending=UserError("ended"), errors={0: DataError("x")})
    with pytest.raises(UserError, match="ended"):
        policy(state).after_exception(None, {0: RuntimeError("x")})


def test_a_private_name_that_is_missing_is_found_when_the_hooks_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    from scoreray.trainer.on_ray import hooks

    assert hooks.MISSING == []
    monkeypatch.setitem(sys.modules, "ray._private.grpc_utils", None)
    try:
        importlib.reload(hooks)
        assert ["ray._private.grpc_utils" in name for name in hooks.MISSING] == [True]
        hooks.Standby(2, {}, 0.0, lambda progress: None)  # starts nothing
    finally:
        monkeypatch.undo()
        importlib.reload(hooks)


def test_a_group_that_fails_for_a_while_is_one_failure(state: SimpleNamespace) -> None:
    one = policy(state, max_failures=2)
    for starts in (1, 1, 1, 2):
        state.answer = GroupState(starts)
        one.after_exception(None, {1: WorkerHealthCheckFailedError("x")})
    assert reasons(state) == ["rank 1 died"] * 2
