"""Jobs that make their items by Ray actors or tasks, with items that sleep; for `scale_actors.py`.

sampling, evaluation, packing, encoding: by the code of `scoreray sample`, `evaluate`, `data pack` and `data encode`
that hands out work and takes results, on RAY_ADDRESS's cluster; of what an item is made of, see `sleeping_work.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import ray
import ray.data
import sleeping_work
from sleeping_work import Chunk, SleepingPlan, Work

from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.verbs import encode, evaluate, sample_actors
from scoreray.cluster.verbs.pack import map_on_ray
from scoreray.data.packing.commit import carry_out
from scoreray.data.packing.plan import PackedShard
from scoreray.data.storage.lease import Lease
from scoreray.data.storage.store import open_store


def run(job: str, actors: int, items: int, work: Work, url: str) -> None:
    """Makes the items that are not there yet."""
    if job == "evaluation":
        evaluation(url, work, actors, items)
        return
    plan = SleepingPlan(url, work, items)

    def shards(_: Any, numbers: Sequence[int]) -> Iterable[PackedShard]:
        if job != "packing":
            plan.lease = Lease.take(open_store(url), "packing/owner", job)
        return SHARDS[job](plan, numbers, actors)

    carry_out(plan, workers=1, map_shards=shards, progress=None)


def sampling(plan: SleepingPlan, numbers: Sequence[int], actors: int) -> Iterable[PackedShard]:
    def loaded(job: Any, url: str, model: Any, count: Any, lease: Any) -> SleepingPlan:
        return model

    sample_actors.SamplePlan = loaded  # type: ignore[assignment,misc]
    sample_actors._load = lambda job: job.plan
    sample_actors.worker_environment = lambda config: {}  # type: ignore[assignment]
    plan.job.plan = SleepingPlan(plan.url, plan.work, plan.num_shards, plan.lease)
    with connected():
        ray.cloudpickle.register_pickle_by_value(sample_actors)  # so that its actors don't import all of sampling
        yield from sample_actors.on_actors(actors, lambda done, total: None)(plan, numbers)  # type: ignore[arg-type]


def packing(plan: SleepingPlan, numbers: Sequence[int], actors: int) -> Iterable[PackedShard]:
    with connected():
        yield from map_on_ray(plan, numbers, actors)


def encoding(plan: SleepingPlan, numbers: Sequence[int], actors: int) -> Iterable[PackedShard]:
    encode.SampleChunk = Chunk  # type: ignore[assignment,misc]
    encode.keep_large_tensors_on_the_heap = lambda: None
    ray.cloudpickle.register_pickle_by_value(encode)
    with contextlib.ExitStack() as ending:
        yield from encode._on_ray(plan, numbers, (actors, actors), "cpu", False, ending)  # type: ignore[arg-type]


def evaluation(url: str, work: Work, actors: int, items: int) -> None:
    ray.cloudpickle.register_pickle_by_value(evaluate)
    with connected(), evaluate.workers_of(actors, 1) as run:
        stored = {key for key, _ in open_store(url).list("samples/")}
        left = [item for item in range(items) if f"samples/{item:06d}.npz" not in stored]
        run(sleeping_work.run_chunk, [(url, work, item) for item in left], lambda count: None)


SHARDS = {"sampling": sampling, "packing": packing, "encoding": encoding}
