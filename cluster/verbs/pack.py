"""`data pack` with its progress shown, its shards made by Ray tasks: on RAY_ADDRESS's cluster or on this machine."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scoreray.cluster.actors import Retries, in_order
from scoreray.cluster.connect.local_ray import connected
from scoreray.cluster.connect.room import wait_for_room
from scoreray.cluster.display import counted, say
from scoreray.data.buckets.bucketed import BucketedSet
from scoreray.data.buckets.sizes import Size
from scoreray.data.errors import UserError
from scoreray.data.fields.field import Field
from scoreray.data.packing.commit import check_node, pack_shard
from scoreray.data.packing.pack import SourcePlan, pack
from scoreray.data.packing.pack_buckets import pack_buckets
from scoreray.data.packing.plan import PackedShard, PackPlan
from scoreray.data.reading.allowlist import JSON, TEXTS
from scoreray.data.reading.manifest import Manifest
from scoreray.data.sources.field_options import option_for
from scoreray.data.sources.listing import kinds_line
from scoreray.data.storage.store import open_store
from scoreray.data.units import counted_noun

WORTH_RAY_S = 20.0  # with less work left, starting Ray (some 5 s) costs about what it saves
MOST_NAMED = 10  # samples that were left out, in the last lines
RETRIES = Retries(
    times=4,
    work="shard {}",
    hint="is there memory for so many shards at once? give a smaller --workers or --samples-per-shard",
)
CHECK_S = 60.0


def pack_with_bar(
    source: str,
    url: str,
    *,
    buckets: Sequence[Size] = (),
    workers: int | None = None,
    left_out: Counter[str] | None = None,
    **options: Any,
) -> tuple[Manifest | BucketedSet, list[str]]:
    """`pack`, or with `buckets` `pack_buckets`, with a bar; options as there. Also returns what was left out, and why.

    workers: shards that are made at once. None: as many as RAY_ADDRESS's cluster has CPUs, or without that as this
    machine has cores, once it turns out that this is worth starting Ray for; 1: this process makes them.
    left_out: what no field reads is counted in it, by kind: members of tars, and columns, which the plan's notes name.
    """
    open_store(url).check_writable()
    to_make, kept, skipped, is_named = 0, 0, list[str](), False
    left_out = Counter() if left_out is None else left_out

    def counting(plan: PackPlan, numbers: Sequence[int]) -> Iterator[PackedShard]:
        nonlocal to_make, kept, is_named
        to_make, is_named = to_make + len(numbers), isinstance(plan, SourcePlan)
        for note in plan.notes:
            say(note)
        for packed in _make(plan, numbers, workers, stack):
            kept += packed.kept
            skipped.extend(packed.skipped)
            left_out.update(packed.left_out)
            yield packed

    with (
        contextlib.ExitStack() as stack,
        counted(f"pack {Path(source).name}", "samples", "looking through the source") as progress,
    ):
        shared: dict[str, Any] = {"progress": progress, "map_shards": counting, **options}
        manifest = pack_buckets(source, url, buckets, **shared) if buckets else pack(source, url, **shared)
    holds = f"{counted_noun(manifest.num_samples, 'sample')} in {counted_noun(len(manifest.shards), 'shard')}"
    kept += max(0, len(manifest.shards) - to_make)  # of a pack that was finished, and of which some were gone
    if to_make:
        say(f"packed {holds}{f', {kept} of them made before,' if kept else ''} at {url}")
    else:
        say(f"packed already: {holds} at {url}, of this source and with these options; nothing had to be done")
    if isinstance(manifest, BucketedSet):
        for folder, one in zip(manifest.folders, manifest.manifests, strict=True):
            say(f"  {folder}: {counted_noun(one.num_samples, 'sample')}")
    if left_out and not is_named:
        say(f"left out, as no field reads it: {kinds_line(left_out)}{_taking(left_out, manifest.fields)}")
    if skipped:
        more = [f"and {len(skipped) - MOST_NAMED} more"] if len(skipped) > MOST_NAMED else []
        say("\n  ".join([f"left out {len(skipped)} that can't be read:", *skipped[:MOST_NAMED], *more]))
    return manifest, skipped


def _taking(left_out: Counter[str], fields: Sequence[Field]) -> str:
    """The --field that takes the most frequent kind of member that one can be made of."""
    for kind, _ in sorted(left_out.items(), key=lambda item: (-item[1], item[0])):
        extension, _, path = kind.removeprefix(".").partition(f"{JSON}.")
        last = extension.rpartition(".")[2]
        if kind.startswith(".") and (path or last in ("npy", JSON, *TEXTS)):
            where = f"{JSON}:{path}" if path else extension
            return f"; {option_for(where, (path or extension).split('.')[0], (field.name for field in fields))}"
    return ""


def _make(
    plan: PackPlan, numbers: Sequence[int], workers: int | None, stack: contextlib.ExitStack
) -> Iterator[PackedShard]:
    cores, started = len(os.sched_getaffinity(0)), time.monotonic()
    on_cluster = "RAY_ADDRESS" in os.environ
    done = 0
    if workers == 1 or (workers is None and not on_cluster):
        for done, number in enumerate(numbers, 1):
            yield pack_shard(plan, number)
            left_s = (time.monotonic() - started) / done * (len(numbers) - done)
            if workers is None and min(cores, len(numbers) - done) > 1 and left_s > WORTH_RAY_S:
                break
        else:
            return
    stack.enter_context(connected(num_cpus=workers or cores))
    if on_cluster:
        wait_for_room("a shard's task needs", [{"CPU": 1}], "--workers 1 packs here")
        check_nodes(plan, "--workers 1 packs here")
    yield from map_on_ray(plan, numbers[done:], workers)


def map_on_ray(plan: PackPlan, numbers: Sequence[int], workers: int | None = None) -> Iterator[PackedShard]:
    """pack_shard() for each number by tasks of the connected cluster, `workers` at once (None: as many as it has CPUs),
    in order. What still runs when this iterator ends is left to itself, and ends with this process: one shard more does
    no harm, and Ray 2.60 may abort where a task ends while it is cancelled.
    """
    import ray

    # A lambda is sent by value, so that a task's process imports no more than packing needs.
    task = ray.remote(num_cpus=1, max_retries=RETRIES.times)(lambda plan, number: pack_shard(plan, number))
    shared = ray.put(plan)
    at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))

    def call(number: int) -> Any:
        return task.options(name=f"pack shard {number}").remote(shared, number)

    yield from in_order([call] * at_once, numbers, RETRIES)


def check_nodes(plan: PackPlan, otherwise: str) -> None:
    """Each machine that may run a task looks for the source and the target. Raises UserError naming one that does not
    see them.

    otherwise: what packs without them."""
    import ray
    from ray.exceptions import GetTimeoutError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    check = ray.remote(lambda plan: check_node(plan))
    shared = ray.put(plan)
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    for node in nodes:
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        node["check"] = check.options(scheduling_strategy=where, num_cpus=0, max_retries=0).remote(shared)
    for node in nodes:
        try:
            ray.get(node["check"], timeout=CHECK_S)
        except GetTimeoutError:
            continue  # a busy machine; if it can't do it, its tasks will say so
        except RayTaskError as error:
            raise UserError(
                f"Ray's machine {node['NodeManagerAddress']} (RAY_ADDRESS={os.environ['RAY_ADDRESS']}): {error.cause}; "
                f"put the source and the target where every machine sees them (S3, a shared disk), or {otherwise}"
            ) from None
