"""An encoding from claiming its place to its manifest: of several starts at one place, the newest works."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from scoreray.data.errors import ScorerayError
from scoreray.data.packing.commit import carry_out, pack_shard
from scoreray.data.packing.plan import PackedShard, PackPlan
from scoreray.data.reading.manifest import Manifest
from scoreray.data.storage.lease import Lease
from scoreray.data.storage.store import open_store
from scoreray.sampling.encoding.plan import EncodePlan
from scoreray.sampling.offline.place import OWNER, Place, give_way

Mapper = Callable[[EncodePlan, Sequence[int]], Iterable[PackedShard]]
"""Makes the shards of these numbers, in order: in this process or on a cluster."""


def in_this_process(plan: EncodePlan, numbers: Sequence[int]) -> Iterator[PackedShard]:
    return (pack_shard(plan, number) for number in numbers)


def carry_out_encoding(
    plan: EncodePlan, map_shards: Mapper, progress: Callable[[int, int], None] | None = None
) -> Manifest:
    """Makes the shards that are missing, and commits the data set.

    Raises UserError (another data set is there), TakenOver where another start has begun meanwhile, DataError,
    StorageError.
    """
    store = open_store(plan.url)
    store.check_writable()
    place = Place(store, "webdataset")

    def make(_: PackPlan, numbers: Sequence[int]) -> Iterator[PackedShard]:
        plan.lease = Lease.take(store, OWNER, "encoding")  # once the place is known to be this plan's
        yield from map_shards(plan, numbers)
        plan.check_owner()

    try:
        manifest = carry_out(plan, workers=1, map_shards=make, progress=progress)
    except ScorerayError:
        if plan.lease is not None:
            give_way(plan.lease, place)
        raise
    if plan.lease is not None:
        place.clear()
    return manifest
