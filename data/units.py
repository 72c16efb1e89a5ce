"""Numbers as people write them in a config."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

_COUNT = re.compile(r"([0-9][0-9_]{0,29}(?:\.[0-9]{1,30})?)\s*([kMG])")
MOST_THREADS = 1024  # of one process
_SUFFIXES = {"k": 10**3, "M": 10**6, "G": 10**9}


def whole_number(text: str) -> int | None:
    """A number from 0 in at most 18 of the digits 0 to 9; None for any other text ("²", "--5", "1e3")."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def counted_noun(count: int, noun: str) -> str:
    """ "1 shard", "2,000 shards"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def parse_count(value: Any) -> Any:
    """'200k', '1.5M' and '2G' as integers; anything else as it is, for pydantic to judge."""
    if isinstance(value, str) and (match := _COUNT.fullmatch(value.strip())):
        return round(float(match[1].replace("_", "")) * _SUFFIXES[match[2]])
    return value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=1, lt=10**12)]  # checkpoints are named by 12 digits
CountOrZero = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
NumberAsText = Annotated[str, BeforeValidator(_as_text)]
"""A name that may look like a number (an EMA length): what YAML reads as a number is one too."""


def readable_bytes(count: int) -> str:
    """ "512 B", "3.4 MB": three figures, in powers of 1000 as disks and S3 count."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 999.5 or unit == "PB":
            break
        value /= 1000
    return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
