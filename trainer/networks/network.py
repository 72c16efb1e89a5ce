"""Every network that a config can name."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from pydantic import Field
from torch import nn

from scoreray.data import checks
from scoreray.data.errors import UserError, nearest
from scoreray.trainer.diffusion.condition import Conditions
from scoreray.trainer.networks.base import BaseNetworkConfig
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.ladder import Conditioning, OnLadder, geometric_ladder
from scoreray.trainer.networks.mlp import MLPConfig
from scoreray.trainer.networks.rbm import GaussianRBMConfig, RBMConfig
from scoreray.trainer.networks.unet import UNetConfig

SingleNetworkConfig = UNetConfig | DiTConfig | MLPConfig
"""Networks that see any noise level, which a ladder can be put around. A new network is added here."""


@dataclass(frozen=True)
class LadderNetworkConfig(BaseNetworkConfig):
    """A network that knows the rungs of a geometric ladder only (`OnLadder`), around any other network."""

    network: Annotated[SingleNetworkConfig, Field(discriminator="kind")] = field(default=UNetConfig())
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    num_levels: int = 232
    conditioning: Conditioning = "learned"
    kind: Literal["ladder"] = field(default="ladder", kw_only=True)

    def __post_init__(self) -> None:
        checks.positive("network", sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        checks.ordered("network", "sigma_min", "sigma_max", self.sigma_min, self.sigma_max)
        checks.at_least("network", 2, num_levels=self.num_levels)

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> OnLadder:
        sigmas = geometric_ladder(self.sigma_max, self.sigma_min, self.num_levels)
        return OnLadder(self.network.build(image_shape, conditions), sigmas, self.conditioning)


NetworkConfig = SingleNetworkConfig | LadderNetworkConfig | RBMConfig | GaussianRBMConfig

NETWORKS: dict[str, type[NetworkConfig]] = {config.kind: config for config in get_args(NetworkConfig)}


def num_parameters(network: nn.Module) -> int:
    """Number of trained values."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def freeze(network: nn.Module, patterns: Sequence[str]) -> None:
    """Excludes from training the parameters that `optimizer.frozen` names: by globs, of which the last that fits a name
    decides; one that begins with "!" trains. Raises UserError where one fits no name, or none is left to train."""
    names = [name for name, _ in network.named_parameters()]
    frozen = set[str]()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern.removeprefix("!"))
        if not found:
            raise UserError(
                f"optimizer.frozen: '{pattern}' fits no parameter of the network; {nearest(pattern, names)}"
            )
        frozen = frozen.difference(found) if pattern.startswith("!") else frozen.union(found)
    if len(frozen) == len(names):
        raise UserError(f"optimizer.frozen: {list(patterns)} leaves no parameter to train; add '!NAME' for some")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
