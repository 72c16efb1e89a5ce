"""What every network makes of conditions of all kinds, over 1, 2 and 3 spatial dimensions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.condition import Condition, ConditionSpec, encoded
from scoreray.trainer.diffusion.condition_shapes import check_condition, complete, example_condition
from scoreray.trainer.diffusion.layers import allow_double_backward, attend, attention_by_products
from scoreray.trainer.networks.conditioning import TextEncoderConfig, grid_channels
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.flops import flops
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.networks.mmdit import MMDiTConfig
from scoreray.trainer.networks.network import NetworkConfig
from scoreray.trainer.networks.unet import UNetConfig

TEXT = TextEncoderConfig(hidden_size=16, depth=1, num_heads=2)
UNET = UNetConfig(model_channels=8, channel_mult=(1, 2), num_blocks=1, patch_size=2, text_encoder=TEXT)
DIT = DiTConfig(patch_size=4, hidden_size=24, depth=2, num_heads=2, text_encoder=TEXT)
MMDIT = MMDiTConfig(patch_size=4, hidden_size=24, depth=2, num_heads=2, text_encoder=TEXT)
MLP = MLPConfig(hidden_size=16, num_layers=2, text_encoder=TEXT)
each_network = pytest.mark.parametrize("config", [UNET, DIT, MMDIT, MLP], ids=lambda config: config.kind)
each_grid = pytest.mark.parametrize("grid", [(9,), (6, 7), (5, 2, 3)], ids=lambda grid: f"{len(grid)}-d")
GRID, ROWS = (6, 7), 4


def specs(grid: tuple[int, ...] = GRID) -> dict[str, ConditionSpec]:
    return {
        "label": ConditionSpec("class", classes=("a", "b", "c")),
        "type": ConditionSpec("class", classes=("x", "y")),  # no key of a ModuleDict as it stands
        "place": ConditionSpec("vector", (3,)),
        "coarse": ConditionSpec("concat", (2, *[3] * len(grid))),
        "t5": ConditionSpec("sequence", (5, 6)),
        "caption": ConditionSpec("text", (7,)),
    }


def condition(grid: tuple[int, ...] = GRID, length: int = 4) -> Condition:
    """Row i has i tokens and 2 i bytes, so that row 0 has none."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.arange(ROWS)
    return Condition(
        {
            "label": rows % 3,
            "type": rows % 2,
            "place": torch.randn(ROWS, 3, generator=generator),
            "coarse": torch.randn(ROWS, 2, *[3] * len(grid), generator=generator),
            "t5": torch.randn(ROWS, length, 6, generator=generator),
            "caption": torch.randint(0, 256, (ROWS, 6), generator=generator).to(torch.uint8),
        },
        {"t5": torch.arange(length) < rows[:, None], "caption": torch.arange(6) < 2 * rows[:, None]},
    )


