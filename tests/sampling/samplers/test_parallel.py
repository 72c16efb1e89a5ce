"""Parallel in time: the sequential sampler's samples to the tolerance, in fewer calls, for a bounded number of rows."""

from __future__ import annotations

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.sampling.guidance.guidance import ClassifierFree, Interval
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.parallel import MOST_ROWS, PARALLEL, Parallel
from scoreray.sampling.samplers.sample import SAMPLERS, drive, num_calls, sample, start
from scoreray.sampling.samplers.sigmas import karras
from scoreray.sampling.service.batcher import StepBatcher
from scoreray.sampling.service.request import SampleRequest
from scoreray.trainer.diffusion.condition import Condition

OPTIONS = {"ddim": {"eta": 0.5}, "edm_sde": {"s_churn": 4.0}}
SEEDS = [3, 4]


def begin(grid, seeds=SEEDS):
    return float(grid[0]) * SampleNoise(seeds).normal((len(seeds), 2), torch.float64)


def counted(denoiser, sampler, grid, parallel=None):
    """(samples, calls of the network, rows a sample)."""
    rows = []

    def count(x, sigma):
        rows.append(len(x) // len(SEEDS))
        return denoiser(x, sigma)

    steps = start(sampler, begin(grid), grid, SEEDS, parallel=parallel, **OPTIONS.get(sampler, {}))
    samples, calls = drive(steps, count)
    return samples, calls, sum(rows)


@pytest.mark.parametrize("sampler", sorted(PARALLEL))
def test_parallel_in_time_is_the_sequential_sampler_to_the_tolerance_and_never_takes_more_rows_than_it_may(
    mixture, sampler
):
    grid = karras(18)
    expected, sequential, _ = counted(mixture, sampler, grid)
    samples, calls, rows = counted(mixture, sampler, grid, Parallel())
    assert (samples - expected).abs().max() < 0.02
    assert calls < sequential
    assert rows <= MOST_ROWS * sequential
    exact, calls, rows = counted(mixture, sampler, grid, Parallel(tolerance=0))
    assert torch.equal(exact, expected)
    assert calls <= sequential
    assert rows <= MOST_ROWS * sequential


@pytest.mark.parametrize("steps", [18, 50, 100])
def test_a_deterministic_sampler_takes_half_the_sequential_calls_or_fewer(mixture, steps):
    _, calls, rows = counted(mixture, "euler", karras(steps), Parallel())
    assert calls <= steps / 2
    assert rows <= MOST_ROWS * steps


def test_a_condition_is_repeated_for_each_state_of_a_sample():
    grid, labels = karras(18), torch.tensor([0, 3])

    def denoiser(x, sigma, labels):
        kept = 0.25 / (0.25 + sigma**2)
        return labels[:, None] + (x - labels[:, None]) * kept[:, None]

    drawn = [
        sample(denoiser, begin(grid), grid, sampler="euler", condition=labels, parallel=parallel)
        for parallel in (None, Parallel())
    ]
    assert torch.allclose(*drawn, atol=0.01)


@pytest.mark.parametrize("interval", [None, (0.5, 20.0)])
def test_classifier_free_guidance_is_of_each_state_of_a_sample(interval):
    grid, labels = karras(18), torch.tensor([0, 3])

    def denoiser(x, sigma, labels):
        middle = torch.where(labels < 0, 1.0, labels.to(x))[:, None]
        return middle + (x - middle) * (0.25 / (0.25 + sigma**2))[:, None]

    guided = ClassifierFree(denoiser, 2.0)
    if interval is not None:
        guided = Interval(guided, denoiser, *interval)
    plain, drawn = [
        sample(guided, begin(grid), grid, sampler="heun", condition=labels, parallel=parallel)
        for parallel in (None, Parallel())
    ]
    assert torch.allclose(drawn, plain, atol=0.01)
    unguided = sample(denoiser, begin(grid), grid, sampler="heun", condition=labels)
    assert (plain - unguided).abs().min() > 0.1


def test_a_batcher_guides_each_state_of_a_lone_request():
    def denoiser(x, sigma, condition):
        given = condition.values["label"]
        middle = torch.where(given < 0, 1.0, given.to(x))[:, None]
        return middle + (x - middle) * (0.25 / (0.25 + sigma**2))[:, None]

    def drawn(parallel):
        batcher = StepBatcher(denoiser, 32, parallel=parallel)
        condition = Condition({"label": torch.tensor([3])})
        ticket = batcher.submit(
            SampleRequest([7], (2,), karras(18).tolist(), "euler", condition=condition, guidance=2.0, expected_calls=18)
        )
        while batcher.step():
            pass
        return ticket, batcher

    (plain, sequential), (ticket, batcher) = drawn(False), drawn(True)
    assert torch.allclose(ticket.result(0), plain.result(0), atol=0.02)
    assert batcher.calls < sequential.calls
    assert ticket.parallel
    assert ticket.rows == batcher.rows > sequential.rows


def test_a_sampler_whose_states_are_not_known_from_its_denoised_batches_is_refused_in_one_line(mixture):
    for sampler in sorted(set(SAMPLERS) - PARALLEL):
        with pytest.raises(UserError, match=r"can't run in parallel in time.*choose one of ddim") as refusal:
            sample(mixture, begin(karras(4)), karras(4), sampler=sampler, parallel=Parallel())
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=r"window 1: must be in \[2"):
        Parallel(window=1)


def test_a_batcher_runs_a_lone_request_in_fewer_calls_and_shares_them_when_another_comes(mixture):
    def request(first):
        return SampleRequest([first], (2,), karras(18).tolist(), "euler", expected_calls=num_calls("euler", karras(18)))

    def alone(parallel):
        batcher = StepBatcher(mixture, 32, parallel=parallel)
        ticket = batcher.submit(request(7))
        while batcher.step():
            pass
        return ticket, batcher.calls

    expected, sequential = alone(False)
    ticket, calls = alone(True)
    assert ticket.parallel
    assert calls <= sequential / 2
    assert torch.allclose(ticket.result(0), expected.result(0), atol=0.02)
    batcher = StepBatcher(mixture, 32, parallel=True)
    first = batcher.submit(request(7))
    for _ in range(3):
        batcher.step()
    second = batcher.submit(request(8))
    batcher.step()
    assert first.parts[0].copies == 1
    while batcher.step():
        pass
    assert first.parallel
    assert not second.parallel
    assert torch.allclose(first.result(0), expected.result(0), atol=0.02)
