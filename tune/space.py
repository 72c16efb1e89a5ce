"""A search space: dimensions over dotted keys of a run's config, and of how its samples are drawn.

    space:
      objective.weighting.kind: {choice: [edm, min_snr]}
      objective.weighting.gamma: {log: [0.5, 50], when: {objective.weighting.kind: min_snr}}
      objective.sigma_sampling.P_mean: {uniform: [-2.5, 0.5]}
      network.num_layers: {int: [1, 4]}
      sample.steps: {int: [4, 64], log: true}

Keys that begin with `sample.` say how a model is drawn from, so trials that differ in them alone share one run.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator

from scoreray.trainer.config import Section, kinds_first, set_key, with_default_kinds

SAMPLE = "sample."
SAMPLE_KEYS = ("sampler", "steps", "grid", "guidance", "ema")
OPTION = "sample.options."
LEVEL = "sample.levels."  # a noise level each; together, sorted, they are the grid
Values = dict[str, Any]


class DimensionSection(Section):
    """One dimension as it is written: exactly one of `uniform`, `log`, `int` (both ends included) and `choice`.

    `log: true` beside `int`: even in the logarithm. `when`: keys of other dimensions (or of the base config) and the
    values of them at which this one exists.
    """

    uniform: tuple[float, float] | None = None
    log: tuple[float, float] | bool | None = None
    integer: tuple[int, int] | None = Field(None, alias="int")
    choice: tuple[Any, ...] | None = None
    when: dict[str, Any] = {}  # noqa: RUF012 (pydantic copies it)

    @model_validator(mode="after")
    def _one_kind(self) -> DimensionSection:
        given = [name for name in ("uniform", "choice") if getattr(self, name) is not None]
        given += ["int"] if self.integer is not None else []
        given += ["log"] if isinstance(self.log, tuple) else []
        if len(given) != 1:
            what = "none is given" if not given else f"{' and '.join(given)} are given"
            raise ValueError(f"a dimension is one of uniform, log, int and choice; {what}")
        if self.log is True and self.integer is None:
            raise ValueError("log: true is for int; for a real number write log: [low, high]")
        return self


@dataclass(frozen=True)
class Dimension:
    """One searched key: "float" or "int" with [low, high], or "choice". `when`: (key, values at which it exists)."""

    key: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()
    when: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def corners(self) -> list[Any]:
        """Every choice, or both ends."""
        return list(self.choices) if self.kind == "choice" else [self._typed(self.low), self._typed(self.high)]

    def at(self, u: float) -> Any:
        """The value at u in [0, 1]."""
        if self.kind == "choice":
            return self.choices[min(int(u * len(self.choices)), len(self.choices) - 1)]
        if self.kind == "int" and not self.log:
            return min(int(self.low + u * (self.high - self.low + 1)), int(self.high))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + u * (high - low)
        return self._typed(min(max(math.exp(value) if self.log else value, self.low), self.high))

    @property
    def categories(self) -> list[Any]:
        """The choices as searchers take them: themselves, or their JSON where a choice is a section or a list."""
        return [one if one is None or isinstance(one, bool | int | float | str) else json.dumps(one, sort_keys=True)
                for one in self.choices]  # fmt: skip

    def encoded(self, value: Any) -> Any:
        """A value as searchers take it."""
        return self.categories[self.choices.index(value)] if self.kind == "choice" else value

    def decoded(self, value: Any) -> Any:
        """The value of what a searcher gave, within the bounds: some round past them."""
        if self.kind == "choice":
            return self.choices[self.categories.index(value)]
        return self._typed(min(max(value, self.low), self.high))

    def contains(self, value: Any) -> bool:
        if self.kind == "choice":
            return value in self.choices
        return isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high

    def grid(self, points: int) -> list[Any]:
        """Every choice or integer where they are few, else `points` even ones."""
        if self.kind == "choice":
            return list(self.choices)
        if self.kind == "int" and self.high - self.low < points:
            return list(range(int(self.low), int(self.high) + 1))
        made = [self.at((i + 0.5) / points if self.kind == "int" and not self.log else i / max(1, points - 1))
                for i in range(points)]  # fmt: skip
        return list(dict.fromkeys(made))

    def _typed(self, value: float) -> Any:
        return round(value) if self.kind == "int" else float(value)


@dataclass(frozen=True)
class Space:
    """Dimensions in an order in which each comes after those that it depends on."""

    dimensions: tuple[Dimension, ...]

    @property
    def trains(self) -> bool:
        """Whether any dimension changes what is trained."""
        return any(not one.key.startswith(SAMPLE) for one in self.dimensions)

    def active(self, dimension: Dimension, values: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
        """Whether a dimension exists where those before it have `values`; what is not searched is as in `base`."""
        names = {one.key for one in self.dimensions}
        for key, accepted in dimension.when:
            there = values.get(key) if key in names else base.get(key)
            if there not in accepted:
                return False
        return True

    def encoded(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's values as searchers take them, and as Ray Tune shows them."""
        return {one.key: one.encoded(values[one.key]) for one in self.dimensions if one.key in values}

    def decoded(self, config: Mapping[str, Any], base: Mapping[str, Any]) -> Values:
        """A trial's values of what a searcher gave, without the dimensions that do not exist beside the others."""
        values: Values = {}
        for one in self.dimensions:
            if self.active(one, values, base):
                values[one.key] = one.decoded(config[one.key])
        return values

    def draw(self, rng: random.Random, base: Mapping[str, Any]) -> Values:
        """Values of every dimension that exists, at random."""
        values: Values = {}
        for one in self.dimensions:
            u = rng.random()  # drawn also where it does not exist, so that conditions do not shift the others
            if self.active(one, values, base):
                values[one.key] = one.at(u)
        return values

    def grid(self, points: int, base: Mapping[str, Any]) -> list[Values]:
        """All combinations, `points` on each range."""
        found: list[Values] = [{}]
        for one in self.dimensions:
            found = [
                {**values, one.key: value} if exists else values
                for values in found
                for exists in [self.active(one, values, base)]
                for value in (one.grid(points) if exists else [None])
            ]
        return found

    def corners(self, base: Mapping[str, Any]) -> Iterable[tuple[Dimension, Any, Values]]:
        """(dimension, value, all values) for each end and choice of each dimension, with its conditions met."""
        for one in self.dimensions:
            for value in one.corners():
                values = self._meeting(one, {})
                values[one.key] = value
                for other in self.dimensions:  # conditions of conditions, and whatever must be there with them
                    if other.key not in values and self.active(other, values, base):
                        values[other.key] = other.corners()[0]
                ordered = {d.key: values[d.key] for d in self.dimensions if d.key in values}
                yield one, value, ordered

    def _meeting(self, dimension: Dimension, values: Values) -> Values:
        by_key = {one.key: one for one in self.dimensions}
        for key, accepted in dimension.when:
            if key in by_key:
                values = self._meeting(by_key[key], values)
                values[key] = accepted[0]
        return values


