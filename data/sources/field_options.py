"""Fields that a pack is asked for: `--field NAME=WHERE[:PATH]`, `--kind NAME=KIND`, `--normalise NAME=KIND`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from scoreray.data.errors import UserError, nearest
from scoreray.data.fields.field import MAX_FIELDS, NAME
from scoreray.data.fields.field_kinds import FIELD_KINDS, FieldKind
from scoreray.data.fields.normalisation import NORMALISATIONS, Normalisation
from scoreray.data.own_code import is_own

T = TypeVar("T", bound=str)
CLASS_NAMES = ("cls", "class", "label")
"""Fields of these names that hold whole numbers are classes; others become one by --kind NAME=class."""
HOW = "NAME=WHERE or NAME=WHERE:PATH"


@dataclass(frozen=True)
class FieldOption:
    """One field to pack. where: a tar member's extension, a column, an array or a variable, as the source has them;
    path: within a json value, "a.b".  kind: None finds it from the values.  normalisation: None stores "none".
    decoder: `package.module:Name`, somebody else's function that makes an array of a tar member's bytes; "" for none.
    """

    name: str
    where: str
    path: str = ""
    kind: FieldKind | None = None
    normalisation: Normalisation | None = None
    decoder: str = ""

    def __str__(self) -> str:
        """As it is given on the command line, for messages."""
        return f"--field {self.name}={self.where}{f':{self.path}' if self.path else ''}"


@dataclass(frozen=True)
class FieldOptions:
    """fields: those of --field.  kinds, normalisations: (name, kind) of fields that are packed without being asked for,
    such as `image`, `array` and `label`."""

    fields: tuple[FieldOption, ...] = ()
    kinds: tuple[tuple[str, FieldKind], ...] = ()
    normalisations: tuple[tuple[str, Normalisation], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.fields or self.kinds or self.normalisations)

    @property
    def decoders(self) -> list[str]:
        """Names of somebody else's functions that members are read by."""
        return [one.decoder for one in self.fields if one.decoder]

    def flag(self) -> str:
        """The first of them, as it is given on the command line."""
        if self.fields:
            return str(self.fields[0])
        flag, (name, kind) = ("--kind", self.kinds[0]) if self.kinds else ("--normalise", self.normalisations[0])
        return f"{flag} {name}={kind}"

    def check_names(self, names: Sequence[str], source: str) -> None:
        """Raises UserError where --kind or --normalise names a field that a source does not have."""
        for flag, given in (("--kind", self.kinds), ("--normalise", self.normalisations)):
            for name, kind in given:
                if name not in names:
                    raise UserError(f"{flag} {name}={kind}: {source} has no such field; {nearest(name, names)}")


NO_FIELDS = FieldOptions()


def of_extensions(asked: FieldOptions) -> FieldOptions:
    """The options for tars, whose members are known by extensions in small letters, without the dot."""
    fields = tuple(replace(one, where=one.where.lower().removeprefix(".")) for one in asked.fields)
    return replace(asked, fields=fields)


def option_for(where: str, word: str, taken: Iterable[str]) -> str:
    """What a message suggests for what no field reads: `--field NAME=WHERE`, with `word` as the name if it is free."""
    name = re.sub(r"^[^a-z]+|[^a-z0-9_]", "_", word.lower()).lstrip("_")
    is_free = re.fullmatch(NAME, name) and name not in set(taken)
    return f"--field {name if is_free else 'NAME'}={where} takes one"


def parse_field_options(
    fields: Sequence[str] = (),
    kinds: Sequence[str] = (),
    normalise: Sequence[str] = (),
    decoders: Sequence[str] = (),
) -> FieldOptions:
    """From the command line's words. Raises UserError naming the first that is wrong."""
    found: dict[str, FieldOption] = {}
    for word in fields:
        name, where = _split("--field", word, HOW)
        where, _, path = where.partition(":")
        if not where or (":" in word and not path):
            raise UserError(f"--field {word}: {HOW} is needed")
        if name in found:
            raise UserError(f"--field {word}: a field '{name}' is given already: {found[name]}")
        found[name] = FieldOption(name, where, path)
    if len(found) > MAX_FIELDS:
        raise UserError(f"--field: {len(found)} fields, at most {MAX_FIELDS} are accepted")
    for word in decoders:
        where, _, kind = word.partition("=")
        where = where.lower().removeprefix(".")
        wanted = [one for one in found.values() if one.where.lower().removeprefix(".") == where and not one.path]
        if not is_own(kind) or not wanted:
            needs = f"--field NAME={where}" if is_own(kind) else "EXT=package.module:Name"
            raise UserError(f"--decoder {word}: {needs} is needed")
        found |= {one.name: replace(one, decoder=kind) for one in wanted}
    kind_of = _by_name("--kind", kinds, FIELD_KINDS)
    normaliser_of = _by_name("--normalise", normalise, NORMALISATIONS)
    options = tuple(
        replace(option, kind=kind_of.pop(name, None), normalisation=normaliser_of.pop(name, None))
        for name, option in found.items()
    )
    return FieldOptions(options, tuple(kind_of.items()), tuple(normaliser_of.items()))


def _by_name(flag: str, words: Sequence[str], accepted: Sequence[T]) -> dict[str, T]:
    found: dict[str, T] = {}
    for word in words:
        name, kind = _split(flag, word, "NAME=KIND")
        if kind not in accepted:
            raise UserError(f"{flag} {word}: {nearest(kind, accepted)}")
        if name in found:
            raise UserError(f"{flag} {word}: '{name}' is given twice")
        found[name] = accepted[accepted.index(kind)]
    return found


def _split(flag: str, word: str, how: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not value:
        raise UserError(f"{flag} {word}: {how} is needed")
    if not re.fullmatch(NAME, name):
        raise UserError(f"{flag} {word}: '{name}' can't be a field's name: a to z, 0 to 9 and _, a letter first")
    return name, value
