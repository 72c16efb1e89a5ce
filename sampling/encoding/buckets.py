"""The encoding of a data set in buckets: one of each bucket, in the same folders, and the list of them written last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from scoreray.data.buckets.bucketed import BucketedSet, progress_of_part
from scoreray.data.packing.pack_buckets import commit_buckets
from scoreray.data.reading.manifest import Manifest
from scoreray.data.storage.store import open_store
from scoreray.sampling.encoding.begin import EncodedField, EncodeOptions, untried_plan, with_previews
from scoreray.sampling.encoding.encode import FieldEncoder
from scoreray.sampling.encoding.job import Mapper, carry_out_encoding
from scoreray.sampling.encoding.plan import EncodePlan


def plan_buckets(
    data: BucketedSet, out: str, wanted: Sequence[EncodedField], options: EncodeOptions
) -> dict[str, EncodePlan]:
    """The plan of each bucket, by its folder. All have the preview that is fitted to samples of the first bucket, which
    has the most. Raises UserError, DataError, StorageError."""
    store, named = open_store(out), replace(options, name=options.name or data.name)
    plans: dict[str, EncodePlan] = {}
    for number, (folder, count) in enumerate(zip(data.folders, data.counts, strict=True)):
        plan = untried_plan(data.bucket_url(number), store.url(folder), wanted, named, count / data.num_samples)
        first = int(data.first_samples[number])
        fitted = next(iter(plans.values()), None)
        plans[folder] = with_previews(plan) if fitted is None else replace(
            plan, first_sample=first, encoders=tuple(map(_with_preview_of, plan.encoders, fitted.encoders))
        )  # fmt: skip
    return plans


def _with_preview_of(one: FieldEncoder, fitted: FieldEncoder) -> FieldEncoder:
    encoding, of = one.makes.encoding, fitted.makes.encoding
    assert encoding is not None
    assert of is not None
    return replace(one, makes=replace(one.makes, encoding=replace(encoding, preview=of.preview)))


def carry_out_buckets(
    out: str,
    plans: Mapping[str, EncodePlan],
    map_shards: Mapper,
    progress: Callable[[int, int], None] | None = None,
) -> BucketedSet:
    """`carry_out_encoding` of each bucket, then the list. Raises as that does."""
    total, (name, *_) = sum(plan.num_samples for plan in plans.values()), (plan.name for plan in plans.values())
    packing = json.dumps([[folder, plan.sha256] for folder, plan in plans.items()])

    def encoded() -> Iterator[tuple[str, Manifest]]:
        before = 0
        for folder, plan in plans.items():
            yield folder, carry_out_encoding(plan, map_shards, progress_of_part(progress, before, total))
            before += plan.num_samples

    return commit_buckets(open_store(out), name, hashlib.sha256(packing.encode()).hexdigest(), encoded())