def build_space(sections: Mapping[str, DimensionSection]) -> tuple[Space | None, list[str]]:
    """The space of a sweep, and every mistake that shows without a run's config."""
    mistakes: list[str] = []
    made = {key: _dimension(key, section, mistakes) for key, section in sections.items()}
    for one in made.values():
        for key, accepted in one.when:
            other = made.get(key)
            if other is None:
                continue  # a key of the base config, which is fixed: looked at later
            bad = [value for value in accepted if not other.contains(value)]
            if bad:
                mistakes.append(f"space.{one.key}.when: {key} is never {bad[0]!r}; it is {_described(other)}")
    mistakes += _overlaps(made)
    order = _ordered(made, mistakes)
    if not sections:
        mistakes.append(
            "space: is empty; give at least one dimension, e.g. optimizer.learning_rate: {log: [1e-5, 1e-2]}"
        )
    return (None if mistakes else Space(tuple(order))), mistakes


def with_values(raw: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A config as a dict, with dotted keys set; a new `kind` replaces its section, as on the command line."""
    made = with_default_kinds(raw)
    for key, value in sorted(values.items(), key=lambda item: kinds_first(item[0])):
        if not key.startswith(SAMPLE):
            set_key(made, key, value, key)
    return made


def inside(key: str, section: str) -> bool:
    """Whether a dotted key is a section's own or of one of its keys."""
    return key == section or key.startswith(section + ".")


def flat(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested dict."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        found |= flat(value, name) if isinstance(value, dict) else {name: value}
    return found


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """As few of the last words of each dotted key as distinguish it from the others."""
    found = {}
    for key in keys:
        words = key.split(".")
        for count in range(1, len(words) + 1):
            found[key] = ".".join(words[-count:])
            if sum(other == key or other.endswith("." + found[key]) for other in keys) == 1 and found[key] != "kind":
                break
    return found


def _dimension(key: str, section: DimensionSection, mistakes: list[str]) -> Dimension:
    when = tuple((name, tuple(v) if isinstance(v, list | tuple) else (v,)) for name, v in section.when.items())
    mistakes += [f"space.{key}.when.{name}: no value is accepted; give one or a list" for name, v in when if not v]
    if section.choice is not None:
        if not section.choice:
            mistakes.append(f"space.{key}: choice is empty; give at least one value")
        choices = tuple(section.choice)
        if any(choices.count(one) > 1 for one in choices):
            mistakes.append(f"space.{key}: choice {list(choices)} names a value twice")
        return Dimension(key, "choice", choices=choices, when=when)
    log = section.log is True or isinstance(section.log, tuple)
    ends: Sequence[float] = section.integer or section.uniform or section.log  # type: ignore[assignment]
    low, high = ends
    if low > high:
        mistakes.append(f"space.{key}: [{low}, {high}] is reversed; write [{high}, {low}]")
    elif low == high:
        mistakes.append(f"space.{key}: [{low}, {high}] is empty; widen it, or set the key in the base config")
    elif log and low <= 0:
        mistakes.append(f"space.{key}: log [{low}, {high}] must be above 0")
    return Dimension(key, "int" if section.integer else "float", low, high, log, when=when)


def _overlaps(made: Mapping[str, Dimension]) -> list[str]:
    """Sections searched beside their own keys, where one value of a trial would overwrite the other."""
    found = [
        f"space.{section}: sets space.{key} too, so one would undo the other; search the section or its keys, not both"
        for section in made
        for key in made
        if key != section and inside(key, section)
    ]
    found += [
        f"space.{one.key}.when: {key} is in space.{section}, which is searched whole; search its keys instead"
        for one in made.values()
        for key, _ in one.when
        for section in made
        if key != section and inside(key, section)
    ]
    return found


def _ordered(made: Mapping[str, Dimension], mistakes: list[str]) -> list[Dimension]:
    """Those depended on first, `kind`s before the keys of their section, else as written."""
    order: list[Dimension] = []
    waiting = sorted(made.values(), key=lambda one: kinds_first(one.key))
    while waiting:
        done = {one.key for one in order}
        ready = [one for one in waiting if all(key in done or key not in made for key, _ in one.when)]
        if not ready:
            mistakes.append(f"space.{waiting[0].key}.when: depends on itself, through {waiting[0].when[0][0]}")
            break
        order.append(ready[0])
        waiting.remove(ready[0])
    return order


def _described(dimension: Dimension) -> str:
    if dimension.kind == "choice":
        return "one of " + ", ".join(map(str, dimension.choices))
    return f"in [{dimension.low:g}, {dimension.high:g}]"
