"""From a checkpoint in the store to a denoiser that samples: averaged weights, the run's config, its classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scoreray.data.errors import DataError, UserError, nearest
from scoreray.sampling.sigmas import karras
from scoreray.trainer.checkpoint import find
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.denoiser import Denoiser
from scoreray.trainer.network import build_network

PREFIX = "denoiser.network."  # where the network lies in the training module
SIGMA_RANGE = (0.002, 80.0)  # flow matching starts at pure noise and many processes end at none: a grid can't


@dataclass(frozen=True)
class ModelInfo:
    """Where a loaded denoiser comes from and what it draws."""

    url: str
    images_seen: int
    ema: str
    image_shape: tuple[int, ...]
    classes: tuple[str, ...]
    config: Config

    def class_number(self, label: str | int | None) -> int:
        """The class meant by a number or a name; -1 for None. Raises UserError with the classes that there are."""
        if label is None:
            return -1
        if str(label).lstrip("-").isdigit() and -1 <= int(label) < len(self.classes):
            return int(label)
        if not self.classes:
            raise UserError(f"class '{label}': this model was trained without classes")
        matching = [i for i, name in enumerate(self.classes) if name.lower() == str(label).lower()]
        if not matching:
            raise UserError(
                f"class '{label}' is unknown; {nearest(str(label), self.classes)}; or 0 to {len(self.classes) - 1}"
            )
        return matching[0]

    def sigmas(self, steps: int) -> torch.Tensor:
        """A Karras grid of `steps` levels over the noise levels that the run's process covers."""
        low, high = self.config.process.sigma_range()
        return karras(steps, max(low, SIGMA_RANGE[0]), min(high, max(SIGMA_RANGE[1], 2 * low)))


class LoadedDenoiser(Denoiser):
    """A denoiser (eval mode, no gradients) that knows where it comes from."""

    info: ModelInfo


def load(checkpoint_url: str, ema: str | None = None, device: torch.device | str | None = None) -> LoadedDenoiser:
    """The denoiser of a committed checkpoint.

    checkpoint_url: a run (its newest committed checkpoint) or one checkpoint's folder, `s3://` or a path.
    ema: a tracked length ("0.050"), None for the run's first one, "none" for the weights without averaging.
    Raises UserError (no such checkpoint or length), DataError (bytes are not what was committed), StorageError.
    """
    checkpoint = find(checkpoint_url)
    try:
        config = load_config(checkpoint.marker["config"])
        shape, classes = tuple(checkpoint.marker["image_shape"]), tuple(checkpoint.marker["classes"])
    except (KeyError, TypeError, UserError) as error:
        raise DataError(f"{checkpoint.url}: its marker does not describe a model: {error}") from None
    name = "none" if ema == "none" else config.ema.choose(ema)
    state = checkpoint.full_state("master" if name == "none" else f"ema_{name}")
    network = build_network(config.network, shape, len(classes))
    weights = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{checkpoint.url}: does not fit its own config: {' '.join(str(error).split())}") from None
    denoiser = LoadedDenoiser(network, config.denoiser.parameterization, config.denoiser.sigma_data)
    denoiser.info = ModelInfo(checkpoint.url, checkpoint.images_seen, name, shape, classes, config)
    return denoiser.requires_grad_(False).eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
