"""The diffusion bound against exact likelihoods, and its diffusion term against the I-MMSE relation."""

from __future__ import annotations

import math

import pytest
import torch

from scoreray.sampling.measures.diffusion_bound import diffusion_bound
from scoreray.sampling.measures.distances import mean_of
from scoreray.sampling.measures.likelihood import log_likelihood
from scoreray.trainer.diffusion.targets import Mixture

F64 = torch.float64
RANGE = {"sigma_min": 0.01, "sigma_max": 20.0}
GAUSSIAN = Mixture(torch.tensor([[0.3, -0.2]]), 0.5)
MODES = Mixture(torch.tensor([[-0.6, 0.0], [0.4, 0.5], [0.4, -0.5]]), 0.15)


def samples(of: Mixture, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x0 = of.sample(count, generator)
    return x0 + 0.01 * torch.randn(x0.shape, generator=generator, dtype=F64)


def test_with_the_exact_denoiser_of_gaussian_data_the_bound_is_the_log_likelihood_of_each_sample():
    x = samples(GAUSSIAN, 50)
    found = diffusion_bound(GAUSSIAN, x, **RANGE, data_mean=GAUSSIAN.means[0], data_std=0.5, levels=4)
    torch.testing.assert_close(
        found.nats, GAUSSIAN.log_density(x, 0.01), atol=2e-4, rtol=0
    )  # NEAR, squared, times d / 4
    assert found.nfe == 5


@pytest.mark.parametrize("times", ["low_discrepancy", "importance"])
def test_of_a_mixture_it_is_the_exact_log_likelihood_within_its_error(times):
    x = samples(MODES, 4000)
    found = diffusion_bound(MODES, x, **RANGE, data_std=0.5, levels=32, times=times)
    gap = mean_of(MODES.log_density(x, 0.01) - found.nats)
    assert abs(gap.value) < 4 * gap.std_error + 5e-3  # 5e-3: the mixture at sigma 20 is Gaussian to this


def test_low_discrepancy_times_vary_less_than_independent_ones():
    x = MODES.means[:1].expand(2000, -1) + 0.3  # one sample, whose diffusion term differs by noise and times alone
    spread = {
        times: diffusion_bound(MODES, x, **RANGE, levels=32, times=times, data_std=0.0).diffusion.std().item()
        for times in ("low_discrepancy", "importance")
    }
    controlled = diffusion_bound(MODES, x, **RANGE, levels=32, data_std=0.5).diffusion.std().item()
    assert controlled < 0.8 * spread["low_discrepancy"] < 0.7 * spread["importance"]


def test_the_diffusion_term_is_the_mutual_information_that_its_noise_levels_add():
    """I-MMSE (Guo 2005): 1/2 int mmse d SNR = I(high SNR) - I(low SNR), d/2 ln(1 + s^2 SNR) of Gaussian data; of two
    points at +-1 it is ln 2 between no noise and all of it."""
    x = samples(GAUSSIAN, 4000)
    found = diffusion_bound(GAUSSIAN, x, **RANGE, data_mean=GAUSSIAN.means[0], data_std=0.5).diffusion
    s2, low, high = 0.25 + 1e-4, 1e-3, 20.0
    exact = math.log((1 + s2 / low**2) / (1 + s2 / high**2))
    assert abs(found.mean().item() - exact) < 4 * found.std().item() / math.sqrt(len(x))
    points = Mixture(torch.tensor([[-1.0], [1.0]]))
    x = points.sample(4000, torch.Generator().manual_seed(0))
    found = diffusion_bound(points, x, sigma_min=0.02, sigma_max=50.0, grid_step=2 / 255, levels=32).diffusion
    assert found.mean().item() == pytest.approx(math.log(2), abs=4 * found.std().item() / math.sqrt(len(x)) + 1e-3)


def test_a_wrong_denoiser_is_strictly_below_the_exact_likelihood():
    x = samples(MODES, 2000)
    wrong = lambda x, sigma: 0.9 * MODES(x, sigma)  # noqa: E731
    found = diffusion_bound(wrong, x, **RANGE, data_std=0.5)
    gap = mean_of(MODES.log_density(x, 0.01) - found.nats)
    assert gap.value > 10 * gap.std_error


def test_it_is_below_the_probability_flow_s_likelihood_of_the_same_data():
    """A denoiser that nearly fits, as a trained one does: bits of the bound are above those of `bpd`."""
    x = samples(MODES, 200)
    near = lambda x, sigma: MODES(x, sigma) + 0.02 * torch.sin(3 * x)  # noqa: E731
    bound = diffusion_bound(near, x, **RANGE, data_std=0.5).nats
    flow = log_likelihood(near, x, **RANGE, trace="exact", data_std=0.5).nats
    assert (flow - bound).mean() > 0


def test_discrete_values_have_the_probability_of_their_level():
    """A constant picture of one of 256 levels, all equally likely: 8 bits a value, by the exact posterior mean."""
    levels = torch.arange(256, dtype=F64)[:, None] / 127.5 - 1
    exact = Mixture(levels)
    found = diffusion_bound(exact, levels, sigma_min=1e-3, sigma_max=50.0, grid_step=2 / 255, data_std=0.6, levels=64)
    assert found.nats.mean().item() == pytest.approx(-math.log(256), abs=0.05)
    assert found.reconstruction.max() < 1e-2


def test_a_sample_s_bound_does_not_depend_on_its_batch():
    x = samples(MODES, 9)
    seeds = torch.arange(100, 109)
    whole = diffusion_bound(MODES, x, **RANGE, seeds=seeds).nats
    torch.testing.assert_close(diffusion_bound(MODES, x[4:6], **RANGE, seeds=seeds[4:6]).nats, whole[4:6])
