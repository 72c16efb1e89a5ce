"""Exceptions for what goes wrong outside the code, shown as one line; each has its exit status."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator

SHOWN = 80  # characters of a value that a message echoes
LONGEST_WORD, LONGEST_LINE, MOST_LINES = 500, 1500, 200  # of a message; a path is one word


def shortened(text: str, most: int = SHOWN) -> str:
    """`text`, or where it is longer than `most`, its beginning and its length, for a message."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def printable(text: str, keep: str = "") -> str:
    """`text` with what is no printable character written as an escape, for a terminal: data may hold sequences that
    move its cursor or colour it, and marks that turn the direction of writing. `keep`: characters that stay."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else ascii(one)[1:-1] for one in text)


def readable(message: str) -> str:
    """A message without control characters, with its longest words and lines shortened.

    Messages echo what a person typed, which may be of any length and hold escape sequences.
    """
    lines = message.split("\n", MOST_LINES)
    if len(lines) > MOST_LINES:
        lines[-1] = f"... ({lines[-1].count(chr(10)) + 1:,} more lines)"
    lines = [re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda word: shortened(word[0]), line) for line in lines]
    return printable("\n".join(shortened(line, LONGEST_LINE) for line in lines), keep="\n\t")


class ScorerayError(Exception):
    """Base of the errors that a person should read as one line, without a traceback."""

    exit_status = 1

    def __str__(self) -> str:
        return readable(super().__str__())


class UserError(ScorerayError, ValueError):
    """The caller's mistake: a wrong name, value, shape or configuration."""

    exit_status = 2


class StorageError(ScorerayError):
    """The object store can't be read or written (missing bucket, wrong credentials, no space, no answer)."""

    exit_status = 3


class Unanswered(StorageError):
    """The store gave no usable answer (busy, cut off, timed out): a later request may succeed."""


class DataError(ScorerayError):
    """Bytes that are not what the manifest or a checkpoint's marker says they are."""

    exit_status = 3


class MachineError(ScorerayError):
    """This machine lacks what every command needs: disk space, processor time, a limit of the system."""

    exit_status = 3


@contextlib.contextmanager
def key_in_errors(key: str) -> Iterator[None]:
    """Prefixes the message of an error with a config's key."""
    try:
        yield
    except ScorerayError as error:
        error.args = (f"{key}: {error}",)
        raise


MOST_LISTED = 10  # tensors, or classes
MOST_NAMES = 40  # of those accepted in one message
MOST_COMPARED = 10_000  # a data set may have a million classes


def listed(found: Iterable[str]) -> str:
    """The first ten, shortened, and how many there are."""
    items = list(found)
    more = f", ... ({len(items):,} in all)" if len(items) > MOST_LISTED else ""
    return ", ".join(one[: 2 * SHOWN] for one in items[:MOST_LISTED]) + more


def did_you_mean(name: str, accepted: Iterable[str]) -> str:
    """A question that names the accepted one that is closest to `name`, and ends in a space; '' where none is close."""
    close = difflib.get_close_matches(name, sorted(accepted)[:MOST_COMPARED], n=1)
    return f"did you mean '{close[0]}'? " if close else ""


def nearest(name: str, accepted: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: the closest accepted one, and all of them if not many."""
    names = sorted(accepted)
    hint = did_you_mean(name, names)
    more = f", ... ({len(names):,} in all)" if len(names) > MOST_NAMES else ""
    return f"{hint}accepted: {', '.join(names[:MOST_NAMES])}{more}"
