"""YAML as people write it: configs, sweeps, `key=value` overrides and options, all read and written here.

Values follow the core schema of YAML 1.2 (section 10.3.2): 1e-3, 1E5, .5 and +1 are numbers, 010 is 10 and 0o10 is 8;
yes, no, on and off are strings, and so are 1:30 and dates. PyYAML parses; values are made from its events, as its own
constructors follow YAML 1.1 (1e-3 is a string, 010 is 8), keep the last of two equal keys without a word, and fail with
exceptions of any kind on what they can't convert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from scoreray.data.errors import UserError, shortened

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_VALUES = 10_000
MAX_DIGITS = 40

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_BASES = {"0o": 8, "0x": 16}


def parse_yaml(text: str | bytes, name: str) -> Any:
    """The value of a YAML text (bytes are UTF-8): mappings with string keys, lists, str, int, float, bool, None.

    Aliases and merge keys (`<<`) work; each counts as what it stands for. Raises UserError, one line that begins with
    `name` and says where: no YAML, a key twice, a tag, a number too large, too much or too deep for a config.
    """
    try:
        if len(text) > MAX_BYTES:
            raise _Wrong(f"larger than {MAX_BYTES >> 20} MiB: not a config")
        return _Builder().build(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except _Wrong as wrong:
        why = str(wrong)
    except UnicodeDecodeError as error:
        why = f"can't be read: not UTF-8 text, at byte {error.start}"
    except yaml.reader.ReaderError as error:
        why = f"not YAML: at character {error.position + 1}: U+{int(error.character):04X} can't be in it"
    except yaml.MarkedYAMLError as error:
        said = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        why = f"not YAML: {_where(error.problem_mark or error.context_mark)}{said}"
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # escapes such as "\U00110000"
        why = f"not YAML: {' '.join(str(error).split())}"
    raise UserError(f"{name}: {why}")


def parse_value(text: str, name: str) -> Any:
    """The value of a `key=value` word, as it would be read after `key:` in a file. Raises UserError as `parse_yaml`."""
    try:
        value = parse_yaml(text, name)
    except UserError as error:
        raise UserError(f"{error}; text that YAML would read as something else needs quotes: key='\"TEXT\"'") from None
    if value is None and text.lstrip().startswith("#"):
        raise UserError(f"{name}: what follows # is a comment to YAML; text needs quotes: key='\"#TEXT\"'")
    return value


def parse_options(
    pairs: Sequence[str], flag: str = "--option", form: str = "NAME=VALUE, e.g. s_churn=40"
) -> dict[str, Any]:
    """Options from words NAME=VALUE, the value YAML; of two with one name the last holds. Raises UserError, which names
    the command line's `flag` and the `form` of its words."""
    options = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"{flag} {shortened(pair)}: write {form}")
        options[name] = parse_value(text, f"{flag} {shortened(pair)}")
    return options


