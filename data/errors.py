"""What can go wrong outside the code, each with the exit status that the command line gives it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ScorerayError(Exception):
    """Base of the errors that a person should read as one line, without a traceback."""

    exit_status = 1


class UserError(ScorerayError, ValueError):
    """The caller's mistake: a wrong name, value, shape or configuration."""

    exit_status = 2


class StorageError(ScorerayError):
    """The object store can't be read or written (missing bucket, wrong credentials, no space, no answer)."""

    exit_status = 3


class Unanswered(StorageError):
    """No usable answer came (busy, cut off, timed out): worth asking again."""


class DataError(ScorerayError):
    """Bytes that are not what the manifest or a checkpoint's marker says they are."""

    exit_status = 3


class MachineError(ScorerayError):
    """This machine can't do what every command needs of it: no room, no processor time, a limit of the system."""

    exit_status = 3


MOST_NAMES = 40  # of those accepted in one message
MOST_COMPARED = 10_000  # a data set may have a million classes


def nearest(name: str, accepted: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: the closest accepted one, and all of them if not many."""
    names = sorted(accepted)
    close = difflib.get_close_matches(name, names[:MOST_COMPARED], n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    more = f", ... ({len(names):,} in all)" if len(names) > MOST_NAMES else ""
    return f"{hint}accepted: {', '.join(names[:MOST_NAMES])}{more}"
