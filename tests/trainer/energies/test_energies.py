"""Energies trained without their normaliser: ln Z that noise-contrastive estimation learns is the enumerated one, and
recovery likelihood samples the posterior and rests at the data's own energy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.trainer.config.validation import mistakes
from scoreray.trainer.diffusion.denoiser import Denoiser, DenoiserConfig
from scoreray.trainer.diffusion.noise import ChainNoise, normal
from scoreray.trainer.diffusion.process import EDM
from scoreray.trainer.diffusion.sigma_sampling import LogUniform
from scoreray.trainer.diffusion.weighting import Adaptive, Constant, Sigma2
from scoreray.trainer.energies.langevin import recovery_chain
from scoreray.trainer.energies.nce import LogPartition, noise_contrastive_loss
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.networks.rbm import RBM, GaussianBernoulliRBM, GaussianRBMConfig, RBMConfig, _states
from scoreray.trainer.objectives.base import NoisedBatch
from scoreray.trainer.objectives.energy_based import NoiseContrastiveObjective, RecoveryLikelihoodObjective
from scoreray.trainer.step import MachineModule, TrainingModule

F64 = torch.float64


def teacher() -> RBM:
    torch.manual_seed(0)
    machine = RBM(4, 2).double()
    for parameter in machine.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=F64)
    return machine


def test_the_learned_log_normaliser_of_an_rbm_is_the_enumerated_one():
    """Expectations over all states, so that the optimum itself is reached. Another machine is the data's law."""
    data, states, mean = teacher(), _states(torch.zeros(4, dtype=F64)), torch.zeros(4, dtype=F64)
    target = (-data.free_energy(states) - data.log_partition()).exp().detach()
    machine = RBM(4, 2).double()
    log_partition = LogPartition(machine.initial_log_partition).double()
    of_noise = machine.log_independent(states, mean, mean + 1)
    assert of_noise.exp().sum().item() == pytest.approx(1)
    parameters = [*machine.parameters(), log_partition.value]
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        log_ratio = log_partition(machine(states)) - of_noise
        one, zero = torch.zeros_like(log_ratio), torch.zeros_like(log_ratio)
        of_states = noise_contrastive_loss(log_ratio, one[:, None]) - math.log(2)
        of_drawn = noise_contrastive_loss(zero, log_ratio[:, None]) - math.log(2)
        total = target @ of_states + of_noise.exp() @ of_drawn
        total.backward()
        return total

    optimizer.step(loss)
    learned = (-machine.free_energy(states) - log_partition.value).exp()
    assert (learned - target).abs().max() < 2e-3
    assert log_partition.value.item() == pytest.approx(machine.log_partition().item(), abs=5e-3)


@pytest.mark.parametrize("kind", ["rbm", "gaussian_rbm"])
def test_a_training_step_of_a_machine_learns_its_log_normaliser(kind):
    """The machine stays, at the density of its data; ln Z starts 1 nat off and comes to the enumerated one."""
    torch.manual_seed(0)
    machine = teacher() if kind == "rbm" else GaussianBernoulliRBM(2, 3, 0.7).double()
    if kind == "gaussian_rbm":
        machine.weight.data = torch.randn(2, 3, dtype=F64)
    count, law = 2000, {"mean": (0.2,), "std": (1.2,)}
    v = machine.gibbs(torch.zeros(count, machine.num_visible, dtype=F64), 30, torch.Generator().manual_seed(1))
    objective = NoiseContrastiveObjective(num_noise=3)
    step = MachineModule(machine, objective, seed=0, global_batch_size=count, **law)
    exact = machine.log_partition().item()
    step.log_partition.value.data.fill_(exact + 1)
    optimizer = torch.optim.LBFGS([step.log_partition.value], max_iter=8)

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = step(2 * v - 1 if kind == "rbm" else v, None, torch.arange(count))[0].mean()
        total.backward()
        return total

    optimizer.step(loss)
    assert step.log_partition.value.item() == pytest.approx(exact, abs=0.1)


def test_independent_units_have_the_law_that_their_density_says():
    source, mean, std = ChainNoise(0, torch.arange(20_000)), torch.tensor([0.4, -0.4]), torch.tensor([0.5, 2.0])
    gaussian = GaussianBernoulliRBM(2, 1)
    v = gaussian.independent(mean, std, source)
    expected = torch.distributions.Normal(mean, std).log_prob(v).sum(1)
    torch.testing.assert_close(gaussian.log_independent(v, mean, std), expected)
    assert (v.mean(0) - mean).abs().max() < 0.06
    binary = RBM(2, 1)
    v = binary.independent(mean, std, source)
    expected = torch.distributions.Bernoulli(torch.tensor([0.7, 0.3])).log_prob(v).sum(1)
    torch.testing.assert_close(binary.log_independent(v, mean, std), expected)
    assert (v.mean(0) - torch.tensor([0.7, 0.3])).abs().max() < 0.02


def quadratic(sigma_data: float) -> Denoiser:
    """The energy of N(0, sigma_data^2 + sigma^2), by a network whose output is 0 but can be trained."""
    torch.manual_seed(0)
    denoiser = Denoiser(MLPConfig(8, 1).build((3,)).double(), "energy_dot", sigma_data)
    for parameter in denoiser.network.parameters():
        if parameter.ndim > 1 and parameter.shape[0] == 3:
            parameter.data.zero_()
    return denoiser


