"""Scorers: a user's own program that says how well samples match what was requested, named as `package.module:Name`.

A classifier of a class that was requested, the error of a field's regression, the similarity of a text's and an
image's features: each is a function of samples and requested values. Its weights are its own affair; nothing is
downloaded here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.own_code import instance, line_of


class Scorer(Protocol):
    def __call__(self, samples: Tensor, requested: Mapping[str, Sequence[Any]]) -> Mapping[str, Tensor]:
        """Scores by name, each one a sample: [B], finite; the first is the metric's value.

        samples: [B, ...] in the data's own units, uint8 [B, C, H, W] of images. requested: what was requested of each
        sample by condition: a text as str, a class as its name, anything else as a tensor in the data's own units;
        None where nothing was.
        """
        ...


def load_scorer(name: str) -> Scorer:
    """The scorer of this name: `Name()` where it is a class, else itself. Raises UserError."""
    return instance(name, "--scorer")  # type: ignore[no-any-return]


def scores_of(scorer: Scorer, name: str, samples: Tensor, requested: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    """Its scores, float64. Raises UserError where it fails, or gives something else."""
    try:
        found = {key: value.double().cpu() for key, value in scorer(samples, requested).items()}
    except Exception as error:
        known = ", ".join(requested) or "nothing"
        raise UserError(f"--scorer {name}: failed, given {known}: {line_of(error)}") from error
    wrong = [f"'{key}' of shape {list(value.shape)}" for key, value in found.items() if value.shape != (len(samples),)]
    if wrong or not found:
        raise UserError(f"--scorer {name}: gave {wrong[0] if wrong else 'no score'}, [{len(samples)}] is needed")
    for key, value in found.items():
        if not value.isfinite().all():
            wrong_one = float(value[~value.isfinite()][0])
            raise UserError(f"--scorer {name}: '{key}' is {wrong_one} for a sample; scores must be finite")
    return found
