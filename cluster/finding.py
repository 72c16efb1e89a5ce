"""One finding of the doctor: a line for people, facts for programs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

PAGE = "docs/troubleshooting.md"  # a heading `doctor: TOPIC` for each topic


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    state: Literal["good", "note", "problem"]
    text: str
    facts: dict[str, Any] = field(default_factory=dict)


def pages(found: Iterable[Finding]) -> str:
    """Where the documentation explains what is not good: the page's name in it, which an installed wheel lacks, and the
    anchors of the topics; "" where all is good."""
    topics = dict.fromkeys(one.topic for one in found if one.state != "good")
    return ", ".join(f"{PAGE}#doctor-{re.sub('[^a-z]', '', topic.lower())}" for topic in topics)


def error_line(error: BaseException) -> str:
    """The kind of an error and its first line: what follows in Ray's are stacks and paths of logs."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
