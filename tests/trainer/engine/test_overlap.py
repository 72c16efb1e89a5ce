"""Gradients summed behind the backward pass are those summed after it, on two ranks, whatever gets no gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scoreray.trainer.engine.buckets import LARGEST, SMALLEST, bucket_elements

RANKS = Path(__file__).with_name("overlap_ranks.py")
CASES = ("plain", "micro", "half", "second", "no rank", "one rank")


@pytest.fixture(scope="module")
def facts(
    run_ranks: Callable[..., str], free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> list[dict]:
    """Of both ranks: a case's name -> gradients, and the order of events in its first step."""
    folder = tmp_path_factory.mktemp("overlap")
    run_ranks(RANKS, str(folder), str(free_port()))
    return [json.loads((folder / f"facts-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_the_sum_is_that_of_one_collective_after_the_backward_pass(facts: list[dict], name: str) -> None:
    """Micro-batches, bf16 weights, a second derivative, and parameters that get no gradient on one rank or on both."""
    for rank in facts:
        torch.testing.assert_close(torch.tensor(rank[name]["gradient"]), torch.tensor(rank[name]["reference"]))
        assert rank[name]["gradient"] == facts[0][name]["gradient"]
        assert sum(value != 0 for value in rank[name]["gradient"]) > 200


@pytest.mark.parametrize("name", CASES)
def test_three_steps_twice_give_the_same_bits_on_both_ranks(facts: list[dict], name: str) -> None:
    assert all(rank[name]["same bits again"] for rank in facts)


@pytest.mark.parametrize("name", ["plain", "micro", "half"])
def test_sums_begin_before_the_last_gradient_and_only_in_the_last_micro_batch(facts: list[dict], name: str) -> None:
    for rank in facts:
        events = rank[name]["events"]
        sums = [k for k, event in enumerate(events) if isinstance(event, int)]
        firsts = [k for k, event in enumerate(events) if event == "first layer"]
        ends = [k for k, event in enumerate(events) if event == "backward ended"]
        assert len(sums) > 2
        assert sum(k < firsts[-1] for k in sums) >= 2
        assert all(k < ends[-1] for k in sums)
        assert len(ends) == 1 or all(k > ends[-2] for k in sums)


def test_every_rank_sums_in_the_same_order_also_where_gradients_are_missing(facts: list[dict]) -> None:
    """The range of the parameter without gradient comes last here, and is summed when the step is taken."""
    orders = [[event for event in rank["one rank"]["events"] if isinstance(event, int)] for rank in facts]
    assert orders[0] == orders[1] == sorted(orders[0], reverse=True)
    assert facts[1]["one rank"]["events"][-1] == 0
    assert facts[0]["one rank"]["events"][-1] == "backward ended"


def test_ranges_are_neither_tiny_nor_huge() -> None:
    assert bucket_elements(1000) == SMALLEST
    assert bucket_elements(675_000_000) == 675_000_000 // 32
    assert bucket_elements(10**10) == LARGEST
