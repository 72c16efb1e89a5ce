"""From a checkpoint in the store to a denoiser that samples: averaged weights, the run's config, its classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from scoreray.data.errors import DataError, UserError, nearest
from scoreray.sampling.export import PREFIX, RAW, ExportedModel, find_exported
from scoreray.sampling.sigmas import karras
from scoreray.trainer.checkpoint import Checkpoint, find
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.denoiser import Denoiser
from scoreray.trainer.ema import name_of_std
from scoreray.trainer.network import build_network

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
    """The denoiser of a committed checkpoint, or of an exported model.

    checkpoint_url: a run (its newest committed checkpoint), one checkpoint's folder, or an exported model (its folder
    or one of its safetensors files), `s3://` or a path.
    ema: a length that is there ("0.050"), None for the first one, "none" for the weights without averaging.
    Raises UserError (no such checkpoint or length), DataError (bytes are not what was committed), StorageError.
    """
    source = find_exported(checkpoint_url) or find(checkpoint_url)
    page = source.page if isinstance(source, ExportedModel) else source.marker
    try:
        config = load_config(page["config"])
        shape, classes, images_seen = tuple(page["image_shape"]), tuple(page["classes"]), int(page["images_seen"])
    except (KeyError, TypeError, UserError) as error:
        raise DataError(f"{checkpoint_url}: does not describe a model: {error}") from None
    name, weights = _weights(source, config, ema)
    network = build_network(config.network, shape, len(classes))
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{checkpoint_url}: does not fit its own config: {' '.join(str(error).split())}") from None
    denoiser = LoadedDenoiser(network, config.denoiser.parameterization, config.denoiser.sigma_data)
    url = source.store.url() if isinstance(source, ExportedModel) else source.url
    denoiser.info = ModelInfo(url, images_seen, name, shape, classes, config)
    return denoiser.requires_grad_(False).eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _weights(source: Checkpoint | ExportedModel, config: Config, ema: str | None) -> tuple[str, dict[str, Any]]:
    """The length that is meant by `ema`, and the network's weights at it."""
    if isinstance(source, ExportedModel):
        try:
            name = ema if ema in (None, RAW) else name_of_std(float(ema))
        except ValueError:
            name = ema
        name = name or source.chosen or next(iter(source.page["files"]))
        return name, source.weights(name)
    name = RAW if ema == RAW else config.ema.choose(ema)
    state = source.full_state("master" if name == RAW else f"ema_{name}")
    return name, {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