@pytest.mark.parametrize("width", [1.0, 1.5])
def test_noise_contrast_of_the_true_energy_has_no_gradient_and_what_is_alike_costs_ln_4(width):
    objective = NoiseContrastiveObjective(Constant(), LogUniform(0.3, 1.0), width=width)
    step = TrainingModule(quadratic(0.7), objective, EDM(), seed=0, global_batch_size=5000).double()
    data = 0.7 * normal(9, torch.arange(5000), (3,), dtype=F64)
    loss = step(data, None, torch.arange(5000))[0]
    if width == 1:
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(4)))
        return
    parameters = list(step.log_partition.parameters())
    settled = torch.cat([g.flatten() for g in torch.autograd.grad(loss.mean(), parameters)]).norm()
    off = step(1.5 * data, None, torch.arange(5000))[0]
    assert settled < 0.1 * torch.cat([g.flatten() for g in torch.autograd.grad(off.mean(), parameters)]).norm()


def test_a_recovery_chain_has_the_moments_of_the_gaussian_posterior():
    """Of N(0, v) and x~ = x + s z: mean x~ v / (v + s^2), variance 1 / (1 / v + 1 / s^2), times what the score that is
    held over a step h leaves, (2 - q) / (2 - q (1 + k)), q = 1 - e^-h and k = s^2 / v."""
    count, v, s, h = 20_000, 0.8, 0.6, 0.2
    noisier = torch.full((count, 1), 1.3, dtype=F64)
    noises = normal(0, torch.arange(count), (40, 1), dtype=F64)
    ends = recovery_chain(lambda x: -x / v, noisier, torch.full_like(noisier, s), h, noises)
    q, k = 1 - math.exp(-h), s**2 / v
    variance = (2 - q) / (2 - q * (1 + k)) / (1 / v + 1 / s**2)
    assert abs(ends.mean().item() - 1.3 * v / (v + s**2)) < 4.5 * math.sqrt(variance / count)
    assert ends.var().item() == pytest.approx(variance, rel=0.05)


class Quadratic:
    """E = scale |x|^2 / 2, whose chain's law is known."""

    sigma_data = 1.0

    def __init__(self, scale: float) -> None:
        self.scale = torch.tensor(scale, dtype=F64, requires_grad=True)

    def score(self, x: Tensor, sigma: Tensor, condition: object) -> Tensor:
        return -self.scale * x

    def energy(self, x: Tensor, sigma: Tensor, condition: object) -> Tensor:
        return self.scale * x.square().sum(1) / 2


@pytest.mark.parametrize("scale", [1 / 1.4, 0.9])
def test_recovery_likelihood_has_the_gradient_of_the_denoising_error_at_a_ratio_near_1_and_none_at_the_truth(scale):
    """Data N(0, 0.4) at noise level 1. By dE / d scale = |x|^2 / 2 at the sample and at the end of its chain, a draw of
    N(x~ v / s^2, v), v = 1 / (scale + 1 / s^2)."""
    ratio, count, variance = 1.02, 200_000, 1.4
    s2 = ratio**2 - 1
    v = 1 / (scale + 1 / s2)
    gradient = (variance - (v / s2) ** 2 * (variance + s2) - v) / s2
    assert gradient == pytest.approx(2 * (scale * variance - 1), abs=0.03)  # d/d scale of E |D - x_0|^2, as s -> 0
    positions, objective = torch.arange(count), RecoveryLikelihoodObjective(ratio=ratio, step_size=0.2)
    x = math.sqrt(variance) * normal(0, positions, (1,), dtype=F64)
    batch = NoisedBatch(x, x, torch.ones(count, dtype=F64), probes=objective.draw_probes(1, positions, (1,), F64))
    energy = Quadratic(scale)
    found = torch.autograd.grad(objective.error(energy, batch).mean(), energy.scale)[0].item()  # type: ignore[arg-type]
    assert found == pytest.approx(gradient, abs=0.13)


@pytest.mark.parametrize(
    ("network", "objective", "message"),
    [
        (RBMConfig(2), RecoveryLikelihoodObjective(), "'recovery_likelihood' can't train network.kind 'rbm'"),
        (RBMConfig(2), NoiseContrastiveObjective(width=2.0), "objective.width: network.kind 'rbm' has none"),
        (GaussianRBMConfig(2), NoiseContrastiveObjective(Sigma2()), "objective.weighting: network.kind 'gaussian_rbm'"),
        (MLPConfig(), NoiseContrastiveObjective(), "objective 'noise_contrastive' needs an energy"),
        (MLPConfig(), RecoveryLikelihoodObjective(Adaptive()), "no error that weighting 'adaptive' could learn from"),
    ],
)
def test_what_does_not_fit_is_named(network, objective, message):
    assert any(message in one for one in mistakes(network, EDM(), DenoiserConfig(), objective, 8, False))


def test_impossible_numbers_are_refused():
    for make, message in [
        (lambda: NoiseContrastiveObjective(num_noise=0), "num_noise is 0"),
        (lambda: NoiseContrastiveObjective(width=0.0), "width is 0"),
        (lambda: RecoveryLikelihoodObjective(ratio=1.0), "ratio is 1"),
    ]:
        with pytest.raises(UserError, match=message):
            make()
