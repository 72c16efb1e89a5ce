"""A checksum inside a JSON file: its last line is the SHA-256 of all lines before, so that a flipped bit is noticed.

Without it a flipped digit is another valid number: a position, a noise level, a shape. It is no signature: anybody who
can write the file can write its checksum too.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from scoreray.data.errors import DataError, StorageError

T = TypeVar("T")
log = logging.getLogger(__name__)
_SEAL = '\n "sha256": "'  # begins the last line of the file


def sealed(lines: Sequence[str]) -> str:
    """A JSON object of these members, each `"key": value` on a line (or several), and its seal."""
    text = "{\n" + "".join(f" {line},\n" for line in lines).removesuffix("\n")
    return f'{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}"\n}}\n'


def opened(data: bytes) -> tuple[bytes, bool | None]:
    """The JSON object without its seal, and whether the seal is right; where there is none, `data` itself and None."""
    body, seal, end = data.rpartition(_SEAL.encode())
    if not seal:
        return data, None
    intact = end.partition(b'"')[0] == hashlib.sha256(body).hexdigest().encode()
    return body.removesuffix(b",") + b"}", intact


def read_sealed(
    adapter: TypeAdapter[T],
    data: bytes,
    url: str,
    what: str,
    *,
    unsealed_format: int | None = None,
    place: str = "",
    again: str = "",
) -> T:
    """The value of a sealed file. Raises DataError in one line: `url`, `what` it should be, the first wrong field.

    unsealed_format: its `format` of before there were seals, which is read with a note, one for all at `place`.
    again: what to do about a file of another version.
    """
    fields, intact = opened(data)
    try:
        found: Any = adapter.validate_json(fields, strict=True)
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        advice = again if where in ("version", "format") else ""
        raise DataError(f"{url}: no {what} of this version: {_short(where)}: {_short(first['msg'])}{advice}") from error
    except StorageError as error:
        raise DataError(f"{url}: {error}") from error
    unsealed = unsealed_format is not None and found.format == unsealed_format
    if unsealed and intact is None:
        _note_unsealed(place)
    elif unsealed or not intact:
        raise DataError(
            f"{url}: the {what} is damaged, or was edited: its last line is not the SHA-256 of the lines before"
        )
    return found


@functools.cache
def _note_unsealed(place: str) -> None:
    log.warning("%s: was written before its JSON files had a seal; damage to their values can't be seen", place)


def _short(text: str, most: int = 200) -> str:
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= most else line[: most - 3] + "..."
