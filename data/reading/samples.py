"""Samples of a packed data set by their numbers: neighbours in one request, each verified."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from scoreray.data.classes import NO_CLASS
from scoreray.data.fields.encoding import drawn_for_statistics
from scoreray.data.fields.field import FieldRequest
from scoreray.data.reading.field_values import FieldArrays, FieldDecoder, FieldTensors
from scoreray.data.reading.manifest import MANIFEST, Manifest
from scoreray.data.reading.order import RecordRange
from scoreray.data.reading.reader import Reader
from scoreray.data.storage.stats import ReadStats
from scoreray.data.storage.store import open_store


class SampleReader:
    """Samples of the data set at `url`, each verified by its digest; `sha256` is the manifest's."""

    def __init__(self, url: str, manifest: bytes | None = None) -> None:
        """manifest: its bytes, where they have been read already."""
        store = open_store(url)
        self.url = store.url()
        self._bytes = Manifest.read(store) if manifest is None else manifest
        self.manifest = Manifest.from_json(self._bytes, store.url(MANIFEST))
        self.sha256 = hashlib.sha256(self._bytes).hexdigest()
        self._reader = Reader(store, self.manifest, ReadStats())

    def __reduce__(self) -> tuple[Callable[[str, bytes], SampleReader], tuple[str, bytes]]:
        """To another process with the manifest's bytes, so that it reads nothing to open the data set, and opens it
        once."""
        return _opened, (self.url, self._bytes)

    def read(self, numbers: Sequence[int] | np.ndarray, *, draws: bool = False) -> tuple[Tensor, Tensor]:
        """(samples of the data set's target, labels int64 [n]) of ascending `numbers`; of images uint8 [n, C, H, W],
        of moments the means, or with `draws` a draw of each, as a run sees them. Raises as `read_fields`."""
        found = self.read_fields(numbers).fields
        target, label = self.manifest.target, self.manifest.label
        samples = found[target.name]
        if target.holds_moments:
            samples = drawn_for_statistics(samples) if draws else samples[:, : target.drawn_shape[0]]
        if target.kind == "image":  # by the strides of a single channel too: torch looks at these
            samples = samples.clone(memory_format=torch.contiguous_format)
        return samples, found[label.name] if label else torch.full((len(samples),), NO_CLASS)

    def read_fields(
        self, numbers: Sequence[int] | np.ndarray, fields: Sequence[FieldRequest] | None = None
    ) -> FieldTensors:
        """Fields of the samples of ascending `numbers`; None for the data set's target and its class.

        Raises IndexError for a number that is not there, UserError for fields that are not there or too long for a
        request, DataError (shard, sample, offset), StorageError.
        """
        decoder = FieldDecoder(self.manifest, fields)
        return decoder.tensors(self.read_arrays(numbers, decoder))

    def read_arrays(self, numbers: Sequence[int] | np.ndarray, decoder: FieldDecoder) -> FieldArrays:
        """The decoder's fields of the samples of ascending `numbers`, in numpy. Raises as `read_fields`."""
        self._check(numbers)
        members, records = self._reader.read(ranges(numbers, self._reader.first_samples), decoder.columns)
        out = decoder.empty(len(records))
        for row in decoder.decode_rows(records, members, out):
            name = partial(self._reader.name_of, int(numbers[row]))
            decoder.decode_row(records[row], [column[row] for column in members], out, row, name)
        return out

    def read_members(self, numbers: Sequence[int] | np.ndarray, members: Sequence[str]) -> list[list[bytes]]:
        """The bytes of each of these members (`Manifest.members`) of the samples of ascending `numbers`, as they are
        stored. Raises IndexError, DataError, StorageError."""
        self._check(numbers)
        columns = [self.manifest.members.index(one) for one in members]
        found, _ = self._reader.read(ranges(numbers, self._reader.first_samples), columns)
        return [[member for member in column if member is not None] for column in found]

    def _check(self, numbers: Sequence[int] | np.ndarray) -> None:
        for number in (numbers[0], numbers[-1]) if len(numbers) else ():
            if not 0 <= number < self.manifest.num_samples:
                raise IndexError(f"sample {number}: the data set has {self.manifest.num_samples}")


@lru_cache(maxsize=2)
def _opened(url: str, manifest: bytes) -> SampleReader:
    """In a process that gets one reader again and again: of a manifest of 1,000 shards this takes tens of ms."""
    return SampleReader(url, manifest)


def read_samples(url: str, numbers: Sequence[int] | np.ndarray) -> Tensor:
    """The samples of ascending `numbers`, uint8 [n, C, H, W] or float32 [n, ...]."""
    return SampleReader(url).read(numbers)[0]


def spread(count: int, total: int) -> np.ndarray:
    """`count` of the numbers 0 to total - 1, evenly spread, ascending; all of them where count is not less."""
    return np.arange(total) if count >= total else np.arange(count) * total // count


def ranges(numbers: Sequence[int] | np.ndarray, first_samples: np.ndarray) -> list[RecordRange]:
    """Ascending sample numbers as ranges of neighbours in a shard."""
    wanted = np.asarray(numbers, np.int64)
    if not len(wanted):
        return []
    shards = np.searchsorted(first_samples, wanted, side="right") - 1
    starts = np.flatnonzero((np.diff(wanted, prepend=-2) != 1) | (np.diff(shards, prepend=-1) != 0))
    ends = np.append(starts[1:], len(wanted))
    return [
        RecordRange(int(shards[i]), int(wanted[i] - first_samples[shards[i]]), int(j - i))
        for i, j in zip(starts, ends, strict=True)
    ]
