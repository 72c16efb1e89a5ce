"""What the config of every kind of network has in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import ConfigDict
from torch import nn


class BaseNetworkConfig:
    """The `network` section of a config; a subclass is a frozen dataclass with a `kind` and the network's size."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    is_machine: ClassVar[bool] = False
    """A restricted Boltzmann machine: it has no noise level, so no process and no denoiser, and moves by Gibbs."""

    def build(self, image_shape: Sequence[int], num_classes: int) -> nn.Module:
        """The module for samples of `image_shape`; see `network.build_network`, which calls it."""
        raise NotImplementedError
