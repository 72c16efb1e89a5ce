"""The manifest of a data set: `manifest.json` (counts, sizes, hashes, statistics of fields).

Untrusted input, and checked as such. It grows with the number of shards; the records of `index.bin`, one a sample,
are read by chunks (records.py), and never all at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter
from pydantic import Field as Limits

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import (
    MAX_CLASSES,
    MAX_FIELDS,
    Field,
    class_field,
    is_plain,
    plain_fields,
    target_of,
)
from scoreray.data.fields.field_kinds import FieldDtype
from scoreray.data.fields.limits import MAX_AXES, MAX_AXIS, MAX_VALUES, check_label, check_shape
from scoreray.data.fields.record_layout import CHUNK, RECORD, column_of, index_bytes, members_of, record_dtype
from scoreray.data.seal import read_sealed, sealed
from scoreray.data.storage.interface import check_key
from scoreray.data.storage.store import NotFound, Store, open_store

MANIFEST = "manifest.json"
INDEX = "index.bin"
BUCKETS = "buckets.json"
MAX_MANIFEST_BYTES = 1 << 29  # MAX_SHARDS of them
MAX_NAME = 255
MAX_KEY = 1024  # of a shard
MAX_SHARDS = 2_000_000

Sha256 = Annotated[str, Limits(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Limits(gt=0, lt=1 << 62)]


def check_limits(name: str, fields: Sequence[Field], num_shards: int) -> None:
    """Raises UserError where a data set would get a manifest that can't be read: before the work begins."""
    if not name.isprintable():  # a file's name need not be UTF-8, and JSON's text must be
        raise UserError(f"--name {ascii(name)[:80]}: can't be the name of a data set; give it printable characters")
    if len(name) > MAX_NAME:
        raise UserError(f"--name '{name[:40]}...': {len(name)} characters, at most {MAX_NAME} are accepted")
    try:
        target_of(fields)
    except ValueError as error:
        raise UserError(f"{name}: {error}; a --field that is one is needed") from error
    for one in fields:
        what = name if is_plain(fields) else f"{name}: field '{one.name}'"
        if one.shape:
            check_shape(what, one.shape)
        check_label(len(one.classes) - 1, what)
    if num_shards > MAX_SHARDS:
        raise UserError(f"{name}: {num_shards:,} shards, the limit is {MAX_SHARDS:,}; put more samples into each")


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar. `records_sha256` is that of its part of the index, made of its chunks' ones."""

    name: Annotated[str, Limits(max_length=MAX_KEY)]
    num_samples: Count
    bytes: Count
    sha256: Sha256
    records_sha256: Sha256


