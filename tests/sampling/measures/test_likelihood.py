"""Likelihood through the ODE: a Gaussian's and a mixture's to 1e-3 nats, traces, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.sampling.measures.likelihood import LogLikelihood, dequantize, log_likelihood


def gaussian_nats(x: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    flat = x.flatten(1)
    return -0.5 * (((flat - mean) / std) ** 2 + math.log(2 * math.pi * std**2)).sum(1)


def mixture_nats(mixture, x: torch.Tensor, sigma: float = 0.002) -> torch.Tensor:
    variance = mixture.std**2 + sigma**2
    squared = (x[:, None] - mixture.means).square().sum(-1)
    each = mixture.weights.log() - squared / (2 * variance) - math.log(2 * math.pi * variance)
    return each.logsumexp(1)


@pytest.mark.parametrize("trace", ["exact", "rademacher"])
@pytest.mark.parametrize("steps", [None, 640])
def test_a_gaussians_log_likelihood_is_exact_to_a_thousandth_of_a_nat(trace, steps, make_gaussian):
    data = make_gaussian(0.3, 0.5)
    x = data.draw((20, 2, 3), 0)
    found = log_likelihood(data, x, trace=trace, steps=steps, data_mean=0.3, data_std=0.5)
    # The smoothing at sigma_min 0.002 adds d (0.002 / 0.5)^2 / 2 = 5e-5.
    assert (found.nats - gaussian_nats(x, 0.3, 0.5)).abs().max() < 1e-3
    assert found.latent.shape == x.shape
    assert found.nfe == 2 * 640 if steps else found.nfe < 60


@pytest.mark.parametrize(("std", "scale"), [(0.5, 0.5), (0.5, 0.2), (0.3, 1.0), (3.0, None)])
@pytest.mark.parametrize("shape", [(1,), (2, 3)])
def test_the_change_of_variables_leaves_a_gaussians_density_exact_to_a_millionth(std, scale, shape, make_gaussian):
    """Whatever scale the solver's coordinates have: the prior at sigma_max is then the exact one, as it is widened by
    `std` itself, and the density is that of data smoothed by sigma_min."""
    data = make_gaussian(0.3, std)
    x = data.draw((10, *shape), 0)
    low, high = 0.01, 50.0
    found = log_likelihood(
        data, x, trace="exact", sigma_min=low, sigma_max=high, data_mean=0.3, data_std=scale, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(found.latent, data.ode_end(x, low, high), rtol=1e-7, atol=1e-7)
    mistaken = gaussian_nats(found.latent, 0.3, math.hypot(high, scale or 0.0))
    right = gaussian_nats(found.latent, 0.3, math.hypot(high, std))
    exact = gaussian_nats(x, 0.3, math.hypot(low, std))
    assert (found.nats - mistaken + right - exact).abs().max() < 1e-6


def test_gaussian_data_of_the_models_scale_take_two_steps_and_mixtures_two_thirds_of_what_ln_sigma_takes(mixture):
    """At rtol 1e-5 steps in ln sigma took 127 calls for an error of 8e-5, and for the mixture 205 for 3e-4."""

    class Scaled:
        sigma_data = 0.5

        def __call__(self, x, sigma):
            return x * (0.25 / (0.25 + sigma**2)).view(-1, 1).to(x.dtype)

    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2
    found = log_likelihood(Scaled(), x, trace="exact")
    assert found.nfe == 13
    assert (found.nats - gaussian_nats(x, 0.0, math.hypot(0.5, 0.002))).abs().max() < 1e-9
    x = mixture.draw(20, 0)
    found = log_likelihood(mixture, x, trace="exact", data_mean=mixture.mean, data_std=1.1, sigma_max=2000.0)
    assert found.nfe <= 130
    assert (found.nats - mixture_nats(mixture, x)).abs().max() < 5e-5


def test_a_mixtures_log_likelihood_is_exact_to_a_thousandth_of_a_nat(mixture):
    x = torch.cat([mixture.draw(60, 0), torch.tensor([[0.0, 0.0]], dtype=torch.float64)])
    found = log_likelihood(mixture, x, trace="exact", data_mean=mixture.mean, data_std=1.1)
    assert (found.nats - mixture_nats(mixture, x)).abs().max() < 1e-3
    near = found.nats[:60] - mixture_nats(mixture, x[:60], sigma=0.0)  # of the data itself, not smoothed by sigma_min
    assert near.abs().max() < 1e-3


def test_hutchinsons_estimate_is_right_on_average_and_better_with_more_probes(mixture):
    x = torch.tensor([[0.3, 0.2]], dtype=torch.float64).repeat(400, 1)  # between the modes, where dD/dx is not diagonal
    exact = mixture_nats(mixture, x[:1]).item()
    errors = {}
    for trace in ("rademacher", "gaussian"):
        one = (
            log_likelihood(mixture, x, trace=trace, data_mean=mixture.mean, data_std=1.1, rtol=1e-4, atol=1e-4).nats
            - exact
        )
        four = (
            log_likelihood(
                mixture, x, trace=trace, data_mean=mixture.mean, data_std=1.1, probes=4, rtol=1e-4, atol=1e-4
            ).nats
            - exact
        )
        assert one.mean().abs() < 5 * one.std() / 20 + 2e-3
        assert four.std() == pytest.approx(one.std().item() / 2, rel=0.25)
        errors[trace] = one.std()
    assert 0 < errors["rademacher"] < errors["gaussian"]


def test_rademacher_probes_have_no_variance_on_a_diagonal_jacobian_and_gaussian_ones_have(make_gaussian):
    data = make_gaussian(0.0, 0.5)
    x = torch.zeros(50, 4, dtype=torch.float64)
    assert log_likelihood(data, x, trace="rademacher").nats.std() < 1e-9
    assert log_likelihood(data, x, trace="gaussian").nats.std() > 0.1


def test_a_row_alone_is_the_row_of_its_batch(mixture):
    x = mixture.draw(6, 3)
    together = log_likelihood(mixture, x, seeds=range(10, 16)).nats
    alone = log_likelihood(mixture, x[4:5], seeds=[14]).nats
    assert alone.item() == pytest.approx(together[4].item(), abs=1e-12)


def test_float32_stays_float32_and_near(make_gaussian):
    data = make_gaussian(0.0, 0.5)
    x = data.draw((8, 3), 1).float()
    found = log_likelihood(data, x, trace="exact", data_std=0.5)
    assert found.nats.dtype == torch.float32
    assert (found.nats - gaussian_nats(x, 0.0, 0.5)).abs().max() < 5e-3


def test_the_datas_mean_and_spread_leave_no_error_of_the_prior(make_gaussian):
    data = make_gaussian(3.0, 2.0)
    x = data.draw((10, 4), 1)
    plain = log_likelihood(data, x, sigma_max=10.0).nats - gaussian_nats(x, 3.0, 2.0)
    scaled = log_likelihood(data, x, sigma_max=10.0, data_mean=3.0, data_std=2.0).nats - gaussian_nats(x, 3.0, 2.0)
    assert scaled.abs().max() < 1e-3
    assert plain.abs().max() > 0.1


def test_bits_per_dim_adds_seven_for_eight_bits_in_minus_one_to_one():
    likelihood = LogLikelihood(torch.tensor([0.0]), torch.zeros(1, 3, 2, 2), 1)
    assert likelihood.bits_per_dim().item() == 7
    assert likelihood.bits_per_dim(1 / 256).item() == 8
    # Uniform data in [-1, 1] has density 2^-d: 8 bits a dimension.
    assert LogLikelihood(torch.tensor([-12 * math.log(2)]), torch.zeros(1, 3, 2, 2), 1).bits_per_dim().item() == 8


def test_dequantized_pixels_fill_their_level_and_round_back_to_it():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(4, -1, -1, -1)
    x, width = dequantize(images, range(4))
    assert width == 1 / 127.5
    assert torch.equal(((x + 1) * 127.5).round().to(torch.uint8), images)
    offsets = (x + 1) * 127.5 - images
    assert offsets.min() < -0.49
    assert offsets.max() > 0.49
    assert offsets.mean().abs() < 5 * math.sqrt(1 / 12 / 1024)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"trace": "radamacher"}, "did you mean 'rademacher'"),
        ({"probes": 0}, "probes = 0"),
        ({"sigma_min": 0.0}, "0 < sigma_min"),
        ({"sigma_max": 0.001}, "0 < sigma_min"),
        ({"seeds": [1]}, "one integer per row"),
    ],
)
def test_bad_settings_are_refused(settings, what, gaussian):
    with pytest.raises(UserError, match=what):
        log_likelihood(gaussian, torch.zeros(2, 3), **settings)


def test_bad_data_is_refused(gaussian):
    for x in (torch.zeros(3), torch.zeros(2, 3, dtype=torch.uint8), torch.full((2, 3), math.nan)):
        with pytest.raises(UserError, match="x "):
            log_likelihood(gaussian, x)
    with pytest.raises(UserError, match="must be uint8"):
        dequantize(torch.zeros(1, 1, 2, 2), [0])
