"""`pack_buckets(source, url, sizes)`: pictures of many aspect ratios into a packed data set for each size.

Which bucket a picture goes to is a function of its width and height alone; each bucket is packed as any data set is,
and the list of them is written last. A pack that was killed is run again, and keeps what is there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scoreray.data.buckets.bucketed import BucketedSet, BucketEntry, BucketList, progress_of_part
from scoreray.data.buckets.sizes import MAX_ENLARGE, Bucket, Size, bucket_of, sorted_sizes
from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field
from scoreray.data.packing.commit import PLAN, Mapper, NoSamples, carry_out
from scoreray.data.packing.pack import SourcePlan, plan_pack
from scoreray.data.packing.repack import RepackPlan
from scoreray.data.reading.manifest import BUCKETS, MANIFEST, Manifest
from scoreray.data.sources.field_source import FieldSource, Sample
from scoreray.data.storage.store import Store, open_store


def pack_buckets(
    source: str | Path,
    url: str | Path,
    sizes: Sequence[Size],
    *,
    max_enlarge: float = MAX_ENLARGE,
    skip_bad: int = 0,
    workers: int = 1,
    map_shards: Mapper | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> BucketedSet:
    """Packs the pictures of `source` at `url`, each in the size nearest to its aspect ratio; other arguments and errors
    as of `pack`.

    Args:
      sizes: (width, height) of each bucket.
      max_enlarge: a picture that had to be enlarged more than so many times is one that can't be read.
    """
    if not max_enlarge >= 1 or math.isinf(max_enlarge):
        raise UserError(f"--max-enlarge {max_enlarge:g}: a number from 1 is needed")
    bucket = Bucket(sorted_sizes(sizes), 0, max_enlarge)
    plan = plan_pack(source, url, image_size=bucket, skip_bad=skip_bad, **options)
    if not isinstance(plan, SourcePlan | RepackPlan):
        raise UserError(f"{source}: holds no pictures that could be brought to a size; --buckets is for these")
    parts = _of_tars(plan, bucket) if isinstance(plan, RepackPlan) else _of_source(plan, bucket)
    total = 0 if isinstance(plan, RepackPlan) else plan.source.num_samples

    def packed() -> Iterator[tuple[str, Manifest]]:
        before, left = 0, skip_bad
        for folder, part in parts:
            shown = progress_of_part(progress, before, total)
            try:
                one = carry_out(part, workers=workers, map_shards=map_shards, progress=shown, skip_bad=left)
            except NoSamples:
                _remove(open_store(part.url))
                continue
            before, left = before + one.num_samples + one.num_left_out, left - one.num_left_out
            yield folder, one

    return commit_buckets(open_store(url), plan.name, plan.origin, packed())


def commit_buckets(store: Store, name: str, packing: str, parts: Iterable[tuple[str, Manifest]]) -> BucketedSet:
    """Makes the place that of these buckets, has them made one after the other, and writes the list of them last.

    Args:
      packing: of what is made and how (`BucketList`).
      parts: (folder, manifest) of each, made and committed as it is iterated.

    Raises UserError where the place is another's, DataError where there is no sample, and what `parts` raises.
    """
    _claim(store, packing)
    if not (found := list(parts)):
        raise DataError(f"{name}: none of its samples can be read")
    found.sort(key=lambda one: -one[1].num_samples)
    folders, manifests = zip(*found, strict=True)
    made = BucketedSet(store.url(), name, folders, manifests)
    assert made.fields  # that all hold the same: raises DataError
    entries = [
        BucketEntry(
            folder, manifest.num_samples, hashlib.sha256(Manifest.read(open_store(store.url(folder)))).hexdigest()
        )
        for folder, manifest in found
    ]
    store.put(BUCKETS, BucketList(1, name, packing, entries).to_json().encode())
    store.delete([PLAN])
    return made


def _claim(store: Store, packing: str) -> None:
    """Raises UserError where the place is that of another pack."""
    if store.exists(MANIFEST):
        raise UserError(f"{store.url()}: holds a data set that is not in buckets; give another URL, or remove it")
    listed = BucketList.read(store)
    if listed is not None:
        if listed.packing != packing:
            raise UserError(
                f"{store.url()}: holds another data set ('{listed.name}'): of another source, by other encoders, or "
                "with other buckets or options; give another URL, or remove what is there"
            )
    elif not store.put_new(PLAN, packing.encode()) and store.get(PLAN).decode() != packing:
        raise UserError(
            f"{store.url()}: a pack of another source, or with other arguments, has begun here, or its encoder has "
            "changed since; run that one again to finish it, give another URL, or remove what is there"
        )


def _remove(store: Store) -> None:
    """What the pack of a bucket that no picture goes to has left."""
    store.delete([key for key, _ in store.list("packing/")])


def _of_source(plan: SourcePlan, bucket: Bucket) -> Iterator[tuple[str, SourcePlan]]:
    """(folder, plan) of each bucket that a picture goes to."""
    pictures, which = np.unique(plan.source.picture_sizes(), axis=0, return_inverse=True)
    buckets = np.array([bucket_of(bucket.sizes, size) for size in pictures.tolist()])[which.reshape(-1)]
    first = int(buckets.min())
    for number in np.unique(buckets).tolist():
        one = replace(bucket, number=number)
        chosen = Selected(plan.source.in_bucket(one), np.flatnonzero(buckets == number), says=number == first)
        url = f"{plan.url.rstrip('/')}/{one.folder}"
        yield one.folder, replace(plan, url=url, source=chosen, options=replace(plan.options, image_size=one))


def _of_tars(plan: RepackPlan, bucket: Bucket) -> Iterator[tuple[str, RepackPlan]]:
    """Each bucket goes through all tars: what is not its own costs the parsing and the head of a picture."""
    for number in range(len(bucket.sizes)):
        one = replace(bucket, number=number)
        notes = [] if number else plan.notes
        yield one.folder, replace(plan.in_bucket(one), url=f"{plan.url.rstrip('/')}/{one.folder}", notes=notes)


@dataclass(frozen=True)
class Selected:
    """A FieldSource of some samples of another. `numbers`: int64, ascending. says: it also says what is left out."""

    source: FieldSource
    numbers: np.ndarray
    says: bool

    @property
    def path(self) -> str:
        return self.source.path

    @property
    def num_samples(self) -> int:
        return len(self.numbers)

    @property
    def fields(self) -> Sequence[Field]:
        return self.source.fields

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint.encode() + self.numbers.tobytes()).hexdigest()

    def inputs(self, numbers: Sequence[int]) -> str:
        chosen = self.numbers[list(numbers)]
        return hashlib.sha256(self.source.inputs(chosen.tolist()).encode() + chosen.tobytes()).hexdigest()

    @cached_property
    def runs(self) -> np.ndarray | None:
        if self.source.runs is None:
            return None
        which = np.searchsorted(self.source.runs, self.numbers, side="right")
        return np.flatnonzero(np.diff(which, prepend=-1))

    @property
    def notes(self) -> Sequence[str]:
        return self.source.notes if self.says else ()

    @property
    def left_out(self) -> Mapping[str, int]:
        return self.source.left_out if self.says else {}

    def check_visible(self) -> None:
        self.source.check_visible()

    def check_readable(self, skip_bad: int) -> None:
        self.source.check_readable(skip_bad)

    def read_all(self, numbers: Iterable[int]) -> Iterator[Sample | DataError]:
        return self.source.read_all(self.numbers[list(numbers)].tolist())

    def picture_sizes(self) -> np.ndarray:
        return self.source.picture_sizes()[self.numbers]

    def in_bucket(self, bucket: Bucket) -> Selected:
        return replace(self, source=self.source.in_bucket(bucket))
