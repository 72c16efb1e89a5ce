"""Calibration and p-values against exact denoisers: nothing is found where nothing is, and all of it is true."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from scoreray.sampling.measures.calibration import FUNCTIONS, calibration, residual_products
from scoreray.sampling.measures.distances import mean_of
from scoreray.sampling.measures.held_out import HeldOut
from scoreray.sampling.measures.likelihood import out_of_distribution
from scoreray.trainer.diffusion.targets import Mixture

F64 = torch.float64
MODES = Mixture(torch.tensor([[-0.6, 0.0], [0.4, 0.5], [0.4, -0.5]]), 0.15)
SIGMAS = [0.05, 0.3, 2.0]


def held(count: int, seed: int = 0) -> HeldOut:
    x0 = MODES.sample(count, torch.Generator().manual_seed(seed))
    numbers = torch.arange(count) + seed * count
    return HeldOut(x0, x0, numbers, None, torch.zeros(2, dtype=F64), {})


def levels_of(denoiser, data: HeldOut):
    exact = lambda x, sigma, condition=None: denoiser(x.double(), sigma)  # noqa: E731
    products = residual_products(exact, data, SIGMAS, 0.5, 1024)
    return [calibration(products.with_residual[:, level], products.among[:, level]) for level in range(len(SIGMAS))]


def test_of_the_exact_denoiser_p_values_are_uniform_and_nothing_is_removed():
    found = [level for seed in range(40) for level in levels_of(MODES, held(400, seed))]
    assert stats.kstest([level.p_value for level in found], "uniform").pvalue > 1e-3
    z = torch.tensor([level.z_scores for level in found])
    assert z.shape[1] == len(FUNCTIONS)
    assert abs(z.std().item() - 1) < 0.1
    for level in found[:3]:
        gain = mean_of(level.removed)
        assert gain.value < 3 * gain.std_error


@pytest.mark.parametrize("name", ["gain", "shift", "curve"])
def test_of_a_wrong_denoiser_what_is_removed_is_a_bound_below_the_true_divergence(name):
    wrongs = {
        "gain": lambda x, sigma: 0.9 * MODES(x, sigma),
        "shift": lambda x, sigma: MODES(x, sigma) + 0.05,
        "curve": lambda x, sigma: MODES(x, sigma) + 0.1 * torch.sin(3 * x),
    }
    wrong, data = wrongs[name], held(4000)
    for sigma, level in zip(SIGMAS, levels_of(wrong, data), strict=True):
        z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(9), dtype=F64)
        x = data.x0 + sigma * z
        true = (wrong(x, sigma) - MODES(x, sigma)).square().mean().item()
        gain = mean_of(level.removed)
        assert gain.value < true + 3 * gain.std_error
        if name != "curve" and sigma == 0.3:  # in the span of the functions, or nearly
            assert level.p_value < 1e-4
            assert gain.value > 0.5 * true - 3 * gain.std_error


@pytest.mark.parametrize("statistic", ["likelihood", "typicality", "ratio"])
def test_p_values_are_uniform_under_the_true_mixture_and_small_far_from_it(statistic):
    def values(x):
        return MODES.log_density(x), torch.distributions.Normal(0.0, 0.5).log_prob(x).sum(1)

    own, inside = (
        MODES.sample(4000, torch.Generator().manual_seed(1)),
        MODES.sample(2000, torch.Generator().manual_seed(2)),
    )
    found = out_of_distribution(*values(inside), *values(own), statistic)
    assert stats.kstest(found.p_values.numpy(), "uniform").pvalue > 1e-3
    assert found.ks_p_value > 1e-3
    outside = torch.rand(500, 2, generator=torch.Generator().manual_seed(3), dtype=F64) + 1.5
    far = out_of_distribution(*values(outside), *values(own), statistic)
    assert far.p_values.max() < 0.01
    assert far.ks > 0.9