@dataclass(frozen=True)
class Index:
    name: Annotated[str, Limits(max_length=MAX_KEY)]
    bytes: Count
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A packed data set. Sample i is the i-th of the shards in their order.

    fields: what a sample holds. A data set of version 2 has an image or a float32 array, and classes or none: it says
    so by `shape`, `dtype`, `classes`, ..., and its `fields` follow from these; in one of version 3 these follow from
    its fields: they describe `target`, and `label` if there is one.
    shape: (C, H, W) of images, any for arrays, (1,) of a scalar.  dtype: "uint8" (images) or "float32" (arrays, used as
    they are).
    mean, std: of each channel, the first axis of `shape`; sigma_data: the standard deviation of all values; all in the
    range that the model sees, [-1, 1] for images (x / 127.5 - 1). Sets of earlier versions have no std, and of arrays
    one mean a value.  class_counts: samples of each class, in the order of `classes`.
    num_left_out: samples of the source that could not be read.
    packing: SHA-256 of what was packed and how; the same pack again is recognised by it.

    The file ends with the SHA-256 of all that is before it, so that a flipped digit does not pass.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    version: Literal[2, 3]
    name: Annotated[str, Limits(max_length=MAX_NAME)]
    shape: Annotated[list[Annotated[int, Limits(gt=0, le=MAX_AXIS)]], Limits(min_length=1, max_length=MAX_AXES)] = (
        field(default_factory=list)
    )
    dtype: FieldDtype = "uint8"
    num_samples: Count
    classes: Annotated[list[Annotated[str, Limits(max_length=MAX_NAME)]], Limits(max_length=MAX_CLASSES)] = field(
        default_factory=list
    )
    class_counts: Annotated[list[Annotated[int, Limits(ge=0)]], Limits(max_length=MAX_CLASSES)] = field(
        default_factory=list
    )
    mean: Annotated[list[float], Limits(max_length=MAX_AXIS)] = field(default_factory=list)
    std: Annotated[list[float], Limits(max_length=MAX_AXIS)] = field(default_factory=list)
    sigma_data: Annotated[float, Limits(gt=0, allow_inf_nan=False)] = math.nan
    fields: Annotated[list[Field], Limits(max_length=MAX_FIELDS)] = field(default_factory=list)
    index: Index
    shards: Annotated[list[Shard], Limits(min_length=1)]
    num_left_out: Annotated[int, Limits(ge=0)] = 0
    packing: str = ""

    def __post_init__(self) -> None:
        derived = _of_fields(self.fields) if self.version == 3 else {"fields": self._plain_fields()}
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        for name in (self.index.name, *(shard.name for shard in self.shards)):
            check_key(name)
        if len({shard.name for shard in self.shards}) != len(self.shards):
            raise ValueError("two shards have the same name")
        if sum(shard.num_samples for shard in self.shards) != self.num_samples:
            raise ValueError("num_samples is not the sum over the shards")
        if self.index.bytes != index_bytes((shard.num_samples for shard in self.shards), self.record):
            raise ValueError(f"the index needs {self.record.itemsize} bytes a sample, 32 for each {CHUNK} of a shard")
        for one in self.fields:
            if max(one.shape, default=1) > MAX_AXIS or math.prod(one.shape) > MAX_VALUES or len(one.shape) > MAX_AXES:
                raise ValueError(f"{one.name}: a sample of {' x '.join(map(str, one.shape))} is above the limits")
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)):
            raise ValueError("mean or std is not finite")

    def _plain_fields(self) -> list[Field]:
        """Those of a data set of version 2."""
        if not self.shape or not self.sigma_data > 0 or self.dtype not in ("uint8", "float32"):
            raise ValueError("a data set of version 2 has a shape, a sigma_data, and the dtype uint8 or float32")
        if self.dtype == "uint8" and len(self.shape) != 3:
            raise ValueError("images have the shape (C, H, W)")
        if len(self.class_counts) != len(self.classes):
            raise ValueError("classes and class_counts differ in length")
        mean = self.channel_means() if self.mean else []
        return plain_fields(self.shape, self.dtype, self.classes, self.class_counts, mean, self.std)

    @property
    def target(self) -> Field:
        """What a run models that names nothing else."""
        return target_of(self.fields)

    @property
    def label(self) -> Field | None:
        """The (first) class field."""
        return class_field(self.fields)

    @property
    def members(self) -> list[str]:
        """The extensions of the tar members that a record points to; [""] in a data set of version 2."""
        return members_of(self.fields)

    @property
    def record(self) -> np.dtype:
        """The type of a record of index.bin."""
        return RECORD if self.version == 2 else record_dtype(self.fields)

    def column(self, field: Field) -> str:
        """The column of a record that holds the value of a class or scalar."""
        return "label" if self.version == 2 else column_of(field)

    def find_field(self, name: str, key: str) -> Field:
        """The field of this name. Raises UserError, which begins with the configuration's `key` that names it."""
        for found in self.fields:
            if found.name == name:
                return found
        raise UserError(
            f"{key}: the data set '{self.name}' has no field '{name}'; it has {', '.join(f.name for f in self.fields)}"
        )

    def to_json(self) -> str:
        """For people too: a field a line, a shard a line; sealed (`seal.py`)."""
        parts = asdict(self)
        shards = ",\n  ".join(json.dumps(shard) for shard in parts.pop("shards"))
        for name in DERIVED if self.version == 3 else ("fields",):
            del parts[name]
        if self.version == 3:  # what is empty or as ever is left out: most of a field's entries
            fields = [{k: v for k, v in f.as_dict().items() if v not in ([], "") or k == "shape"} for f in self.fields]
            parts["fields"] = fields
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in parts.items()]
        return sealed([*lines, f'"shards": [\n  {shards}\n ]'])

    @staticmethod
    def from_json(text: bytes | str, url: str = MANIFEST) -> Manifest:
        """Raises DataError, naming `url` and the first field that is wrong."""
        data = text.encode() if isinstance(text, str) else text
        return read_sealed(_ADAPTER, data, url, "manifest", again="; pack the data set again")

    @staticmethod
    def load(store: Store) -> Manifest:
        """The data set's manifest. Raises UserError when there is none, DataError when it is not valid."""
        return Manifest.from_json(Manifest.read(store), store.url(MANIFEST))

    @staticmethod
    def at(url: str) -> Manifest:
        """The manifest of the data set at a URL, as `load`; StorageError within seconds where its store is silent."""
        store = open_store(url)
        store.check_reachable()
        return Manifest.load(store)

    @staticmethod
    def read(store: Store) -> bytes:
        """The bytes of a data set's manifest, not yet checked. Raises UserError when there is none, DataError."""
        url = store.url(MANIFEST)
        try:
            size = store.size(MANIFEST)
        except NotFound as error:
            if store.exists(BUCKETS):
                raise UserError(
                    f"{store.url()}: is a data set in buckets ({BUCKETS}), and one of a single size is needed: give "
                    f"that of one of them, {store.url('WIDTHxHEIGHT')}"
                ) from error
            unfinished = "; a pack has begun there: run it again to finish it" if store.list("packing/") else ""
            raise UserError(
                f"{store.url()}: no data set here ({MANIFEST} is missing){unfinished}; "
                "make one: scoreray data pack SOURCE URL"
            ) from error
        if size > MAX_MANIFEST_BYTES:
            raise DataError(f"{url}: {size} bytes is above the limit of {MAX_MANIFEST_BYTES}")
        return store.get(MANIFEST)

    @property
    def classes_with_images(self) -> int:
        """How many classes have a sample: a class of another split, or one that was emptied, has a name and none."""
        return sum(count > 0 for count in self.class_counts)

    @cached_property  # over all shards, of which there may be millions
    def identity(self) -> str:
        """SHA-256 of which samples there are and in which order: of each shard's records, which hold a digest and the
        class of every sample, and of what they mean. A copy elsewhere, under another name, has the same."""
        shards = [(shard.num_samples, shard.bytes, shard.records_sha256) for shard in self.shards]
        parts: list[object] = [self.shape, self.dtype, self.classes, shards]
        if self.version == 3:
            parts.append([[f.name, f.kind, f.shape, f.dtype, f.member, f.path, f.classes] for f in self.fields])
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def bytes_per_sample(self) -> float:
        """Stored bytes of a sample, tar headers included, on average."""
        return sum(shard.bytes for shard in self.shards) / self.num_samples

    def channel_means(self) -> list[float]:
        """The mean of each channel, also where an earlier version kept one of each value of an array."""
        values = np.asarray(self.mean)
        parts = values.reshape(self.shape[0], -1) if values.size % self.shape[0] == 0 else values[:, None]
        return [float(mean) for mean in parts.mean(1)]

    def first_samples(self) -> np.ndarray:
        """int64 [num_shards + 1]: the number of each shard's first sample; the last is num_samples."""
        counts = np.fromiter((shard.num_samples for shard in self.shards), np.int64, len(self.shards))
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


