"""Weightings are lambda(sigma) on the denoising error; those that learn find the optimum that they should."""

from __future__ import annotations

import math

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.denoiser import convert
from scoreray.trainer.diffusion.process import EDM, PROCESSES, VP
from scoreray.trainer.diffusion.weighting import (
    WEIGHTINGS,
    Adaptive,
    Constant,
    EDMWeighting,
    Learned,
    LikelihoodWeighting,
    MinSNR,
    Sigma2,
    SoftMinSNR,
    Velocity,
)

F64 = torch.float64
SIGMA = torch.logspace(-3, 2, 26, dtype=F64)
SD = 0.5


def weight(config, process=None):
    return config.weight(SIGMA, process or EDM(), SD)


@pytest.mark.parametrize(
    ("config", "quantity", "factor"),
    [(Sigma2(), "noise", 1), (Sigma2(), "score", "sigma"), (EDMWeighting(), "edm", 1), (Velocity(), "velocity", 1)],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_a_weighting_is_the_square_error_of_the_quantity_it_is_named_after(config, quantity, factor):
    """Two denoised values differ by delta; the outputs that they stand for differ by sqrt(lambda) delta."""
    x = torch.ones(len(SIGMA), 1, dtype=F64)
    outputs = [convert(torch.full_like(x, value), x, SIGMA, "denoised", quantity, SD) for value in (0.0, 0.1)]
    error = ((outputs[1] - outputs[0]) ** 2).squeeze(1) * (SIGMA**2 if factor == "sigma" else 1)
    torch.testing.assert_close(weight(config) * 0.01, error, rtol=1e-8, atol=0)


def test_closed_forms():
    torch.testing.assert_close(weight(Constant()), torch.ones_like(SIGMA))
    torch.testing.assert_close(weight(EDMWeighting()), (SIGMA**2 + SD**2) / (SIGMA * SD) ** 2)
    snr = SIGMA**-2
    torch.testing.assert_close(weight(MinSNR()), torch.minimum(snr, torch.tensor(5.0, dtype=F64)))
    torch.testing.assert_close(weight(SoftMinSNR()), snr * 4 / (snr + 4))


@pytest.mark.parametrize("process", [cls() for cls in PROCESSES.values()], ids=lambda p: p.kind)
def test_likelihood_weighting_is_the_rate_of_the_signal_to_noise_ratio(process):
    low, high = process.sigma_range()
    t = process.time(torch.logspace(math.log10(low * 1.2), math.log10(high / 1.2), 20, dtype=F64))
    if process.kind == "ddpm":
        t = ((t * 1000).floor() + 0.5) / 1000
    step = 1e-5 * t
    numeric = (process.log_snr(t - step).exp() - process.log_snr(t + step).exp()) / (2 * step)
    got = LikelihoodWeighting().weight(process.noise_to_signal(t), process, SD)
    torch.testing.assert_close(got, numeric, rtol=1e-5, atol=0)
    # and it is g^2 on the error of the score in the process's own frame, whose noise is sigma z for data alpha x_0
    squared = (process.diffusion(t) * process.alpha(t) / process.sigma(t) ** 2) ** 2
    torch.testing.assert_close(got, squared, rtol=1e-7, atol=0)


def test_learned_uncertainty_starts_at_edm_and_its_optimum_is_the_log_of_the_expected_loss():
    torch.manual_seed(0)
    module = Learned().build(VP(), SD)
    sigma = torch.logspace(-2, 1, 200)
    error = 0.3 * sigma**0.5 / (sigma**-2 + SD**-2)
    torch.testing.assert_close(module(error, sigma), 0.3 * sigma**0.5)
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = module(error, sigma).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (0.3 * sigma**0.5).log()
    assert (module.at(sigma) - expected).abs().max() < 0.05
    torch.testing.assert_close(module(error, sigma), 1 + expected, atol=0.01, rtol=0)


def test_learned_uncertainty_works_in_bf16():
    module = Learned().build(VP(), SD).bfloat16()
    loss = module(torch.ones(3), torch.tensor([0.01, 1.0, 50.0]))
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert module.linear.weight.grad.abs().max() > 0


def test_adaptive_weighting_brings_every_noise_level_to_one():
    module = Adaptive(half_life=50.0).build(VP(), SD)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        sigma = (torch.rand(64, generator=generator) * math.log(1e4) + math.log(1e-2)).exp()
        module(0.01 * sigma, sigma)
    module.eval()
    before = module.ratio.clone()
    sigma = torch.logspace(-1.8, 1.8, 50)
    # within a bin the error that this E stands for changes by the bin's width, a factor 10^(6 / 64)
    assert (module(0.01 * sigma, sigma) - 1).abs().max() < 0.3
    assert torch.equal(module.ratio, before)


def test_adaptive_state_is_a_buffer_that_stays_float32_and_ignores_what_is_not_finite():
    module = Adaptive().build(VP(), SD).bfloat16()
    assert module.state_dict()["ratio"].dtype == torch.float32
    module(torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 1.0]))
    assert module.ratio.isfinite().all()
    assert (module.ratio != 1).sum() == 1


def test_adaptive_state_is_that_of_the_whole_batch_on_every_rank(monkeypatch):
    error, sigma = torch.linspace(0.1, 2, 40), torch.logspace(-2, 1, 40)
    alone = Adaptive(half_life=10.0).build(VP(), SD)
    alone(error, sigma)
    sent = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sent.append(sums.clone()))
    halves = [(error[::2], sigma[::2]), (error[1::2], sigma[1::2])]
    for half in halves:
        Adaptive(half_life=10.0).build(VP(), SD)(*half)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.copy_(sent[0] + sent[1]))
    for half in halves:
        rank = Adaptive(half_life=10.0).build(VP(), SD)
        rank(*half)
        torch.testing.assert_close(rank.ratio, alone.ratio)


@pytest.mark.parametrize("config", [cls() for cls in WEIGHTINGS.values()], ids=lambda c: c.kind)
def test_every_weighting_gives_a_finite_loss_of_its_inputs_dtype(config):
    sigma = torch.logspace(-2, 2, 9)
    loss = config.build(VP(), SD)(torch.ones(9), sigma)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()


def test_bad_values_are_named():
    with pytest.raises(UserError, match="gamma is -1"):
        MinSNR(gamma=-1.0)
    with pytest.raises(UserError, match="num_bins is 0"):
        Adaptive(num_bins=0)
