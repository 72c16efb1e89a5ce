"""GroupNorm with channels innermost is GroupNorm: values, gradients, and where torch's own has to do it."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from scoreray.trainer.diffusion import layers
from scoreray.trainer.diffusion.layers import GroupNorm, allow_double_backward, group_norm
from scoreray.trainer.networks.unet import UNet, UNetConfig


@pytest.fixture
def matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_has_matrix_units", lambda: True)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_both_layouts_give_the_same_values_and_gradients(modulated: bool, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = group_norm(24).to(dtype)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    x, slope = (torch.randn(3, 24, 5, 6) + 2).to(dtype), torch.randn(3, 24, 5, 6).to(dtype)
    emb = [torch.randn(3, 24).to(dtype) for _ in range(2)] if modulated else []
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        inputs = [x.contiguous(memory_format=layout), *emb]
        inputs = [one.detach().clone(memory_format=torch.preserve_format).requires_grad_() for one in inputs]
        y = norm(*inputs)
        assert y.is_contiguous(memory_format=layout)
        found.append([y, *torch.autograd.grad((y * slope).sum(), [*inputs, *norm.parameters()])])
    for usual, innermost in zip(*found, strict=True):
        difference = (usual.float() - innermost.float()).abs().max()
        assert difference < tolerance * usual.float().abs().max()


def built() -> UNet:
    torch.manual_seed(0)
    network = UNet(UNetConfig(model_channels=8, channel_mult=(1, 2), num_blocks=1), (1, 8, 8)).bfloat16()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def test_a_u_net_keeps_the_layout_all_along_and_its_output(monkeypatch: pytest.MonkeyPatch, matrix_units: None) -> None:
    network, x, level = built(), torch.randn(2, 1, 8, 8), torch.zeros(2)
    layouts = []
    for one in network.modules():
        if isinstance(one, GroupNorm):
            one.register_forward_hook(
                lambda _, inputs, y: layouts.append(y.is_contiguous(memory_format=torch.channels_last))
            )
    innermost = network(x, level)
    assert layouts
    assert all(layouts)
    monkeypatch.setattr(layers, "_has_matrix_units", lambda: False)
    usual = network(x, level)
    assert (usual - innermost).abs().max() < 0.03 * usual.abs().max()


def test_derivatives_of_other_kinds_take_torchs_own(matrix_units: None) -> None:
    network, level = built(), torch.zeros(2)
    maps = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)
    assert not network.norm_out.laid_out(maps).is_contiguous()
    with forward_ad.dual_level():
        assert network.norm_out.laid_out(forward_ad.make_dual(maps, torch.ones_like(maps))).is_contiguous()
    assert network.norm_out.laid_out(maps.float()).is_contiguous()
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(network(x, level).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.square().sum().backward()
    network = allow_double_backward(network)
    (slope,) = torch.autograd.grad(network(x, level).sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert x.grad is not None
