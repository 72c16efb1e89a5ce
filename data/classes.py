"""Class names and numbers: how names are ordered when a data set is packed, and which class a label names."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Iterable, Sequence

from scoreray.data.errors import UserError, nearest, printable

NO_CLASS = -1
WHOLE_NUMBER = re.compile(r"-?[0-9]+", re.ASCII)
INDEX = re.compile(r"-1|0|[1-9][0-9]{0,6}", re.ASCII)  # one spelling for each number: '05', '+5' and '²' are words
BY_NAME, BY_INDEX = "name:", "index:"
SHOWN = 64  # characters of a label in a message


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order that they are numbered in: as numbers where all are whole numbers, else as text."""
    found = sorted(set(names))
    if all(WHOLE_NUMBER.fullmatch(name) for name in found):
        found.sort(key=int)
    return found


def class_number(label: object, classes: Sequence[str]) -> int:
    """The number of the class that `label` names; -1 for None, which names no class.

    A number (Python's, numpy's, JSON's) is the class's number, -1 no class. A word, which is all that a command line
    has, is a class's exact name, or its number in digits, or its name in another case. `name:2` is the class
    that is called 2, `index:2` number 2.

    Raises UserError where there is no such class, and where a word fits two: it names both and how to write each.
    """
    if label is None:
        return NO_CLASS
    word = label if isinstance(label, str) else _digits(label)
    found = _meant(word, classes) if isinstance(label, str) else _by_index(word, classes)
    if not found and not classes:
        raise UserError(f"class {_quoted(word)}: this model was trained without classes")
    if not found:
        names = nearest(_one_line(word), map(_one_line, classes))
        raise UserError(f"class {_quoted(word)} is unknown; {names}; or 0 to {len(classes) - 1}, -1 for none")
    if len(found) > 1:
        ways = [f"{_spelled(n, word, classes)} for {_described(n, classes)}" for n in sorted(found)]
        more = [f"and {len(ways) - 4} more"] if len(ways) > 4 else []
        raise UserError(f"class {_quoted(word)} fits {len(ways)} classes: give {'; '.join([*ways[:4], *more])}")
    return found.pop()


def _digits(label: object) -> str:
    if isinstance(label, bool):
        raise UserError(f"class {label}: a class's name or number is needed")
    try:
        return str(operator.index(label))  # type: ignore[arg-type]
    except TypeError:
        raise UserError(f"class {_quoted(str(label))}: a class's name or number is needed") from None


def _by_index(word: str, classes: Sequence[str]) -> set[int]:
    return {int(word)} if INDEX.fullmatch(word) and int(word) < len(classes) else set()


def _meant(word: str, classes: Sequence[str]) -> set[int]:
    """Numbers of all classes that a word may name. Exact matches come before those in another case."""
    by_name = word.removeprefix(BY_NAME) if word.startswith(BY_NAME) else None
    exact = {i for i, name in enumerate(classes) if name in (word, by_name)}
    exact |= _by_index(word.removeprefix(BY_INDEX), classes)
    folded = {_folded(word), _folded(word if by_name is None else by_name)}
    return exact or {i for i, name in enumerate(classes) if _folded(name) in folded}


def _folded(name: str) -> str:
    """The name without case; letters with accents are the same whichever way a file system writes them."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _spelled(number: int, word: str, classes: Sequence[str]) -> str:
    """How to write this class so that no other is meant, where `word` fits several."""
    name = classes[number] if number >= 0 else ""
    by_name, by_index = f"{BY_NAME}{name}", f"{BY_INDEX}{number}"
    ways = [name, by_name, by_index, str(number)] if name == word else [name, by_index, by_name, str(number)]
    return next((_quoted(way) for way in ways if _meant(way, classes) == {number}), f"the number {number}")


def _described(number: int, classes: Sequence[str]) -> str:
    return f"class {number} (called {_quoted(classes[number])})" if number >= 0 else "no class"


def _quoted(word: str) -> str:
    return f"'{_one_line(word)}'"


def _one_line(word: str) -> str:
    """A word as a message shows it: printable, and cut where it is long."""
    return printable(word if len(word) <= SHOWN else f"{word[:SHOWN]}...")
