"""Nothing mixes devices or waits for one: processes, objectives, samplers, wrappers, estimates.

The meta device stands for a GPU: an operation on a tensor there and one on the CPU is refused (torch itself does not
always), and so is a look at a value. What must look, the adaptive solver and the checks of `sample`, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scoreray.sampling.guidance.guidance import Autoguidance, ClassifierFree
from scoreray.sampling.guidance.inverse import LinearInverse
from scoreray.sampling.guidance.operators import average_pool, gray, mask, matrix
from scoreray.sampling.measures.ais import GaussianRBMPath, RBMPath
from scoreray.sampling.measures.kde import _distances
from scoreray.sampling.measures.likelihood import _Augmented, _probes
from scoreray.sampling.samplers.gibbs import gibbs
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import ADAPTIVE, SAMPLERS, drive
from scoreray.sampling.samplers.sigmas import from_process, geometric
from scoreray.trainer.diffusion.denoiser import PARAMETERIZATIONS, Denoiser
from scoreray.trainer.diffusion.process import EDM, PROCESSES, VP, Process
from scoreray.trainer.diffusion.sigma_sampling import SIGMA_SAMPLINGS
from scoreray.trainer.diffusion.weighting import WEIGHTINGS
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.networks.network import NetworkConfig
from scoreray.trainer.networks.rbm import (
    RBM,
    GaussianBernoulliRBM,
    GaussianRBMConfig,
    RBMConfig,
)
from scoreray.trainer.networks.unet import UNetConfig
from scoreray.trainer.objectives.base import FewStepObjective
from scoreray.trainer.objectives.denoising import DenoisingObjective, EDMObjective
from scoreray.trainer.objectives.energy_based import ContrastiveObjective, EnergyObjective
from scoreray.trainer.objectives.objective import OBJECTIVES, ObjectiveConfig
from scoreray.trainer.objectives.teacher import Teacher
from scoreray.trainer.step import MachineModule, TrainingModule

B, SHAPE = 3, (3, 4, 4)
GRID = geometric(5, 0.1, 10.0).tolist()


class OneDevice(TorchDispatchMode):
    """Refuses operations, but for copies, on tensors of two devices; numbers (0 dimensions) may come from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.ndim]
        if len({tensor.device for tensor in tensors}) > 1 and "copy" not in func.__name__:
            raise RuntimeError(f"{func}: not on the same device: {[tensor.device.type for tensor in tensors]}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_device() -> Iterator[None]:
    with OneDevice():
        yield


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser(MLPConfig(8, 1).build(SHAPE, 2)).to("meta").requires_grad_(False)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.empty(B, *SHAPE, device="meta"),
        torch.empty(B, device="meta"),
        torch.empty(B, dtype=torch.int64, device="meta"),
    )


def test_two_devices_in_one_operation_are_refused() -> None:
    """`OneDevice` itself, on which the tests below rely."""
    x, *_ = inputs()
    for mix in (lambda y: x + y, lambda y: x @ y, lambda y: torch.cat([x, y]), lambda y: torch.where(x > 0, x, y)):
        with pytest.raises(RuntimeError, match="same device"):
            mix(torch.zeros(x.shape))
    with pytest.raises(RuntimeError):
        bool((x > 0).all())


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - ADAPTIVE))
def test_a_sampler_stays_on_the_device_of_its_samples(name: str, denoiser: Denoiser) -> None:
    x, _, seeds = inputs()
    options = {"num_steps": 2} if name in ("ncsn", "ncsnv2") else {}
    plain = lambda x, sigma, condition=None: denoiser(x, sigma)  # noqa: E731 (it takes no level to reach)
    end, nfe = drive(SAMPLERS[name](x, GRID, SampleNoise(seeds), **options), plain)
    assert end.device.type == "meta"
    assert nfe > 0


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_reverse_sde_of_a_process_stays_there_too(kind: str, denoiser: Denoiser) -> None:
    x, _, seeds = inputs()
    grid = from_process(PROCESSES[kind](), 4).tolist()
    end, _ = drive(SAMPLERS["reverse_sde"](x, grid, SampleNoise(seeds), process=PROCESSES[kind]()), denoiser)
    assert end.device.type == "meta"


@pytest.mark.parametrize("kind", PROCESSES)
def test_everything_that_is_derived_of_a_process_stays_with_its_t(kind: str) -> None:
    process, (x, t, _) = PROCESSES[kind](), inputs()
    for derived in (process.alpha, process.sigma, process.diffusion, process.noise_to_signal, process.time):
        assert derived(t).device.type == "meta"
    for level in (t, 0.5):
        assert process.drift(x, level).device.type == "meta"
        assert process.perturb(x, level, x).device.type == "meta"
        assert process.reverse_sde(x, level, x)[0].device.type == "meta"


