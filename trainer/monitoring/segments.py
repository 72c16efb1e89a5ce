"""What a run has measured from checkpoint to checkpoint: <folder>/<images seen>.jsonl, a record a line."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from scoreray.data.errors import DataError, shortened
from scoreray.data.storage.store import Store

T = TypeVar("T")


def segment_key(folder: str, images_seen: int) -> str:
    """Where the records up to a checkpoint are."""
    return f"{folder}/{images_seen:012d}.jsonl"


def segments(run: Store, folder: str) -> dict[int, str]:
    """Keys of the segments in a folder of a run, by images seen; other files there are none of ours."""
    names = ((re.fullmatch(r".*/(\d{12,18})\.jsonl", key), key) for key, _ in run.list(f"{folder}/"))
    return {int(found[1]): key for found, key in names if found}


def read_segment(run: Store, key: str, record: TypeAdapter[T]) -> list[T]:
    """The records of a segment. Raises DataError that names its file and line, NotFound."""
    found = []
    for number, line in enumerate(run.get(key).splitlines(), 1):
        try:
            found.append(record.validate_json(line))
        except ValidationError as error:
            first: Any = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            why = shortened(ascii(f"{where}: {first['msg']}" if where else first["msg"])[1:-1])
            raise DataError(
                f"{run.url(key)}: line {number} is no record of a run ({why}); the checkpoints are not affected: put "
                "the file back as it was, or remove it and what it held"
            ) from None
    return found
