"""A process is alpha and sigma; drift, diffusion, kernel, reverse SDE and ODE follow, and agree with closed forms."""

from __future__ import annotations

import math
from typing import Annotated

import pytest
import torch
from pydantic import Field, TypeAdapter, ValidationError

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.process import (
    DDPM,
    EDM,
    PROCESSES,
    VE,
    VP,
    Cosine,
    FlowMatching,
    GaussianProcess,
    Process,
    SubVP,
)

F64 = torch.float64
ALL = [cls() for cls in PROCESSES.values()] + [DDPM(schedule="squared_cosine"), FlowMatching(shift=3.0)]
every_process = pytest.mark.parametrize("process", ALL, ids=lambda process: process.kind)


def times(process: Process, count: int = 41) -> torch.Tensor:
    """Times whose noise levels are geometric: both ends of a process are reached."""
    low, high = process.sigma_range()
    return process.time(torch.logspace(math.log10(low), math.log10(high), count, dtype=F64))


def test_constants_at_t_1_are_the_published_ones():
    assert float(VP().alpha(1.0)) == pytest.approx(0.00657159, abs=5e-9)
    assert float(VP().sigma(torch.tensor(1.0, dtype=F64))) == pytest.approx(0.99997841, abs=5e-9)
    assert float(SubVP().sigma(torch.tensor(1.0, dtype=F64))) == pytest.approx(0.99995681, abs=5e-9)
    assert float(DDPM().alpha(torch.tensor(1.0, dtype=F64))) ** 2 == pytest.approx(4.03583e-5, rel=2e-6)
    assert VE().sigma_range() == pytest.approx((0.02, 100.0))  # Song 2021's 0.01 to 50, of pictures from 0 to 1
    assert EDM().sigma_range() == (0.002, 80.0)


def test_the_ddpm_ladder_is_the_cumulative_product():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    alpha_bar = (1 - betas).cumprod(0)
    expected = ((1 - alpha_bar) / alpha_bar).sqrt().flip(0)
    torch.testing.assert_close(DDPM().ladder(1000), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("process", "betas"),
    [
        (DDPM(8.5e-4, 0.012, schedule="scaled_linear"), torch.linspace(8.5e-4**0.5, 0.012**0.5, 1000, dtype=F64) ** 2),
        (DDPM(num_steps=3, betas=(0.1, 0.5, 0.2)), torch.tensor([0.1, 0.5, 0.2], dtype=F64)),
    ],
)
def test_other_ladders_are_the_cumulative_products_of_their_betas(process, betas):
    alpha_bar = (1 - betas).cumprod(0).flip(0)
    torch.testing.assert_close(process.ladder(len(betas)), (1 / alpha_bar - 1).sqrt(), rtol=1e-10, atol=0)


def test_the_squared_cosine_ladder_is_nichols_but_for_its_last_beta():
    k = torch.arange(1, 1000, dtype=F64)
    f = lambda k: torch.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    process = DDPM(schedule="squared_cosine")
    torch.testing.assert_close(process.alpha(k / 1000) ** 2, f(k) / f(0 * k), rtol=1e-9, atol=0)
    assert float((process.alpha(1.0) / process.alpha(0.999)) ** 2) == pytest.approx(1 - 0.999, rel=1e-5)


def test_a_shift_of_flow_matching_multiplies_its_noise_levels():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    shifted = FlowMatching(shift=3.0)
    torch.testing.assert_close(shifted.noise_to_signal(t), 3 * FlowMatching().noise_to_signal(t))
    torch.testing.assert_close(shifted.alpha(t) + shifted.sigma(t), torch.ones_like(t))


def test_the_ve_ladder_is_geometric():
    ladder = VE(sigma_min=0.01, sigma_max=1.0).ladder(10)
    expected = torch.tensor([10 ** (-2 * i / 9) for i in range(10)], dtype=F64)
    torch.testing.assert_close(ladder, expected)


