"""Muon: orthogonal steps of the matrices in blocks, AdamW's of all else, and where it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scoreray.data.errors import UserError
from scoreray.trainer.config import load_config
from scoreray.trainer.engine.base import EngineConfig
from scoreray.trainer.engine.flat import FlatEngine
from scoreray.trainer.optim.ema import EMAConfig
from scoreray.trainer.optim.muon import MuonConfig, is_matrix_of_block, orthogonal
from scoreray.trainer.optim.optimizer import OptimizerConfig

MINIMAL = "configs/demo.yaml"


class Toy(nn.Module):
    """A layer before the blocks, blocks with a convolution and matrices of two shapes, a vector in each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 8, 3), nn.Linear(6, 5), nn.Linear(6, 5)])


def engine(module: nn.Module, config: OptimizerConfig, precision: str = "fp32") -> FlatEngine:
    settings = EngineConfig(zero_stage=0, precision=precision)  # type: ignore[arg-type]
    return FlatEngine(
        module, settings, config, EMAConfig(), rank_batch_size=1, world_size=1, device=torch.device("cpu")
    )


def loss(module: nn.Module, step: int) -> torch.Tensor:
    """Linear in the weights, so that its gradient is known: other numbers in each step."""
    given = torch.Generator().manual_seed(step)
    return torch.stack([(p * torch.randn(p.shape, generator=given)).sum() for p in module.parameters()]).sum()


def test_a_step_is_torchs_muon_on_matrices_of_blocks_and_adamw_on_the_rest() -> None:
    config = MuonConfig(learning_rate=0.02, weight_decay=0.1, gradient_clip=0.0)
    ours, theirs = Toy(), Toy()
    trained = engine(ours, config)
    named = dict(theirs.named_parameters())
    matrices = [name for name, p in named.items() if is_matrix_of_block(name, p.shape)]
    assert matrices == ["blocks.0.weight", "blocks.1.weight", "blocks.2.weight"]
    flat = {name: nn.Parameter(named[name].detach().flatten(1)) for name in matrices}
    muon = torch.optim.Muon(flat.values(), lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = [p for name, p in named.items() if name not in matrices]
    adamw = torch.optim.AdamW(rest, lr=0.02, betas=config.betas, weight_decay=0.1)
    for step in range(1, 4):
        trained.backward(loss(ours, step))
        trained.step(0.02, [0.5, 0.9])
        theirs.zero_grad()
        loss(theirs, step).backward()
        for name in matrices:
            flat[name].grad = named[name].grad.flatten(1)  # type: ignore[union-attr]
        muon.step()
        adamw.step()
    for name, p in ours.named_parameters():
        expected = flat[name].view(p.shape) if name in flat else named[name]
        # torch's iteration is in bf16, ours here in float32
        torch.testing.assert_close(p.detach(), expected.detach(), rtol=0, atol=3e-4 if name in flat else 1e-6)


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (6, 6)])
def test_orthogonal_keeps_singular_vectors_and_brings_values_near_1(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(4, *shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(0.2, 1, min(shape), dtype=torch.float64)
    found = orthogonal(u * values @ v)
    inside = u.mT @ found @ v.mT
    assert torch.allclose(inside, torch.diag_embed(inside.diagonal(dim1=1, dim2=2)), atol=1e-10)
    assert inside.diagonal(dim1=1, dim2=2).sub(0.95).abs().max() < 0.3
    assert torch.isfinite(orthogonal(torch.zeros(1, *shape))).all()


def test_a_step_has_adamws_size_whatever_the_gradients() -> None:
    """Root mean square 0.2 of the learning rate: an orthogonal matrix's elements have 1 / sqrt(max(rows, columns))."""
    module = Toy()
    trained, before = engine(module, MuonConfig(gradient_clip=0.0)), module.blocks[0].weight.detach().clone()
    trained.backward(1e-4 * loss(module, 1))
    trained.step(0.1, [0.5, 0.9])
    rms = (module.blocks[0].weight.detach() - before).square().mean().sqrt()
    assert float(rms) == pytest.approx(0.02, rel=0.3)


def test_state_keys_are_adamws() -> None:
    built = [engine(Toy(), config) for config in (MuonConfig(), OptimizerConfig())]
    assert built[0].optimizer.state_keys == built[1].optimizer.state_keys


@pytest.mark.parametrize(
    ("name", "shape", "is_one"),
    [
        ("denoiser.network.down.0.conv_in.weight", (8, 4, 3, 3), True),
        ("denoiser.network.blocks.11.mlp_in.weight", (16, 4), True),
        ("denoiser.network.down.0.conv_in.bias", (8,), False),
        ("denoiser.network.conv_in.weight", (8, 1, 3, 3), False),
        ("denoiser.network.embedding.texts.0.weight", (8, 8), False),
        ("weighting.linear.weight", (1, 64), False),
    ],
)
def test_which_parameters_are_matrices_of_blocks(name: str, shape: tuple[int, ...], is_one: bool) -> None:
    assert is_matrix_of_block(name, shape) is is_one


def test_it_is_refused_where_matrices_are_cut_or_none_is_there() -> None:
    muon = ["optimizer.kind=muon"]
    assert load_config(MINIMAL, [*muon, "engine.zero_stage=auto"]).max_zero_stage == 0
    with pytest.raises(UserError, match=r"engine\.zero_stage: optimizer 'muon' .* stage 2 cuts them; choose 0 or auto"):
        load_config(MINIMAL, [*muon, "engine.zero_stage=2"])
    with pytest.raises(UserError, match=r"engine\.offload: optimizer 'muon'"):
        load_config(MINIMAL, [*muon, "engine.zero_stage=auto", "engine.offload=optimizer"])
    with pytest.raises(UserError, match="this network has none; choose adamw"):
        engine(nn.Linear(3, 3), MuonConfig())
