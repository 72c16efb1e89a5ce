"""`scoreray data encode` with its progress shown: a Ray Data pipeline on RAY_ADDRESS's or an embedded cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.connect.room import autoscaler, gpus_come, wait_for_room
from scoreray.cluster.display import counted, say
from scoreray.cluster.verbs.pack import check_nodes
from scoreray.data.buckets.bucketed import BucketedSet, is_bucketed
from scoreray.data.errors import ScorerayError, StorageError, UserError, nearest
from scoreray.data.fields.record_layout import record_of
from scoreray.data.packing.commit import finished_shard, store_shard
from scoreray.data.packing.plan import PackedShard, get_record
from scoreray.data.reading.manifest import Manifest
from scoreray.data.storage.store import open_store
from scoreray.data.threads import map_in_threads
from scoreray.data.units import counted_noun
from scoreray.sampling.encoding.begin import EncodedField, EncodeOptions, plan_encoding
from scoreray.sampling.encoding.buckets import carry_out_buckets, plan_buckets
from scoreray.sampling.encoding.job import Mapper, carry_out_encoding, in_this_process
from scoreray.sampling.encoding.plan import EncodePlan, SampleChunk
from scoreray.trainer.engine.cpu import keep_large_tensors_on_the_heap

if TYPE_CHECKING:
    from ray.data import ActorPoolStrategy, Dataset

RETRIES = 4  # of what a process died over
CHECKED_AT_ONCE = 8  # shards of an earlier start, whose bytes are hashed
OBJECT_STORE_BYTES = 1 << 30  # chunks of samples and of latents pass through it
DEVICES = ("auto", "cpu", "cuda")


Actors = tuple[int, int | None]
"""How many encode, at least and at most; None: as many as there is room for. (0, 0): this process does, without Ray."""


def encode_to(
    url: str, out: str, wanted: Sequence[EncodedField], options: EncodeOptions, *, actors: Actors, verbose: bool = False
) -> Manifest | BucketedSet:
    """Encodes a data set, or each bucket of one, with progress shown, or what is missing of it. Raises UserError,
    DataError, StorageError."""
    keep_large_tensors_on_the_heap()
    in_actors = actors[1] != 0
    if options.device not in DEVICES:
        raise UserError(f"--device {options.device}: {nearest(options.device, DEVICES)}")
    options_here = replace(options, device="cpu") if in_actors else options
    carry_out: Callable[[Mapper, Callable[[int, int], None]], Manifest | BucketedSet]
    if is_bucketed(open_store(url)):
        data = BucketedSet.load(open_store(url))
        carry_out = partial(carry_out_buckets, out, plan_buckets(data, out, wanted, options_here))
    else:
        carry_out = partial(carry_out_encoding, plan_encoding(url, out, wanted, options_here))
    kept, made = 0, 0

    def counting(plan: EncodePlan, numbers: Sequence[int]) -> Iterator[PackedShard]:
        nonlocal kept, made
        found = in_this_process(plan, numbers)
        if in_actors:
            found = _on_ray(plan, numbers, actors, options.device, verbose, ending)
        for packed in found:
            kept, made = kept + packed.kept, made + (not packed.kept)
            yield packed

    with (
        contextlib.ExitStack() as ending,
        counted("encode", "samples", "loading encoders, and the first batch") as progress,
    ):
        manifest = carry_out(counting, progress)
    holds = f"{counted_noun(manifest.num_samples, 'sample')} in {counted_noun(len(manifest.shards), 'shard')}"
    if made:
        say(f"encoded {holds}{f', {kept} of them made before,' if kept else ''} at {out}")
    else:
        say(f"encoded already: {holds} at {out}, by these encoders and options; nothing had to be done")
    return manifest


def _on_ray(
    plan: EncodePlan,
    numbers: Sequence[int],
    actors: Actors,
    device: str,
    verbose: bool,
    ending: contextlib.ExitStack,
) -> Iterator[PackedShard]:
    """The shards, in order: those that an earlier start finished, and the others by Ray Data. What runs them is ended
    with them, or at the latest, as the cluster that they need, by `ending`."""
    checked = map_in_threads(CHECKED_AT_ONCE, lambda number: finished_shard(plan, number) is not None, numbers)
    finished = {number for number, is_there in zip(numbers, checked, strict=True) if is_there}
    missing = [number for number in numbers if number not in finished]
    store, record, made = open_store(plan.url), record_of(plan.fields), None
    if missing:
        ending.enter_context(_connected(actors, verbose))
        if "RAY_ADDRESS" in os.environ:
            check_nodes(plan, "--actors 0 encodes here")
        plan.device, pool = _room(plan, actors, device, len(missing))
        made = ending.enter_context(contextlib.closing(pipeline(plan, missing, pool, verbose)))
    for number in numbers:
        if made is None or number in finished:
            yield get_record(store, number, record)
            continue
        assert next(made) == number, "Ray Data gave shards in another order"
        yield replace(get_record(store, number, record), kept=False)
    if made is not None:
        made.close()  # its actors leave their room to those of the next bucket


@contextlib.contextmanager
def _connected(actors: Actors, verbose: bool) -> Iterator[None]:
    """RAY_ADDRESS's cluster, or an embedded one with a slot for each actor and one for what goes on beside them."""
    if not verbose:  # an error line of its C++ for each of Ray Data's actor pools, whose actors may be started again
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    slots = (actors[1] or len(os.sched_getaffinity(0))) + 1
    with connected(num_cpus=slots, object_store_bytes=OBJECT_STORE_BYTES, verbose=verbose):
        yield


