"""What is the MMDiT's own: joint attention as SD3 has it, tokens that act on the sample, a DiT where there are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion.condition import Condition, ConditionSpec
from scoreray.trainer.meta import on_meta
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.mmdit import JointBlock, LastJointBlock, MMDiTConfig
from scoreray.trainer.networks.network import build_network, num_parameters

SIZE = {"patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
SMALL = MMDiTConfig(**SIZE)
TOKENS = {"t5": ConditionSpec("sequence", (3, 6))}


def randomized(network: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("is_last", [False, True], ids=["a block", "the last block"])
def test_a_block_is_that_of_stable_diffusion_3(is_last: bool) -> None:
    """diffusers' block, with our norm of queries and keys and with our exact GELU."""
    attention = pytest.importorskip("diffusers.models.attention")
    theirs = attention.JointTransformerBlock(16, 2, 8, context_pre_only=is_last, qk_norm="fp32_layer_norm")
    for module in theirs.modules():
        if type(module).__name__ == "GELU":
            module.approximate = "none"
    ours = randomized((LastJointBlock if is_last else JointBlock)(SMALL))
    copies = [(ours.image, "norm1", "to_q to_k to_v", "to_out.0", "ff")]
    if not is_last:
        copies.append((ours.context, "norm1_context", "add_q_proj add_k_proj add_v_proj", "to_add_out", "ff_context"))
    for stream, norm, heads, out, mlp in copies:
        pairs = {
            f"{norm}.linear": stream.modulation, f"attn.{out}": stream.attention.out,
            f"{mlp}.net.0.proj": stream.mlp_in, f"{mlp}.net.2": stream.mlp_out,
        }  # fmt: skip
        for name, layer in pairs.items():
            theirs.get_submodule(name).load_state_dict(layer.state_dict())
        stream.attention.gain.data.fill_(1)
        copy_parts(theirs.attn, heads, stream.attention.qkv)
    if is_last:
        shift, scale = ours.modulation.state_dict(), theirs.norm1_context.linear.state_dict()
        for key in scale:  # theirs are the other way round
            scale[key].copy_(torch.cat(list(reversed(shift[key].chunk(2)))))
        copy_parts(theirs.attn, "add_k_proj add_v_proj", ours.context_kv)
    x, context, emb = torch.randn(2, 5, 16), torch.randn(2, 3, 16), torch.randn(2, 16)
    expected_context, expected = theirs(x, context, emb)
    out, out_context = ours(x, nn.functional.silu(emb), context, torch.ones(2, 8, dtype=torch.bool))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    if not is_last:
        torch.testing.assert_close(out_context, expected_context, rtol=1e-4, atol=1e-4)


def copy_parts(into: nn.Module, names: str, layer: nn.Linear) -> None:
    """Rows of one layer into several."""
    parts = [getattr(layer, key).chunk(len(names.split())) for key in ("weight", "bias")]
    for name, weight, bias in zip(names.split(), *parts, strict=True):
        into.get_submodule(name).load_state_dict({"weight": weight, "bias": bias})


@pytest.mark.parametrize("block", [JointBlock, LastJointBlock])
def test_a_new_block_is_the_identity(block: type[nn.Module]) -> None:
    x, context, mask = torch.randn(2, 5, 16), torch.randn(2, 3, 16), torch.ones(2, 8, dtype=torch.bool)
    out, out_context = block(SMALL)(x, torch.randn(2, 16), context, mask)
    assert torch.equal(out, x)
    assert torch.equal(out_context, context)


def test_without_tokens_it_is_a_dit() -> None:
    ours, dit = (randomized(config.build((3, 8, 8), 4)) for config in (SMALL, DiTConfig(**SIZE)))
    ours.load_state_dict(dit.state_dict())
    given = torch.randn(2, 3, 8, 8), torch.zeros(2), torch.tensor([-1, 3])
    assert torch.equal(ours(*given), dit(*given))


def test_a_row_of_no_token_is_a_row_without_the_condition() -> None:
    network = randomized(SMALL.build((3, 8, 8), TOKENS))
    x, c_noise, mask = torch.randn(2, 3, 8, 8), torch.zeros(2), torch.tensor([[True, True, False], [False] * 3])
    out = network(x, c_noise, Condition({"t5": torch.randn(2, 3, 6)}, {"t5": mask}))
    null = network(x, c_noise)
    assert torch.equal(out[1], null[1])
    assert (out[0] - null[0]).abs().max() > 1e-3


def test_every_block_but_the_last_changes_the_tokens_that_the_next_one_reads() -> None:
    network = randomized(SMALL.build((3, 8, 8), TOKENS))
    x, c_noise = torch.randn(1, 3, 8, 8), torch.zeros(1)
    network(
        x, c_noise, Condition({"t5": torch.randn(1, 3, 6)}, {"t5": torch.ones(1, 3, dtype=torch.bool)})
    ).sum().backward()
    of_context = [name for name, _ in network.blocks.named_parameters() if "context" in name]
    assert any(name.startswith("0.context.mlp_out") for name in of_context)
    assert all(name.startswith(("0.context.", "1.context_kv.")) for name in of_context)
    assert all(parameter.grad.abs().max() > 0 for parameter in network.blocks.parameters())


def test_the_preset_of_stable_diffusion_3_s_size_has_it() -> None:
    """2.03 G parameters (Esser 2024's model of depth 24 as it was published, SD3 Medium)."""
    conditions = {
        "t5": ConditionSpec("sequence", (77, 4096)),
        "clip": ConditionSpec("sequence", (77, 768)),
        "pooled": ConditionSpec("vector", (768,)),
    }
    config = load_config(Path(__file__).parents[3] / "configs" / "text-to-image.yaml")
    network = on_meta(lambda: build_network(config.network, (16, 32, 32), conditions))
    assert num_parameters(network) == pytest.approx(2.03e9, rel=0.01)
