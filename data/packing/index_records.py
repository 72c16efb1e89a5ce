"""The index's part of one shard, sample by sample: where members are, values that are stored inline, and sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from scoreray.data.errors import DataError
from scoreray.data.fields.field import MAX_CLASSES, Field, is_plain
from scoreray.data.fields.limits import MAX_AXIS
from scoreray.data.fields.record_layout import digest, members_of, record_of
from scoreray.data.packing.moments import FieldCounter, check_finite
from scoreray.data.packing.plan import PackedShard
from scoreray.data.reading.manifest import Shard
from scoreray.data.reading.records import records_sha256
from scoreray.data.sources.field_source import FieldValue

Values = Mapping[str, FieldValue]


class StoredMember(NamedTuple):
    """A member of the shard: where its bytes begin, how many there are, record_layout.FORMATS' code, their digest."""

    offset: int
    size: int
    format: int
    digest: int

    @staticmethod
    def of(offset: int, data: bytes, code: int) -> StoredMember:
        return StoredMember(offset, len(data), code, digest(data))


class IndexRecords:
    """Records of a shard's samples. Values are as in FieldSource, images decoded.

    Args:
      fields: with the members that the shard has, in the order of the manifest.
    """

    def __init__(self, fields: Sequence[Field]) -> None:
        self._fields, self._plain = fields, is_plain(fields)
        self._members, self._inline = members_of(fields), [field for field in fields if field.is_inline]
        self._rows: list[tuple[Any, ...]] = []
        self._counters = [FieldCounter(field, self._plain) for field in fields]

    def check(self, values: Values) -> None:
        """Raises DataError naming the field where the manifest could not describe a value."""
        for field in self._fields:
            value = values[field.name]
            if field.kind == "class":
                if not -1 <= int(value) < MAX_CLASSES:
                    raise DataError(f"field '{field.name}': class {value!r}; 0 to {MAX_CLASSES - 1} are accepted")
            elif field.kind in ("text", "json"):
                size = len(value.encode() if isinstance(value, str) else bytes(value))  # type: ignore[arg-type]
                if size > MAX_AXIS:
                    raise DataError(f"field '{field.name}': {size:,} bytes, the limit is {MAX_AXIS:,}")
            elif field.kind == "sequence" and len(value) > MAX_AXIS:  # type: ignore[arg-type]
                raise DataError(f"field '{field.name}': {len(value):,} tokens, the limit is {MAX_AXIS:,}")  # type: ignore[arg-type]
            elif field.kind != "image":
                check_finite(value, field)

    def add(self, members: Mapping[str, StoredMember], values: Values) -> None:
        """members: those that the records point to, by their extensions."""
        if self._plain:
            (one,) = members.values()
            label = values[self._inline[0].name] if self._inline else -1
            self._rows.append((one.offset, one.size, label, one.format, one.digest))
        else:
            columns = zip(*(members[name] for name in self._members), strict=True) if self._members else [()] * 4
            self._rows.append((*columns, *(values[field.name] for field in self._inline)))
        for counter in self._counters:
            counter.add(values[counter.field.name])

    def __len__(self) -> int:
        return len(self._rows)

    def finish(
        self, name: str, num_bytes: int, sha256: str, skipped: Sequence[str], left_out: Mapping[str, int]
    ) -> PackedShard:
        """What is to be known of the shard. skipped: samples left out, and why; left_out: members, by kind."""
        dtype = record_of(self._fields)
        array = np.zeros(len(self._rows), dtype)  # what pads a record is zero too
        array[:] = self._rows
        records = array.tobytes()
        shard = Shard(name, len(self._rows), num_bytes, sha256, records_sha256(records, dtype))
        moments = [counter.finish() for counter in self._counters]
        return PackedShard(shard, moments, records, list(skipped), left_out=dict(left_out))
