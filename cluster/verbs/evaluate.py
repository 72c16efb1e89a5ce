"""`scoreray evaluate` on Ray: chunks of an evaluation handed to actors, with a bar for each stage."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from scoreray.cluster.actors import Retries, actors, completed
from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.connect.room import autoscaler, gpus_come, wait_for_room
from scoreray.cluster.display import bar
from scoreray.data.errors import UserError
from scoreray.sampling.evaluation.evaluate import AT_ONCE, Evaluation, Run, evaluate, find_finished, prepare
from scoreray.sampling.evaluation.plan import EvaluationPlan, EvaluationSettings, make_plan

RETRIES = Retries(
    4, "a chunk", "is there memory for so many workers? give fewer --workers or a smaller --batch-size"
)  # of one actor


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
        with workers_of(workers or most, settings.threads, gpu=on_gpus) as run:
            return evaluate(settings, run=run, bar=counting)


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


@contextlib.contextmanager
def workers_of(count: int, threads: int, *, gpu: bool = False) -> Iterator[Run]:
    """Calls functions in `count` processes that keep model and extractor in memory."""
    options = {
        "num_cpus": threads,
        "num_gpus": int(gpu),
        "max_concurrency": AT_ONCE,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}},
    }
    with actors(Worker, count, retries=RETRIES, **options) as workers:
        yield partial(_run, workers)


class Worker:
    """An actor's process."""

    def call(self, function: Callable[..., int], *arguments: Any) -> int:
        return function(*arguments)


def _run(
    workers: list[Any], function: Callable[..., int], arguments: Sequence[tuple[Any, ...]], done: Callable[[int], None]
) -> None:
    """Each call goes to a worker that has room; the first error ends it."""
    import ray

    shared: dict[int, Any] = {}  # a plan is sent once, not with every chunk

    def sent(argument: Any) -> Any:
        if not isinstance(argument, EvaluationPlan):
            return argument
        return shared.get(id(argument)) or shared.setdefault(id(argument), ray.put(argument))

    def call(worker: Any, chunk: tuple[Any, ...]) -> Any:
        return worker.call.remote(function, *map(sent, chunk))

    for _, count in completed([partial(call, worker) for worker in workers] * AT_ONCE, arguments, RETRIES):
        done(count)
