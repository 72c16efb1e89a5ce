"""Stochastic samplers end in the data's distribution: stationary variances, moments, sliced Wasserstein distances."""

from __future__ import annotations

import math

import pytest
import torch

from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import OF_MAPS, SAMPLERS, sample
from scoreray.sampling.samplers.sigmas import from_process, geometric, karras
from scoreray.trainer.diffusion.process import VP, SubVP
from scoreray.trainer.networks.ladder import step_size, variance_ratio

COUNT = 2000


def run(denoiser, name, sigmas, *, count=COUNT, dims=2, first_seed=0, **options):
    noise = SampleNoise(range(first_seed, first_seed + count))
    x = float(sigmas[0]) * noise.normal((count, dims), torch.float64)
    return sample(denoiser, x, sigmas, sampler=name, generator=noise, **options)


SETTINGS = {
    # Every sampler with enough steps that what is left is the spread of a finite sample.
    "ddpm": (karras(100, 0.02, 20.0), {}),
    "ddpm large": (from_process(VP(), 300), {"variance": "large"}),
    "ddim": (karras(60, 0.02, 20.0), {"eta": 0.6}),
    "reverse_sde": (geometric(300, 0.02, 20.0), {}),
    "reverse_sde vp": (from_process(VP(), 400), {"process": VP()}),
    "reverse_sde sub-vp": (from_process(SubVP(), 400), {"process": SubVP()}),
    "predictor_corrector": (geometric(200, 0.02, 20.0), {}),
    "predictor_corrector vp": (from_process(VP(), 200), {"process": VP()}),
    "predictor_corrector sub-vp": (from_process(SubVP(), 200), {"process": SubVP()}),
    "edm_sde": (karras(50, 0.02, 20.0), {"s_churn": 20.0, "s_noise": 1.0}),
    "dpmpp_2m_sde": (karras(40, 0.02, 20.0), {}),
    "dpmpp_2m_sde heun": (karras(40, 0.02, 20.0), {"solver": "heun"}),
    "dpmpp_3m_sde": (karras(40, 0.02, 20.0), {}),
    "ncsn": (geometric(25, 0.02, 20.0), {"num_steps": 30, "epsilon": 0.1 * 0.02**2}),
    "ncsnv2": (geometric(200, 0.02, 20.0), {}),
    "baoab": (karras(30, 0.02, 20.0), {"warm_start": True}),
    "baoab annealed": (geometric(25, 0.02, 20.0), {"anneal": True}),
    "cld": (karras(30, 0.02, 20.0), {"warm_start": True}),
    "cld annealed": (geometric(25, 0.02, 20.0), {"anneal": True, "num_steps": 6}),
    "mala": (karras(30, 0.02, 20.0), {"warm_start": True}),
    "mala annealed": (geometric(25, 0.02, 20.0), {"anneal": True, "num_steps": 6}),
    "hmc": (karras(30, 0.02, 20.0), {"warm_start": True, "num_steps": 2}),
    "hmc annealed": (geometric(40, 0.02, 20.0), {"anneal": True, "num_steps": 3, "line_calls": 0}),
    "langevin": (karras(30, 0.02, 20.0), {"warm_start": True}),
    "sgld": (karras(30, 0.02, 20.0), {"warm_start": True}),
    "heun": (karras(30, 0.02, 20.0), {}),
    "unipc": (karras(30, 0.02, 20.0), {}),
    "rk45": (karras(30, 0.02, 20.0), {"rtol": 1e-3, "atol": 1e-3}),
}


SLOW = ("reverse_sde sub-vp", "predictor_corrector sub-vp")  # a second each: the SDE's numbers are test_process.py's


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SETTINGS]
)
def test_samples_of_a_mixture_have_its_moments_and_its_projections(setting, mixture, distance):
    sigmas, options = SETTINGS[setting]
    samples = run(mixture, setting.split()[0], sigmas, **options)
    covariance = mixture.covariance
    # The mean of N samples is off by std / sqrt(N), a second moment by about sqrt(2) variance / sqrt(N); five of each,
    # and 2% for what finite steps leave.
    variance = covariance.diagonal().max().item()
    assert (samples.mean(0) - mixture.mean).abs().max() < 5 * math.sqrt(variance / COUNT) + 0.02 * math.sqrt(variance)
    assert (torch.cov(samples.T) - covariance).abs().max() < (5 * math.sqrt(2 / COUNT) + 0.02) * variance
    # The distance of two exact sets of this size, from eight pairs, is what perfect sampling shows.
    floor = torch.tensor([distance(mixture.draw(COUNT, 2 * i), mixture.draw(COUNT, 2 * i + 1)) for i in range(8)])
    assert distance(samples, mixture.draw(COUNT, 99)) < floor.mean() + 4 * floor.std() + 0.02 * math.sqrt(variance)


