"""Shards of samples made by Ray actors, each with the model in memory."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scoreray.cluster.actors import Retries, actors, in_order
from scoreray.data.errors import DataError
from scoreray.data.packing.commit import pack_shard
from scoreray.data.packing.plan import PackedShard
from scoreray.data.storage.lease import Lease
from scoreray.data.traces import span
from scoreray.sampling.model.load import load_to_sample
from scoreray.sampling.offline.driver import fingerprint
from scoreray.sampling.offline.plan import Mapper, SamplePlan
from scoreray.sampling.offline.record import SampleJob
from scoreray.trainer.encoders.load import environment as autoencoders
from scoreray.trainer.on_ray.run import worker_environment

RETRIES = Retries(
    times=10,  # more than elsewhere: Ray counts them over an actor's whole life, and jobs take hours on spot instances
    work="shard {}",
    hint="is there memory for so many actors? give fewer --actors or a smaller --batch-size",
)
CALLS_AT_ONCE = 2  # of an actor: it draws one shard while the other waits in its queue, so that it is never idle
POLL_S = 0.5
MOST_ASKED = 256  # actors a second, so that a thousand of them leave the driver its time


@dataclass(frozen=True)
class ActorState:
    """How far one actor is. process: changes when the actor is started again, while `actor`, Ray's id, stays."""

    actor: str
    process: str
    samples: int


class DrawingActor:
    """Makes shards of one job. The model is loaded by the first shard, so that a failure is that shard's."""

    def __init__(self, job: SampleJob, url: str, lease: Lease | None) -> None:
        import ray

        self._job, self._url, self._lease, self._drawn = job, url, lease, 0
        self._actor, self._process = ray.get_runtime_context().get_actor_id(), uuid.uuid4().hex
        self._plan: SamplePlan | None = None

    def make(self, number: int) -> tuple[ActorState, PackedShard]:
        if self._plan is None:
            with span("sample.load", checkpoint=self._job.checkpoint):
                self._plan = SamplePlan(self._job, self._url, _load(self._job), self._count, self._lease)
        packed = pack_shard(self._plan, number)
        return self.state(), packed

    def state(self) -> ActorState:
        return ActorState(self._actor, self._process, self._drawn)

    def _count(self, n: int) -> None:
        self._drawn += n


def _load(job: SampleJob) -> Any:
    model = load_to_sample(job.checkpoint, job.ema)
    model.info = model.info.at_size(job.request.size)
    if fingerprint(model) != job.weights:
        raise DataError(
            f"{job.checkpoint}: its weights are not those that this job began with; put these back, or give another "
            "--out"
        )
    if job.raw:
        model.info = model.info.as_latents()
    return model


def on_actors(
    num_actors: int,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
    *,
    gpu: bool = False,
) -> Mapper:
    """Shards made by `num_actors` actors of the connected Ray cluster; `gpu`: with one each.

    progress(samples done, in all): a few times a second. say: called with a line when an actor was started again.
    """

    def run(plan: SamplePlan, numbers: Sequence[int]) -> Iterator[PackedShard]:
        options = {
            "num_cpus": 1,
            "num_gpus": int(gpu),
            "concurrency_groups": {"state": 1},  # a thread of its own: `state` answers while `make` draws
            "runtime_env": {"env_vars": worker_environment(plan.model.info.config) | autoencoders()},
        }
        count = min(num_actors, len(numbers))
        with actors(DrawingActor, count, plan.job, plan.url, plan.lease, retries=RETRIES, **options) as drawing:
            watch = _Watch(drawing, plan.job.request.count, plan.num_outside(numbers), progress, say)
            calls = [actor.make.remote for actor in drawing] * CALLS_AT_ONCE
            for state, packed in in_order(calls, numbers, RETRIES, poll_s=POLL_S, poll=watch.poll):
                watch.finished(state, packed)
                yield packed
            watch.show()

    return run


class _Watch:
    """Adds up the samples that were drawn, by asking each actor for its state, and notices actors started again."""

    def __init__(
        self,
        drawing: list[Any],
        total: int,
        before: int,
        progress: Callable[[int, int], None] | None,
        say: Callable[[str], None],
    ) -> None:
        self._drawing, self._total, self._progress, self._say = drawing, total, progress, say
        self._kept = self._finished = self._shown = before
        self._next_s = 0.0
        self._states: dict[str, ActorState] = {}
        self._processes: dict[str, list[str]] = {}  # an actor's, in the order in which they were seen
        self._calls: dict[Any, int] = {}  # ObjectRef of a state -> the number of its actor
        self._poll_s = max(POLL_S, len(drawing) / MOST_ASKED)

    def finished(self, state: ActorState, packed: PackedShard) -> None:
        self._update(state)
        self._finished += packed.shard.num_samples
        self._kept += packed.shard.num_samples if packed.kept else 0

    def poll(self) -> None:
        import ray

        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + self._poll_s
        ready = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)[0] if self._calls else []
        for ref in ready:
            del self._calls[ref]
            with contextlib.suppress(ray.exceptions.RayError):  # it is being started again
                self._update(ray.get(ref))
        asked = set(self._calls.values())
        for number, actor in enumerate(self._drawing):
            if number not in asked:
                state = actor.state.options(concurrency_group="state", max_task_retries=0)
                self._calls[state.remote()] = number
        self.show()

    def _update(self, state: ActorState) -> None:
        processes = self._processes.setdefault(state.actor, [])
        if state.process not in processes:
            processes.append(state.process)
            if len(processes) > 1:
                self._say(f"an actor died and was started again ({len(processes) - 1} of {RETRIES.times})")
        elif state.process != processes[-1]:
            return  # the last word of one that died may come after the first of the next
        self._states[state.actor] = state

    def show(self) -> None:
        drawn = min(self._total, self._kept + sum(state.samples for state in self._states.values()))
        self._shown = max(self._shown, self._finished, drawn)
        if self._progress is not None:
            self._progress(self._shown, self._total)
