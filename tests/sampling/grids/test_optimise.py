"""Grids optimised for an exact denoiser: nearer to the exact ends than any named grid, and never worse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from scoreray.sampling.grids.dynamic import best_levels, step_errors
from scoreray.sampling.grids.optimise import OPTIMISED, GridSearch, distance, optimise
from scoreray.sampling.grids.reference import NoiseBatch, make_reference
from scoreray.sampling.grids.refine import to_levels, to_parameters
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sigmas import GRIDS, geometric, karras

RANGE = LOW, HIGH = 0.002, 80.0


def batch(denoiser, count: int, first: int = 0, called=lambda rows: None) -> NoiseBatch:
    seeds = torch.arange(first, first + count)
    noise = SampleNoise(seeds).normal((count, 2), torch.float64)
    return NoiseBatch(denoiser, lambda sigma: noise * sigma, seeds, called=called)


def named(steps: int) -> dict[str, torch.Tensor]:
    return {name: GRIDS[name](steps, *RANGE) for name in ("karras", "geometric", "interior")}


@pytest.mark.parametrize(
    ("sampler", "steps", "share"), [("euler", 4, 0.75), ("dpmpp_2m", 6, 0.5), ("heun", 5, 0.75), ("unipc", 8, 0.8)]
)
def test_an_optimised_grid_ends_nearer_to_the_exact_samples(sampler, steps, share, mixture):
    """At most this share of the least error of the named grids, on noise that it was not fitted to."""
    search = GridSearch(sampler, steps, RANGE, named(steps), budget=60)
    found = optimise(search, [batch(mixture, 48)], [batch(mixture, 64, 1000)])
    assert found.name == OPTIMISED
    assert found.errors[OPTIMISED] < share * min(found.errors[name] for name in search.named), found.errors
    assert found.levels[0] == HIGH
    assert found.levels[-1] == 0
    assert len(found.levels) == steps + 1


def test_a_named_grid_that_is_no_worse_is_kept(mixture):
    """One that was fitted to the held-out samples themselves, against what is fitted to two others."""
    held = batch(mixture, 32, 50)
    mine = optimise(GridSearch("euler", 4, RANGE, named(4), budget=60), [held], [held]).levels
    search = GridSearch("euler", 4, RANGE, {"mine": mine, "karras": karras(4)}, budget=40)
    found = optimise(search, [batch(mixture, 2, 7)], [held])
    assert found.name == "mine"
    assert torch.equal(found.levels, mine)
    assert found.errors["mine"] < min(found.errors[OPTIMISED], found.errors["karras"])


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_dynamic_programming_finds_what_brute_force_finds(sampler, mixture):
    reference = make_reference([batch(mixture, 8)], *RANGE, num_fine=9)
    first, between, last = step_errors(reference, sampler)
    for steps in (1, 2, 3, 5):
        found = best_levels(reference, sampler, steps)
        sums = {}
        for middle in itertools.combinations(range(1, 9), steps - 1):
            path = (0, *middle)
            total = sum(between[path[at - 2 : at + 1]] for at in range(2, len(path)))
            sums[path] = total + last[path[-1]] + (first[path[1]] if middle else 0)
        best = min(sums, key=sums.__getitem__)
        assert found.tolist() == [*reference.sigmas[list(best)].tolist(), 0.0]


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_2m"])
def test_the_errors_of_steps_are_those_of_the_sampler_itself(sampler, mixture):
    """Run on the reference's own estimates; what the first step left in the second's state is taken off again."""
    one, states, estimates = batch(mixture, 8), [], {}

    def keep(state) -> None:
        if state.nfe % 2:
            states.append(state.x)
            estimates[state.sigma] = state.denoised

    reference = make_reference([one], *RANGE, num_fine=16)
    one.drawn(reference.sigmas, callback=keep)
    stored = NoiseBatch(lambda x, sigma: estimates[float(sigma[0])], one.starts, one.seeds)
    seen = []
    levels = torch.cat([reference.sigmas[[0, 3, 5]], torch.zeros(1)])
    end = stored.drawn(levels, sampler, callback=lambda state: seen.append(state.x))
    first, between, last = step_errors(reference, sampler)
    assert first[3] == pytest.approx(float(reference.gains[3]) * distance(seen[1], states[3]), rel=1e-6)
    second = seen[2] - float(levels[2] / levels[1]) * (seen[1] - states[3])
    assert between[0, 3, 5] == pytest.approx(float(reference.gains[5]) * distance(second, states[5]), rel=1e-6)
    assert last[5] == pytest.approx(distance(end, reference.ends[0]), rel=1e-6)
    assert np.isinf([between[5, 3, 8], between[0, 5, 3], first[0]]).all()


def test_what_is_left_of_an_error_is_measured(gaussian):
    """Gaussian data of spread s: an error at level sigma is multiplied by s / sqrt(s^2 + sigma^2)."""
    reference = make_reference([batch(gaussian, 8)], *RANGE)
    sigmas = reference.sigmas[:-1].numpy()
    exact = 0.5 / np.sqrt(0.25 + sigmas**2)
    assert reference.gains[8:57:8] == pytest.approx(exact[8:57:8], rel=0.01)  # where it was measured
    assert reference.gains[8:57] == pytest.approx(exact[8:57], rel=0.12)  # and between


def test_parameters_are_any_numbers_and_give_levels_that_descend():
    for grid in (karras(6), geometric(6, *RANGE)):
        there = to_levels(to_parameters(grid, LOW), HIGH, LOW)
        assert there[:-2].tolist() == pytest.approx(grid[:-2].tolist(), rel=0.06)  # a gap is left below the last
        assert there[-1] == 0
    wild = to_levels(np.array([8.0, -8.0, 8.0, -8.0]), HIGH, LOW)
    assert bool((wild[:-1] > wild[1:]).all())
    assert wild[-2] > LOW


def test_no_more_rows_are_called_than_were_announced(mixture):
    rows = []
    search = GridSearch("dpmpp_2m", 4, RANGE, named(4), budget=20, num_fine=16)
    optimise(search, [batch(mixture, 8, called=rows.append)], [batch(mixture, 4, 50, called=rows.append)])
    assert sum(rows) <= search.num_rows([8], [4])
