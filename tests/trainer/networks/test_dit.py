"""What is the DiT's own: its published size, its blocks' start as identities, its positions."""

from __future__ import annotations

import pytest
import torch

from scoreray.trainer.diffusion.layers import grid_code
from scoreray.trainer.networks.dit import DiT, DiTBlock, DiTConfig

SMALL = DiTConfig(patch_size=4, hidden_size=16, depth=2, num_heads=2)


def test_dit_xl_2_has_its_published_size_and_cost():
    """Peebles and Xie 2023, table 4: 675 M parameters, 118.64 Gflops (they count a multiply-add as one)."""
    from scoreray.trainer.networks.flops import flops
    from scoreray.trainer.networks.network import num_parameters

    with torch.device("meta"):
        network = DiT(DiTConfig(patch_size=2, hidden_size=1152, depth=28, num_heads=16), (4, 32, 32), 1000)
    assert num_parameters(network) == pytest.approx(675e6, rel=0.01)
    assert flops(network, (4, 32, 32)) == pytest.approx(2 * 118.64e9, rel=0.02)


def test_a_new_block_is_the_identity():
    x = torch.randn(2, 5, 16)
    assert torch.equal(DiTBlock(SMALL)(x, torch.randn(2, 16)), x)


def test_positions_start_as_distinct_codes_of_unit_variance():
    code = grid_code((7, 5), 32)
    assert code.shape == (35, 32)
    torch.testing.assert_close(code.square().sum(dim=1), torch.full((35,), 8.0))
    assert torch.pdist(code).min() > 0.5


def test_patches_keep_their_places():
    """The derivative of one output pixel by its own input pixel passes only through the skip of its own patch."""
    network = DiT(SMALL, (1, 8, 8)).double()
    torch.nn.init.eye_(network.patch_in.weight)
    torch.nn.init.eye_(network.patch_out.weight)
    network.modulation_out.bias.data.zero_()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    out = network(x, torch.zeros(1, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out[0, 0, 1, 6], x)
    patch = torch.zeros(8, 8, dtype=torch.bool)
    patch[:4, 4:] = True
    assert gradient[0, 0, 1, 6] > 0
    assert gradient[0, 0][~patch].abs().max() == 0
