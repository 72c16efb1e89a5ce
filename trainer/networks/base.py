"""What the config of every kind of network has in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import ConfigDict
from torch import Tensor, nn

from scoreray.data.errors import listed
from scoreray.trainer.diffusion.condition import Conditions


class BaseNetworkConfig:
    """The `network` section of a config; a subclass is a frozen dataclass with a `kind` and the network's size."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    is_machine: ClassVar[bool] = False
    """A restricted Boltzmann machine: it has no noise level, so no process and no denoiser, and moves by Gibbs."""

    wrapped_prefix: ClassVar[str] = ""
    """What begins the names of another library's network inside the one that is built; LoRAs' files leave it out."""

    @property
    def required_sigma_data(self) -> float | None:
        """The `denoiser.sigma_data` whose scaling of the input the network was made for; None: any."""
        return None

    def build(self, image_shape: Sequence[int], conditions: Conditions | int = 0) -> nn.Module:
        """The network for samples of `image_shape` and what conditions it (a number: so many classes).

        network(x [B, *image_shape], c_noise [B], condition or None) -> the same shape, 0 before training;
        for an RBM's config the machine and for an autoencoder's an `AutoencoderNetwork`, which are called otherwise
        and have no classes.
        Its weights come from torch's global generator. Raises UserError when config and shape do not go together.
        """
        raise NotImplementedError


def state_misfits(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """How a state differs from the one that a network has, in names and shapes; "" where it fits."""
    differs = [name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape]
    shapes = [f"{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}" for name in sorted(differs)]
    found = {
        "missing": sorted(wanted.keys() - given.keys()),
        "not of this network": sorted(given.keys() - wanted.keys()),
        "of other shapes": shapes,
    }
    return "; ".join(f"{what}: {listed(names)}" for what, names in found.items() if names)
