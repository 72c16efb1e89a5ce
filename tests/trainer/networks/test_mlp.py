"""The perceptron keeps the promises of every network, on points."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scoreray.data.errors import UserError
from scoreray.trainer.networks.mlp import MLPConfig


def trained(shape=(2,), num_classes=3) -> nn.Module:
    torch.manual_seed(0)
    network = MLPConfig(hidden_size=16, num_layers=2).build(shape, num_classes)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return network


X, C_NOISE, LABELS = torch.linspace(-1, 1, 10).reshape(5, 2), torch.linspace(-1.5, 1, 5), torch.arange(5) % 4 - 1


def test_a_new_network_outputs_zero_in_the_shape_of_x():
    out = MLPConfig().build((2, 3), 0)(torch.ones(4, 2, 3), torch.zeros(4), None)
    assert torch.equal(out, torch.zeros(4, 2, 3))


def test_output_depends_on_point_noise_level_and_class_and_not_on_the_batch():
    network = trained()
    out = network(X, C_NOISE, LABELS)
    for other in (
        network(X + 0.1, C_NOISE, LABELS),
        network(X, C_NOISE + 0.1, LABELS),
        network(X, C_NOISE, (LABELS + 2) % 4 - 1),
    ):
        assert (other - out).abs().max() > 1e-3
    torch.testing.assert_close(network(X[2:3], C_NOISE[2:3], LABELS[2:3])[0], out[2])
    assert torch.equal(network(X, C_NOISE), network(X, C_NOISE, torch.full((5,), -1)))


def test_it_has_second_derivatives_in_float64():
    network = trained().double()
    inputs = X.double().requires_grad_()
    function = lambda x: network(x, C_NOISE.double(), LABELS)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"samples of shape \(3,\): this network was built for \(2,\)"):
        trained()(torch.ones(5, 3), C_NOISE)
    with pytest.raises(UserError, match="hidden_size is 0"):
        MLPConfig(hidden_size=0)
