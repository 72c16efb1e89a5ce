"""What every network promises: its call, its class labels, its precisions, its derivatives, its cost."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Annotated

import pytest
import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import nn

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.layers import Attention, allow_double_backward, sinusoids
from scoreray.trainer.networks import dit, unet
from scoreray.trainer.networks.conditioning import TextEncoderConfig
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.flops import flops
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.networks.network import NetworkConfig, num_parameters
from scoreray.trainer.networks.unet import UNetConfig

UNET = UNetConfig(model_channels=8, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(6,))
DIT = DiTConfig(patch_size=4, hidden_size=16, depth=2, num_heads=2)
IMAGE = (3, 12, 8)
MLP = MLPConfig(hidden_size=16, num_layers=2)
each_network = pytest.mark.parametrize("config", [UNET, DIT, MLP], ids=lambda config: config.kind)
each_image_network = pytest.mark.parametrize("config", [UNET, DIT], ids=lambda config: config.kind)


def trained(config: NetworkConfig, image_shape: tuple[int, ...] = IMAGE, num_classes: int = 4) -> nn.Module:
    """A network with random weights everywhere, as training leaves them: a new one outputs 0 whatever its input."""
    torch.manual_seed(0)
    network = config.build(image_shape, num_classes)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def inputs(batch: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *IMAGE, generator=generator, dtype=dtype)
    return x, torch.linspace(-1.5, 1.0, batch, dtype=dtype), torch.arange(batch) % 5 - 1


@each_network
def test_a_new_network_outputs_zero(config):
    out = config.build(IMAGE, 4)(*inputs())
    assert out.shape == (4, *IMAGE)
    assert out.abs().max() == 0


@each_network
def test_output_depends_on_image_noise_level_and_class(config):
    network = trained(config)
    x, c_noise, labels = inputs()
    out = network(x, c_noise, labels)
    assert not torch.allclose(out, network(x + 0.1, c_noise, labels), atol=1e-4)
    assert not torch.allclose(out, network(x, c_noise + 0.1, labels), atol=1e-4)
    assert not torch.allclose(out, network(x, c_noise, (labels + 2) % 4), atol=1e-4)


@each_network
def test_no_labels_is_the_null_class(config):
    network = trained(config)
    x, c_noise, labels = inputs()
    torch.testing.assert_close(network(x, c_noise), network(x, c_noise, torch.full_like(labels, -1)))
    assert not torch.allclose(network(x, c_noise), network(x, c_noise, torch.zeros_like(labels)), atol=1e-4)


@each_network
def test_a_network_says_how_many_classes_it_knows(config):
    assert config.build(IMAGE, 4).num_classes == 4
    assert config.build(IMAGE).num_classes == 0


@each_network
def test_without_classes_labels_change_nothing(config):
    network = trained(config, num_classes=0)
    x, c_noise, labels = inputs()
    torch.testing.assert_close(network(x, c_noise), network(x, c_noise, labels))


@each_network
def test_a_row_of_a_batch_equals_a_batch_of_one(config):
    network = trained(config).double()
    x, c_noise, labels = inputs(dtype=torch.float64)
    rows = [network(x[i : i + 1], c_noise[i : i + 1], labels[i : i + 1]) for i in range(len(x))]
    torch.testing.assert_close(network(x, c_noise, labels), torch.cat(rows), rtol=1e-12, atol=1e-12)


@each_network
def test_output_has_the_input_type_whatever_the_parameters(config):
    x, c_noise, labels = inputs()
    for parameters in (torch.float32, torch.bfloat16, torch.float64):
        network = trained(config).to(parameters)
        assert network(x, c_noise, labels).dtype == torch.float32
        assert network(x.to(parameters), c_noise.to(parameters), labels).dtype == parameters


@each_network
def test_bfloat16_parameters_and_autocast_agree_with_float32(config):
    network = trained(config)
    x, c_noise, labels = inputs()
    exact = network(x, c_noise, labels)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(network(x, c_noise, labels), exact, rtol=0, atol=0.05 * exact.abs().max().item())
    network.to(torch.bfloat16)
    torch.testing.assert_close(network(x, c_noise, labels), exact, rtol=0, atol=0.05 * exact.abs().max().item())


@each_network
def test_float64_is_computed_in_float64(config):
    """Central differences of the output agree with autograd to 1e-8: impossible if any layer rounds to float32."""
    network = trained(config).double()
    x, c_noise, labels = inputs(2, torch.float64)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    _, derivative = torch.func.jvp(lambda x: network(x, c_noise, labels), (x,), (direction,))
    step = 1e-5
    ahead, behind = network(x + step * direction, c_noise, labels), network(x - step * direction, c_noise, labels)
    torch.testing.assert_close((ahead - behind) / (2 * step), derivative, rtol=1e-7, atol=1e-8)


@each_network
def test_second_derivatives_reach_every_parameter_that_acts(config):
    """The gradient of a loss of a score that is itself the gradient of an energy x.f(x)."""
    network = allow_double_backward(trained(config).double())
    x, c_noise, labels = inputs(2, torch.float64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        x = x if x.requires_grad else x.clone().requires_grad_()
        (score,) = torch.autograd.grad((x * network(x, c_noise, labels)).sum(), x, create_graph=True)
        return score.square().mean()

    parameters = dict(network.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(loss(x), parameters.values()), strict=True))
    name = next(name for name in parameters if name.endswith(("qkv.weight", "inside.weight")))
    parameter, step = parameters[name], 1e-5
    direction = gradients[name] / gradients[name].norm()
    with torch.no_grad():
        parameter += step * direction
    ahead = loss(x)
    with torch.no_grad():
        parameter -= 2 * step * direction
    torch.testing.assert_close((ahead - loss(x)) / (2 * step), gradients[name].norm(), rtol=1e-5, atol=0)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@each_network
def test_compiles_as_one_graph(config):
    network = trained(config)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), network(*inputs()))
    compiled(*inputs()).sum().backward()


INDUCTOR = pytest.param(  # each kernel is compiled by itself: a DiT's block has 16, 25 s of CPU time
    "inductor",
    marks=[pytest.mark.slow, pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")],
)


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", INDUCTOR])
@pytest.mark.parametrize(
    ("block", "x"),
    [
        (lambda: dit.DiTBlock(DIT), torch.randn(2, 6, 16)),
        (lambda: unet.ResidualBlock(8, 16, 16, heads=2, resample="down"), torch.randn(2, 8, 6, 4)),
    ],
    ids=["dit", "unet"],
)
def test_a_compiled_block_computes_what_eager_does(block, x, backend):
    """In the operations that inductor breaks it down to, and compiled by it. Blocks stand for the networks, which
    compile for up to a minute (`benchmarks/sampling.py` compiles them whole).

    fullgraph: a graph break is an error. Only the order of sums differs, so float32 agrees to rounding.
    """
    network, call = block().requires_grad_(False), (x, torch.randn(2, 16))
    for parameter in network.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        expected = network(*call)
        got = torch.compile(network, fullgraph=True, backend=backend)(*call)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@each_image_network
def test_activation_checkpointing_changes_no_gradient_and_keeps_less(config):
    def gradients_and_kept_bytes(checkpointing: bool) -> tuple[list[torch.Tensor], int]:
        network = trained(replace(config, activation_checkpointing=checkpointing, dropout=0.1))
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = network(*inputs()).square().mean()
        kept_bytes = sum(kept.values())
        loss.backward()
        return [parameter.grad for parameter in network.parameters()], kept_bytes

    plain, plain_bytes = gradients_and_kept_bytes(False)
    recomputed, recomputed_bytes = gradients_and_kept_bytes(True)
    for expected, gradient in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(gradient, expected)
    assert recomputed_bytes < 0.5 * plain_bytes


@each_network
def test_flops_are_those_of_a_real_call(config):
    network = config.build(IMAGE, 4)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        network(*inputs(1))
    assert flops(network, IMAGE) == counter.get_total_flops()


@each_network
def test_state_has_no_buffers_and_the_seed_decides_the_weights(config):
    def state() -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        return config.build(IMAGE, 4).state_dict()

    first, again = state(), state()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not list(config.build(IMAGE, 4).buffers())


@each_network
@pytest.mark.parametrize(
    ("x", "c_noise", "message"),
    [
        (torch.zeros(4, 1, 12, 8), torch.zeros(4), r"samples of shape \(1, 12, 8\): this network was built for \(3,"),
        (torch.zeros(3, 12, 8), torch.zeros(3), r"samples of shape \(12, 8\)"),
        (torch.zeros(4, 3, 12, 8), torch.zeros(3), r"c_noise of shape \(3,\) for 4 samples"),
    ],
)
def test_a_call_that_does_not_fit_is_named(config, x, c_noise, message):
    with pytest.raises(UserError, match=message):
        config.build(IMAGE)(x, c_noise)


def test_networks_of_one_size_refuse_another():
    for config in (DIT, MLP):
        with pytest.raises(UserError, match=r"samples of shape \(3, 8, 12\): this network was built for \(3, 12, 8\)"):
            config.build(IMAGE)(torch.zeros(4, 3, 8, 12), torch.zeros(4))


def test_flops_and_parameters_of_a_layer_counted_by_hand():
    class Linear(nn.Linear):
        def forward(self, x, c_noise):
            return super().forward(x)

    network = Linear(10, 7)
    assert flops(network, (10,)) == 2 * 10 * 7
    assert num_parameters(network) == 10 * 7 + 7


def test_sinusoids_distinguish_neighbouring_noise_levels():
    """Noise levels a factor 1.5 apart over [0.002, 80] never look more alike than the same level looks to itself."""
    sigma = 0.002 * 1.5 ** torch.arange(27)
    code = sinusoids(sigma.log() / 4, 64) / 8
    alike = code @ code.T
    torch.testing.assert_close(alike.diag(), torch.ones(27))
    assert alike.fill_diagonal_(0).max() < 0.95


def test_attention_equals_the_fused_kernel():
    torch.manual_seed(0)
    layer = Attention(12, num_heads=3)
    x = torch.randn(2, 5, 12)
    q, k, v = layer.qkv(x).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    q, k = (torch.nn.functional.layer_norm(part, (4,)) for part in (q, k))
    mixed = torch.nn.functional.scaled_dot_product_attention(q * layer.gain, k, v)
    torch.testing.assert_close(layer(x), layer.out(mixed.transpose(1, 2).reshape(2, 5, 12)))


def test_a_config_is_read_by_its_kind():
    read = TypeAdapter(Annotated[NetworkConfig, Field(discriminator="kind")]).validate_python
    assert read({"kind": "dit", "hidden_size": 32, "num_heads": 4}) == DiTConfig(hidden_size=32, num_heads=4)
    assert read({"kind": "unet", "channel_mult": [1, 2]}) == UNetConfig(channel_mult=(1, 2))
    with pytest.raises(ValidationError, match="hidden_sise"):
        read({"kind": "dit", "hidden_sise": 32})


@pytest.mark.parametrize(
    ("config", "image_shape", "message"),
    [
        (lambda: UNetConfig(model_channels=30), IMAGE, "network.model_channels: 30"),
        (lambda: UNetConfig(channel_mult=()), IMAGE, "network.channel_mult"),
        (lambda: UNetConfig(dropout=1.0), IMAGE, "network.dropout: 1.0"),
        (lambda: replace(UNET, patch_size=0), IMAGE, "network.patch_size: 0"),
        (lambda: replace(UNET, attention_resolutions=(7,)), IMAGE, "feature maps are 12, 6 high"),
        (lambda: DiTConfig(hidden_size=30, num_heads=4), IMAGE, "network.hidden_size: 30"),
        (lambda: DiTConfig(depth=0), IMAGE, "network.depth: 0"),
        (lambda: replace(DIT, patch_size=0), IMAGE, "network.patch_size: 0"),
        (lambda: DIT, (2,), "network.kind: mlp"),
        (lambda: UNET, (2, 3, 3, 3, 3), "[channels, depth, height, width]"),
        (lambda: TextEncoderConfig(hidden_size=30), IMAGE, "network.text_encoder.hidden_size: 30"),
    ],
)
def test_a_value_that_does_not_fit_is_named(config, image_shape, message):
    with pytest.raises(UserError) as error:
        config().build(image_shape)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "field"), [(UNetConfig, "num_blocks"), (DiTConfig, "depth"), (MLPConfig, "num_layers")]
)
def test_a_network_that_is_too_large_is_refused_before_it_is_built(config, field):
    with pytest.raises(UserError, match=rf"network\.{field}: 100000 .* 1 to 1024"):
        config(**{field: 100_000})
