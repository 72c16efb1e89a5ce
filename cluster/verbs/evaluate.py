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
from scoreray.cluster.display import bar, say, waiting
from scoreray.data import own_code
from scoreray.data.errors import UserError
from scoreray.sampling.evaluation.evaluate import AT_ONCE, Evaluation, evaluate, find_finished
from scoreray.sampling.evaluation.prepare import Run, load_inputs, make_plan, needs_training
from scoreray.sampling.guidance.steering import untrained_estimate
from scoreray.sampling.metrics.plan import EvaluationInputs, EvaluationPlan, EvaluationSettings
from scoreray.trainer.encoders.load import environment as autoencoders

RETRIES = Retries(
    times=4, work="a chunk", hint="is there memory for so many workers? give fewer --workers or a smaller --batch-size"
)


def evaluate_on_ray(settings: EvaluationSettings, *, workers: int | None = None, verbose: bool = False) -> Evaluation:
    """Evaluate on RAY_ADDRESS's cluster, or on an embedded one of this machine; the record does not depend on which.

    workers: actors, with a GPU each where the cluster has any; as many as it has room for by default. Raises
    ScorerayErrors; what is wrong with the settings is found before Ray starts.
    """
    inputs = checked_inputs(settings)
    if warning := untrained_estimate(inputs.info, inputs.info.conditions, inputs.request.guided):
        say(warning)
    with connected(verbose=verbose):
        import ray

        if not (on_gpus := gpus_come(settings.threads)):
            wait_for_room("--threads: a worker needs", [{"CPU": settings.threads}], "give fewer --threads")
        room = ray.cluster_resources()
        gpus = int(room.get("GPU", 0)) if on_gpus else 0
        inputs = replace(inputs, settings=replace(settings, device="cuda" if on_gpus else "cpu"))
        most = gpus or max(1, int(room.get("CPU", 1)) // settings.threads)
        if workers is not None and workers > most and not autoscaler().is_there:
            raise UserError(
                f"--workers {workers}: the cluster has room for {most} ({gpus} GPUs, {room.get('CPU', 0):g} CPUs of "
                f"which each takes {settings.threads}); ask for fewer"
            )
        with workers_of(workers or most, settings.threads, gpu=on_gpus) as run:
            return evaluate(inputs, run=run, bar=bar)


def checked_inputs(settings: EvaluationSettings) -> EvaluationInputs:
    """What an evaluation reads, loaded once; a user's mistakes are found here, in seconds, before Ray starts.

    A classifier that is still to be trained is left for later, and so is whether the place can be written to.
    """
    with waiting("reading the model and the reference"):
        inputs = load_inputs(settings)
        if not needs_training(inputs):
            plan = make_plan(inputs)
            if find_finished(plan) is None:
                plan.store.check_writable()
    return inputs


@contextlib.contextmanager
def workers_of(count: int, threads: int, *, gpu: bool = False) -> Iterator[Run]:
    """Calls functions in `count` processes that keep model and extractor in memory."""
    options = {
        "num_cpus": threads,
        "num_gpus": int(gpu),
        "max_concurrency": AT_ONCE,
        "runtime_env": {
            "env_vars": {
                "OMP_NUM_THREADS": str(threads),
                "OMP_WAIT_POLICY": "PASSIVE",
                **own_code.environment(),
                **autoencoders(),
            }
        },
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
