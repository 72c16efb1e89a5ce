"""Fields that an encoding keeps as they are: their values as `ShardWriter` takes them, pictures as they are stored."""

from __future__ import annotations

from collections.abc import Sequence

from scoreray.data.fields.field import Field, FieldRequest
from scoreray.data.fields.record_layout import FORMATS
from scoreray.data.reading.decode import decode_as_found
from scoreray.data.reading.samples import SampleReader
from scoreray.data.sources.field_source import FieldValue
from scoreray.sampling.offline.ensembles import stored_value

NPY = b"\x93NUMPY"


def carried_values(
    source: SampleReader, fields: Sequence[Field], numbers: Sequence[int]
) -> list[dict[str, FieldValue]]:
    """Of each of the samples of ascending `numbers`. A png or jpg is not decoded and encoded again: its bytes are kept.
    Raises DataError, StorageError."""
    if not numbers:
        return []
    whole = [one for one in fields if one.kind in ("image", "json") and not one.path]
    decoded = [one for one in fields if one not in whole]
    read = source.read_fields(numbers, [FieldRequest(one.name) for one in decoded])
    members = source.read_members(numbers, [one.member for one in whole])
    found = [{one.name: stored_value(one, read, row) for one in decoded} for row in range(len(numbers))]
    for one, column in zip(whole, members, strict=True):
        for row, data in enumerate(column):
            found[row][one.name] = decode_as_found(data, FORMATS["npy"]) if data.startswith(NPY) else data
    return found