@pytest.mark.parametrize(
    ("process", "drift", "squared"),
    [
        (VE(0.01, 50.0), lambda t: 0 * t, lambda t: 2 * math.log(5000) * (0.01 * 5000**t) ** 2),
        (VP(), lambda t: -(0.1 + 19.9 * t) / 2, lambda t: 0.1 + 19.9 * t),
        (
            SubVP(),
            lambda t: -(0.1 + 19.9 * t) / 2,
            lambda t: (0.1 + 19.9 * t) * -torch.expm1(-2 * (0.1 * t + 9.95 * t**2)),
        ),
        (FlowMatching(), lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)),
        (Cosine(), lambda t: -math.pi / 2 * (math.pi / 2 * t).tan(), lambda t: math.pi * (math.pi / 2 * t).tan()),
        (EDM(), lambda t: 0 * t, lambda t: 2 * t),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_drift_and_diffusion_are_the_textbook_ones(process, drift, squared):
    t = times(process)
    torch.testing.assert_close(process.drift(torch.ones_like(t), t), drift(t), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(process.diffusion(t) ** 2, squared(t), rtol=1e-9, atol=0)


def test_ddpm_agrees_with_the_vp_that_it_discretises():
    t = torch.linspace(0.05, 1, 20, dtype=F64)
    torch.testing.assert_close(DDPM().alpha(t), VP().alpha(t), rtol=0.06, atol=0)
    k = t[5:] - 0.5 / 1000  # inside a step; DDPM's beta over a step is -ln(1 - beta_k) * 1000
    torch.testing.assert_close(DDPM().diffusion(k) ** 2, VP().diffusion(k) ** 2, rtol=0.02, atol=0)


@every_process
def test_time_inverts_the_noise_to_signal_ratio_in_closed_form_and_by_bisection(process):
    t = times(process)
    low, high = process.sigma_range()
    ratio = process.noise_to_signal(t)
    assert (ratio.diff() > 0).all()
    torch.testing.assert_close(ratio[[0, -1]], torch.tensor([low, high], dtype=F64), rtol=1e-9, atol=0)
    torch.testing.assert_close(process.time(ratio), t, rtol=1e-9, atol=0)
    torch.testing.assert_close(GaussianProcess._time_of(process, ratio), t, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(process.log_snr(t), -2 * ratio.log())


@every_process
def test_the_moments_of_a_gaussian_follow_the_sde(process):
    """d var/dt = 2 (f / x) var + g^2 for x_t of N(0, s^2) data: the Fokker-Planck equation of a linear SDE."""
    t = times(process)[3:-3]
    if isinstance(process, DDPM):
        t = ((t * 1000).floor() + 0.5) / 1000  # between the kinks of a piecewise linear ladder
    s = 0.7
    step = 1e-4 * t
    variance = lambda t: (process.alpha(t) * s) ** 2 + process.sigma(t) ** 2  # noqa: E731
    numeric = (variance(t + step) - variance(t - step)) / (2 * step)
    exact = 2 * process.drift(torch.ones_like(t), t) * variance(t) + process.diffusion(t) ** 2
    scale = 2 * process.drift(torch.ones_like(t), t).abs() * variance(t) + process.diffusion(t) ** 2
    assert ((numeric - exact).abs() / scale).max() < 1e-6


@every_process
def test_score_of_gaussian_data_is_exact_at_every_noise_level(process):
    mean, s = 0.3, 0.5
    denoiser = lambda x, sigma: mean + (x - mean) * s**2 / (s**2 + sigma[:, None] ** 2)  # noqa: E731
    t = times(process)
    x0 = torch.linspace(-2, 2, len(t), dtype=F64)[:, None].expand(-1, 3)
    x = process.perturb(x0, t, torch.ones_like(x0))
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    expected = -(x - alpha * mean) / (alpha**2 * s**2 + sigma**2)
    # (denoised - x) / sigma^2 can't be closer than the rounding of x over sigma^2.
    allowed = 1e-9 * expected.abs() + 1e-15 * x.abs() / sigma**2
    assert ((process.score(x, t, denoiser) - expected).abs() <= allowed).all()


@every_process
def test_score_of_a_mixture_is_exact_at_every_noise_level(process):
    means, s = torch.tensor([-1.0, 0.5], dtype=F64), 0.2

    def denoiser(x, sigma):
        variance = s**2 + sigma[:, None] ** 2
        weight = (-((x - means) ** 2) / (2 * variance)).softmax(-1)
        return (weight * (means + (x - means) * s**2 / variance)).sum(-1, keepdim=True)

    t = times(process)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    x = (alpha * 0.1 + sigma * 0.7).requires_grad_()
    log_density = (-((x - alpha * means) ** 2) / (2 * (alpha**2 * s**2 + sigma**2))).logsumexp(-1)
    (expected,) = torch.autograd.grad(log_density.sum(), x)
    allowed = 1e-9 * expected.abs() + 1e-15 * (1 + x.detach().abs()) / sigma**2
    assert ((process.score(x.detach(), t, denoiser) - expected).abs() <= allowed).all()


@every_process
def test_reverse_sde_and_probability_flow_are_made_of_drift_diffusion_and_score(process):
    t = times(process)
    x, score = torch.randn(2, len(t), 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    f, g = process.drift(x, t), process.diffusion(t)
    drift, diffusion = process.reverse_sde(x, t, score)
    torch.testing.assert_close(drift, f - g[:, None] ** 2 * score)
    torch.testing.assert_close(diffusion, g)
    torch.testing.assert_close(process.probability_flow(x, t, score), f - g[:, None] ** 2 * score / 2)


@every_process
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_are_those_of_the_input(process, dtype):
    t = times(process).to(torch.float64 if dtype is torch.float64 else torch.float32)
    x = torch.ones(len(t), 2, 3, 3, dtype=dtype)
    for value in (process.alpha(t), process.sigma(t), process.diffusion(t), process.time(process.noise_to_signal(t))):
        assert value.dtype == t.dtype
    assert process.perturb(x, t, x).dtype == process.drift(x, t).dtype == dtype
    assert process.probability_flow(x, 0.5, x).dtype == dtype
    assert process.alpha(0.5).dtype == torch.float32


@every_process
def test_float32_is_as_exact_as_float32_can_be(process):
    """Late VE and early VP lose nothing: everything is computed in float64 and rounded once."""
    t = times(process).float()
    for name in ("alpha", "sigma", "noise_to_signal", "diffusion"):
        single, double = getattr(process, name)(t), getattr(process, name)(t.double())
        torch.testing.assert_close(single.double(), double, rtol=6e-8, atol=0, msg=name)
    ones, zeros = torch.ones(len(t), 1), torch.zeros(len(t), 1)
    for x0, z, name in ((ones, zeros, "alpha"), (zeros, ones, "sigma")):
        assert torch.equal(process.perturb(x0, t, z).squeeze(1), getattr(process, name)(t))


@every_process
def test_derivatives_work_under_inference_mode_and_with_scalar_times(process):
    t = times(process)[20]
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        inside = process.drift(x, t), process.diffusion(t)
    torch.testing.assert_close(inside, (process.drift(x, t.expand(4)), process.diffusion(t)))


class Ellipse(GaussianProcess):
    """What a new process takes: alpha and sigma (here VP's with a noise of half the size at the end)."""

    def _alpha(self, t: torch.Tensor) -> torch.Tensor:
        return (-3 * t).exp()

    def _sigma(self, t: torch.Tensor) -> torch.Tensor:
        return 0.5 * (-torch.expm1(-6 * t)).sqrt()


def test_a_process_is_two_functions_and_nothing_else():
    process, t = Ellipse(), torch.linspace(0.01, 1, 30, dtype=F64)
    torch.testing.assert_close(process.drift(torch.ones_like(t), t), -3 * torch.ones_like(t))
    torch.testing.assert_close(process.diffusion(t) ** 2, 1.5 * torch.ones_like(t))
    torch.testing.assert_close(process.time(process.noise_to_signal(t)), t)
    assert process.sigma_range()[0] == 0


@pytest.mark.parametrize("process", ALL, ids=lambda process: process.kind)
def test_diffusion_at_t_0_is_its_limit(process):
    at, beside = process.diffusion(torch.tensor([0.0, 1e-9], dtype=F64)).tolist()
    assert at == pytest.approx(beside, rel=1e-4, abs=1e-3)
    assert process.diffusion(0.0).isfinite()


@pytest.mark.parametrize(
    ("process", "low", "high"),
    [
        (VE(0.005, 200.0), 0.005, 200.0),
        (EDM(2e-5, 300.0), 2e-5, 300.0),
        (VP(), 0.002, 152.16697028),
        (SubVP(), 0.002, 152.16368453),
        (DDPM(), 0.0100005, 157.40728081),
        (DDPM(schedule="squared_cosine"), 0.00642541, 80.0),  # its signal ends at a twenty-thousandth of the noise
        (FlowMatching(), 0.002, 80.0),
        (Cosine(), 0.002, 80.0),
        (FlowMatching(shift=1e-6), 4.995e-4, 9.99e-4),
        (Ellipse(), 0.002, 0.5 * math.sqrt(1 - math.exp(-6)) * math.exp(3)),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_sampling_goes_from_end_to_end_but_not_towards_all_noise_or_none(process, low, high):
    assert process.sampling_range() == pytest.approx((low, high), rel=1e-6)


Union = TypeAdapter(Annotated[Process, Field(discriminator="kind")])


def test_a_config_chooses_a_process_by_its_kind():
    assert Union.validate_python({"kind": "ve", "sigma_max": 20}) == VE(sigma_max=20.0)
    for name in PROCESSES:
        assert Union.validate_python({"kind": name}).kind == name
    with pytest.raises(ValidationError, match="sigma_mx"):
        Union.validate_python({"kind": "ve", "sigma_mx": 20})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VE(sigma_min=0.0), "sigma_min is 0.0: give a finite number above 0"),
        (lambda: EDM(sigma_min=3.0, sigma_max=2.0), "sigma_min is 3.0 and sigma_max is 2.0"),
        (lambda: VP(beta_max=math.nan), "beta_max is nan"),
        (lambda: DDPM(num_steps=1), "num_steps is 1: give 2 or more"),
        (lambda: DDPM(beta_max=1.5), "beta_max is 1.5"),
        (lambda: DDPM(schedule="cosine"), "process.schedule 'cosine' is unknown"),
        (lambda: DDPM(betas=(0.1, 0.2)), "process.betas: 2 numbers for num_steps 1000"),
        (lambda: DDPM(num_steps=2, betas=(0.1, 1.0)), "process.betas: 1.0 is not accepted"),
        (lambda: FlowMatching(shift=0.0), "shift is 0.0"),
        (lambda: FlowMatching(t_max=1.5), "t_max is 1.5"),
        (lambda: EDM(sigma_max=1e300), r"sigma_max is 1e\+300: give a number above 0, at most 1e\+18"),
        (lambda: EDM(sigma_max=1e15), r"sigma_max 1000000000000000.0 make noise levels .* to 1e\+15: they must"),
        (lambda: VE(sigma_min=1e-300), "from 1e-300 to 100: they must rise within 1e-09 to 1e\\+09"),
        (lambda: VP(beta_max=1e4), "beta_max 10000.0, .* to inf"),
        (lambda: SubVP(t_min=1e-300), "noise levels .* from 0 to|from 1e-301"),
        (lambda: DDPM(num_steps=10**6), "num_steps 1000000, .* make noise levels .* to inf"),
        (lambda: FlowMatching(t_max=1.0), "t_max 1.0, .* make noise levels .* to inf"),
        (lambda: Cosine(t_min=1e-300), "from 1.57e-300"),
    ],
)
def test_impossible_values_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VP().time(0.0), "noise_to_signal is 0.0: give a finite number above 0"),
        (lambda: VP().time(math.inf), "noise_to_signal is inf"),
        (lambda: VP().alpha(-0.1), "t is -0.1: give a finite time from 0 up"),
        (lambda: VP().perturb(torch.zeros(3, 2), math.nan, torch.zeros(3, 2)), "t is nan"),
        (lambda: VP().drift(torch.zeros(3, 2), torch.ones(2)), r"t has shape \(2,\) and x \(3, 2\)"),
        (lambda: VP().perturb(torch.zeros(3, 2), 0.5, torch.zeros(2, 2)), r"noise of shape \(2, 2\) for x0 \(3, 2\)"),
        (lambda: VP().ladder(0), "num_levels is 0: give 1 or more"),
    ],
)
def test_impossible_arguments_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call()
