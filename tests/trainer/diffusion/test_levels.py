"""Levels: inputs of a network that are no data, which samplers and requests set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scoreray.trainer.diffusion.condition import Condition, class_condition
from scoreray.trainer.diffusion.condition_shapes import check_condition, complete, example_condition
from scoreray.trainer.diffusion.denoiser import Denoiser, like
from scoreray.trainer.diffusion.jacobian import path_derivative
from scoreray.trainer.diffusion.levels import (
    GUIDANCE_WEIGHT,
    LEVELS,
    TARGET_LEVEL,
    as_angles,
    data_conditions,
    level_names,
    with_guidance_weight,
    with_levels,
    with_target_level,
)
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.networks.mmdit import MMDiTConfig
from scoreray.trainer.networks.network import NetworkConfig
from scoreray.trainer.networks.unet import UNetConfig

UNET = UNetConfig(model_channels=8, channel_mult=(1, 2), num_blocks=1, patch_size=1)
DIT = DiTConfig(patch_size=4, hidden_size=16, depth=1, num_heads=2)
MMDIT = MMDiTConfig(patch_size=4, hidden_size=16, depth=1, num_heads=2)
MLP = MLPConfig(hidden_size=16, num_layers=2)
each_network = pytest.mark.parametrize("config", [UNET, DIT, MMDIT, MLP], ids=lambda config: config.kind)
CLASSES = class_condition(["a", "b"])
ROWS = 3


def denoiser(config: NetworkConfig, trained: bool) -> Denoiser:
    torch.manual_seed(0)
    network = config.build((2, 8, 8), with_levels(CLASSES, LEVELS))
    for name, parameter in network.named_parameters():
        if trained or ".level_" not in name:  # a new network outputs 0 whatever its input
            parameter.data += 0.1 * torch.randn_like(parameter)
    return Denoiser(network)


@each_network
def test_a_level_acts_once_it_is_trained_and_a_row_without_one_has_its_own_sigmas(config: NetworkConfig) -> None:
    x, sigma = torch.randn(ROWS, 2, 8, 8), torch.tensor([0.1, 1.0, 20.0])
    labels = Condition({"label": torch.tensor([0, 1, -1])})
    reached = with_guidance_weight(with_target_level(labels, sigma / 3, x), 3.0, x)
    begun = denoiser(config, trained=False)
    assert (begun(x, sigma, reached) == begun(x, sigma, labels)).all()
    trained = denoiser(config, trained=True)
    plain = trained(x, sigma, labels)
    assert ((trained(x, sigma, reached) - plain).flatten(1).abs().amax(1) > 1e-4).all()
    assert (trained(x, sigma, with_target_level(labels, sigma, x)) == plain).all()
    mixed = Condition.cat([reached[:1], labels[1:]], [1, 2])  # of a step batcher, say
    assert mixed is not None
    torch.testing.assert_close(trained(x, sigma, mixed)[1:], plain[1:])
    torch.testing.assert_close(trained(x, sigma, mixed)[:1], trained(x, sigma, reached)[:1])


@each_network
def test_a_networks_derivative_along_a_path_is_the_finite_difference(config: NetworkConfig) -> None:
    x, slope = torch.randn(2, ROWS, 2, 8, 8, dtype=torch.float64)
    sigma = torch.tensor([0.1, 1.0, 20.0], dtype=torch.float64)
    made = denoiser(config, trained=True).double()
    given = with_guidance_weight(
        with_target_level(Condition({"label": torch.tensor([0, 1, -1])}), sigma / 3, x), 3.0, x
    )

    def function(x: Tensor, sigma: Tensor) -> Tensor:
        return made.denoise(x, sigma, given)

    found, step = path_derivative(function, x, sigma, slope), 1e-5 * sigma
    with torch.no_grad():
        ends = [function(x + sign * like(step, x) * slope, sigma + sign * step) for sign in (1, -1)]
    torch.testing.assert_close(found, (ends[0] - ends[1]) / like(2 * step, x), rtol=1e-5, atol=1e-6)
    made.bfloat16()
    rounded = path_derivative(function, x, sigma, slope)
    assert (rounded - found).norm() < 0.03 * found.norm()


def test_a_network_sees_each_level_as_an_angle() -> None:
    x, sigma = torch.zeros(2, 3), torch.tensor([1.0, 0.5])
    given = with_guidance_weight(with_target_level(None, torch.tensor([0.0, 0.5]), x), 2.0, x)
    seen = as_angles(given, with_levels({}, LEVELS), sigma, 0.5)
    assert seen is not None
    torch.testing.assert_close(seen.values[TARGET_LEVEL], torch.tensor([[0.0], [0.5]]))
    torch.testing.assert_close(seen.values[GUIDANCE_WEIGHT], torch.tensor([[0.5], [0.5]]))
    own = as_angles(given.drop(torch.tensor([True, False])), with_levels({}, LEVELS), sigma, 1.0)
    assert own is not None
    torch.testing.assert_close(own.values[TARGET_LEVEL][0], torch.tensor([0.5]))


def test_conditions_are_split_into_the_datas_and_levels() -> None:
    known = with_levels(CLASSES, LEVELS)
    assert data_conditions(known) == CLASSES
    assert level_names(known) == LEVELS
    for given in (example_condition(known, ROWS), complete(None, known, ROWS)):
        check_condition(given, known, ROWS)
