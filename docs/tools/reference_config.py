"""The site's page of a config's keys: type, default, description and kinds, from the models that a config is read into.

A key's description stands in its class's docstring, or in that of a class that it inherits from: "`key`: what it is.",
at the beginning of a line or after two spaces; else it is the first sentence there that names it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

import docstrings
from pydantic import BaseModel
from reference_tables import keys

from scoreray.data.own_code.part import PartOf
from scoreray.trainer.config import Config

HEAD = """# Keys of a config

Every section and key, with its type, default and meaning. How configs are written, overridden and resumed:
docs/config.md. `scoreray train CONFIG --print-config` prints a config with all defaults filled in.

A count may be written `200k`, `1.5M` or `2G`. `null` (None) is a value that is left out. Of a section with kinds,
`kind` chooses one, and the keys are that kind's; where it says so, `package.module:Name` is a class of yours
(docs/own-code.md).
"""
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}


@dataclasses.dataclass(frozen=True)
class Group:
    """A section, `objective.weighting`: the classes that it may be, one a kind; own: or somebody else's class."""

    path: str
    classes: tuple[type, ...]
    own: bool


def page() -> str:
    return "\n".join([HEAD, *(_group(group) for group in groups())])


@cache
def groups() -> tuple[Group, ...]:
    """Every section, each before those inside it; a class that several hold stands at the first."""
    return tuple(_groups(Config, ""))


def described() -> dict[str, str]:
    """Key with its section and kind, `process.vp.beta_min` -> its description, "" where there is none."""
    return {
        _id(group, cls, name): description(cls, name)
        for group in groups()
        for cls in group.classes
        for name in types_of(cls)
        if name != "kind" or not kind_of(cls)
    }


def _groups(cls: type, path: str) -> Iterator[Group]:
    seen: set[type] = set()

    def within(cls: type, path: str) -> Iterator[Group]:
        for name, annotation in types_of(cls).items():
            classes = tuple(one for one in _classes(annotation) if one not in seen)
            seen.update(classes)
            place = f"{path}{name}"
            if classes:
                yield Group(place, classes, _takes_own(annotation))
            for one in classes:
                yield from within(one, f"{place}.")

    return within(cls, path)


@cache
def types_of(cls: type) -> dict[str, Any]:
    """Key -> its type, of a section's class."""
    if issubclass(cls, BaseModel):
        hints = typing.get_type_hints(cls, include_extras=True)
        return {name: hints[name] for name in cls.model_fields}
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _classes(annotation: Any) -> list[type]:
    """The sections' classes in a type."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return [annotation]
    return [one for inner in typing.get_args(annotation) for one in _classes(inner)]


def _takes_own(annotation: Any) -> bool:
    return isinstance(annotation, PartOf) or any(_takes_own(inner) for inner in _parts(annotation))


def _parts(annotation: Any) -> tuple[Any, ...]:
    return (*typing.get_args(annotation), *getattr(annotation, "__metadata__", ()))


def kind_of(cls: type) -> str | None:
    return getattr(cls, "kind", None) if "kind" in types_of(cls) else None


def description(cls: type, name: str) -> str:
    """What a docstring says of a key, "" where it says nothing."""
    for base in cls.__mro__:
        if found := _descriptions(base, tuple(types_of(cls))).get(name):
            return found
    return next((found for base in cls.__mro__ if (found := _sentence(base, name))), "")


@cache
def _descriptions(cls: type, names: tuple[str, ...]) -> dict[str, str]:
    """Key -> its words, of those that this class's own docstring describes."""
    one = rf"`?(?:{'|'.join(names)})`?"
    begin = rf"(?:^|(?<=  )|(?<=[.;] )){one}(?:, {one})*: "
    found: dict[str, str] = {}
    for words in re.split(rf"(?={begin})|\n\n", _doc(cls), flags=re.M):
        if match := re.match(rf"({one}(?:, {one})*): (.*)", words, re.S):
            found |= dict.fromkeys(re.findall(r"\w+", match[1]), _in_one_line(match[2]))
    return found


def _sentence(cls: type, name: str) -> str:
    sentences = re.split(r"(?<=\.)\s+(?=[A-Z`])|\n\n|  ", _doc(cls))
    return next((_in_one_line(one) for one in sentences if re.search(rf"\b{name}\b", one)), "")


