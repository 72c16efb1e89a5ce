"""A data set in buckets of sizes: `buckets.json` (sealed) above one packed data set for each size.

URL/buckets.json            the list, written last: the commit
URL/48x80/manifest.json     a packed data set as any other, of pictures 48 wide and 80 high
URL/48x80/shards/...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter
from pydantic import Field as Limits

from scoreray.data.buckets.sizes import MOST_BUCKETS
from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field, target_of
from scoreray.data.reading.manifest import BUCKETS, MANIFEST, MAX_NAME, Count, Manifest, Sha256, Shard, derived
from scoreray.data.seal import read_sealed, sealed
from scoreray.data.storage.store import NotFound, Store, open_store

MAX_LIST_BYTES = 1 << 20


@dataclass(frozen=True)
class BucketEntry:
    """A bucket of the list. manifest_sha256: of its manifest's bytes."""

    folder: Annotated[str, Limits(pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]
    num_samples: Count
    manifest_sha256: Sha256


@dataclass(frozen=True)
class BucketList:
    """`buckets.json`. buckets: the one with the most samples first; those without any are left out.
    packing: of what was packed and how; the same pack again is recognised by it."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    name: Annotated[str, Limits(max_length=MAX_NAME)]
    packing: str
    buckets: Annotated[list[BucketEntry], Limits(min_length=1, max_length=MOST_BUCKETS)]

    def __post_init__(self) -> None:
        if len({one.folder for one in self.buckets}) < len(self.buckets):
            raise ValueError("two buckets have the same folder")

    def to_json(self) -> str:
        """For people too: a bucket a line."""
        parts = asdict(self)
        buckets = ",\n  ".join(json.dumps(one) for one in parts.pop("buckets"))
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items()]
        return sealed([*lines, f'"buckets": [\n  {buckets}\n ]'])

    @staticmethod
    def read(store: Store) -> BucketList | None:
        """The list at a place; None where there is none. Raises DataError."""
        try:
            data = store.get(BUCKETS, 0, MAX_LIST_BYTES)
        except NotFound:
            return None
        return read_sealed(_ADAPTER, data, store.url(BUCKETS), "list of buckets", again="; pack the data set again")


@dataclass(frozen=True)
class BucketedSet:
    """A DataDescription of all buckets together: `shape` is that of the one with the most samples, which comes first;
    statistics are those of all values of all buckets. Samples are numbered through the buckets in their order."""

    url: str
    name: str
    folders: tuple[str, ...]
    manifests: tuple[Manifest, ...]

    @staticmethod
    def load(store: Store) -> BucketedSet:
        """Raises UserError where there is none, DataError where a bucket is not the one of the list."""
        listed = BucketList.read(store)
        if listed is None:
            raise UserError(f"{store.url()}: no data set in buckets here ({BUCKETS} is missing)")
        manifests = []
        for one in listed.buckets:
            place = open_store(store.url(one.folder))
            data = Manifest.read(place)
            if hashlib.sha256(data).hexdigest() != one.manifest_sha256:
                raise DataError(f"{place.url(MANIFEST)}: is not the manifest that {BUCKETS} lists; pack it again")
            manifests.append(Manifest.from_json(data, place.url(MANIFEST)))
        return BucketedSet(store.url(), listed.name, tuple(one.folder for one in listed.buckets), tuple(manifests))

    def bucket_url(self, number: int) -> str:
        return f"{self.url.rstrip('/')}/{self.folders[number]}"

    @property
    def counts(self) -> list[int]:
        """Samples of each bucket."""
        return [one.num_samples for one in self.manifests]

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    @property
    def first_samples(self) -> np.ndarray:
        """int64 [buckets + 1]: the number of each bucket's first sample; the last is num_samples."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])

    @property
    def shards(self) -> list[Shard]:
        return [shard for one in self.manifests for shard in one.shards]

    def shapes_of(self, field: str) -> list[list[int]]:
        """Of a sample's field in each bucket."""
        return [one.drawn_shape for manifest in self.manifests for one in manifest.fields if one.name == field]

    @cached_property
    def fields(self) -> list[Field]:
        """Those of the first bucket, with the statistics of all. Raises DataError where others have other fields."""
        alike = [
            [(f.name, f.kind, f.dtype, f.encoding is None and f.normalisation) for f in one.fields]
            for one in self.manifests
        ]
        for folder, described in zip(self.folders, alike, strict=True):
            if described != alike[0]:
                raise DataError(f"{self.url}: buckets {self.folders[0]} and {folder} hold other fields; pack it again")
        return [_merged(of, self.counts) for of in zip(*(one.fields for one in self.manifests), strict=True)]

    @cached_property
    def _whole(self) -> dict[str, Any]:
        return derived(self.fields)

    @property
    def version(self) -> int:
        """Of the buckets' manifests."""
        return self.manifests[0].version

    @property
    def target(self) -> Field:
        """What a run models that names nothing else."""
        return target_of(self.fields)

    @property
    def shape(self) -> list[int]:
        return self.manifests[0].shape

    @property
    def dtype(self) -> str:
        return self.manifests[0].dtype

    @property
    def classes(self) -> list[str]:
        return list(self._whole["classes"])

    @property
    def std(self) -> list[float]:
        return list(self._whole["std"])

    @property
    def sigma_data(self) -> float:
        return float(self._whole["sigma_data"])

    def channel_means(self) -> list[float]:
        return list(self._whole["mean"])

    @cached_property
    def identity(self) -> str:
        """SHA-256 of which samples there are and in which order; of a copy elsewhere the same."""
        parts = [(folder, one.identity) for folder, one in zip(self.folders, self.manifests, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_bucketed(store: Store) -> bool:
    """Whether the data set at a place is in buckets, and not of one size."""
    return store.exists(BUCKETS) and not store.exists(MANIFEST)


def progress_of_part(
    progress: Callable[[int, int], None] | None, before: int, total: int = 0
) -> Callable[[int, int], None] | None:
    """`progress(samples done, samples in all)` as the work on one bucket calls it. before: samples of earlier ones.
    total: of all; 0 where it is not known."""
    if progress is None:
        return None
    return lambda done, in_part: progress(before + done, total or before + in_part)


def _merged(parts: Sequence[Field], counts: Sequence[int]) -> Field:
    """A field of all buckets: of the shape in the first one, or the longest length, with the statistics of all values
    (each sequence weighs the same)."""
    first = parts[0]
    if first.kind == "class":
        longest = max((one.classes for one in parts), key=len)
        found = np.zeros(len(longest), np.int64)
        for one in parts:
            if one.classes != longest[: len(one.classes)]:
                raise DataError(f"field '{first.name}': buckets name other classes; pack the data set again")
            found[: len(one.classes)] += np.asarray(one.class_counts, np.int64)
        return replace(first, classes=longest, class_counts=found.tolist())
    if first.is_varying:
        first = replace(first, shape=[max(one.shape[0] for one in parts), *first.shape[1:]])
    sizes = [1 if one.is_varying else np.prod(one.shape, dtype=np.float64) for one in parts]
    weights = np.asarray(counts) * np.asarray(sizes)
    mean, std = _moments([one.mean for one in parts], [one.std for one in parts], weights)
    log_mean, log_std = _moments([one.log_mean for one in parts], [one.log_std for one in parts], weights)
    low = [min(channel) for channel in zip(*(one.low for one in parts), strict=True)]
    high = [max(channel) for channel in zip(*(one.high for one in parts), strict=True)]
    if first.encoding is not None and "channel" in {one.normalisation for one in parts}:
        # "none" in a bucket where a channel of the latents is constant, which it may not be in others.
        first = replace(first, normalisation="channel" if min(std) > 0 else "none")
    return replace(first, mean=mean, std=std, low=low, high=high, log_mean=log_mean, log_std=log_std)


def _moments(means: list[list[float]], stds: list[list[float]], weights: np.ndarray) -> tuple[list[float], list[float]]:
    """Of the union: E[x] and sqrt(E[x^2] - E[x]^2), by channel; of one part its own, to the bit."""
    if len(means) == 1 or not means[0]:
        return means[0], stds[0]
    mean, std, share = np.asarray(means), np.asarray(stds), (weights / weights.sum())[:, None]
    whole = (share * mean).sum(0)
    squares = (share * (std**2 + (mean - whole) ** 2)).sum(0)
    return whole.tolist(), np.sqrt(squares).tolist()


_ADAPTER = TypeAdapter(BucketList)