def randomized(network: nn.Module) -> nn.Module:
    """Random weights everywhere, as training leaves them: a new network outputs 0 whatever its input."""
    torch.manual_seed(1)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def inputs(grid: tuple[int, ...] = GRID, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 2, *grid, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, torch.linspace(-1.5, 1.0, ROWS, dtype=dtype)


def built(config: NetworkConfig, grid: tuple[int, ...] = GRID) -> nn.Module:
    torch.manual_seed(0)
    return randomized(config.build((2, *grid), specs(grid)))


@each_network
@each_grid
def test_every_kind_acts_and_what_is_not_given_is_null(config, grid):
    network, (x, c_noise), given = built(config, grid), inputs(grid), condition(grid)
    out, null = network(x, c_noise, given), network(x, c_noise)
    assert out.shape == x.shape
    assert torch.equal(null, network(x, c_noise, given.null()))
    for name in given.values:
        less = {other: value for other, value in given.values.items() if other != name}
        without = network(x, c_noise, Condition(less, given.masks))
        assert torch.equal(without, network(x, c_noise, given.null([name])))
        assert (without - out).abs().max() > 1e-4


@each_network
def test_masked_values_and_padding_change_no_bit(config):
    network, (x, c_noise), given = built(config), inputs(), condition()
    masks = {**given.masks, "place": torch.arange(ROWS) > 1, "coarse": torch.arange(ROWS) > 2}
    expected = network(x, c_noise, Condition(given.values, masks))

    values = dict(given.values)
    for name, mask in masks.items():
        garbage = torch.full_like(values[name], 255 if name == "caption" else math.nan)
        values[name] = torch.where(mask.view(*mask.shape, *[1] * (garbage.ndim - mask.ndim)), values[name], garbage)
    for name, most in (("t5", 5), ("caption", 7)):
        longer = values[name].new_full((ROWS, most, *values[name].shape[2:]), 9)
        longer[:, : values[name].shape[1]] = values[name]
        values[name] = longer
        masks[name] = torch.arange(most) < masks[name].sum(1, keepdim=True)
    out = network(x, c_noise, Condition(values, masks))
    assert torch.equal(out, expected)
    out.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@each_network
def test_texts_that_were_read_before_give_the_same_bits(config):
    network, (x, c_noise), given = built(config).eval(), inputs(), condition()
    read = encoded(network, given)
    assert read.values["caption"].is_floating_point()
    assert all(read.values[name] is value for name, value in given.values.items() if name != "caption")
    assert encoded(network, read).values["caption"] is read.values["caption"]
    pairs = [(given, read), (given.null(["caption"]), read.null(["caption"]))]
    others = [Condition.cat([one[:2], None], [2, 2]) for one in (given, read)]  # as rows of a request without one
    pairs += [(others[0], others[1]), (complete(given, specs(), ROWS), complete(read, specs(), ROWS))]
    for before, after in pairs:
        assert torch.equal(network(x, c_noise, before), network(x, c_noise, after))
    check_condition(read, specs(), ROWS)


@pytest.mark.parametrize("config", [UNET, DIT, MLP], ids=lambda config: config.kind)
def test_null_conditions_give_what_an_unconditional_network_of_the_same_weights_gives(config):
    """So an unconditional checkpoint can be trained on with conditions."""
    x, c_noise = inputs()
    plain = randomized(config.build((2, *GRID)))
    for parameters in (torch.float32, torch.bfloat16):
        network = config.build((2, *GRID), specs()).to(parameters)
        missing, unexpected = network.load_state_dict(plain.to(parameters).state_dict(), strict=False)
        assert missing
        assert not unexpected
        with torch.no_grad():  # nulls of classes begin as random vectors
            network.embedding.classes.weight[0] = 0
            network.embedding.inputs["class_type"].weight[0] = 0
        assert torch.equal(network(x, c_noise), plain(x, c_noise))


@each_network
def test_every_parameter_has_a_gradient_whatever_a_batch_gives(config):
    """Engines that shard gradients wait for each of them, on every rank."""
    network, (x, c_noise) = built(config), inputs()
    for given in (None, condition().null(), Condition({"place": torch.zeros(ROWS, 3)})):
        network.zero_grad()
        network(x, c_noise, given).square().sum().backward()
        assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


SHALLOW = {"unet": {"channel_mult": (1,)}, "dit": {"depth": 1}, "mmdit": {"depth": 1}, "mlp": {"num_layers": 1}}
"""Each kind of block once: tracing takes as long for each as for the first."""


@pytest.mark.parametrize(
    "config",
    # 3 s each. Without conditions both are traced in tests/trainer/networks/test_network.py.
    [*(pytest.param(config, marks=pytest.mark.slow) for config in (UNET, DIT)), MMDIT, MLP],
    ids=lambda config: config.kind,
)
def test_it_compiles_as_one_graph_for_a_condition_of_any_length(config):
    torch.compiler.reset()
    network, (x, c_noise) = built(replace(config, **SHALLOW[config.kind])), inputs()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for given in (condition(), condition(length=5), None):
        torch.testing.assert_close(compiled(x, c_noise, given), network(x, c_noise, given))
    compiled(x, c_noise, condition()).sum().backward()


@each_network
def test_bfloat16_and_autocast_agree_with_float32(config):
    network, (x, c_noise), given = built(config), inputs(), condition()
    exact = network(x, c_noise, given)
    with torch.autocast("cpu", torch.bfloat16):
        close = network(x, c_noise, given)
    torch.testing.assert_close(close, exact, rtol=0, atol=0.05 * exact.abs().max().item())
    close = network.to(torch.bfloat16)(x, c_noise, given)
    torch.testing.assert_close(close, exact, rtol=0, atol=0.05 * exact.abs().max().item())


@each_network
def test_energies_have_gradients_in_all_weights_that_x_meets(config):
    """The derivative of |grad_x (x . f(x, c))|^2 along its own gradient, by central differences in float64."""
    network = allow_double_backward(built(config).double())
    (x, c_noise), given = inputs(dtype=torch.float64), condition().to("cpu", torch.float64)
    names = {
        "unet": "middle.0.cross_attention.kv.weight",
        "dit": "blocks.0.cross_attention.kv.weight",
        "mmdit": "blocks.0.context.attention.qkv.weight",
        "mlp": "embedding.inputs.sequence_t5.pool.weight",
    }
    weight = network.get_parameter(names[config.kind])

    def loss() -> Tensor:
        at = x.clone().requires_grad_()
        (score,) = torch.autograd.grad((at * network(at, c_noise, given)).sum(), at, create_graph=True)
        return score.square().mean()

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction, step = gradient / gradient.norm(), 1e-5
    with torch.no_grad():
        weight += step * direction
    ahead = loss()
    with torch.no_grad():
        weight -= 2 * step * direction
    torch.testing.assert_close((ahead - loss()) / (2 * step), gradient.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("config", [UNET, DIT, MMDIT], ids=lambda config: config.kind)
def test_activation_checkpointing_changes_no_gradient(config):
    (x, c_noise), given = inputs(), condition()
    gradients = []
    for checkpointing in (False, True):
        network = built(replace(config, activation_checkpointing=checkpointing))
        network(x, c_noise, given).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@each_network
def test_shapes_alone_can_be_built_and_flops_count_the_conditions(config):
    with torch.device("meta"):
        network = config.build((2, *GRID), specs())
        plain = config.build((2, *GRID))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        built(config)(torch.zeros(1, 2, *GRID), torch.zeros(1), condition()[:1])
    assert flops(network, (2, *GRID)) == counter.get_total_flops() > flops(plain, (2, *GRID))


@pytest.mark.parametrize("tokens", [8, 520], ids=["few", "many"])
def test_masked_attention_is_torchs_and_its_masked_keys_count_for_nothing(tokens):
    """Many tokens go through torch's fused attention on a CPU, few through products."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 1, tokens, 4, generator=generator)
    mask = torch.arange(tokens) < torch.tensor([[1], [tokens // 2]])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None])
    out = attend(q, k, v, mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(attention_by_products(q, k, v, mask), expected)
    hidden = ~mask[:, None, :, None]
    assert torch.equal(attend(q, k.masked_fill(hidden, 1e4), v.masked_fill(hidden, -1e4), mask), out)


@pytest.mark.parametrize("tokens", [1023, 1024], ids=["few", "many"])
def test_attention_without_a_mask_is_torchs_from_1024_tokens_on_and_products_to_the_bit_below(tokens):
    q, k, v = torch.randn(3, 2, 1, tokens, 4, generator=torch.Generator().manual_seed(0))
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    products = attention_by_products(q, k, v, None)
    torch.testing.assert_close(fused, products)
    assert not torch.equal(fused, products)
    assert torch.equal(attend(q, k, v), fused if tokens == 1024 else products)
    assert torch.equal(attend(q[:1], k[:1], v[:1]), attend(q, k, v)[:1])  # a row's bits are its own


def test_grids_are_resized_by_means_or_linearly_and_a_channel_says_where_there_is_one():
    coarse = torch.tensor([[[0.0, 4.0]], [[9.0, 9.0]]])
    given = torch.tensor([True, False])
    finer = grid_channels(coarse * given[:, None, None], given, (4,))
    assert finer.tolist() == [[[0, 1, 3, 4], [1, 1, 1, 1]], [[0, 0, 0, 0], [0, 0, 0, 0]]]
    fine = torch.arange(8.0).view(1, 1, 8)
    assert grid_channels(fine, given[:1], (2,))[0, 0].tolist() == [1.5, 5.5]
    assert torch.equal(grid_channels(fine, given[:1], (8,))[:, :1], fine)


def test_nulls_examples_and_completed_conditions_are_what_networks_take():
    for made in (complete(None, specs(), ROWS), example_condition(specs(), ROWS), complete(condition(), specs(), ROWS)):
        check_condition(made, specs(), ROWS)
        for name, spec in specs().items():
            assert made.values[name].dtype == spec.dtype
            assert made.mask(name).shape == spec.mask_shape(ROWS)
    null = complete(None, specs(), ROWS)
    assert not any(null.mask(name).any() for name in specs())
    whole = complete(condition(), specs(), ROWS)
    assert torch.equal(whole.values["t5"][:, :4], condition().values["t5"])
    assert torch.equal(whole.mask("t5"), torch.arange(5) < torch.arange(ROWS)[:, None])


def test_a_condition_that_does_not_fit_is_named():
    with pytest.raises(UserError, match=r"data.conditions.map: .*\[2, 5\].* 2 spatial dimensions"):
        UNET.build((2, *GRID), {"map": ConditionSpec("concat", (2, 5))})
    long = Condition({"caption": torch.zeros(ROWS, 8, dtype=torch.uint8)}, {"caption": torch.ones(ROWS, 8).bool()})
    with pytest.raises(UserError, match=r"'caption' of shape \[4, 8\]: .* \[4, 'up to 7'\]"):
        built(MLP)(*inputs(), long)
