"""The stored chunks of an evaluation as its metrics and its page read them: one at a time, or some rows of all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from scoreray.data.reading.samples import spread
from scoreray.sampling.metrics.chunks import ChunkArrays, FeatureChunk, read_chunk
from scoreray.sampling.metrics.plan import Chunk, EvaluationInputs, EvaluationPlan

C = TypeVar("C", bound=ChunkArrays)


@dataclass(frozen=True)
class StoredChunks:
    """The chunks of a plan that are all stored, as metrics read them. chunks: of every stage, in order."""

    plan: EvaluationPlan
    chunks: Mapping[str, Sequence[Chunk]]

    @property
    def inputs(self) -> EvaluationInputs:
        return self.plan.inputs

    def each(self, stage: str, kind: type[C]) -> Iterator[C]:
        """Each chunk of a stage, in order, one at a time."""
        store = self.plan.folder(stage)
        for chunk in self.chunks[stage]:
            yield read_chunk(store, chunk.key, kind)

    def rows(self, stage: str, name: str, most: int | None = None) -> Tensor:
        """An array of a `FeatureChunk`: at most `num_rows` (or `most`) of its rows, spread evenly over all chunks."""
        chunks = self.chunks[stage]
        wanted = spread(self.inputs.num_rows if most is None else most, chunks[-1].last)
        parts = []
        for chunk, stored in zip(chunks, self.each(stage, FeatureChunk), strict=True):
            inside = wanted[(wanted >= chunk.first) & (wanted < chunk.last)] - chunk.first
            parts.append(getattr(stored, name)[inside])
        return joined(parts)

    def both(self, name: str) -> tuple[Tensor, Tensor]:
        """Rows of the samples and of the reference."""
        return self.rows("samples", name), self.rows("reference", name)


def joined(parts: Iterable[np.ndarray]) -> Tensor:
    """Arrays of several chunks as one tensor, along their first dimension."""
    return torch.from_numpy(np.concatenate(list(parts)))
