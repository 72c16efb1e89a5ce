"""A budget of network calls: the solver that errs least at it, and how many steps fit."""

from __future__ import annotations

import pytest
import torch

from scoreray.sampling.samplers.budget import ENOUGH_CALLS, best_within, most_steps
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import drive, num_calls, sample, start
from scoreray.sampling.samplers.sigmas import GRIDS, karras


@pytest.mark.parametrize("max_calls", [5, 12, 13, 20, 40])
def test_the_chosen_solver_and_grid_err_less_than_the_others(max_calls, mixture) -> None:
    begin = 80 * SampleNoise(range(16)).normal((16, 2), torch.float64)
    end = sample(mixture, begin, karras(400), sampler="unipc")

    def error(sampler: str, name: str = "karras") -> float:
        steps = most_steps(max_calls, lambda n: num_calls(sampler, karras(n)))
        samples, calls = drive(start(sampler, begin, GRIDS[name](steps)), mixture)
        assert calls <= max_calls < num_calls(sampler, karras(steps + 1))
        return float((samples - end).square().mean().sqrt())

    sampler, grid, _ = best_within(max_calls)
    assert sampler is not None
    assert grid is not None
    assert error(sampler, grid) < min(error("heun"), error("dpm2"), error("euler"))
    assert error(sampler, grid) < 1.01 * error(sampler)


def test_beyond_what_is_enough_calls_change_samples_by_less_than_a_grey_level(mixture) -> None:
    begin = 80 * SampleNoise(range(16)).normal((16, 2), torch.float64)
    end = sample(mixture, begin, karras(400), sampler="unipc")
    sampler, grid, _ = best_within(ENOUGH_CALLS)
    assert sampler is not None
    assert grid is not None
    found = sample(mixture, begin, GRIDS[grid](ENOUGH_CALLS), sampler=sampler)
    assert float((found - end).square().mean().sqrt()) < 2 / 255
    assert [best_within(n).most_calls for n in (1, ENOUGH_CALLS, 1000)] == [1, ENOUGH_CALLS, ENOUGH_CALLS]


def test_steps_that_fit_are_the_most_that_do() -> None:
    assert [most_steps(n, lambda steps: 2 * steps - 1) for n in (1, 2, 3, 35, 36)] == [1, 1, 2, 18, 18]
    assert most_steps(4, lambda steps: 5 * steps) == 0