DERIVED = ("shape", "dtype", "classes", "class_counts", "mean", "std", "sigma_data")
"""What follows from the fields of a data set of version 3."""


def _of_fields(fields: Sequence[Field]) -> dict[str, Any]:
    """The values of DERIVED. Raises ValueError where fields of these can't be a data set."""
    names = [found.name for found in fields]
    if len(set(names)) < len(names):
        raise ValueError(f"two fields have the name '{next(name for name in names if names.count(name) > 1)}'")
    if any(not found.member for found in fields if not found.is_inline):
        raise ValueError("a field has no member that holds it")
    return derived(fields)


def derived(fields: Sequence[Field]) -> dict[str, Any]:
    """The values of DERIVED of sound fields. Raises ValueError where the target has no spread."""
    target = target_of(fields)
    label = class_field(fields)
    mean, std = np.asarray(target.mean), np.asarray(target.std)
    if not len(mean) or len(std) != len(mean):
        raise ValueError(f"{target.name}: has no mean and std")
    if target.kind == "image":
        mean, std = mean / 127.5 - 1, std / 127.5
    sigma_data = math.sqrt(float(np.mean(std**2) + np.var(mean)))  # channels have equally many values
    if not sigma_data > 0:
        raise ValueError(f"{target.name}: all values are the same")
    classes, counts = (label.classes, label.class_counts) if label else ([], [])
    values = (target.shape or [1], target.dtype, classes, counts, mean.tolist(), std.tolist(), sigma_data)
    return dict(zip(DERIVED, values, strict=True))


_ADAPTER = TypeAdapter(Manifest)
