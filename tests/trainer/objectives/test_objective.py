"""Every objective is an estimate of one denoising error; at the optimal network it is the posterior variance."""

from __future__ import annotations

import math
from typing import Annotated

import pytest
import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.trainer.config.validation import objective_mistakes, refuse
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.noise import normal, rademacher
from scoreray.trainer.diffusion.process import VP
from scoreray.trainer.diffusion.sigma_sampling import LadderUniform, LogNormal, LogUniform, UniformT
from scoreray.trainer.diffusion.weighting import Adaptive, Constant, EDMWeighting, Sigma2, Velocity
from scoreray.trainer.objectives.base import FewStepObjective, NoisedBatch
from scoreray.trainer.objectives.denoising import DDPMObjective, DenoisingObjective, EDMObjective, FlowMatchingObjective
from scoreray.trainer.objectives.energy_based import ContrastiveObjective, EnergyObjective
from scoreray.trainer.objectives.maximum_likelihood import MaximumLikelihoodObjective
from scoreray.trainer.objectives.objective import OBJECTIVES, ObjectiveConfig
from scoreray.trainer.objectives.score_matching import ImplicitObjective, SlicedObjective, SlicedVRObjective
from scoreray.trainer.step import TrainingModule

F64 = torch.float64
D = 3
OTHER = (EnergyObjective, MaximumLikelihoodObjective, FewStepObjective)  # whose losses are not the error
ERRORS = [cls() for cls in OBJECTIVES.values() if not issubclass(cls, OTHER)]
every_objective = pytest.mark.parametrize("objective", ERRORS, ids=lambda o: o.kind)


def estimates(objective, denoiser, data, sigma, count, num_probes=1, weighting=None) -> Tensor:
    """Losses of `count` independent samples at one noise level, unweighted by default."""
    positions = torch.arange(count)
    x0 = data(normal(1, positions, (D,), dtype=F64))
    z = normal(2, positions, (D,), dtype=F64)
    probes = (rademacher if objective.kind != "contrastive" else normal)(3, positions, (num_probes, D), dtype=F64)
    weight = (weighting or Constant()).build(VP(), denoiser.sigma_data)
    levels = torch.full((count,), sigma, dtype=F64)
    return weight(objective.error(denoiser, NoisedBatch(x0, x0 + sigma * z, levels, probes=probes)), levels)


def near(values: Tensor, expected: float) -> bool:
    """The mean is within 4.5 standard errors."""
    return abs(values.mean().item() - expected) < 4.5 * values.std().item() / math.sqrt(len(values)) + 1e-12


def gaussian_denoiser(s: float) -> Denoiser:
    """The optimal denoiser of N(0, s^2 I), by an EDM network with sigma_data s that outputs 0."""
    return Denoiser(lambda x, *_: torch.zeros_like(x), "edm", s)


@every_objective
@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
def test_at_the_optimum_every_objective_is_the_posterior_variance(objective, sigma):
    s = 0.7
    values = estimates(objective, gaussian_denoiser(s), lambda z: s * z, sigma, 20_000)
    assert near(values.detach(), s**2 * sigma**2 / (s**2 + sigma**2))


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_the_losses_at_the_optimum_are_the_closed_forms(sigma):
    s = 0.5
    best = gaussian_denoiser(s)
    edm = estimates(EDMObjective(), best, lambda z: s * z, sigma, 20_000, weighting=EDMWeighting())
    assert near(edm, 1.0)
    simple = estimates(DDPMObjective(), best, lambda z: s * z, sigma, 20_000, weighting=Sigma2())
    assert near(simple, s**2 / (s**2 + sigma**2))
    silent = Denoiser(lambda x, *_: torch.zeros_like(x), "score", s)
    assert near(estimates(DenoisingObjective(), silent, lambda z: s * z, sigma, 20_000, weighting=Sigma2()), 1.0)
    flow = estimates(FlowMatchingObjective(), best, lambda z: s * z, sigma, 20_000, weighting=Velocity())
    assert near(flow, ((1 + sigma) * s) ** 2 / (s**2 + sigma**2))


