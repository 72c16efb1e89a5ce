"""The reference set of an evaluation: chosen samples of a packed data set, spread evenly over it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from scoreray.data.decode import decode
from scoreray.data.manifest import MANIFEST, Manifest
from scoreray.data.order import Run
from scoreray.data.reader import Reader, Stats
from scoreray.data.store import open_store


class ReferenceSet:
    """Samples of a packed data set by number, each verified by its digest; `sha256` is the manifest's."""

    def __init__(self, url: str) -> None:
        store = open_store(url)
        self.url = store.url()
        self.manifest = Manifest.load(store)
        self.sha256 = hashlib.sha256(store.get(MANIFEST)).hexdigest()
        self._reader = Reader(store, self.manifest, Stats())

    def read(self, numbers: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """(samples uint8 [n, C, H, W] or float32 [n, ...], labels int64 [n]) of ascending `numbers`."""
        manifest, reader = self.manifest, self._reader
        members, records = reader.read(runs(numbers, reader.first_samples))
        arrays = []
        for number, member, record in zip(numbers, members, records, strict=True):
            assert member is not None  # nothing is quarantined here
            name = partial(reader.name_of, int(number))
            dtype = np.dtype(manifest.dtype)
            array = decode(member, int(record["format"]), tuple(manifest.shape), dtype, name)
            arrays.append(array.transpose(2, 0, 1) if dtype == np.uint8 else array)
        labels = torch.from_numpy(records["label"].astype(np.int64))
        return torch.from_numpy(np.stack(arrays)), labels


def spread(count: int, total: int) -> np.ndarray:
    """`count` of the numbers 0 to total - 1, evenly spread, ascending; all of them where count is not less."""
    return np.arange(total) if count >= total else np.arange(count) * total // count


def runs(numbers: Sequence[int] | np.ndarray, first_samples: np.ndarray) -> list[Run]:
    """Ascending sample numbers as runs of neighbours in a shard."""
    found: list[Run] = []
    for number in numbers:
        shard = int(np.searchsorted(first_samples, number, side="right")) - 1
        place = int(number - first_samples[shard])
        last = found[-1] if found else None
        if last is not None and last.shard == shard and last.first + last.count == place:
            found[-1] = Run(shard, last.first, last.count + 1)
        else:
            found.append(Run(shard, place, 1))
    return found
