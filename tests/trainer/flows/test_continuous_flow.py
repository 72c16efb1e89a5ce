"""Continuous normalizing flows: the density is the likelihood's, both gradients agree, the optimum is the data's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.measures.likelihood import log_likelihood
from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.process import EDM, FlowMatching
from scoreray.trainer.diffusion.targets import Mixture
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.objectives.base import NoisedBatch
from scoreray.trainer.objectives.maximum_likelihood import MaximumLikelihoodObjective

PROCESS = EDM(sigma_min=0.05, sigma_max=20.0)


class Small(torch.nn.Module):
    """A perceptron that is smooth in the noise level, so that an exact solution takes few steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()

    def forward(self, x: Tensor, c_noise: Tensor, condition: None = None) -> Tensor:
        return self.layers(torch.cat([x, torch.tanh(c_noise)[:, None]], dim=1))


def denoiser(parameterization: str = "edm") -> Denoiser:
    return Denoiser(Small(), parameterization)


def batch(process=PROCESS, probes: Tensor | None = None) -> NoisedBatch:
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return NoisedBatch(x, x, torch.zeros(4, dtype=torch.float64), probes=probes, process=process)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_gradients_by_the_adjoint_and_through_the_solver_are_equal_to_1e_5(trace):
    probes = noise.rademacher(0, torch.arange(4), (1, 2), dtype=torch.float64) if trace == "hutchinson" else None
    found = []
    for adjoint in (False, True):
        model = denoiser()
        objective = MaximumLikelihoodObjective(solver="dopri5", rtol=1e-9, atol=1e-9, adjoint=adjoint, trace=trace)
        loss = objective.error(model, batch(probes=probes)).mean()
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    (one, direct), (other, adjoint) = found
    assert float(direct.norm()) > 0.01
    assert torch.allclose(one, other, rtol=1e-10)
    assert float((direct - adjoint).norm() / direct.norm()) < 1e-5
    assert float((direct - adjoint).abs().max()) < 1e-5


@pytest.mark.parametrize("parameterization", ["edm", "velocity"])
def test_the_log_density_is_the_likelihood_s_of_the_same_model(parameterization):
    model, process = denoiser(parameterization), FlowMatching(t_min=0.05, t_max=0.95)
    objective = MaximumLikelihoodObjective(solver="dopri5", rtol=1e-8, atol=1e-8, trace="exact")
    x = batch().x0
    low, high = process.sigma_range()
    nats = log_likelihood(model, x, sigma_min=low, sigma_max=high, trace="exact", rtol=1e-9, atol=1e-9).nats
    assert torch.allclose(-2 * objective.error(model, batch(process)), nats, atol=1e-5)


class Linear(torch.nn.Module):
    """EDM's F of Gaussian data N(0, s^2): a number times x at each noise level."""

    def __init__(self, s: float) -> None:
        super().__init__()
        self.s = torch.nn.Parameter(torch.tensor(s, dtype=torch.float64))

    def forward(self, x: Tensor, c_noise: Tensor, condition: None = None) -> Tensor:
        sigma, sd = (4 * c_noise).exp()[:, None], 0.5
        gain = self.s**2 / (self.s**2 + sigma**2) - sd**2 / (sd**2 + sigma**2)
        return gain * x * (sigma**2 + sd**2) / (sigma * sd)


@pytest.mark.parametrize(("solver", "steps"), [("rk4", 16), ("midpoint", 48), ("dopri5", 1)])
def test_of_gaussian_data_the_loss_is_least_at_their_variance_and_there_their_entropy(solver, steps):
    s, process = 0.7, EDM(sigma_min=0.002, sigma_max=200.0)
    x = torch.special.ndtri((torch.arange(64, dtype=torch.float64) + 0.5) / 64)[:, None]  # quantiles of the normal
    x = x * s / x.square().mean().sqrt()
    data = NoisedBatch(x, x, torch.zeros(len(x), dtype=torch.float64), process=process)
    objective = MaximumLikelihoodObjective(solver=solver, steps=steps, rtol=1e-6, atol=1e-6, trace="exact")
    truth = Denoiser(Linear(s))
    loss = objective.error(truth, data).mean()
    loss.backward()
    loss = loss.detach()
    assert float(loss) == pytest.approx(math.log(2 * math.pi * math.e * s**2) / 2, abs=2e-3)
    assert abs(float(truth.network.s.grad)) < 5e-3
    for other in (0.8 * s, 1.2 * s):
        assert float(objective.error(Denoiser(Linear(other)), data).mean()) > float(loss) + 0.01


def test_what_it_can_not_be_trained_with_is_refused_in_a_line_each():
    with pytest.raises(UserError) as refused:
        load_config(
            "configs/demo.yaml", ["objective={kind: maximum_likelihood, weighting: {kind: edm}}", "engine.zero_stage=3"]
        )
    text = str(refused.value)
    assert "objective.weighting: kind 'maximum_likelihood' integrates over all noise levels" in text
    assert "engine.zero_stage: objective 'maximum_likelihood'" in text


@pytest.mark.slow
def test_a_trained_flow_reaches_the_entropy_of_a_mixture():
    """By maximum likelihood alone: on held-out samples the loss comes within 0.03 nats a dimension of theirs."""
    torch.manual_seed(0)
    target = Mixture(torch.tensor([[0.6, 0.0], [-0.6, 0.3]], dtype=torch.float64), 0.25)
    model = Denoiser(MLPConfig(hidden_size=32, num_layers=2).build((2,), {}))
    objective = MaximumLikelihoodObjective(solver="dopri5", rtol=1e-4, atol=1e-4, trace="exact")
    optimizer = torch.optim.Adam(model.parameters(), 6e-3)
    g = torch.Generator().manual_seed(1)

    def loss(count: int) -> tuple[Tensor, Tensor]:
        x = target.sample(count, g)
        found = objective.error(model, NoisedBatch(x.float(), x.float(), torch.zeros(count), process=PROCESS))
        return found.mean(), -target.log_density(x, PROCESS.sigma_min).mean() / 2

    first = float(loss(512)[0].detach())
    for step in range(60):
        optimizer.zero_grad()
        loss(128)[0].backward()
        optimizer.param_groups[0]["lr"] = 6e-3 * (1 - step / 60)
        optimizer.step()
    last, entropy = (float(value.detach()) for value in loss(4000))
    assert entropy - 0.01 < last < entropy + 0.03 < first - 0.1, (first, last, entropy)