class Tanh(nn.Module):
    """A small network far from any optimum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D)).double()

    def forward(self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return self.body(x)


def two_points(z: Tensor) -> Tensor:
    return z.sign() * 0.8


@pytest.mark.parametrize("parameterization", ["edm", "noise", "energy_residual"])
@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_implicit_sliced_and_denoising_score_matching_agree_in_expectation(parameterization, sigma):
    denoiser = Denoiser(Tanh(), parameterization)
    clean = estimates(DenoisingObjective(), denoiser, two_points, sigma, 40_000).detach()
    for objective in (ImplicitObjective(), SlicedVRObjective(), SlicedObjective()):
        values = estimates(objective, denoiser, two_points, sigma, 40_000).detach()
        assert near(values - clean, 0.0), objective.kind
    assert near(estimates(SlicedVRObjective(), denoiser, two_points, sigma, 40_000, num_probes=3).detach() - clean, 0.0)


def test_their_gradients_agree_in_expectation_too():
    def gradient(objective, shift):
        denoiser = Denoiser(Tanh(), "edm")
        estimates(objective, denoiser, lambda z: two_points(z.roll(shift, 0)), 0.5, 20_000).mean().backward()
        return torch.cat([p.grad.flatten() for p in denoiser.parameters()])

    clean = gradient(DenoisingObjective(), 0)
    spread = (gradient(DenoisingObjective(), 77) - clean).norm()  # what other samples alone change
    for objective in (ImplicitObjective(), SlicedVRObjective(), SlicedObjective()):
        assert (gradient(objective, 0) - clean).norm() < 8 * spread
        assert (gradient(objective, 0) - clean).norm() < 0.15 * clean.norm()


@pytest.mark.parametrize("num_steps", [1, 5])
def test_contrastive_divergence_from_the_data_has_the_gradient_of_score_matching_for_small_steps(num_steps):
    count, sigma = 50_000, torch.full((50_000,), 1.0, dtype=F64)
    x0, z = two_points(normal(1, torch.arange(count), (D,), dtype=F64)), normal(2, torch.arange(count), (D,), dtype=F64)
    chain = normal(3, torch.arange(count), (num_steps, D), dtype=F64)

    def gradient(objective, probes):
        denoiser = Denoiser(Tanh(), "energy_residual")
        objective.error(denoiser, NoisedBatch(x0, x0 + sigma[:, None] * z, sigma, probes=probes)).mean().backward()
        return torch.cat([p.grad.flatten() for p in denoiser.parameters()])

    objective = ContrastiveObjective(num_steps=num_steps, step_size=2e-3)
    # Steps of both signs: their first order, whose noise grows as the step shrinks, cancels.
    contrast = (gradient(objective, chain) + gradient(objective, -chain)) / 2
    exact = gradient(ImplicitObjective(), None)
    assert (contrast - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("start", ["data", "noise"])
def test_contrastive_divergence_of_the_true_energy_has_no_gradient_wherever_its_chains_begin(start):
    """Gaussian data and the energy of its own density: nothing is left to learn, as there is with other data."""
    denoiser = Denoiser(Tanh(), "energy_dot", 0.7)
    last = denoiser.network.body[2]
    for parameter in last.parameters():
        parameter.data.zero_()  # e(x) = 0 leaves the quadratic, which is the energy of N(0, sigma_data^2 + sigma^2)
    objective = ContrastiveObjective(Constant(), LogUniform(0.5, 1.0), num_steps=30, step_size=0.02, start=start)
    step = TrainingModule(denoiser, objective, VP(), seed=0, global_batch_size=20_000)
    data = 0.7 * normal(9, torch.arange(20_000), (D,), dtype=F64)
    settled, off = (
        torch.autograd.grad(step(x, None, torch.arange(20_000))[0].mean(), last.weight)[0].norm()
        for x in (data, 2 * data)
    )
    assert settled < 0.1 * off


def test_contrastive_divergence_needs_an_energy_and_a_weighting_that_does_not_read_its_loss():
    with pytest.raises(UserError, match=r"needs an energy, and denoiser\.parameterization is 'edm'"):
        TrainingModule(Denoiser(Tanh()), ContrastiveObjective(), VP(), seed=0, global_batch_size=1)
    with pytest.raises(UserError, match="no error that weighting 'adaptive' could learn from"):
        refuse(objective_mistakes(ContrastiveObjective(Adaptive()), "energy_dot"))


def test_rademacher_probes_have_no_variance_on_a_diagonal_jacobian():
    denoiser = gaussian_denoiser(0.6)
    exact = estimates(ImplicitObjective(), denoiser, two_points, 0.5, 100)
    torch.testing.assert_close(estimates(SlicedVRObjective(), denoiser, two_points, 0.5, 100), exact)


def test_variance_falls_from_sliced_to_reduced_to_exact_and_with_more_probes():
    denoiser = Denoiser(Tanh(), "edm")
    deviation = {
        (objective.kind, probes): estimates(objective, denoiser, two_points, 1.0, 5000, probes).std().item()
        for objective in (SlicedObjective(), SlicedVRObjective(), ImplicitObjective())
        for probes in (1, 8)
    }
    assert deviation["sliced", 1] > deviation["sliced_vr", 1] > deviation["implicit", 1]
    assert deviation["sliced", 8] < deviation["sliced", 1]


@every_objective
def test_a_sample_s_loss_does_not_depend_on_its_batch_and_keeps_its_dtype(objective):
    denoiser = Denoiser(Tanh(), "edm")
    whole = estimates(objective, denoiser, two_points, 0.5, 7)
    torch.testing.assert_close(estimates(objective, denoiser, two_points, 0.5, 1), whole[:1])
    assert whole.dtype == F64


def test_the_defaults_are_edm_and_each_objective_has_its_own():
    assert EDMObjective() == EDMObjective(EDMWeighting(), LogNormal(-1.2, 1.2), 0.0)
    assert DenoisingObjective() == DenoisingObjective(Sigma2(), UniformT())
    assert DDPMObjective() == DDPMObjective(Sigma2(), LadderUniform(1000))
    assert FlowMatchingObjective() == FlowMatchingObjective(Velocity(), UniformT())


def test_configs_are_chosen_by_kind_and_checked():
    union = TypeAdapter(Annotated[ObjectiveConfig, Field(discriminator="kind")])
    for name in OBJECTIVES:
        chosen = union.validate_python({"kind": name, "weighting": {"kind": "min_snr", "gamma": 3}})
        assert chosen.weighting.gamma == 3
    with pytest.raises(ValidationError, match="P_men"):
        union.validate_python({"kind": "edm", "sigma_sampling": {"kind": "log_normal", "P_men": 0}})
    with pytest.raises(ValidationError, match=r"label_dropout is 1\.5: give a number between 0 and 1"):
        union.validate_python({"kind": "edm", "label_dropout": 1.5})
    with pytest.raises(UserError, match="num_probes is 0"):
        SlicedObjective(num_probes=0)
