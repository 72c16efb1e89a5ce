"""Reading a config: YAML and dotted overrides into a validated `Config`, all mistakes reported at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ValidationError

from scoreray.data.errors import UserError, nearest, shortened
from scoreray.data.own_code import is_own, name_in_command, or_own
from scoreray.data.own_code.part import config_class
from scoreray.data.storage.store import NotFound, open_store
from scoreray.data.yaml_text import MAX_BYTES, dump_yaml, parse_value, parse_yaml
from scoreray.trainer.config.sections import Config

MAX_MISTAKES = 100  # that an error lists

# Keys that may change when a run is resumed: they decide where and how long it computes, not what it learns.
CHANGEABLE = ("run.storage", "scaling", "checkpoint", "log", "evaluation",
              "engine.zero_stage", "engine.micro_batch_size",
              "engine.offload", "engine.compile", "engine.partition_group", "engine.internode_gbit_s",
              "data.url", "data.prefetch_batches", "data.cache_dir", "data.cache_bytes",
              "data.on_error", "data.quarantine_budget", "autoencoder.kind", "autoencoder.path",
              "duration")  # fmt: skip


def load_config(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The validated config of a YAML file (or a plain dict) with `section.key=value` overrides applied.

    A file and overrides are the caller's, so parts of somebody else's that they name may be imported (`own_code`); a
    dict may come out of a checkpoint. Raises one UserError that lists every mistake, a line each.
    """
    name = "config" if isinstance(source, dict) else str(source)
    try:
        raw = with_default_kinds(override(with_default_kinds(read_yaml(source)), overrides))
    except RecursionError:
        raise UserError(f"{name}: nested too deeply, or within itself: not a config") from None
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise explained(error, Config, name) from None


def left_out_by_kinds(source: str | Path | dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """A line for each override of a `kind` with which keys of the file go, other than those that are given again."""
    of_kinds = [given for given in overrides if given.partition("=")[0].endswith(".kind")]
    if not of_kinds:
        return []
    raw = with_default_kinds(read_yaml(source))
    before, after = dict(leaves(raw)), dict(leaves(override(raw, overrides)))
    lines, counted = [], set[str]()
    for given in sorted(of_kinds, key=lambda text: kinds_first(text.partition("=")[0])):
        section = given.partition("=")[0].removesuffix("kind")
        if before.get(f"{section}kind") == after.get(f"{section}kind"):
            continue  # nothing was dropped for this one
        dropped = [key for key in before if key.startswith(section) and key not in after and key not in counted]
        counted.update(dropped)
        gone = [key.removeprefix(section) for key in dropped if key.rpartition(".")[2] != "kind"]
        if gone:
            lines.append(f"{shortened(given)}: this kind's own defaults, without the file's {', '.join(gone)}")
    return lines


def explained(error: ValidationError, root: type[BaseModel], name: str) -> UserError:
    """What pydantic found wrong with a `root` read from `name`, a line for each mistake."""
    return refusal(
        name, [line for one in error.errors(include_url=False) for line in _describe(one, root).splitlines()]
    )


def refusal(name: str, mistakes: Sequence[str]) -> UserError:
    """The error of what was read from `name`, a line for each mistake."""
    head = f"{name}: {len(mistakes)} mistakes\n  " if len(mistakes) > 1 else f"{name}: "
    more = [f"... and {len(mistakes) - MAX_MISTAKES:,} more"] if len(mistakes) > MAX_MISTAKES else []
    return UserError(head + "\n  ".join([*mistakes[:MAX_MISTAKES], *more]))


def dump_config(config: Config) -> str:
    """The whole config as YAML, every default written out; `load_config` reads it back equal."""
    return dump_yaml(config.model_dump(mode="json"))


def differing_keys(old: Config, new: Config) -> list[str]:
    """Dotted keys that differ and that a resumed run may not change, each with both values."""
    old_values, new_values = dict(leaves(old.model_dump())), dict(leaves(new.model_dump()))
    keys = [key for key in sorted(old_values.keys() | new_values.keys()) if old_values.get(key) != new_values.get(key)]
    changeable = tuple(key for key in CHANGEABLE if key != "duration" or new.optimizer.schedule != "cosine")
    return [
        f"{key}: {old_values.get(key)} in the run, {new_values.get(key)} in this config"
        for key in keys
        if not any(key == allowed or key.startswith(allowed + ".") for allowed in changeable)
    ]


def read_yaml(source: str | Path | dict[str, Any]) -> dict[str, Any]:
    """The mapping in a YAML file, local or in S3, which the caller's command gives (or a plain dict, as it is). Raises
    UserError, StorageError."""
    if isinstance(source, dict):
        return source
    remote = re.fullmatch(r"s3:/+(.+)/([^/]+)", str(source))  # Path("s3://a") has one slash left
    try:
        if remote:
            data = open_store(f"s3://{remote[1]}").get(remote[2])
        else:
            with Path(source).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotFound):
        raise UserError(f"{source}: no such config file") from None
    except OSError as error:
        raise UserError(f"{source}: can't be read: {error}") from None
    return name_in_command(parse_sections(data, str(source)))  # type: ignore[no-any-return]


