"""Codes of samples beside what is known of these: the input of every metric of representations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from scoreray.data.classes import NO_CLASS
from scoreray.data.errors import UserError, nearest
from scoreray.data.extras import check_installed
from scoreray.data.fields.field import Field, FieldRequest
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import SampleReader
from scoreray.sampling.measures.distances import Estimate, jackknife

GROUPS = 10  # of samples, of which each is left out in turn for an error
HELD_OUT = 4  # one sample in so many is not learnt from
FEWEST_SAMPLES = 4 * GROUPS


@dataclass(frozen=True)
class CodeScore:
    """A metric's value; parts of it by name, such as each factor's; what else stands beside it in a record."""

    estimate: Estimate
    parts: dict[str, Estimate] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Factor:
    """What is known of each sample. values: float64 [n], the number of a class, or a number; NaN where it is not known.
    num_classes: 0 of a number."""

    name: str
    values: np.ndarray
    num_classes: int = 0

    def binned(self, bins: int) -> np.ndarray:
        """int64 [n] from 0: classes as they are, numbers in so many equal intervals of their range."""
        return self.values.astype(np.int64) if self.num_classes else equal_bins(self.values[:, None], bins)[:, 0]


@dataclass(frozen=True)
class LabelledCodes:
    """codes: float64 [n, d]. factors: of the same samples."""

    codes: np.ndarray
    factors: tuple[Factor, ...]

    def chosen(self, names: str, *, fewest: int = 1, classes_alone: bool = False) -> LabelledCodes:
        """With the factors of these names (commas between; "": all of them), and the samples of which all are known.

        Raises UserError where there is none of a name, fewer than `fewest` of them or too few samples.
        """
        there = {one.name: one for one in self.factors if one.num_classes or not classes_alone}
        wanted = [name.strip() for name in names.split(",") if name.strip()] or list(there)
        for name in wanted:
            if name not in there:
                what = "class" if classes_alone else "class or scalar"
                raise UserError(f"factors = {name}: no field of kind {what} is called that; {nearest(name, there)}")
        if len(wanted) < fewest:
            raise UserError(
                f"factors: {', '.join(wanted) or 'none'}; {fewest} or more are needed, fields of kind class or scalar "
                "of the data set"
            )
        factors = [there[name] for name in dict.fromkeys(wanted)]
        known = np.isfinite(np.stack([one.values for one in factors])).all(0) & np.isfinite(self.codes).all(1)
        if known.sum() < FEWEST_SAMPLES:
            raise UserError(
                f"factors = {','.join(one.name for one in factors)}: {known.sum()} samples have all of them and finite "
                f"codes; {FEWEST_SAMPLES} are needed"
            )
        for one in factors:
            if len(np.unique(one.values[known])) < 2:
                raise UserError(f"factors = {one.name}: it is the same for all samples, so nothing depends on it")
        return LabelledCodes(self.codes[known], tuple(replace(one, values=one.values[known]) for one in factors))


def factor_fields(manifest: Manifest) -> list[Field]:
    """Fields that may be factors: of kind class or scalar, but what is modelled by default."""
    return [one for one in manifest.fields if one.is_inline and one.name != manifest.target.name]


def read_factors(reader: SampleReader, numbers: np.ndarray) -> np.ndarray:
    """Of samples of ascending `numbers`, float64 [n, factor fields]; NaN of a sample without a class."""
    fields = factor_fields(reader.manifest)
    if not fields:
        return np.zeros((len(numbers), 0))
    found = reader.read_fields(numbers, [FieldRequest(one.name) for one in fields]).fields
    columns = [found[one.name].view(-1).double().numpy() for one in fields]
    for one, column in zip(fields, columns, strict=True):
        if one.kind == "class":
            column[column == NO_CLASS] = np.nan
    return np.stack(columns, 1)


def factors_of(manifest: Manifest, values: np.ndarray) -> tuple[Factor, ...]:
    """Of what `read_factors` read."""
    return tuple(Factor(one.name, values[:, i], len(one.classes)) for i, one in enumerate(factor_fields(manifest)))


def equal_bins(values: np.ndarray, bins: int) -> np.ndarray:
    """Columns of float64 [n, d] in equal intervals of each one's range, int64 [n, d] from 0 (`np.histogram`'s bins, as
    disentanglement_lib takes them)."""
    low, high = values.min(0), values.max(0)
    width = np.where(high > low, high - low, 1.0)
    return np.minimum((values - low) / width * bins, bins - 1).astype(np.int64)


def held_out(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and rows to test on, by chance, always the same ones."""
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[count // HELD_OUT :]), np.sort(order[: count // HELD_OUT])


def group_numbers(count: int) -> np.ndarray:
    """Which of GROUPS each row is in, by chance: data sets are packed by class, or in turn."""
    return np.random.default_rng(0).permutation(count) % GROUPS


def leave_groups_out(score: Callable[[np.ndarray], float], count: int) -> Estimate:
    """A score of rows out of `count`: of all, and its error from leaving out each of GROUPS groups of them."""
    groups = group_numbers(count)

    def of(kept: Sequence[int]) -> float:
        return score(np.flatnonzero(np.isin(groups, kept)))

    return jackknife(lambda rows: of(rows.tolist()), GROUPS)


@contextmanager
def scikit_learn() -> Iterator[None]:
    """scikit-learn and BLAS on one thread inside: how a sum is cut is part of a result.

    Raises UserError where it is not installed."""
    check_installed("evaluate", "this metric", "sklearn")
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        yield
