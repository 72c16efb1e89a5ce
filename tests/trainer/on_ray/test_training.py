"""Small models trained on a 2-D mixture come near its exact denoiser, with every objective, and draw its samples."""

from __future__ import annotations

import pytest
import torch

from scoreray.sampling.samplers.sample import sample
from scoreray.sampling.samplers.sigmas import karras
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.process import DDPM, EDM, VE, Cosine, FlowMatching, SubVP
from scoreray.trainer.diffusion.sigma_sampling import LadderUniform, LogNormal
from scoreray.trainer.diffusion.targets import Mixture
from scoreray.trainer.diffusion.weighting import Adaptive, EDMWeighting, Learned, Velocity
from scoreray.trainer.networks.ladder import OnLadder
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.networks.rbm import GaussianBernoulliRBM
from scoreray.trainer.objectives.denoising import DDPMObjective, DenoisingObjective, EDMObjective, FlowMatchingObjective
from scoreray.trainer.objectives.energy_based import (
    ContrastiveObjective,
    NoiseContrastiveObjective,
    RecoveryLikelihoodObjective,
)
from scoreray.trainer.objectives.score_matching import ImplicitObjective, SlicedObjective, SlicedVRObjective
from scoreray.trainer.step import MachineModule, TrainingModule

MODES = Mixture(torch.tensor([[-0.6, 0.0], [0.4, 0.5], [0.4, -0.5]]), 0.15, component_labels=torch.arange(3))
BATCH = 256
NARROW = {"weighting": EDMWeighting(), "sigma_sampling": LogNormal(-1.2, 0.8)}

RUNS = {
    "edm": (EDMObjective(), EDM(), "edm"),
    "denoising": (DenoisingObjective(), VE(0.05, 5.0), "noise"),
    "ddpm": (DDPMObjective(), DDPM(), "noise"),
    "flow_matching": (FlowMatchingObjective(), FlowMatching(), "velocity"),
    "implicit": (ImplicitObjective(**NARROW), EDM(), "edm"),
    "sliced": (SlicedObjective(**NARROW), EDM(), "edm"),
    "sliced_vr": (SlicedVRObjective(**NARROW), EDM(), "edm"),
    "contrastive": (
        ContrastiveObjective(EDMWeighting(), LogNormal(-1.4, 0.6), num_steps=5, step_size=0.2),
        EDM(),
        "energy_dot",
    ),
    "contrastive, persistent": (
        ContrastiveObjective(
            EDMWeighting(), LogNormal(-1.3, 0.7, stratified=True), num_steps=5, step_size=0.2, start="persistent"
        ),
        EDM(),
        "energy_dot",
    ),
    "noise_contrastive": (
        NoiseContrastiveObjective(sigma_sampling=LogNormal(-1.3, 0.6), num_noise=4),
        EDM(),
        "energy_dot",
    ),
    "recovery_likelihood": (
        RecoveryLikelihoodObjective(EDMWeighting(), LogNormal(-1.4, 0.6), num_steps=15),
        EDM(),
        "energy_dot",
    ),
    "learned uncertainty": (EDMObjective(Learned()), EDM(), "edm"),
    "adaptive": (EDMObjective(Adaptive()), EDM(), "edm"),
    "energy": (EDMObjective(), EDM(), "energy_residual"),
    "v": (DenoisingObjective(Velocity()), Cosine(), "v"),
    "score": (DenoisingObjective(), SubVP(), "score"),
}


def train(objective, process, parameterization, num_steps=200, network=None, num_classes=0) -> Denoiser:
    torch.manual_seed(0)
    network = network or MLPConfig(48, 2).build((2,), num_classes)
    denoiser = Denoiser(network, parameterization)
    step = TrainingModule(denoiser, objective, process, seed=0, global_batch_size=BATCH, shape=(2,))
    optimizer = torch.optim.Adam(step.parameters(), lr=4e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_steps)
    data = MODES.sample(num_steps * BATCH, torch.Generator().manual_seed(0)).float()
    labels = (data[:, None] - MODES.means).square().sum(2).argmin(1) if num_classes else None
    for positions in torch.arange(len(data)).split(BATCH):
        loss, _ = step(data[positions], None if labels is None else labels[positions], positions)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    return denoiser.eval()


