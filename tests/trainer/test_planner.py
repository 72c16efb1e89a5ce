"""The memory that a stage takes on a rank, and the choice that follows from it."""

from __future__ import annotations

import pytest

from scoreray.trainer.planner import STATE_SHARE, bytes_per_parameter, bytes_per_rank, choose_stage

GIB = 1 << 30


def test_bytes_per_parameter_are_zeros_formulas() -> None:
    """2 + 2 + K sharded as Rajbhandari 2020 has it; K is 20 here: fp32 gradient, master, moments and one average."""
    assert bytes_per_parameter(0, 4, half=True) == 2 + 2 + 20
    assert bytes_per_parameter(1, 4, half=True) == 2 + 2 + 20 / 4
    assert bytes_per_parameter(2, 4, half=True) == 2 + (2 + 20) / 4
    assert bytes_per_parameter(3, 4, half=True) == (2 + 2 + 20) / 4
    assert bytes_per_parameter(0, 1, half=False, num_averages=0) == 16  # fp32: master, gradient, two moments


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("world_size", [2, 8, 64])
def test_a_higher_stage_never_takes_more(half: bool, world_size: int) -> None:
    needs = [bytes_per_rank(10**9, stage, world_size, half=half) for stage in (1, 2, 3)]
    assert needs == sorted(needs, reverse=True)


@pytest.mark.parametrize(("num_params", "stage"), [(10**6, 0), (3 * 10**9, 1), (15 * 10**9, 2), (20 * 10**9, 3)])
def test_the_cheapest_stage_that_fits_is_chosen_and_the_reason_told(num_params: int, stage: int) -> None:
    chosen, why = choose_stage(num_params, 16, 80 * GIB, half=True)
    assert chosen == stage
    assert bytes_per_rank(num_params, chosen, 16, half=True) <= STATE_SHARE * 80 * GIB
    assert "fits 60% of its 80.0 GiB" in why
    assert (f"ZeRO-{stage - 1}'s" in why) == (stage > 0)


def test_what_fits_nowhere_is_sharded_most_and_said_so() -> None:
    chosen, why = choose_stage(10**12, 8, 80 * GIB, half=True)
    assert chosen == 3
    assert "is more than" in why


def test_offload_leaves_weights_and_gradients() -> None:
    assert bytes_per_parameter(2, 4, half=True, offload=True) == 2 + 2 / 4
    assert choose_stage(10**6, 4, GIB, half=True, offload=True)[0] == 1  # stage 0 has nothing to offload
