"""What is the U-Net's own: sizes that do not halve, patches, resolutions of attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scoreray.trainer.diffusion.layers import Attention, from_patches, group_norm, to_patches
from scoreray.trainer.networks.unet import UNet, UNetConfig, resampled

SMALL = UNetConfig(model_channels=8, channel_mult=(1, 2, 2), num_blocks=1)


@pytest.mark.parametrize("size", [(28, 28), (7, 7), (9, 14), (1, 5), (32, 32)])
def test_any_size_comes_back_at_its_size(size):
    network = UNet(SMALL, (1, *size))
    assert network(torch.randn(2, 1, *size), torch.zeros(2)).shape == (2, 1, *size)


def test_one_network_takes_other_sizes_than_it_was_built_for():
    network = UNet(SMALL, (1, 28, 28))
    assert network(torch.randn(1, 1, 40, 36), torch.zeros(1)).shape == (1, 1, 40, 36)


def test_patches_are_undone_exactly():
    x = torch.randn(2, 3, 8, 12)
    assert to_patches(x, 4).shape == (2, 48, 2, 3)
    assert torch.equal(from_patches(to_patches(x, 4), 4, (8, 12)), x)


def test_halving_takes_means_and_doubling_repeats():
    x = torch.arange(9.0).view(1, 1, 3, 3)
    assert torch.equal(resampled(x, "down"), torch.tensor([[[[2.0, 3.5], [6.5, 8.0]]]]))
    assert torch.equal(resampled(resampled(x, "up"), "down"), x)


def test_attention_runs_at_the_resolutions_asked_for_and_in_the_middle():
    def attends(config: UNetConfig) -> list[str]:
        named = UNet(config, (1, 28, 28)).named_modules()
        return [name.removesuffix(".attention") for name, module in named if isinstance(module, Attention)]

    assert attends(SMALL) == ["middle.0"]
    assert attends(replace(SMALL, attention_resolutions=(14,))) == ["down.2", "middle.0", "up.3", "up.4"]


def test_groups_divide_the_channels_and_hold_four_or_more():
    assert {channels: group_norm(channels).num_groups for channels in (8, 48, 96, 128, 176, 256)} == {
        8: 2,
        48: 12,
        96: 24,
        128: 32,
        176: 22,
        256: 32,
    }


def test_the_edm_cifar_network_has_its_published_size():
    """Karras 2022's DDPM++ on CIFAR-10 has 55.7 M parameters. Here each of the 33 blocks scales as well as shifts
    (512 x 256 more), and all five decoder blocks at 16x16 attend, not one (4 x 256 x 256 more each)."""
    config = UNetConfig(model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, attention_resolutions=(16,))
    with torch.device("meta"):
        network = UNet(config, (3, 32, 32))
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    assert num_parameters == pytest.approx(55.7e6 + 33 * 512 * 256 + 4 * 4 * 256**2, rel=0.01)


@pytest.mark.parametrize("grid", [(3,), (9,), (5, 6), (3, 5, 2)])
def test_a_grid_that_patches_do_not_divide_is_filled_up_and_cut_again(grid):
    x = torch.randn(2, 3, *grid)
    patches = to_patches(x, 2)
    assert patches.shape == (2, 3 * 2 ** len(grid), *(-(-length // 2) for length in grid))
    assert patches.square().sum() == pytest.approx(x.square().sum().item())
    assert torch.equal(from_patches(patches, 2, grid), x)


@pytest.mark.parametrize("size", [(9,), (5, 4, 3)])
def test_signals_and_volumes_are_halved_by_means_too(size):
    x = torch.randn(1, 1, *size)
    halved = resampled(x, "down")
    assert halved.shape[2:] == tuple(-(-length // 2) for length in size)
    corner = tuple(slice(0, 2) for _ in size)
    torch.testing.assert_close(halved[(0, 0, *[0] * len(size))], x[(0, 0, *corner)].mean())
    last = x[(0, 0, -1)] if len(size) == 1 else x[0, 0, -1:, 2:4, -1:].mean()
    torch.testing.assert_close(halved[0, 0].flatten()[-1], last.squeeze())
