"""Shards of samples made by Ray actors, each with the model in memory; an actor that dies is started again."""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scoreray.data.errors import DataError, ScorerayError, StorageError
from scoreray.data.packing.commit import Packed, pack_shard
from scoreray.data.storage.lease import Lease
from scoreray.data.traces import span
from scoreray.sampling.model.load import load_model
from scoreray.sampling.offline.driver import fingerprint
from scoreray.sampling.offline.job import Job, Mapper, Samples

RESTARTS = 10  # of one actor; a shard that kills every process that makes it ends the job
AHEAD = 4  # shards that may be finished before an earlier one is, for each actor
POLL_S = 0.5


class DrawingActor:
    """Makes shards of one job. The model is loaded by the first shard, so that a failure is that shard's."""

    def __init__(self, job: Job, url: str, lease: Lease | None) -> None:
        self._job, self._url, self._lease, self._drawn = job, url, lease, 0
        self._life = uuid.uuid4().hex
        self._samples: Samples | None = None

    def make(self, number: int) -> tuple[str, Packed]:
        """(which process this is, the shard)."""
        if self._samples is None:
            with span("sample.load", checkpoint=self._job.checkpoint):
                self._samples = Samples(self._job, self._url, _load(self._job), self._count, self._lease)
        return self._life, pack_shard(self._samples, number)

    def drawn(self) -> tuple[str, int]:
        """(which process this is, samples that it has drawn)."""
        return self._life, self._drawn

    def _count(self, n: int) -> None:
        self._drawn += n


def _load(job: Job) -> Any:
    model = load_model(job.checkpoint, job.ema)
    if fingerprint(model) != job.weights:
        raise DataError(f"{job.checkpoint}: its weights are not those that this job began with")
    return model


def on_actors(
    num_actors: int,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
    *,
    gpu: bool = False,
) -> Mapper:
    """Shards made by `num_actors` actors of the connected Ray cluster; `gpu`: with one each.

    progress(samples done, in all): a few times a second. say: told when an actor died and was started again.
    """

    def run(samples: Samples, numbers: Sequence[int]) -> Iterator[Packed]:
        import ray

        from scoreray.trainer.on_ray.run import worker_environment

        actor = ray.remote(
            num_cpus=1,
            num_gpus=int(gpu),
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            concurrency_groups={"tell": 1},
            runtime_env={"env_vars": worker_environment(samples.model.info.config)},
        )(DrawingActor)
        actors = [actor.remote(samples.job, samples.url, samples.lease) for _ in range(min(num_actors, len(numbers)))]
        try:
            teller = _Teller(actors, samples.job.request.count, samples.elsewhere(numbers), progress, say)
            yield from _in_order(actors, numbers, teller)
        finally:
            for one in actors:
                ray.kill(one)

    return run


class _Teller:
    """Adds up what was kept and what the actors say they have drawn, a few times a second, and counts their deaths."""

    def __init__(
        self,
        actors: list[Any],
        total: int,
        there: int,
        progress: Callable[[int, int], None] | None,
        say: Callable[[str], None],
    ) -> None:
        self._actors, self._total, self._progress, self._say = actors, total, progress, say
        self._kept = self._finished = self._shown = there
        self._next = 0.0
        self._drawn, self._life, self._deaths = [0] * len(actors), [""] * len(actors), [0] * len(actors)
        self._asked: dict[Any, int] = {}

    def finished(self, actor: Any, life: str, packed: Packed) -> None:
        self._lives(self._actors.index(actor), life)
        self._finished += packed.shard.num_samples
        self._kept += packed.shard.num_samples if packed.kept else 0

    def tell(self) -> None:
        import ray

        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + POLL_S
        answered = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)[0] if self._asked else []
        for ref in answered:
            number = self._asked.pop(ref)
            try:
                life, self._drawn[number] = ray.get(ref)
                self._lives(number, life)
            except ray.exceptions.RayError:  # it is being started again
                self._drawn[number] = 0
        for number in set(range(len(self._actors))) - set(self._asked.values()):
            tell = self._actors[number].drawn.options(concurrency_group="tell", max_task_retries=0)
            self._asked[tell.remote()] = number
        self.show()

    def _lives(self, number: int, life: str) -> None:
        if self._life[number] not in ("", life):
            self._deaths[number] += 1
            self._say(f"an actor died and was started again ({self._deaths[number]} of {RESTARTS})")
        self._life[number] = life

    def show(self) -> None:
        drawn = min(self._total, self._kept + sum(self._drawn))
        self._shown = max(self._shown, self._finished, drawn)
        if self._progress is not None:
            self._progress(self._shown, self._total)


def _in_order(actors: list[Any], numbers: Sequence[int], teller: _Teller) -> Iterator[Packed]:
    """The shards in the order of `numbers`, each made by whichever actor is free; two wait at every actor."""
    import ray

    waiting, free = deque(numbers), deque([*actors, *actors])
    running: dict[Any, tuple[int, Any]] = {}
    finished: dict[int, Packed] = {}
    for place, number in enumerate(numbers):
        while number not in finished:
            while waiting and free and len(numbers) - len(waiting) < place + AHEAD * len(actors):
                actor, started = free.popleft(), waiting.popleft()
                running[actor.make.remote(started)] = (started, actor)
            done, _ = ray.wait(list(running), timeout=POLL_S)
            for ref in done:
                started, actor = running.pop(ref)
                free.append(actor)
                life, finished[started] = _result(ref, started)
                teller.finished(actor, life, finished[started])
            teller.tell()
        yield finished.pop(number)
    teller.show()


def _result(ref: Any, number: int) -> tuple[str, Packed]:
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, ScorerayError) else error from None
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise StorageError(
            f"shard {number}: the process that drew it died {RESTARTS + 1} times ({reason}); is there memory for so "
            "many actors? give fewer --actors or a smaller --batch-size"
        ) from None
