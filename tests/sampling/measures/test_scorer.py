"""Scorers of a user's own: what they may give, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.measures.scorer import load_scorer, scores_of


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "gave no score"),
        ({"hit": torch.zeros(2)}, r"gave 'hit' of shape \[2\], \[3\] is needed"),
        ({"hit": torch.tensor([0.0, float("nan"), 1.0])}, "'hit' is nan for a sample"),
    ],
)
def test_what_is_no_score_of_each_sample_is_refused(given: Mapping[str, Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scores_of(lambda samples, requested: given, "mine:Scorer", torch.zeros(3, 1), {})


def test_scores_are_float64_and_a_name_that_is_not_there_is_refused() -> None:
    found = scores_of(lambda samples, requested: {"hit": samples[:, 0] > 0}, "mine:Scorer", torch.ones(3, 1), {})
    assert found["hit"].dtype == torch.float64
    for name in ("no_colon", "scoreray.data.shapes:Missing", "not_there:Scorer"):
        with pytest.raises(UserError, match=f"--scorer '?{name}"):
            load_scorer(name)