def parse_metric_options(pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options of metrics, by the metric's name, from words METRIC.NAME=VALUE. Raises UserError."""
    flag, form = "--metric-option", "METRIC.NAME=VALUE, e.g. kde.kernel=tophat"
    options: dict[str, dict[str, Any]] = {}
    for key, value in parse_options(pairs, flag, form).items():
        metric, _, name = key.rpartition(".")  # a metric of somebody else's has dots too
        if not metric or not name:
            raise UserError(f"{flag} {shortened(key)}: write {form}")
        options.setdefault(metric, {})[name] = value
    return options


def dump_yaml(value: Any) -> str:
    """A value as YAML that versions 1.1 and 1.2 read alike; `parse_yaml` gives it back equal."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


class _Wrong(Exception):
    """What a text says that can't be taken, with its place."""

    def __init__(self, why: str, mark: Any = None) -> None:
        super().__init__(f"{_where(mark)}{why}")


def _where(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""


@dataclass
class _Open:
    """A mapping or list whose end has not come yet. `num_values`: values in it and itself."""

    made: Any
    anchor: str | None
    num_values: int = 1
    key: str | None = None
    merge: bool = False
    merged: list[dict[str, Any]] = field(default_factory=list)
    lines: dict[str, int] = field(default_factory=dict)


class _Builder:
    """Makes a document's value of the parser's events, without recursion."""

    def __init__(self) -> None:
        self._open: list[_Open] = []
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._root: Any = None
        self._num_values = 0

    def build(self, text: str) -> Any:
        documents = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            mark = event.start_mark
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise _Wrong("a second document begins here; a file holds one", mark)
                if event.version is not None and tuple(event.version) != (1, 2):
                    raise _Wrong("%YAML names another version; values are read as of 1.2", mark)
            elif isinstance(event, yaml.AliasEvent):
                self._alias(event.anchor, mark)
            elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
                self._begin(event, mark)
            elif isinstance(event, yaml.CollectionEndEvent):
                self._end(mark)
        return self._root

    def _begin(self, event: Any, mark: Any) -> None:
        if event.tag is not None:
            tag = " ".join(event.tag.replace("tag:yaml.org,2002:", "!!").split())  # "!%0a" is one with a line's end
            raise _Wrong(f"tag {shortened(tag)}: tags are not read; write the value without one", mark)
        if isinstance(event, yaml.CollectionStartEvent):
            if len(self._open) >= MAX_DEPTH:
                raise _Wrong(f"nested too deeply, more than {MAX_DEPTH} levels: not a config", mark)
            if self._wants_key():
                raise _Wrong("a key must be a name, this is a mapping or a list", mark)
            self._open.append(_Open({} if isinstance(event, yaml.MappingStartEvent) else [], event.anchor))
            if event.anchor:
                self._anchors.pop(event.anchor, None)  # so that an alias within it is not one of an earlier value
            return
        plain = event.implicit[0]
        if self._wants_key():
            self._key(event.value, plain, mark)
            return
        value = _scalar(event.value, mark) if plain else _text(event.value, mark)
        self._add(value, 1, event.anchor, mark)

    def _wants_key(self) -> bool:
        return bool(self._open) and isinstance(self._open[-1].made, dict) and self._open[-1].key is None

    def _key(self, text: str, plain: bool, mark: Any) -> None:
        section = self._open[-1]
        if plain and not isinstance(_scalar(text, mark), str):
            raise _Wrong(f"a key must be a name, and {shortened(text) or 'nothing'} is none; put it in quotes", mark)
        if text in section.lines:
            raise _Wrong(f"key '{shortened(text)}' stands here again, after line {section.lines[text]}; keep one", mark)
        section.key, section.merge = _text(text, mark), plain and text == "<<"
        section.lines[text] = mark.line + 1

    def _alias(self, anchor: Any, mark: Any) -> None:
        if self._wants_key():
            raise _Wrong("a key must be a name, this is an alias", mark)
        if any(section.anchor == anchor for section in self._open) and anchor not in self._anchors:
            raise _Wrong(f"'*{shortened(anchor)}' stands within itself: not a config", mark)
        if anchor not in self._anchors:
            raise _Wrong(f"alias '*{shortened(anchor)}' has no anchor; text that begins with * needs quotes", mark)
        value, num_values = self._anchors[anchor]
        self._add(value, num_values, None, mark)

    def _end(self, mark: Any) -> None:
        section = self._open.pop()
        if isinstance(section.made, dict):
            for merged in section.merged:
                for key, value in merged.items():
                    section.made.setdefault(key, value)
        self._add(section.made, section.num_values, section.anchor, mark)

    def _add(self, value: Any, num_values: int, anchor: str | None, mark: Any) -> None:
        """Puts a finished value where it belongs."""
        if anchor:
            self._anchors[anchor] = value, num_values
        if not self._open:
            self._root = value
            return
        section = self._open[-1]
        section.num_values += num_values
        if section.num_values > MAX_VALUES:
            raise _Wrong(f"more than {MAX_VALUES} values (an alias counts as what it stands for): not a config", mark)
        if isinstance(section.made, list):
            section.made.append(value)
            return
        if section.merge:
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, dict) for part in parts):
                raise _Wrong("<< takes a mapping, or a list of them", mark)
            section.merged += parts
        else:
            assert section.key is not None
            section.made[section.key] = value
        section.key = None


def _scalar(text: str, mark: Any) -> Any:
    """The value of a plain scalar."""
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match[1] is not None
    if _INT.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise _Wrong(f"{shortened(text)} is too long for a number", mark)
        return int(text, _BASES.get(text[:2], 10))
    if _FLOAT.fullmatch(text):
        value = float(text)
        digits = re.split("[eE]", text)[0]
        if math.isinf(value) or (value == 0 and re.search("[1-9]", digits)):
            raise _Wrong(f"{shortened(text)} is too {'large' if value else 'small'} for a number", mark)
        return value
    if match := _NOT_FINITE.fullmatch(text):
        return math.nan if match[1] is None else math.copysign(math.inf, -1 if match[1] == "-" else 1)
    return _text(text, mark)


def _text(text: str, mark: Any) -> str:
    """A string, which must be one that files and messages can hold; escapes can make others."""
    if "\0" in text or any("\ud800" <= one <= "\udfff" for one in text):
        raise _Wrong(f"{shortened(ascii(text))} holds a character that no text has", mark)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes strings that are something else to YAML 1.1, as PyYAML does, or to 1.2: '1e-3', '089', '0o10'."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"(?:{_INT.pattern})$"), list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), list("-+0123456789."))