@pytest.mark.parametrize("sampling", SIGMA_SAMPLINGS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_under_every_law_of_sigma(weighting: str, sampling: str) -> None:
    objective = DenoisingObjective(WEIGHTINGS[weighting](), SIGMA_SAMPLINGS[sampling](stratified=True))
    loss_of(Denoiser(MLPConfig(8, 1).build(SHAPE)), objective, VP())


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_every_parameterization(parameterization: str) -> None:
    loss_of(Denoiser(MLPConfig(8, 1).build(SHAPE, 2), parameterization), EDMObjective(label_dropout=0.1), EDM())


@pytest.mark.parametrize("start", ["data", "noise", "persistent"])
@pytest.mark.parametrize("kind", [kind for kind in OBJECTIVES if kind != "maximum_likelihood"])  # whose solver reads t
def test_every_objective(kind: str, start: str) -> None:
    if kind == "contrastive":
        objective = ContrastiveObjective(start=start, num_steps=2)
        loss_of(Denoiser(MLPConfig(8, 1).build(SHAPE), "energy_dot"), objective, EDM())
    elif start == "data":
        parameterization = "energy_dot" if issubclass(OBJECTIVES[kind], EnergyObjective) else "edm"
        loss_of(Denoiser(MLPConfig(8, 1).build(SHAPE), parameterization), OBJECTIVES[kind](), EDM())


@pytest.mark.parametrize("network", [UNetConfig(8, (1,), 1, patch_size=2), DiTConfig(2, 8, 1, 2)], ids=["unet", "dit"])
def test_image_networks_as_energies(network: UNetConfig | DiTConfig) -> None:
    loss_of(Denoiser(network.build(SHAPE, 2), "energy_dot"), EDMObjective(), EDM())


@pytest.mark.parametrize("start", ["data", "noise", "persistent"])
@pytest.mark.parametrize("config", [RBMConfig(3), RBMConfig(3, "sample"), GaussianRBMConfig(3)])
def test_rbms_train_on_the_device(config: NetworkConfig, start: str) -> None:
    machine = config.build(SHAPE)
    objective = ContrastiveObjective(chain="gibbs", start=start)  # type: ignore[arg-type]
    step = MachineModule(machine, objective, seed=0, global_batch_size=B)
    loss, _ = step.to("meta")(torch.empty(B, *SHAPE, device="meta"), None, inputs()[2])
    loss.mean().backward()
    assert loss.device.type == "meta"


def loss_of(denoiser: Denoiser, objective: ObjectiveConfig, process: Process) -> None:
    """One training step, forward and backward, on uint8 images."""
    step = TrainingModule(denoiser, objective, process, seed=0, global_batch_size=B, shape=SHAPE).to("meta")
    if isinstance(objective, FewStepObjective):
        step.teacher = Teacher(Denoiser(MLPConfig(8, 1).build(SHAPE)).to("meta"))
    images = torch.empty(B, *SHAPE, dtype=torch.uint8, device="meta")
    loss, sigma = step(images, inputs()[2], inputs()[2])
    loss.mean().backward()
    assert loss.device.type == sigma.device.type == "meta"


def test_guidance_stays_on_the_device(denoiser: Denoiser) -> None:
    x, sigma, labels = inputs()
    for guided in (ClassifierFree(denoiser, 2.0), Autoguidance(denoiser, denoiser, 2.0)):
        assert guided(x, sigma, labels).device.type == "meta"


@pytest.mark.parametrize("method", ["projection", "jacobian"])
def test_a_measurement_on_the_cpu_serves_samples_on_any_device(denoiser: Denoiser, method: str) -> None:
    known = torch.zeros(SHAPE, dtype=torch.bool)
    for operator, y in (
        (mask(known), torch.zeros(SHAPE)),
        (average_pool(2), torch.zeros(3, 2, 2)),
        (gray(), torch.zeros(1, 4, 4)),
    ):
        x, sigma, _ = inputs()
        wrapped = LinearInverse(denoiser, operator, y, 0.1, method=method)  # type: ignore[arg-type]
        assert wrapped(x, sigma).device.type == "meta"
    flat = Denoiser(MLPConfig(8, 1).build((5,))).to("meta")
    wrapped = LinearInverse(flat, matrix(torch.eye(2, 5)), torch.zeros(2), 0.1, method=method)  # type: ignore[arg-type]
    assert wrapped(torch.empty(B, 5, device="meta"), sigma).device.type == "meta"


@pytest.mark.parametrize("trace", ["exact", "rademacher", "gaussian"])
def test_likelihoods_probes_and_state_stay_on_the_device(denoiser: Denoiser, trace: str) -> None:
    x, sigma, seeds = inputs()
    vectors = None if trace == "exact" else _probes(x, trace, 2, seeds)  # type: ignore[arg-type]
    augmented = _Augmented(denoiser, torch.Size(SHAPE), vectors, 0.5, None)
    assert augmented(torch.empty(B, 49, device="meta"), sigma).device.type == "meta"
    assert _probes(x, "rademacher", 1, None).device.type == "meta"


def test_machines_chains_and_their_annealing_stay_on_the_device() -> None:
    seeds = torch.arange(B)  # on the CPU, as callers have them
    for machine, path in ((RBM(5, 3), RBMPath), (GaussianBernoulliRBM(5, 3), GaussianRBMPath)):
        machine.to("meta").requires_grad_(False)
        assert gibbs(machine, seeds, 2).device.type == "meta"
        walk = path(machine)
        x = walk.step(walk.draw(seeds), 0.5, seeds, 0)
        assert walk.log_density(x, 0.5).device.type == "meta"


def test_distances_of_a_kernel_density_estimate_stay_on_the_device() -> None:
    x, *_ = inputs()
    assert _distances(x.flatten(1), x.flatten(1)).device.type == "meta"