def distance_to_exact(denoiser, sigma, class_labels=None) -> float:
    """Square distance to the exact denoiser; 1 for the best linear one, which knows the data's mean and variance."""
    generator = torch.Generator().manual_seed(1)
    x0 = MODES.sample(4000, generator)
    x = x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    exact = MODES(x, sigma, class_labels)
    mean, variance = x0.mean(0), x0.var(0)
    linear = mean + (x - mean) * variance / (variance + sigma**2)
    with torch.no_grad():
        return float((denoiser(x, sigma, class_labels) - exact).square().mean() / (linear - exact).square().mean())


# Chains that persist stay at noise levels of their own, 256 of them, and are correlated: a noisier gradient.
# Others have not quite mixed: over seeds contrastive ends at 0.10 to 0.23.
LIMIT = {"contrastive": 0.3, "contrastive, persistent": 0.3, "recovery_likelihood": 0.25}
WIDTH = {"contrastive": (0.5, 0.9)}  # short chains from the data make models too narrow: 0.61 to 0.72 of it over seeds


# One for each form of target, in few steps that come well under the limit. The closed forms of the others, values
# and gradients, are in the tests of objectives, energies, weightings and the denoiser.
QUICK = ("edm", "denoising", "flow_matching")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS])
def test_every_objective_recovers_the_mixture(name):
    denoiser = train(*RUNS[name], num_steps=200 if name in QUICK else 400)
    for sigma in (0.1, 0.2, 0.4):  # where the modes are separate
        assert distance_to_exact(denoiser, sigma) < LIMIT.get(name, 0.15), f"sigma {sigma}"
    z = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = sample(denoiser, 2.0 * z, karras(18, 0.02, 2.0), sampler="heun")
    distance, mode = (x[:, None] - MODES.means).square().sum(2).min(1)
    share = torch.bincount(mode, minlength=3) / len(x)
    assert (share - 1 / 3).abs().max() < 0.1
    least, most = WIDTH.get(name, (0.7, 1.3))
    assert least < distance.median().sqrt() / (0.15 * 1.1774) < most  # of the median of a Rayleigh law


@pytest.mark.parametrize("start", [pytest.param("data", marks=pytest.mark.slow), "persistent"])
def test_a_gaussian_rbm_trained_by_gibbs_has_nearly_the_likelihood_of_the_mixture(start):
    torch.manual_seed(0)
    machine = GaussianBernoulliRBM(2, 8, 0.3)
    objective = ContrastiveObjective(num_steps=5, start=start, chain="gibbs")
    step = MachineModule(machine, objective, seed=0, global_batch_size=BATCH)
    optimizer = torch.optim.Adam(step.parameters(), lr=0.03, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 500)
    data = MODES.sample(500 * BATCH, torch.Generator().manual_seed(0)).float()
    for positions in torch.arange(len(data)).split(BATCH):
        loss, _ = step(data[positions], None, positions)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    test = MODES.sample(5000, torch.Generator().manual_seed(1))
    exact = MODES.log_density(test).mean()
    one_gaussian = torch.distributions.MultivariateNormal(test.mean(0), torch.cov(test.T)).log_prob(test).mean()
    with torch.no_grad():
        learnt = (-machine.free_energy(test.float()) - machine.log_partition()).mean()
    assert exact - one_gaussian > 1.1
    assert exact - learnt < 0.4


def test_a_ladder_network_with_a_code_for_each_rung_recovers_the_mixture():
    torch.manual_seed(0)
    process = VE(0.05, 2.0)
    network = OnLadder(MLPConfig(48, 2).build((2,)), process.ladder(10))
    denoiser = train(DenoisingObjective(sigma_sampling=LadderUniform(10)), process, "score", network=network)
    for sigma in process.ladder(10)[4:9].tolist():
        assert distance_to_exact(denoiser, sigma) < 0.15


def test_labels_are_learnt_and_what_is_dropped_trains_the_unconditional_denoiser():
    denoiser = train(EDMObjective(label_dropout=0.3), EDM(), "edm", num_steps=300, num_classes=3)
    for label in (-1, 0, 1, 2):
        assert distance_to_exact(denoiser, 0.3, torch.full((4000,), label)) < 0.15
