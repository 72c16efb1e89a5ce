"""Inpainting by a model of latents: known pixels are encoded, and put back over what is decoded.

An autoencoder's latents depend on pixels around their own, those beside unknown pixels too: what is known of latents is
an approximation, and what is drawn is only as near to the known pixels as the autoencoder decodes them. Therefore known
pixels are put back at the end, as in Blended Latent Diffusion (Avrahami 2023, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.fields.normalisation import to_uint8
from scoreray.sampling.guidance.observations import read_mask, read_observed
from scoreray.sampling.model.describe import ModelInfo
from scoreray.trainer.encoders.load import load_autoencoder


@dataclass(frozen=True)
class KnownPixels:
    """What is known of a sample before it is encoded. picture: float32 [C, H, W] in [-1, 1], 0 where `known`, bool
    [C, H, W], is false."""

    picture: Tensor
    known: Tensor

    @staticmethod
    def read(info: ModelInfo, observed: str, mask: str, value_range: str | None = None) -> KnownPixels:
        """From the files of a picture and a mask. Raises UserError, DataError, StorageError."""
        shape = info.sample_shape
        known = read_mask(mask, shape)
        picture = read_observed(observed, shape, pictures=info.is_picture, value_range=value_range)
        return KnownPixels(torch.where(known, picture, 0.0), known)

    def latents(self, info: ModelInfo) -> tuple[Tensor, Tensor]:
        """(latents as the network models them, which of them are known, bool), both [c, h, w] on the CPU: the means of
        what the picture is encoded to, known where all pixels of a cell of their grid are. Raises UserError where no
        cell is, and as `load_autoencoder`."""
        assert info.encoding is not None
        channels, height, width = info.image_shape
        rows, columns = self.known.shape[1] // height, self.known.shape[2] // width
        whole = self.known.all(0).view(height, rows, width, columns).all(3).all(1)
        if not bool(whole.any()):
            raise UserError(
                f"--mask: marks no {columns} x {rows} pixels of the latents' grid as known together; mark larger areas"
            )
        autoencoder = load_autoencoder(info.encoding)
        mean = autoencoder.moments(self.picture[None].to(autoencoder.device))[0].float().cpu()
        normaliser = None if info.target is None else info.target.normaliser
        return (mean if normaliser is None else normaliser.apply(mean))[0], whole.expand(channels, height, width)

    def put_back(self, info: ModelInfo, samples: Tensor) -> Tensor:
        """Samples [B, C, H, W] as `ModelInfo.in_data_units` gives them, with the known pixels in their places."""
        return torch.where(self.known, to_uint8(self.picture) if info.is_picture else self.picture, samples)