def _doc(cls: type) -> str:
    """A class's own docstring; a dataclass without one has its signature there."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    return "" if doc.startswith(f"{cls.__name__}(") else doc


def _in_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(";.")


def _group(group: Group) -> str:
    level = "#" * min(2 + group.path.count("."), 3)
    lines = [f"{level} `{group.path}` {{ #{group.path} }}", ""]
    if group.path == "data.conditions":
        lines += ["By name, each a section:", ""]
    kinds = {kind: cls for cls in group.classes if (kind := kind_of(cls))}
    if not kinds or (len(kinds) < 2 and not group.own):
        (cls,) = group.classes
        own = ["", "Or `kind: package.module:Name`, a class of yours with keys of its own."] if group.own else []
        return "\n".join([*lines, _summary(cls), *own, "", _keys(group, cls), ""])
    named = [f"[`{kind}`](#{group.path}.{kind})" for kind in kinds]
    or_own = " or `package.module:Name`, a class of yours" if group.own else ""
    lines += [f"`kind`: {', '.join(named)}{or_own}.", ""]
    for kind, cls in kinds.items():
        lines += [f"{level}# `{group.path}.kind: {kind}` {{ #{group.path}.{kind} }}", "", _summary(cls), ""]
        lines += [_keys(group, cls), ""]
    return "\n".join(lines)


def _summary(cls: type) -> str:
    """What a class's docstring says before its keys."""
    begin = rf"`?(?:{'|'.join(types_of(cls))})`?(?:, `?\w+`?)*: "
    return docstrings.markdown(re.split(rf"(?:^|(?<=  )){begin}", _doc(cls), maxsplit=1, flags=re.M)[0].strip())


def _id(group: Group, cls: type, name: str) -> str:
    kind = kind_of(cls)
    return ".".join((group.path, *([kind] if kind and (len(group.classes) > 1 or group.own) else []), name))


def _keys(group: Group, cls: type) -> str:
    schema = _schemas()[cls.__name__]
    rows = []
    for name, about in schema["properties"].items():
        if name == "kind" and kind_of(cls):
            continue
        default = f"`{_plain(about['default'])}`" if "default" in about else "required"
        place = _id(group, cls, name)
        anchor = "" if any(other.path == place for other in groups()) else f"{{ #{place} }}"  # its own section has it
        rows.append(
            (
                f"`{name}`{anchor}",
                in_words(about, types_of(cls)[name]),
                default,
                docstrings.escaped(description(cls, name)),
            )
        )
    return keys(("key", "type", "default", "description"), rows) if rows else ""


@cache
def _schemas() -> dict[str, dict[str, Any]]:
    """Class -> JSON schema."""
    schema = Config.model_json_schema()
    return schema["$defs"]


def _plain(value: Any) -> str:
    """A default as YAML in one line has it; of a section its kind, or that it is the section's own."""
    if isinstance(value, dict):
        return f"{{kind: {value['kind']}}}" if "kind" in value else "{}"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def in_words(about: dict[str, Any], annotation: Any) -> str:
    """A JSON schema in plain words: "whole number from 1 to 1,024"."""
    if classes := _classes(annotation):
        group = next(group for group in groups() if classes[0] in group.classes)
        words = f"[section](#{group.path})" if len(classes) == 1 else f"[one of {len(classes)} kinds](#{group.path})"
        return f"{words} or null" if about.get("default", 0) is None else words
    if options := about.get("anyOf") or about.get("oneOf"):
        return " or ".join(dict.fromkeys(in_words(one, None) for one in options))
    if "enum" in about or "const" in about:
        return " or ".join(f"`{json.dumps(value)}`" for value in about.get("enum", [about.get("const")]))
    if about.get("type") == "array":
        inner = about.get("items") or (about.get("prefixItems") or [{}])[0]
        size = f"{about['minItems']} " if about.get("minItems") == about.get("maxItems", 0) else ""
        return f"list of {size}{in_words(inner, None)}" if inner is not True else "list"
    if about.get("type") == "object":
        return "names with values"
    return TYPES.get(about.get("type", ""), "any value") + _range(about)


def _range(about: dict[str, Any]) -> str:
    """The bounds that a person may meet: not those of what a file's name or a 64-bit number holds."""
    bounds = {
        "above": about.get("exclusiveMinimum"),
        "from": about.get("minimum", about.get("ge")),
        "to": about.get("maximum"),
        "below": about.get("exclusiveMaximum", about.get("lt")),
    }
    return "".join(f" {word} {_number(bound)}" for word, bound in bounds.items() if bound is not None and bound < 1e12)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
