"""What a pack carries out (`PackPlan`), and a finished shard with its record under `packing/`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from scoreray.data.fields.field import Field
from scoreray.data.packing.moments import FieldMoments
from scoreray.data.reading.manifest import Shard
from scoreray.data.reading.records import records_sha256
from scoreray.data.storage.store import Store


@dataclass(frozen=True)
class PackedShard:
    """A finished shard: its entry of the manifest, its records, and its part of the data set's statistics."""

    shard: Shard
    moments: list[FieldMoments]  # of each field of the plan
    records: bytes
    skipped: list[str] = field(default_factory=list)  # samples that could not be read and were left out, and why
    kept: bool = False  # it was there, from an earlier run of the same pack
    left_out: dict[str, int] = field(default_factory=dict)  # members that are no part of a sample, by kind
    inputs: str = ""  # the plan's `inputs` of the shard when it was made
    counts: dict[str, int] = field(default_factory=dict)  # what its making counted, to be added up over shards


class PackPlan(Protocol):
    """What is to be packed and how; it determines the bytes of every shard. Picklable, so that shards can be made on
    other machines."""

    @property
    def url(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def fields(self) -> Sequence[Field]:
        """With the members that the shards have. Of a class field without names of classes the numbers are counted as
        far as they go. Where all images that are to have three channels are grey, they get one."""

    @property
    def num_shards(self) -> int: ...
    @property
    def sha256(self) -> str:
        """Equal for equal plans only."""

    @property
    def origin(self) -> str:
        """Equal for all packs of one source with the same options, even after files of the source have changed: an
        unfinished pack goes on once a broken file has been fixed. "" where only an equal plan may go on."""

    def inputs(self, number: int) -> str:
        """A digest of what determines the bytes of a shard, among plans of one origin. A shard that an earlier run made
        from other inputs is made again."""

    @property
    def in_place(self) -> bool:
        """Whether the shards exist already (tars of somebody else, which are never removed)."""

    @property
    def notes(self) -> list[str]:
        """Lines that a person should read before it begins."""

    def make(self, number: int, scratch: Path) -> tuple[bytes | Path | None, PackedShard]:
        """(what to put, what it is) of a shard, a Path being one in the folder `scratch`; None for bytes that are
        there already, or for a shard without samples."""

    def check_visible(self) -> None:
        """Raises UserError, DataError or StorageError when this process does not see the source."""

    def total_samples(self, done: list[Shard]) -> int:
        """The number of samples in all, or an estimate from the shards that are done."""


def put_record(store: Store, number: int, packed: PackedShard) -> None:
    """Records that shard `number` is finished: its bytes are stored."""
    store.put(f"packing/{number:06d}", _to_record(packed))


def _to_record(packed: PackedShard) -> bytes:
    """A line of JSON, then the records."""
    described = {"shard": [getattr(packed.shard, name) for name in Shard.__slots__],
                 "moments": [one.described() for one in packed.moments], "skipped": packed.skipped,
                 "left_out": packed.left_out, "inputs": packed.inputs}  # fmt: skip
    if packed.counts:
        described["counts"] = packed.counts
    return json.dumps(described).encode() + b"\n" + packed.records


def get_record(store: Store, number: int, record: np.dtype) -> PackedShard:
    """What `put_record` stored. Raises NotFound, StorageError; ValueError, KeyError or TypeError for a damaged one."""
    described, _, records = store.get(f"packing/{number:06d}").partition(b"\n")
    found = json.loads(described)
    shard, moments = Shard(*found["shard"]), [FieldMoments.from_described(one) for one in found["moments"]]
    if records_sha256(records, record) != shard.records_sha256:
        raise ValueError("the records of this shard are damaged")
    others = {name: found[name] for name in ("skipped", "left_out", "inputs")}
    return PackedShard(shard, moments, records, kept=True, counts=found.get("counts", {}), **others)
