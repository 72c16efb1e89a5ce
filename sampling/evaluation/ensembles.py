"""The chunks of ensembles: members drawn under the conditions of records of the reference, scored against the records.

Record i of an evaluation has members i M, ..., (i + 1) M - 1, each with the seed of its number: so an ensemble does not
depend on which others are drawn with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoreray.sampling.evaluation.loaded import once
from scoreray.sampling.evaluation.sample_chunks import drawn
from scoreray.sampling.measures.ensembles import EnsembleScores
from scoreray.sampling.measures.held_out import HeldOut, read_held_out
from scoreray.sampling.measures.scorer import load_scorer, scores_of
from scoreray.sampling.metrics.chunks import EnsembleChunk
from scoreray.sampling.metrics.plan import Chunk, EvaluationInputs, EvaluationPlan

SHOWN = 3  # records whose ensembles are drawn on the page
PART = 1024  # records whose conditions are hashed at once


def num_ensembles(inputs: EvaluationInputs) -> int:
    return inputs.at_most(inputs.settings.ensembles)


def condition_hashes(inputs: EvaluationInputs) -> dict[str, str]:
    """SHA-256 of the conditions that ensembles are drawn under, by name, as the reference has them."""

    def hashed() -> dict[str, str]:
        found: dict[str, Any] = {}
        numbers = inputs.numbers(num_ensembles(inputs))
        for first in range(0, len(numbers), PART):
            rows = read_held_out(inputs.reference, numbers[first : first + PART], inputs.info)
            for name, values in rows.requested.items():
                found.setdefault(name, hashlib.sha256()).update(b"".join(map(_as_bytes, values)))
        return {name: digest.hexdigest() for name, digest in found.items()}

    return once("condition hashes", (inputs.reference.sha256, num_ensembles(inputs)), hashed)


def ensemble_chunk(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> EnsembleChunk:
    """Draws and scores the ensembles of some records."""
    inputs, size = plan.inputs, plan.inputs.settings.per_condition
    assert rows.condition is not None  # the plan has refused models without conditions
    row, observed = torch.arange(chunk.size * size) // size, rows.images
    members = drawn(inputs, chunk.first * size, chunk.last * size, rows.condition, row).unflatten(0, (-1, size))
    scores = EnsembleScores.of(members, observed)
    shown = SHOWN if chunk.number == 0 else 0
    names, of_members, of_observed = list[str](), np.zeros((len(observed), size, 0)), np.zeros((len(observed), 0))
    if "match" in plan.metrics:
        scorer = inputs.settings.scorer
        repeated = {name: [value for value in values for _ in range(size)] for name, values in rows.requested.items()}
        found = _scored(scorer, members.flatten(0, 1), repeated)
        names, of_members = list(found), _stacked(found).reshape(len(observed), size, -1)
        of_observed = _stacked(_scored(scorer, observed, rows.requested))
    return EnsembleChunk(
        scores.crps.numpy(),
        scores.variance.numpy(),
        scores.squared_error.numpy(),
        members[:shown].numpy(),
        observed[:shown].numpy(),
        np.array(names, dtype=np.str_),
        of_members,
        of_observed,
    )


def _scored(name: str, samples: Tensor, requested: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    return scores_of(once("scorer", name, lambda: load_scorer(name)), name, samples, requested)


def _stacked(scores: Mapping[str, Tensor]) -> np.ndarray:
    """[B, scores]."""
    return torch.stack(list(scores.values()), 1).numpy()


def _as_bytes(value: Any) -> bytes:
    """One requested value for a hash, its length first."""
    is_tensor = isinstance(value, Tensor)
    data = value.reshape(-1).view(torch.uint8).numpy().tobytes() if is_tensor else str(value).encode()
    return len(data).to_bytes(8, "little") + data