def test_every_stochastic_sampler_stands_in_these_tests(mixture):
    """A sampler that draws nothing solves the ODE: its order of convergence is tested instead (`test_orders.py`). Those
    of maps along the ODE are right for such networks alone (`test_few_step.py`)."""
    x, sigmas = 20.0 * torch.ones(1, 2, dtype=torch.float64), karras(4, 0.02, 20.0)

    def end(name, seed):
        return sample(mixture, x, sigmas, sampler=name, generator=[seed])

    stochastic = {name for name in SAMPLERS if not torch.equal(end(name, 0), end(name, 1))} - OF_MAPS
    assert len(stochastic) > 8
    assert stochastic <= {name.split()[0] for name in SETTINGS} <= set(SAMPLERS)


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
def test_unadjusted_langevin_has_its_known_stationary_variance(step, make_gaussian):
    # s^2 / (1 - eps / (2 s^2)) for the smoothed data's s^2 = 0.5^2 + 0.3^2; 40,000 chains, so off by 5 sqrt(2 / N).
    count, variance = 40_000, 0.5**2 + 0.3**2
    eps = step * variance
    x = run(
        make_gaussian(1.0, 0.5), "langevin", [1.0, 0.3, 0.0], count=count, dims=1,
        step_size=eps, num_steps=math.ceil(12 / step),
    )  # fmt: skip
    expected = variance / (1 - eps / (2 * variance))
    assert x.var().item() == pytest.approx(expected, rel=5 * math.sqrt(2 / count))
    assert x.mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(expected / count))


def test_sgld_forgets_the_noise_of_its_score_as_its_steps_shrink(make_gaussian):
    # A score with noise of variance w^2 adds (eps / 2)^2 w^2 a step to the sampler's own eps: a relative eps w^2 / 4.
    # So Langevin with a constant step stays too wide, and decreasing steps lose the excess.
    exact = make_gaussian(0.0, 0.5)
    generator = torch.Generator().manual_seed(0)
    sigma = 0.3
    variance = 0.5**2 + sigma**2

    def minibatch(x, levels):
        score_noise = 6.0 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        return exact(x, levels) + sigma**2 * score_noise

    settings = {"count": 8000, "dims": 1}
    levels = [1.0, sigma, 0.0]
    constant = run(minibatch, "langevin", levels, step_size=0.1, num_steps=300, **settings).var().item()
    shrinking = run(minibatch, "sgld", levels, step_size=0.2, decay=1.0, num_steps=600, **settings).var().item()
    expected = variance * (1 + 0.1 * 36 / 2) / (1 - 0.1 / (2 * variance))
    assert constant == pytest.approx(expected, rel=5 * math.sqrt(2 / 8000))
    last = 0.2 / 61  # the step at the end; its excess is eps w^2 / 4 of the variance, and lags behind a little
    assert shrinking == pytest.approx(variance * (1 + last * 36 / 4), rel=0.03 + 5 * math.sqrt(2 / 8000))


def test_annealed_langevin_finds_the_weights_of_modes_that_plain_langevin_does_not(mixture):
    start = torch.tensor([[-1.5, -0.5]], dtype=torch.float64).repeat(1000, 1)
    plain = sample(mixture, start, [1.0, 0.02, 0.0], sampler="langevin", generator=range(1000), num_steps=750)
    annealed = run(mixture, "ncsn", geometric(25, 0.02, 20.0), count=1000, num_steps=30)
    stayed = (torch.cdist(plain, mixture.means).argmin(1) == 0).double().mean()
    fair = (torch.cdist(annealed, mixture.means).argmin(1) == 0).double().mean()
    assert stayed > 0.99
    assert fair.item() == pytest.approx(0.5, abs=5 * math.sqrt(0.25 / 1000))


def test_ncsnv2_takes_the_step_of_technique_4_for_its_ladder(mixture):
    sigmas, settings = geometric(232, 0.01, 50.0), {"count": 3, "num_steps": 5}
    chosen = run(mixture, "ncsnv2", sigmas, **settings)
    stated = run(mixture, "ncsnv2", sigmas, epsilon=step_size(0.01, 5000 ** (1 / 231), 5), **settings)
    torch.testing.assert_close(chosen, stated)
    other = run(mixture, "ncsnv2", sigmas, epsilon=5e-6, **settings)
    assert (chosen - other).abs().max() > 1e-3


def test_ncsnv2s_levels_leave_pure_noise_of_their_own_size():
    # Data at a point, D = 0: what is left before the last denoising has the variance that technique 4 aims at.
    sigmas = geometric(40, 0.01, 1.0)
    noise = SampleNoise(range(4000))
    x = noise.normal((4000, 1), torch.float64)
    end = sample(lambda x, s: 0 * x, x, sigmas, sampler="ncsnv2", generator=noise, num_steps=5, denoise=False)
    ratio = 100 ** (1 / 39)
    variance = 1.0
    for _ in range(40):  # the variance over sigma^2, level after level
        variance = variance_ratio(step_size(0.01, ratio, 5), 0.01, variance**0.5, 5)
        variance *= ratio**2
    assert end.var().item() == pytest.approx(variance / ratio**2 * 0.01**2, rel=5 * math.sqrt(2 / 4000))