def parse_sections(data: bytes, name: str) -> dict[str, Any]:
    """The mapping that the bytes of a config hold. Raises UserError, which begins with `name`."""
    raw = parse_yaml(data, name)
    if not isinstance(raw, dict):
        kind = "empty" if raw is None else f"a {type(raw).__name__}"
        raise UserError(f"{name}: a config is a mapping of sections, this is {kind}")
    return raw


def override(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with each dotted override set; a new `kind` clears its section, as the old keys mean nothing to it.

    Of two overrides of one key the last holds, as of two options of a command line. Raises UserError.
    """
    raw = copied(raw)
    # In any order on the command line: a kind that came last would clear the keys that are meant for it.
    for given in sorted(overrides, key=lambda text: kinds_first(text.partition("=")[0])):
        key, equals, text = given.partition("=")
        name = f"'{shortened(given)}'"
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){0,31}", key):
            raise UserError(f"{name} is not an override; write section.key=value, e.g. optimizer.learning_rate=1e-4")
        set_key(raw, key, name_in_command(parse_value(text, name)), name)
    return raw


def kinds_first(key: str) -> tuple[bool, int]:
    """Sorts dotted keys: an outer kind, which clears its section, before an inner one, and all before the rest."""
    kind = key.rpartition(".")[2] == "kind"
    return not kind, key.count(".") if kind else 0


def set_key(raw: dict[str, Any], key: str, value: Any, name: str) -> None:
    """Sets a dotted key of nested sections, in place; a new `kind` clears its section, as old keys mean nothing to
    it. Raises UserError, which begins with `name`, where a part of the key is no section."""
    *path, leaf = key.split(".")
    section = raw
    for part in path:
        if section.get(part) is None:  # also a section that is left out by null
            section[part] = {}
        child = section[part]
        if not isinstance(child, dict):
            raise UserError(f"{name}: {part} is {shortened(repr(child))}, not a section")
        section = child
    if leaf == "kind" and section.get("kind", value) != value:
        section.clear()
    section[leaf] = value


def with_default_kinds(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with the default `kind` wherever a section that has one leaves it out: a new kind is then known as one.

    pydantic's discriminated unions refuse a section without its tag, also where only one key of the default is changed.
    """

    def fill(section: dict[str, Any], annotation: Any, default: Any) -> None:
        if hasattr(default, "kind"):
            section.setdefault("kind", default.kind)
        members = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
        chosen = next((one for one in map(_plain, members) if _kind_of(one) in (None, section.get("kind"))), None)
        if is_own(section.get("kind")):
            with contextlib.suppress(UserError):  # validation reports it, with all other mistakes
                chosen = config_class(section["kind"])
        for key, inner in _fields_of(chosen).items():
            if isinstance(section.get(key), dict):
                fill(section[key], _plain(inner), _default_of(chosen, key))

    filled = copied(raw)
    fill(filled, Config, None)
    return filled


def copied(value: Any) -> Any:
    """Nested sections as ones of their own; the values in them are shared."""
    return {key: copied(item) for key, item in value.items()} if isinstance(value, dict) else value


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is no section; an empty section of a key is a value, as it is not None."""
    if isinstance(value, dict) and (value or not prefix):
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _describe(mistake: Any, root: Any) -> str:
    """One line for one pydantic error: dotted key, value, what is accepted."""
    key, _ = _walk(mistake["loc"], root)
    kind, value = mistake["type"], mistake.get("input")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        _, section = _walk(mistake["loc"][:-1], root)
        return f"{shortened(key)}: unknown key; {nearest(key.rpartition('.')[2], _fields_of(section))}"
    if kind in ("missing", "missing_argument"):
        return f"{key}: missing"
    if kind == "union_tag_invalid":
        expected = [tag.strip(" '") for tag in mistake["ctx"]["expected_tags"].split(",")]
        tag = str(mistake["ctx"]["tag"])
        return f"{key}.kind: unknown '{shortened(tag)}'; {nearest(tag, expected)}{or_own(tag)}"
    if kind == "value_error":
        message = str(mistake["ctx"]["error"])
        return message if not key or message.startswith(key.split(".")[0]) else f"{key}: {message}"
    shown = "a section" if isinstance(value, dict) else shortened(repr(value))
    accepted = mistake["msg"].removeprefix("Input should be ")
    accepted = "a whole number that 64 bits hold" if kind == "int_parsing_size" else accepted
    accepted = (
        "a section of keys, {} for all defaults"
        if kind in ("dict_type", "model_type", "model_attributes_type")
        else accepted
    )
    fix = "; put it in quotes" if kind == "string_type" and isinstance(value, int | float) else ""
    return f"{key}: {shown} is not accepted; it should be {accepted}{fix}"


def _walk(location: tuple[Any, ...], root: Any) -> tuple[str, Any]:
    """Dotted key of a pydantic error location, without the union tags in it, and the type at that place."""
    parts: list[str] = []
    current: Any = root
    for part in location:
        members = [_plain(member) for member in typing.get_args(current)] if _is_union(current) else []
        # pydantic puts the union's tag into the path (process, ve, sigma_min), which no user has written.
        tagged = [member for member in members if _kind_of(member) == part]
        if tagged:
            current = tagged[0]
            continue
        if is_own(part):
            current = config_class(part)
            continue
        parts.append(str(part))
        values = typing.get_args(current)[1] if typing.get_origin(current) is dict else _fields_of(current).get(part)
        current = _plain(values)
    return ".".join(parts), current


def _plain(annotation: Any) -> Any:
    while typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    given = [one for one in typing.get_args(annotation) if one is not types.NoneType]
    return given[0] if _is_union(annotation) and len(given) == 1 else annotation  # X | None is X where it is given


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _kind_of(annotation: Any) -> str | None:
    kind = _fields_of(annotation).get("kind")
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Literal else None


def _default_of(annotation: Any, key: str) -> Any:
    """What a section's key is where nothing is given; of a key that must be given, nothing that means anything."""
    if issubclass(annotation, BaseModel):
        return next(field for name, field in annotation.model_fields.items() if key in (field.alias, name)).default
    return next(field.default for field in dataclasses.fields(annotation) if field.name == key)


def _fields_of(annotation: Any) -> Mapping[str, Any]:
    """Names and types of the keys of a section."""
    return _fields_of_class(annotation) if isinstance(annotation, type) else {}


@functools.lru_cache(maxsize=1024)  # get_type_hints compiles each annotation, 5 ms a config
def _fields_of_class(section: type) -> Mapping[str, Any]:
    if issubclass(section, BaseModel):
        return {field.alias or name: _plain(field.annotation) for name, field in section.model_fields.items()}
    if dataclasses.is_dataclass(section):
        hints = typing.get_type_hints(section)
        return {field.name: hints[field.name] for field in dataclasses.fields(section) if field.init}
    return {}
