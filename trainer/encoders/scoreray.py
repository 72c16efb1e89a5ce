"""Autoencoders that a run of scoreray trained: a run (its newest checkpoint), one checkpoint, or an exported model."""

from __future__ import annotations

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.trainer.checkpoints.stored_model import find_model
from scoreray.trainer.encoders.base import Autoencoder
from scoreray.trainer.encoders.files import absolute, digest_of
from scoreray.trainer.networks.autoencoder import check_autoencoder
from scoreray.trainer.networks.network import build_network, load_weights
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective


class ScorerayAutoencoder(Autoencoder):
    """At the first EMA length. The hash is of the network's section and those weights, so that an exported model is the
    autoencoder that its checkpoint is."""

    kind = "scoreray"
    is_variational = True

    def __init__(self, path: str) -> None:
        """Raises UserError (nothing there, no autoencoder, of other samples than pictures), DataError, StorageError."""
        self.path = absolute(path)
        stored = find_model(path)
        config, page = stored.config, stored.page
        if not isinstance(config.objective, AutoencodingObjective):
            raise UserError(f"{self.name}: a model of objective.kind '{config.objective.kind}' is no autoencoder")
        shape, target = tuple(page.image_shape), page.target
        if len(shape) != 3 or (target is not None and target.normaliser is not None and target.kind != "image"):
            raise UserError(
                f"{self.name}: encodes samples {list(shape)} of kind {target.kind if target else 'array'}; latents are "
                "made of pictures, kind image [channels, height, width]"
            )
        self.module, weights = build_network(config.network, shape), stored.weights()
        load_weights(self.module, weights, stored.url)
        self.module.requires_grad_(False).eval()
        self._network = check_autoencoder(self.module, config.network.kind, shape)
        latent = tuple(self._network.encode(torch.zeros(1, *shape))[0].shape[1:])
        self.channels, self.latent_channels, self.factor = shape[0], latent[0], shape[1] // latent[1]
        if shape[1:] != tuple(self.factor * length for length in latent[1:]):
            raise UserError(f"{self.name}: latents {list(latent)} of samples {list(shape)} are no smaller grid of them")
        section = config.model_dump(mode="json")["network"]
        self.sha256 = digest_of({"network": section, "shape": shape}, weights.items())

    @torch.no_grad()
    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._network.encode(x)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self._network.decode(z)
