"""SGLD on weights: the posterior of a linear model, Li 2016's preconditioner, noise that no partition changes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion.noise import STREAM_WEIGHTS, normal
from scoreray.trainer.optim.ema import EMAConfig
from scoreray.trainer.optim.optimizer import OptimizerConfig
from scoreray.trainer.optim.sgld import AveragingSGLD, SGLDConfig

EMA = EMAConfig()


def built(weights: torch.nn.Parameter, config: SGLDConfig, position: int = 0) -> AveragingSGLD:
    optimizer = AveragingSGLD([weights], config.for_run(7, 100), EMA)
    optimizer.place(weights, 0, weights.numel(), position)
    return optimizer


def step(optimizer: AveragingSGLD, weights: torch.nn.Parameter, gradient: torch.Tensor, rate: float) -> None:
    weights.grad = gradient.to(weights.dtype)
    optimizer.prepare_step(rate, [0.5] * len(EMA.names))
    optimizer.step()


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_the_weights_of_a_linear_model_have_its_posterior(temperature: float) -> None:
    """y = X w + noise of known std, w ~ N(0, s^2): thousands of chains at once have the mean and covariance of the
    discretised chain in closed form, which is near the posterior's own."""
    rows, chains, noise_std, prior_std, rate, steps = 100, 4_000, 0.5, 0.7, 0.02, 150
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.6, 0.3])
    y = x @ torch.tensor([0.8, -0.5, 0.3], dtype=torch.float64)
    y += noise_std * torch.randn(rows, generator=generator, dtype=torch.float64)
    precision = x.T @ x / noise_std**2 + torch.eye(3, dtype=torch.float64) / prior_std**2
    mean = torch.linalg.solve(precision, x.T @ y / noise_std**2)
    weights = torch.nn.Parameter(torch.zeros(chains, 3))
    optimizer = built(weights, SGLDConfig(prior_std=prior_std, temperature=temperature))
    keep = torch.eye(3, dtype=torch.float64) - rate / rows * precision
    expected, covariance = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(steps):
        w = weights.detach().double()
        step(optimizer, weights, (w @ x.T - y) @ x / (noise_std**2 * rows), rate)  # of the mean of -ln p(y | w)
        expected = mean + keep @ (expected - mean)
        covariance = keep @ covariance @ keep.T + 2 * rate * temperature / rows * torch.eye(3, dtype=torch.float64)
    w = weights.detach().double()
    stds = covariance.diagonal().sqrt()
    assert ((w.mean(0) - expected).abs() < 5 * stds / math.sqrt(chains)).all()
    found = torch.cov(w.T)
    assert ((found - covariance).abs() < 5 * math.sqrt(2 / chains) * stds[:, None] * stds).all()
    posterior = temperature * torch.linalg.inv(precision)
    assert (covariance - posterior).abs().max() < 0.15 * posterior.diagonal().max()


def test_preconditioned_steps_are_those_of_li_2016() -> None:
    """Algorithm 1 with eps = 2 rate / N, without the derivative of G, and this very noise."""
    config = SGLDConfig(preconditioned=True, prior_std=2.0, num_data=50, beta=0.9, eps=1e-3, seed=3)
    weights = torch.nn.Parameter(torch.linspace(-1, 1, 9))
    optimizer = built(weights, config, position=40)
    w, v = weights.detach().double(), torch.zeros(9, dtype=torch.float64)
    for number in range(1, 6):
        gradient = torch.randn(9, generator=torch.Generator().manual_seed(number))
        rate = 0.1 / number
        step(optimizer, weights, gradient, rate)
        z = normal(3, torch.arange(40, 49), stream=STREAM_WEIGHTS + number).double()
        g, eps = gradient.double(), 2 * rate / 50
        v = 0.9 * v + 0.1 * g**2
        inverse = 1 / (1e-3 + v.sqrt())
        w = w + eps / 2 * inverse * (-w / 2.0**2 - 50 * g) + (eps * inverse).sqrt() * z
        torch.testing.assert_close(weights.detach().double(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_any_partition_moves_each_weight_alike_and_an_interruption_changes_no_bit(preconditioned: bool) -> None:
    config = SGLDConfig(preconditioned=preconditioned)
    whole = torch.nn.Parameter(torch.linspace(-2, 2, 100))
    cuts = [0, 1, 17, 50, 83, 100]
    parts = [torch.nn.Parameter(whole.detach()[a:b].clone()) for a, b in pairwise(cuts)]
    optimizer = built(whole, config)
    others = [built(part, config, position) for part, position in zip(parts, cuts, strict=False)]
    for number in range(4):
        gradient = torch.randn(100, generator=torch.Generator().manual_seed(number))
        step(optimizer, whole, gradient, 0.1)
        if number == 1:  # as a checkpoint restores it
            again = [built(part, config, position) for part, position in zip(parts, cuts, strict=False)]
            for new, old, part in zip(again, others, parts, strict=True):
                new.init_state(part).update({key: value.clone() for key, value in old.state[part].items()})
            others = again
        for i, (one, part) in enumerate(zip(others, parts, strict=True)):
            step(one, part, gradient[cuts[i] : cuts[i + 1]], 0.1)
        if number == 0:
            for new, old in zip(others, parts, strict=True):
                assert int(new.state[old]["step"]) == 1
    assert torch.equal(torch.cat([part.detach() for part in parts]), whole.detach())
    averages = torch.cat([one.state[part]["ema_0.050"] for one, part in zip(others, parts, strict=True)])
    assert torch.equal(averages, optimizer.state[whole]["ema_0.050"])
    assert optimizer.state_keys == (("exp_avg_sq",) if preconditioned else ()) + ("ema_0.050", "ema_0.100")


def test_its_steps_shrink_as_welling_and_teh_s_do_and_two_steps_share_no_noise() -> None:
    config = SGLDConfig(learning_rate=0.1, decay=0.75, decay_images=1000)
    assert config.rate(0, 10) == 0.1
    assert config.rate(15_000, 10) == pytest.approx(0.1 / 8)
    assert SGLDConfig(learning_rate=0.1, schedule="constant").rate(10**9, 10) == 0.1
    first, second = (normal(0, torch.arange(4000), stream=STREAM_WEIGHTS + number) for number in (1, 2))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 5 / math.sqrt(4000)


MINIMAL = {"run": {"name": "a", "storage": "x"}, "data": {"url": "x"}, "duration": {"images": 256}}


def test_a_config_chooses_it_by_kind_and_its_mistakes_are_lines() -> None:
    assert load_config(MINIMAL).optimizer == OptimizerConfig()
    chosen = load_config(MINIMAL, ["optimizer.kind=sgld", "optimizer.preconditioned=true"]).optimizer
    assert chosen == SGLDConfig(preconditioned=True)
    with pytest.raises(UserError, match=r"optimizer\.kind: unknown 'sgdl'; did you mean 'sgld'"):
        load_config(MINIMAL, ["optimizer.kind=sgdl"])
    with pytest.raises(UserError, match=r"optimizer\.betas: unknown key; did you mean 'beta'"):
        load_config(MINIMAL, ["optimizer.kind=sgld", "optimizer.betas=[0.9, 0.99]"])
    with pytest.raises(UserError, match=r"optimizer\.decay: 0.4 must be in \(0.5, 1\]"):
        load_config(MINIMAL, ["optimizer.kind=sgld", "optimizer.decay=0.4"])
    with pytest.raises(UserError, match=r"optimizer\.num_data: missing"):
        SGLDConfig().for_run(0, None)
    assert SGLDConfig().for_run(5, 60) == SGLDConfig(num_data=60, seed=5)
