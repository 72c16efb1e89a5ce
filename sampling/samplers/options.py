"""Options of samplers and metrics: name, type, range and default are in a function's signature, and checked from it."""

from __future__ import annotations

import functools
import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scoreray.data.errors import UserError, did_you_mean, nearest, shortened
from scoreray.data.own_code import is_own
from scoreray.data.yaml_text import parse_value
from scoreray.trainer.diffusion.process import PROCESSES, GaussianProcess, process_of


@dataclass(frozen=True)
class Range:
    """Bounds of a number, to stand in an Annotated[float, Range(...)] of a signature.

    Both are finite: what is made of any number between them must be one that float32 holds, as PyTorch refuses
    others in the middle of the work.
    """

    low: float
    high: float
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.open_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class OrOwn:
    """Stands in an Annotated[Literal[...], OrOwn()]: one of the words, or `package.module:Name`."""


@dataclass(frozen=True)
class Option:
    """One option of a function: `kind` is its type; `bounds` for numbers, `choices` for words. or_own: whether it may
    name code of somebody else's instead of a word."""

    name: str
    kind: type
    default: Any
    bounds: Range | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    or_own: bool = False

    @property
    def accepted(self) -> str:
        """What may be given, in words for a message."""
        if self.choices:
            what = "one of " + ", ".join(self.choices) + (", or package.module:Name" if self.or_own else "")
        elif self.is_process:
            what = f"a process: {', '.join(PROCESSES)}, or its section as {{kind: vp, beta_max: 10}}"
        elif self.bounds is not None:  # of every number
            what = f"{'an integer' if self.kind is int else 'a number'} in {self.bounds}"
        else:
            what = "true or false" if self.kind is bool else "a text" if self.kind is str else f"a {self.kind.__name__}"
        return what + (" or none" if self.optional else "")

    @property
    def is_process(self) -> bool:
        return self.kind is GaussianProcess

    @property
    def is_unbounded(self) -> bool:
        """A number without bounds, which accepts none, or an option that must be given: a mistake in the function."""
        return self.default is inspect.Parameter.empty or (self.kind in (int, float) and self.bounds is None)

    def check(self, value: Any) -> Any:
        """`value`, as this option's type; raises UserError."""
        if value is None and self.optional:
            return None
        if self.is_process:
            if value == "none":  # as messages and the page write it
                return None
            try:
                return process_of(value)
            except UserError as error:
                raise UserError(f"{self.name} = {shortened(repr(value))}: {error}") from None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        inside = number and self.bounds is not None and value in self.bounds
        fits = {
            bool: isinstance(value, bool),
            str: isinstance(value, str)
            and (not self.choices or value in self.choices or (self.or_own and is_own(value))),
            int: inside and value == int(value),
            float: inside,
        }.get(self.kind, isinstance(value, self.kind))
        if not fits:
            hint = did_you_mean(value, self.choices) if self.choices and isinstance(value, str) else ""
            raise UserError(f"{self.name} = {shortened(repr(value))}: {hint}must be {self.accepted}")
        return self.kind(value) if self.kind in (bool, str, int, float) else value


@functools.cache
def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The options of a sampler or a metric by name: the keyword-only parameters of its function."""
    hints = typing.get_type_hints(function, include_extras=True)
    keyword_only = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for one in keyword_only:
        if one.name not in hints:
            raise TypeError(f"option '{one.name}' has no type")
    return {p.name: _option(p.name, hints[p.name], p.default) for p in keyword_only}


def check_options(
    name: str, function: Callable[..., Any], options: Mapping[str, Any], what: str = "sampler"
) -> dict[str, Any]:
    """`options` checked against the signature of `function`, which is the `what` of that name. Raises UserError that
    names the nearest option."""
    known = options_of(function)
    for key in options:
        if key not in known:
            have = nearest(key, known) if known else "it takes none"
            raise UserError(f"{what} '{name}' has no option '{shortened(str(key))}': {have}")
    return {key: known[key].check(value) for key, value in options.items()}


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Words of a command line from which `parse_options` gets these options back equal."""
    return [word for name, value in options.items() for word in ("--option", f"{name}={_as_text(value)}")]


def _as_text(value: Any) -> str:
    """YAML of a value in one line, as a person would write it."""
    try:
        if parse_value(str(value), "") == value:
            return str(value)
    except UserError:
        pass
    return json.dumps(value)


def _option(name: str, hint: Any, default: Any) -> Option:
    mark, optional = None, False
    if typing.get_origin(hint) is typing.Annotated:
        hint, mark = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        hint, optional = next(part for part in typing.get_args(hint) if part is not type(None)), True
    if typing.get_origin(hint) is Literal:
        return Option(name, str, default, None, typing.get_args(hint), optional, isinstance(mark, OrOwn))
    return Option(name, hint, default, mark, (), optional)
