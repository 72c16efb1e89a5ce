"""Statistics of a field's values, from sums that are added up shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.field import Field

LEVELS = np.arange(256.0)


class ChannelMoments:
    """Sums of the values of each channel and of their squares: the last axis of images [H, W, C], the first of arrays.

    Those of bytes are exact in float64, so statistics do not depend on how the samples are put into shards.
    """

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        self._others = (0, 1) if dtype == "uint8" else tuple(range(1, len(shape)))
        self.sums, self.squares = np.zeros(shape[0]), np.zeros(shape[0])

    def add(self, array: np.ndarray) -> None:
        values = array.astype(np.float64)
        self.sums += values.sum(self._others)
        self.squares += np.square(values).sum(self._others)


@dataclass
class FieldMoments:
    """What a shard's values of one field add up to. Numbers have entries [C], one a channel: the last axis of images
    [H, W, C] and sequences [L, C], the first of arrays and vectors; a scalar has one.

    num_values: of a channel.  low, high: least and largest.  log_sums, log_squares: of log1p |x| with x's sign.
    longest: tokens of a sequence, bytes of a text.  class_counts: of a class field.  is_grey: all its images have one
    channel, where three are counted.
    """

    num_values: int = 0
    sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(0))
    low: np.ndarray = field(default_factory=lambda: np.zeros(0))
    high: np.ndarray = field(default_factory=lambda: np.zeros(0))
    log_sums: np.ndarray = field(default_factory=lambda: np.zeros(0))
    log_squares: np.ndarray = field(default_factory=lambda: np.zeros(0))
    longest: int = 0
    class_counts: list[int] = field(default_factory=list)
    is_grey: bool = True

    def __iadd__(self, other: FieldMoments) -> FieldMoments:
        self.num_values += other.num_values
        self.longest = max(self.longest, other.longest)
        self.is_grey = self.is_grey and other.is_grey
        self.class_counts += [0] * (len(other.class_counts) - len(self.class_counts))
        for number, count in enumerate(other.class_counts):
            self.class_counts[number] += count
        for name, merge in _MERGED.items():
            mine, its = getattr(self, name), getattr(other, name)
            if len(its):
                setattr(self, name, merge(mine, its) if len(mine) else its.copy())
        return self

    def described(self) -> dict[str, Any]:
        """As JSON; floats come back as they were."""
        return {name: value.tolist() if name in _MERGED else value for name, value in self.__dict__.items()}

    @staticmethod
    def from_described(found: dict[str, Any]) -> FieldMoments:
        arrays = {name: np.asarray(found[name], np.float64) for name in _MERGED}
        return FieldMoments(**{**found, **arrays})


_MERGED = {
    "sums": np.add, "squares": np.add, "low": np.minimum, "high": np.maximum, "log_sums": np.add,
    "log_squares": np.add,
}  # fmt: skip


class FieldCounter:
    """Adds up the values of one field. plain: of a data set of version 2, which keeps only means and deviations."""

    def __init__(self, of: Field, plain: bool) -> None:
        self.field, self.moments = of, FieldMoments()
        self._levels = np.zeros((of.shape[0], 256), np.int64) if of.kind == "image" else None
        self._channels = ChannelMoments(of.shape, of.dtype) if plain and of.kind == "array" else None

    def add(self, value: Any) -> None:
        """A value as `FieldValue` says; images as they are decoded, [H, W, 1] among others in colour too."""
        kind, moments = self.field.kind, self.moments
        if kind == "class":
            if value >= len(moments.class_counts):
                moments.class_counts += [0] * (value + 1 - len(moments.class_counts))
            if value >= 0:
                moments.class_counts[value] += 1
        elif kind in ("text", "json"):
            moments.longest = max(moments.longest, len(value.encode() if isinstance(value, str) else value))
        elif kind == "image":
            self._add_image(value)
        elif self._channels is not None:
            self._channels.add(value)
        else:
            self._add_numbers(as_floats(value, self.field.dtype))

    def _add_image(self, image: np.ndarray) -> None:
        """Of 256 levels a histogram has all sums, exactly, at less than the cost of one in floats."""
        assert self._levels is not None
        channels = image.shape[2]
        self.moments.is_grey = self.moments.is_grey and channels == 1
        for channel, levels in enumerate(self._levels):  # a grey picture among others in colour has all alike
            levels += np.bincount(image[:, :, min(channel, channels - 1)].ravel(), minlength=256)

    def _add_numbers(self, values: np.ndarray) -> None:
        if self.field.kind == "sequence":
            self.moments.longest = max(self.moments.longest, len(values))
            values = values.T
        variances: np.ndarray | float = 0.0
        if self.field.holds_moments:  # E x^2 of what is drawn is mean^2 + std^2; the rest is of the means
            values, stds = np.split(values, 2)
            variances = np.square(stds).reshape(self.field.num_channels, -1)
        values = values.reshape(self.field.num_channels, -1)
        if values.size:
            logs = np.copysign(np.log1p(np.abs(values)), values)
            squares = np.square(values) + variances
            self.moments += FieldMoments(
                values.shape[1], values.sum(1), squares.sum(1), values.min(1), values.max(1), logs.sum(1),
                np.square(logs).sum(1),
            )  # fmt: skip

    def finish(self) -> FieldMoments:
        """The sums of all that was added."""
        if self._channels is not None:
            self.moments.sums, self.moments.squares = self._channels.sums, self._channels.squares
        elif self._levels is not None and self._levels.any():
            used, logs = self._levels > 0, np.log1p(LEVELS)
            self.moments += FieldMoments(
                int(self._levels[0].sum()), self._levels @ LEVELS, self._levels @ LEVELS**2,
                used.argmax(1).astype(float), 255.0 - used[:, ::-1].argmax(1), self._levels @ logs,
                self._levels @ logs**2,
            )  # fmt: skip
        return self.moments


def as_floats(value: Any, dtype: str) -> np.ndarray:
    """float64, exactly; bfloat16 from its bits."""
    array = np.asarray(value)
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def check_finite(value: Any, of: Field) -> None:
    """Raises DataError naming the field and the index of the first value that is not finite."""
    array = as_floats(value, of.dtype) if of.dtype == "bfloat16" else np.asarray(value)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        at = np.argwhere(~np.isfinite(array))[0].tolist()
        raise DataError(f"field '{of.name}': {array[tuple(at)]} at {at or 'its only value'}; all must be finite")


def with_statistics(of: Field, total: FieldMoments) -> Field:
    """The field, with the statistics of all its values, its longest length and the classes that were found. Raises
    UserError where its normalisation would divide by zero."""
    if of.kind == "class":
        names = of.classes or [str(number) for number in range(len(total.class_counts))]
        counts = total.class_counts + [0] * (len(names) - len(total.class_counts))
        return replace(of, classes=names, class_counts=counts)
    shape = [max(1, total.longest), *of.shape[1:]] if of.is_varying else of.shape
    if not total.num_values:
        return replace(of, shape=shape)
    keep = slice(0, 1) if of.kind == "image" and total.is_grey else slice(None)
    mean, std = _mean_and_std(total.sums[keep], total.squares[keep], total.num_values)
    log_mean, log_std = _mean_and_std(total.log_sums[keep], total.log_squares[keep], total.num_values)
    low, high = total.low[keep], total.high[keep]
    if not all(np.isfinite(one).all() for one in (mean, std)):
        raise UserError(
            f"field '{of.name}': values up to {max(abs(low.min()), high.max()):.3g} are too large to square; "
            "scale the values before they are packed"
        )
    if of.encoding is not None and of.normalisation == "channel" and not (std > 0).all():
        of = replace(of, normalisation="none")  # a channel that its encoder never uses: seen once all is encoded
    _check_spread(of, {"channel": std, "log1p": log_std, "range": high - low}.get(of.normalisation), low)
    shape = [len(mean), *shape[1:]] if of.kind == "image" else shape
    return replace(
        of, shape=shape, mean=mean.tolist(), std=std.tolist(), low=low.tolist(), high=high.tolist(),
        log_mean=log_mean.tolist(), log_std=log_std.tolist(),
    )  # fmt: skip


def _check_spread(of: Field, spread: np.ndarray | None, low: np.ndarray) -> None:
    if spread is not None and not (spread > 0).all():
        channel = int(np.argmin(spread > 0))
        raise UserError(
            f"--normalise {of.name}={of.normalisation}: channel {channel} of {len(spread)} is {low[channel]:g} in all "
            f"samples, and can't be divided by its spread; pack '{of.name}' without it, or leave out the channel"
        )


def statistics(
    sums: np.ndarray, squares: np.ndarray, num_values: int, dtype: str
) -> tuple[list[float], list[float], float]:
    """(mean of each channel, standard deviation of each, standard deviation of all values) in the model's range."""
    mean, std = _mean_and_std(sums, squares, num_values / len(sums))
    _, overall = _mean_and_std(sums.sum(), squares.sum(), num_values)
    if dtype == "uint8":
        return (mean / 127.5 - 1).tolist(), (std / 127.5).tolist(), float(overall / 127.5)
    return mean.tolist(), std.tolist(), float(overall)


def _mean_and_std(sums: np.ndarray, squares: np.ndarray, count: float) -> tuple[np.ndarray, np.ndarray]:
    mean = sums / count
    variance = squares / count - mean**2
    # A variance below float32's resolution is rounding of a constant, e.g. a channel that is 1000 everywhere.
    return mean, np.sqrt(np.where(variance > 1e-14 * mean**2, variance, 0.0))