def _room(plan: EncodePlan, actors: Actors, device: str, num_shards: int) -> tuple[str, ActorPoolStrategy]:
    """("cuda" or "cpu", the pool of actors) on the connected cluster. Raises UserError where there is no room for the
    least of them."""
    import ray
    from ray.data import ActorPoolStrategy

    is_gpu = device != "cpu" and gpus_come(1)
    if device == "cuda" and not is_gpu:
        raise UserError("--device cuda: the cluster has no GPU; --device cpu encodes without")
    device, name = ("cuda", "GPU") if is_gpu else ("cpu", "CPU")
    one = {"CPU": 1.0, "GPU": float(is_gpu)}
    wait_for_room(f"--actors: {actors[0]} of them need", [one] * actors[0] + [{"CPU": cpus_beside(device)}],
                  "give fewer, or another RAY_ADDRESS")  # fmt: skip
    most, num_chunks = actors[1], num_shards * len(plan.chunks(0))
    if most is None and not autoscaler().is_there:  # which would bring more of them
        most = max(1, int(ray.cluster_resources().get(name, 1)) - (not is_gpu))
    most = num_chunks if most is None else min(most, num_chunks)
    # A cluster's nodes may be shared or still to come; an embedded one has no use for cores that wait.
    first = min(actors[0], most) if "RAY_ADDRESS" in os.environ else most
    return device, ActorPoolStrategy(min_size=min(actors[0], most), max_size=most, initial_size=first)


def pipeline(
    plan: EncodePlan, numbers: Sequence[int], pool: ActorPoolStrategy, verbose: bool = False
) -> Generator[int]:
    """Numbers of shards, in order, as they are stored: chunks are read by tasks, encoded by a pool of actors, and
    brought together to shards by tasks again, all at once.

    A row is a chunk, in a block of its own, and a shard is as many rows as any other; blocks stay in order. So a batch
    of the writers is one shard, without a shuffle, which would wait for the last chunk of the data set.
    """
    import ray.data
    import ray.exceptions

    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.raise_original_map_exception = True
    with ray.data.DataContext.current(context):
        try:
            for row in _dataset(plan, numbers, pool).iter_rows():
                yield int(row["shard"])
        except ray.exceptions.RayTaskError as error:
            # A mistake's own line, without the remote traceback that Ray puts before it; a bug keeps that.
            raise error.cause if isinstance(error.cause, ScorerayError) else error from None
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise StorageError(
                f"encoding: a process died {RETRIES + 1} times over the same samples ({reason}); is there memory for "
                "so many actors? give fewer --actors or a smaller --batch-size"
            ) from None


def _dataset(plan: EncodePlan, numbers: Sequence[int], pool: ActorPoolStrategy) -> Dataset:
    """Ray Data's own limit of retries is none: samples that kill every process that takes them would never end."""
    import ray.data

    gpus = int(plan.device == "cuda")
    beside = {"num_cpus": cpus_beside(plan.device), "max_retries": RETRIES}
    rows = [asdict(chunk) for number in numbers for chunk in plan.chunks(number)]
    with warnings.catch_warnings():
        # max_retries and max_task_retries go by a parameter that Ray 2.64 will not have; pyproject.toml ends below it.
        warnings.simplefilter("ignore", DeprecationWarning)
        return (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map(lambda row: row | dict(plan.read(_chunk(row))), **beside)
            .map_batches(
                EncodingActor, fn_constructor_args=(plan,), compute=pool, batch_size=1, num_cpus=1, num_gpus=gpus,
                max_task_retries=RETRIES,
            )
            .map_batches(lambda batch: _write(plan, batch), batch_size=len(plan.chunks(0)), **beside)
        )  # fmt: skip


def cpus_beside(device: str | None) -> float:
    """Of a task that reads or writes: decoding for a GPU fills a core; beside encoding on a CPU it is little."""
    return 1.0 if device == "cuda" else 0.5


class EncodingActor:
    """Encodes chunks; loads its encoders with the first one."""

    def __init__(self, plan: EncodePlan) -> None:
        keep_large_tensors_on_the_heap()
        self._plan = plan

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        (row,) = _rows(batch)
        chunk = _chunk(row)
        found = self._plan.encode(chunk, row)
        return {name: np.asarray(value)[None] for name, value in {**asdict(chunk), **found}.items()}


def _write(plan: EncodePlan, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    rows = _rows(batch)
    number = int(rows[0]["shard"])
    assert [_chunk(row) for row in rows] == plan.chunks(number), "Ray Data gave a writer other rows than one shard's"
    plan.check_owner()
    data, packed = plan.write(number, rows)
    plan.check_owner()  # another start may have begun while this shard was made
    store_shard(plan, number, data, packed)
    return {"shard": np.array([number])}


def _rows(batch: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    return [{name: column[i] for name, column in batch.items()} for i in range(len(batch["shard"]))]


def _chunk(row: Mapping[str, Any]) -> SampleChunk:
    return SampleChunk(int(row["shard"]), int(row["first"]), int(row["size"]))
