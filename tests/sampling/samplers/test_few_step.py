"""Samplers of few steps on Gaussian data, whose flow map is known: exact in any number of calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.guidance.guidance import ClassifierFree, classifier_free_steps, guidance_terms
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import OF_MAPS, drive, num_calls, sample, start
from scoreray.sampling.samplers.sigmas import as_grid, interior, karras
from scoreray.trainer.diffusion.condition import Condition
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.levels import TARGET_LEVEL, with_levels, with_target_level
from scoreray.trainer.networks.mlp import MLPConfig

STD, SIGMA_MAX = 0.5, 80.0
COUNT = 40_000


class GaussianMap:
    """D(x, sigma, rho) of data N(label, STD^2): one step of it ends where the ODE's path is at rho."""

    def __init__(self) -> None:
        self.targets: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, condition: Condition | None = None) -> Tensor:
        assert condition is not None
        target = condition.values[TARGET_LEVEL]
        assert target.shape == (len(x), 1)
        self.targets.append(target[:, 0])
        rho, sigma = target.to(x.dtype), sigma[:, None]
        mean = condition.values["label"][:, None].to(x.dtype) if "label" in condition.values else torch.zeros_like(rho)
        kept = ((STD**2 + rho**2) / (STD**2 + sigma**2)).sqrt()
        return mean + (x - mean) * (kept - rho / sigma) / (1 - rho / sigma)


def begin(count: int = 64, dims: int = 2) -> Tensor:
    return SIGMA_MAX * SampleNoise(range(count)).normal((count, dims), torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 18])
@pytest.mark.parametrize("grid", [karras, interior])
def test_a_flow_map_ends_where_the_ode_does_in_any_number_of_steps(n: int, grid: Any) -> None:
    x, sigmas, denoiser = begin(), grid(n), GaussianMap()
    samples, nfe = drive(start("flow_map", x, sigmas), denoiser)
    exact = x * STD / math.sqrt(STD**2 + SIGMA_MAX**2)
    torch.testing.assert_close(samples, exact, rtol=1e-12, atol=1e-14)
    assert nfe == n == num_calls("flow_map", sigmas)
    assert [target[0].item() for target in denoiser.targets] == sigmas[1:].tolist()


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize(("name", "options"), [("consistency", {"target": True}), ("flow_map", {"gamma": 0.4})])
def test_with_new_noise_samples_of_an_exact_map_have_the_datas_distribution(
    name: str, options: dict[str, Any], n: int
) -> None:
    x = begin(COUNT, 1)
    samples = sample(GaussianMap(), x, interior(n), sampler=name, generator=SampleNoise(range(COUNT), 1), **options)
    # The ODE takes N(0, sigma_max^2) to a variance that is STD^2 (1 - 4e-5); the estimate is off by sqrt(2 / N).
    assert samples.var().item() == pytest.approx(STD**2, rel=5 * math.sqrt(2 / COUNT))
    assert abs(samples.mean().item()) < 5 * STD / math.sqrt(COUNT)
    assert num_calls(name, interior(n), **options) == n


def test_gamma_1_is_multistep_consistency_sampling() -> None:
    x, seeds = begin(8), list(range(8))
    found = [
        sample(GaussianMap(), x, interior(3), sampler=name, generator=seeds, **options)
        for name, options in (("flow_map", {"gamma": 1.0}), ("consistency", {"target": True}))
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_consistency_model_takes_no_level_and_on_a_plain_denoiser_samples_are_too_narrow(gaussian: Any) -> None:
    """Where the estimate is the mean, the variance follows v' = (STD^2 / (STD^2 + sigma^2))^2 v + sigma'^2."""
    x, sigmas = begin(COUNT, 1), karras(200)
    samples = sample(lambda x, sigma: gaussian(x, sigma), x, sigmas, sampler="consistency",
                     generator=SampleNoise(range(COUNT), 1))  # fmt: skip
    variance = SIGMA_MAX**2
    for sigma, after in pairwise(sigmas.tolist()):
        variance = (STD**2 / (STD**2 + sigma**2)) ** 2 * variance + after**2
    assert samples.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / COUNT))
    assert variance < 0.6 * STD**2


def test_labels_and_guidance_stay_beside_the_level_to_reach() -> None:
    """A tensor of labels, a Condition and guidance, in the driver and as the batcher has it, give the same samples."""
    x, labels, grid = begin(4), torch.tensor([0, 1, 2, 1]), interior(2)
    given = Condition({"label": labels})
    plain = sample(GaussianMap(), x, grid, sampler="flow_map", condition=given)
    assert torch.equal(sample(GaussianMap(), x, grid, sampler="flow_map", condition=labels), plain)
    means = labels[:, None].double()
    torch.testing.assert_close(plain, means + (x - means) * STD / math.sqrt(STD**2 + SIGMA_MAX**2))
    guided = sample(ClassifierFree(GaussianMap(), 2.0), x, grid, sampler="flow_map", condition=given)
    terms = guidance_terms(2.0, ["label"])
    rows = Condition.cat([given, given.null()], [4, 4])
    found, _ = drive(classifier_free_steps(start("flow_map", x, grid), terms), GaussianMap(), condition=rows)
    assert torch.equal(found, guided)
    with pytest.raises(UserError, match="guidance 2 needs class_labels"):
        sample(ClassifierFree(GaussianMap(), 2.0), x, grid, sampler="flow_map")


def test_levels_to_reach_may_differ_from_row_to_row_and_from_rows_without_one() -> None:
    x = begin(3)
    levels = torch.tensor([3.0, 2.0, 0.0])
    (found,) = with_target_level(None, levels, x).values.values()
    assert torch.equal(found, levels[:, None].double())
    mixed = Condition.cat([with_target_level(None, 1.0, x.float()), None], [3, 2])
    assert mixed is not None
    assert mixed.mask(TARGET_LEVEL).tolist() == [True] * 3 + [False] * 2


@pytest.mark.parametrize("name", sorted(OF_MAPS))
def test_a_row_alone_is_bitwise_the_row_of_its_batch(name: str) -> None:
    options = {"target": True} if name == "consistency" else {"gamma": 0.3}
    x, seeds = begin(5), torch.arange(5)
    together = sample(GaussianMap(), x, interior(3), sampler=name, generator=seeds, **options)
    for i in range(5):
        alone = sample(GaussianMap(), x[i : i + 1], interior(3), sampler=name, generator=seeds[i : i + 1], **options)
        assert torch.equal(alone[0], together[i])


JUMPS = """
def jumps(x, sigmas, noise):
    return (yield x, sigmas[0], x.new_zeros(len(x)))
"""


def test_an_own_sampler_may_yield_the_level_to_reach(own_package: Callable[..., Path]) -> None:
    own_package("reaching", parts=JUMPS)
    samples = sample(GaussianMap(), begin(), as_grid([SIGMA_MAX, 0.0]), sampler="reaching.parts:jumps")
    assert torch.equal(samples, sample(GaussianMap(), begin(), as_grid([SIGMA_MAX, 0.0]), sampler="flow_map"))


def test_a_network_without_the_input_refuses_a_level_to_reach_and_one_with_it_takes_all_samplers() -> None:
    plain, mapped = (
        Denoiser(MLPConfig(8, 1).build((2,), with_levels({}, levels))).double() for levels in ((), (TARGET_LEVEL,))
    )
    with pytest.raises(UserError, match=TARGET_LEVEL):
        sample(plain, begin(), interior(2), sampler="flow_map")
    for name in ("flow_map", "heun"):
        assert sample(mapped, begin(), interior(2), sampler=name).isfinite().all()
