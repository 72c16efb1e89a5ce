"""The ODE samplers: their order of convergence, and where they end."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from scoreray.data.errors import ScorerayError
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import drive, sample, start
from scoreray.sampling.samplers.sigmas import geometric, karras

START, END = 100.0, 0.05  # so far out that first steps of low order, where D hardly changes, do not show


def error(name: str, n: int, denoiser, x: torch.Tensor, exact: torch.Tensor, **options) -> float:
    samples = sample(denoiser, x, geometric(n, END, START), sampler=name, **options)
    return (samples - exact).abs().mean().item()


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("euler", {}, 1),
        ("ddim", {"eta": 0.0}, 1),
        ("heun", {}, 2),
        ("edm_sde", {"s_churn": 0.0}, 2),
        ("dpm2", {}, 2),
        ("dpmpp_2m", {}, 2),
        ("dpmpp_2m_sde", {"eta": 0.0}, 2),
        ("dpmpp_2m_sde", {"eta": 0.0, "solver": "heun"}, 2),
        ("dpmpp_3m_sde", {"eta": 0.0}, 2),
        ("dpmpp_3m_sde", {"eta": 0.0, "curvature": "exact"}, 3),
        ("unipc", {"order": 1}, 2),
        ("unipc", {"order": 2}, 3),
        ("unipc", {"order": 2, "variant": "bh1"}, 3),
        ("unipc", {"order": 3}, 4),
    ],
)
def test_halving_the_step_divides_the_error_by_two_to_the_order(name, options, order, mixture):
    # The last step, from END to 0, is one of Euler's for all; it is exact here because the reference takes it too.
    x = torch.tensor([[90.0, 40.0], [-30.0, 70.0], [10.0, -120.0], [-80.0, -60.0]], dtype=torch.float64)
    exact = sample(mixture, x, [START, END, 0.0], sampler="rk45", rtol=1e-11, atol=1e-12)
    errors = [error(name, n, mixture, x, exact, **options) for n in (160, 320)]
    observed = math.log(errors[0] / errors[1]) / math.log(319 / 159)
    assert observed == pytest.approx(order, abs=0.35)


def test_edm_example_is_taken_from_80_to_a_half(gaussian):
    # K22's grid of 18 from x = 80, data N(0, 0.5^2): the ODE's exact end is 0.4999902.
    x = torch.full((1, 1), 80.0, dtype=torch.float64)
    exact = gaussian.ode_end(x, 80.0)
    assert exact.item() == pytest.approx(0.4999902, abs=5e-8)
    off = [sample(gaussian, x, karras(n)).item() - exact.item() for n in (18, 36, 72, 288)]
    assert off[0] == pytest.approx(0.02763, abs=1e-5)  # Heun at K22's 18 steps
    assert abs(off[3]) < 1e-4
    assert all(3 < a / b < 5 for a, b in pairwise(off[:3]))  # order 2


def test_rk45_is_as_exact_as_its_tolerance(gaussian):
    x = torch.tensor([[80.0], [-3.0], [0.1]], dtype=torch.float64)
    for tolerance in (1e-3, 1e-5, 1e-8):
        samples = sample(gaussian, x, karras(18), sampler="rk45", rtol=tolerance, atol=tolerance)
        # Ends with a step of Euler from 0.002, which is off by a relative (0.002 / 0.5)^2 / 2 of the end.
        # Coordinates of another scale than the data's, in which these move.
        other = sample(gaussian, x, karras(18), sampler="rk45", rtol=tolerance, atol=tolerance, sigma_data=2.0)
        torch.testing.assert_close(other, gaussian.ode_end(x, 80.0), rtol=2e-5, atol=20 * tolerance)
        torch.testing.assert_close(samples, gaussian.ode_end(x, 80.0), rtol=2e-5, atol=20 * tolerance)


def test_rk45_takes_two_steps_for_gaussian_data_and_fewer_than_in_ln_sigma_for_a_mixture(gaussian, mixture):
    """Steps in ln sigma took 116 calls for an error of 5e-6, and for the mixture 134 for 7e-6."""
    x = 80 * SampleNoise(range(16)).normal((16, 2), torch.float64)
    grid = karras(18)
    samples, calls = drive(start("rk45", x, grid), gaussian)
    assert calls == 14  # the first slope, two steps, the end
    torch.testing.assert_close(samples, 0.25 / (0.25 + 0.002**2) * gaussian.ode_end(x, 80.0, 0.002), rtol=1e-12, atol=0)
    exact = sample(mixture, x, grid, sampler="rk45", rtol=1e-12, atol=1e-12)
    for tolerance, most in ((1e-4, 85), (1e-5, 120)):
        samples, calls = drive(start("rk45", x, grid, sigma_data=1.1, rtol=tolerance, atol=tolerance), mixture)
        assert calls <= most
        assert (samples - exact).square().mean().sqrt() < tolerance / 4


def test_rk45_spends_calls_by_tolerance_and_finishes_rows_at_their_own_pace(mixture):
    x = torch.tensor([[90.0, 0.0], [2.0, -70.0], [4.0, 20.0]], dtype=torch.float64)
    calls = {t: drive(start("rk45", x, karras(18), rtol=t, atol=t), mixture)[1] for t in (1e-3, 1e-5, 1e-7)}
    assert calls[1e-3] < calls[1e-5] < calls[1e-7] < 1000
    alone = [drive(start("rk45", x[i : i + 1], karras(18)), mixture)[1] for i in range(3)]
    assert calls[1e-5] == max(alone)
    assert min(alone) < max(alone)


def test_rk45_says_so_when_it_can_not_finish(mixture):
    x = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(ScorerayError, match=r"max_steps = 2: .* in rows \[0, 1, 2\]"):
        sample(mixture, x, karras(18), sampler="rk45", max_steps=2)


@pytest.mark.parametrize(
    ("name", "options", "degree"),
    [
        ("euler", {}, 0),
        ("dpmpp_2m", {}, 0),
        ("dpmpp_2m_sde", {"eta": 0.0, "solver": "heun"}, 1),
        ("dpmpp_3m_sde", {"eta": 0.0}, 1),
        ("dpmpp_3m_sde", {"eta": 0.0, "curvature": "exact"}, 2),
    ],
)
@pytest.mark.parametrize("power", [0, 1, 2])
def test_an_exponential_integrator_is_exact_for_a_polynomial_in_log_sigma(name, options, degree, power):
    # Where D = (-ln sigma)^k whatever x, the ODE's step is the integral of e^(l - l_end) l^k: exact up to the degree
    # of the interpolation, after the steps that fill the history.
    def antiderivative(at: float) -> float:
        return [1.0, at - 1, at**2 - 2 * at + 2][power]  # of e^l l^k, over e^l

    sigmas = geometric(8, 0.1, 5.0)
    states: list[float] = []
    sample(
        lambda x, sigma: (-sigma.log()[:, None]) ** power, torch.ones(1, 1, dtype=torch.float64), sigmas,
        sampler=name, callback=lambda p: states.append(p.x.item()), **options,
    )  # fmt: skip
    before, after = -sigmas[4].log().item(), -sigmas[5].log().item()
    ratio = math.exp(before - after)
    exact = ratio * states[4] + antiderivative(after) - ratio * antiderivative(before)
    if power <= degree:
        assert states[5] == pytest.approx(exact, rel=1e-10)
    else:
        assert states[5] != pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("one", "options", "other", "other_options"),
    [
        ("ddim", {"eta": 0.0}, "euler", {}),
        ("edm_sde", {"s_churn": 0.0}, "heun", {}),
        ("dpmpp_2m_sde", {"eta": 0.0}, "dpmpp_2m", {}),
        ("ddim", {"eta": 1.0}, "ddpm", {}),
    ],
)
def test_samplers_that_are_one_method_at_a_setting_agree(one, options, other, other_options, mixture):
    seeds = torch.arange(4)
    x = torch.tensor([[9.0, 4.0], [-3.0, 7.0], [1.0, -12.0], [-8.0, -6.0]], dtype=torch.float64)
    a = sample(mixture, x, karras(12, 0.01, 10.0), sampler=one, generator=seeds, **options)
    b = sample(mixture, x, karras(12, 0.01, 10.0), sampler=other, generator=seeds, **other_options)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
