"""`scoreray evaluate` on Ray: chunks of an evaluation handed to actors, with a bar for each stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.connect.room import autoscaler, gpus_come, wait_for_room
from scoreray.cluster.display import bar
from scoreray.data.errors import ScorerayError, StorageError, UserError
from scoreray.sampling.evaluation.evaluate import AT_ONCE, Evaluation, evaluate, find_finished, prepare
from scoreray.sampling.evaluation.plan import EvaluationPlan, EvaluationSettings, make_plan

RESTARTS = 4  # of one actor: a chunk that kills every process that takes it ends the evaluation


def evaluate_on_ray(settings: EvaluationSettings, *, workers: int | None = None, verbose: bool = False) -> Evaluation:
    """Evaluate on RAY_ADDRESS's cluster, or on an embedded one of this machine; the record tells nothing of which.

    workers: actors, with a GPU each where the cluster has any; as many as it has room for by default. Raises
    ScorerayErrors; what is wrong with the settings is found before Ray starts.
    """
    _check(settings)
    with connected(verbose=verbose):
        import ray

        if not (on_gpus := gpus_come(settings.threads)):
            wait_for_room("--threads: a worker needs", [{"CPU": settings.threads}], "give fewer --threads")
        room = ray.cluster_resources()
        gpus = int(room.get("GPU", 0)) if on_gpus else 0
        settings = replace(settings, device="cuda" if on_gpus else "cpu")
        most = gpus or max(1, int(room.get("CPU", 1)) // settings.threads)
        if workers is not None and workers > most and not autoscaler().is_there:
            raise UserError(
                f"--workers {workers}: the cluster has room for {most} ({gpus} GPUs, {room.get('CPU', 0):g} CPUs of "
                f"which each takes {settings.threads}); ask for fewer"
            )
        with Actors(workers or most, settings.threads, gpu=on_gpus) as actors:
            return evaluate(settings, run=actors.run, bar=counting)


def _check(settings: EvaluationSettings) -> None:
    """What a person got wrong, in seconds; a classifier that is still to be trained is left for later."""

    def nothing(*_: Any) -> None:
        raise _NotYet

    with contextlib.suppress(_NotYet):
        plan = make_plan(settings, *prepare(settings, run=nothing))
        if find_finished(plan) is None:
            plan.store.check_writable()


class _NotYet(Exception):
    pass


@contextlib.contextmanager
def counting(name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """A bar of a stage."""
    with bar(name, total, unit) as progress:
        yield lambda n: progress.advance(progress.task_ids[0], n)


class Actors:
    """Processes that keep model and extractor in memory and call functions; one that dies is started again."""

    def __init__(self, count: int, threads: int, *, gpu: bool = False) -> None:
        self._count, self._threads, self._gpu = count, threads, gpu
        self._actors: list[Any] = []

    def __enter__(self) -> Actors:
        import ray

        actor = ray.remote(
            num_cpus=self._threads,
            num_gpus=int(self._gpu),
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            max_concurrency=AT_ONCE,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(self._threads), "OMP_WAIT_POLICY": "PASSIVE"}},
        )(Worker)
        self._actors = [actor.remote() for _ in range(self._count)]
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def run(
        self, function: Callable[..., int], arguments: Sequence[tuple[Any, ...]], done: Callable[[int], None]
    ) -> None:
        """`sampling.evaluate.Run`: each call goes to whichever actor has room; the first error ends it."""
        import ray

        plans: dict[int, Any] = {}  # a plan goes over once, not with every chunk

        def once(argument: Any) -> Any:
            if isinstance(argument, EvaluationPlan):
                return plans.get(id(argument)) or plans.setdefault(id(argument), ray.put(argument))
            return argument

        waiting, free = list(reversed(arguments)), self._actors * AT_ONCE
        running: dict[Any, Any] = {}
        while waiting or running:
            while waiting and free:
                actor = free.pop()
                running[actor.call.remote(function, *map(once, waiting.pop()))] = actor
            ready, _ = ray.wait(list(running))
            for one in ready:
                free.append(running.pop(one))
                done(_result(one))


class Worker:
    """An actor's process."""

    def call(self, function: Callable[..., int], *arguments: Any) -> int:
        return function(*arguments)


def _result(one: Any) -> int:
    import ray

    try:
        return ray.get(one)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, ScorerayError) else error from None
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise StorageError(
            f"the process of a chunk died {RESTARTS + 1} times ({reason}); is there memory for so many workers? give "
            "fewer --workers or a smaller --batch-size"
        ) from None
