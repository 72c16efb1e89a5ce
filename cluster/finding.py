"""One finding of the doctor: a line for people, facts for programs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    state: Literal["good", "note", "problem"]
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


def error_line(error: BaseException) -> str:
    """The kind of an error and its first line: what follows in Ray's are stacks and paths of logs."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
