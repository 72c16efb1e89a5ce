"""What the config of every kind of network has in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import ConfigDict
from torch import nn

from scoreray.trainer.diffusion.condition import Conditions


class BaseNetworkConfig:
    """The `network` section of a config; a subclass is a frozen dataclass with a `kind` and the network's size."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    is_machine: ClassVar[bool] = False
    """A restricted Boltzmann machine: it has no noise level, so no process and no denoiser, and moves by Gibbs."""

    @property
    def required_sigma_data(self) -> float | None:
        """The `denoiser.sigma_data` whose scaling of the input the network was made for; None: any."""
        return None

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> nn.Module:
        """The network for samples of `image_shape` and what conditions it (a number: so many classes).

        network(x [B, *image_shape], c_noise [B], condition or None) -> the same shape, 0 before training;
        for an RBM's config the machine, which is called otherwise (`rbm`) and has no classes.
        Its weights come from torch's global generator. Raises UserError when config and shape do not go together.
        """
        raise NotImplementedError
