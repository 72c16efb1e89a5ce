"""Work in Ray's processes: calls of tasks or actors, which are started again where their process dies.

The restarts are Ray's own (`max_retries` of a task, `max_restarts` and `max_task_retries` of an actor). This module
decides which process gets the next call and in which order results come, and makes one line of a failure.

`ray.util.ActorPool` hands out calls too, but knows no tasks and doesn't say which call failed, and in its ordered `map`
an actor is idle until its result's turn comes (20 calls on 2 actors, one of them ten times as long: 5.7 s, `in_order`
4.5 s). Ray Data starts dead actors again without a limit: a shard that kills every process that makes it would never
end.
"""

from __future__ import annotations

import contextlib
import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from scoreray.data.errors import ScorerayError, StorageError

AHEAD = 8  # calls begun past the oldest that is not finished, as a multiple of those at once: results don't pile up
LEAST_AHEAD = 1024  # of few calls at once: while one process starts again, the others make many items
T = TypeVar("T")

Call = Callable[[T], Any]
"""Sends one value to a process (`actor.method.remote`, `task.remote`); returns the ObjectRef of its result."""


@dataclass(frozen=True)
class Retries:
    """How often Ray starts a process again, and what a person reads where it died once more.

    work: what a call does, "shard {}" with the value in place of {}. hint: "give fewer --actors".
    """

    times: int
    work: str
    hint: str


@contextlib.contextmanager
def actors(kind: type, count: int, *arguments: Any, retries: Retries, **options: Any) -> Iterator[list[Any]]:
    """`count` actors of the class `kind` on the connected cluster, for the duration; `options` as `ray.remote` takes
    them."""
    import ray

    remote = ray.remote(max_restarts=retries.times, max_task_retries=retries.times, **options)(kind)
    started = [remote.remote(*arguments) for _ in range(count)]
    try:
        yield started
    finally:
        for actor in started:
            ray.kill(actor)


def completed(
    calls: Sequence[Call[T]],
    values: Iterable[T],
    retries: Retries,
    *,
    ahead: int | None = None,
    poll_s: float | None = None,
    poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Any]]:
    """(number of the value, result) in the order in which calls end. Each of `calls` has one value at a time: name an
    actor's twice, and its next value is there when it has finished one.

    ahead: values begun past the oldest one that isn't finished, at most. poll: called after every result, and every
    `poll_s` seconds without one. Raises what a call raised first; StorageError where its process died
    `retries.times` + 1 times. What still runs then, or when this iterator is closed, is left to end by itself.

    A result costs as much with a thousand calls under way as with two: each future says itself that it is done, where
    `ray.wait` looks at all of them.
    """
    waiting, free = deque(enumerate(values)), deque(calls)
    running: dict[Future[Any], tuple[int, T, Call[T]]] = {}
    ended: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    oldest, finished = 0, set[int]()  # all values below `oldest` are finished, and these

    def begin() -> None:
        while waiting and free and (ahead is None or waiting[0][0] < oldest + ahead):
            (number, value), call = waiting.popleft(), free.popleft()
            future = call(value).future()
            running[future] = number, value, call
            future.add_done_callback(ended.put)

    begin()
    while running:
        try:
            future = ended.get(timeout=poll_s)
        except queue.Empty:
            poll()
            continue
        number, value, call = running.pop(future)
        result = _result(future, value, retries)
        free.append(call)
        finished.add(number)
        while oldest in finished:
            finished.remove(oldest)
            oldest += 1
        begin()  # before the caller does something with the result
        yield number, result
        poll()


def in_order(calls: Sequence[Call[T]], values: Iterable[T], retries: Retries, **options: Any) -> Iterator[Any]:
    """The results of `completed`, in the order of `values`."""
    finished: dict[int, Any] = {}
    turn = 0
    ahead = max(LEAST_AHEAD, AHEAD * len(calls))
    for number, result in completed(calls, values, retries, ahead=ahead, **options):
        finished[number] = result
        while turn in finished:
            yield finished.pop(turn)
            turn += 1


def _result(future: Future[Any], value: Any, retries: Retries) -> Any:
    import ray

    try:
        return future.result()
    except ray.exceptions.RayTaskError as error:
        # A mistake's own line, without the remote traceback that Ray puts before it; a bug keeps that.
        raise error.cause if isinstance(error.cause, ScorerayError) else error from None
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        work = retries.work.format(value)
        raise StorageError(f"{work}: its process died {retries.times + 1} times ({reason}); {retries.hint}") from None
