"""Every network that a config can name, and how to build and to weigh one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from scoreray.data import checks
from scoreray.trainer.networks.dit import DiT, DiTConfig
from scoreray.trainer.networks.ladder import LadderNetworkConfig, OnLadder
from scoreray.trainer.networks.mlp import MLP, MLPConfig
from scoreray.trainer.networks.rbm import MachineConfig, build_machine
from scoreray.trainer.networks.unet import UNet, UNetConfig

NetworkConfig = UNetConfig | DiTConfig | MLPConfig | LadderNetworkConfig


def _on_ladder(config: LadderNetworkConfig, image_shape: Sequence[int], num_classes: int) -> OnLadder:
    return OnLadder(build_network(config.network, image_shape, num_classes), config.sigmas(), config.conditioning)


NETWORKS: dict[str, Callable[[Any, Sequence[int], int], nn.Module]] = {
    "unet": UNet,
    "dit": DiT,
    "mlp": MLP,
    "ladder": _on_ladder,
}


def build_network(config: NetworkConfig | MachineConfig, image_shape: Sequence[int], num_classes: int = 0) -> nn.Module:
    """The network that `config` describes, for samples of `image_shape` and `num_classes` classes (0: no classes).

    network(x [B, *image_shape], c_noise [B], class_labels int64 [B] or None) -> the same shape, 0 before training; for
    an RBM's config the machine, which is called otherwise (`rbm`) and has no classes.
    Its weights come from torch's global generator. Raises UserError when config and shape do not go together.
    """
    if isinstance(config, MachineConfig):
        return build_machine(config, image_shape)
    return checks.choose("network.kind", config.kind, NETWORKS)(config, image_shape, num_classes)


def flops(network: nn.Module, image_shape: Sequence[int]) -> int:
    """Floating-point operations of one sample's forward pass (a multiply-add is two); training costs three times it.

    Nothing is computed: it runs on the meta device. Call it before an engine shards the parameters.
    """
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    x = torch.empty(1, *image_shape, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(network, meta, (x, torch.empty(1, device="meta")))
    return counter.get_total_flops()


def num_parameters(network: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
