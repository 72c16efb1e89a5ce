"""Autoencoders of the diffusers library, from folders that it saved: a pipeline's `vae`, or the autoencoder's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoreray.data.errors import DataError, UserError, nearest, shortened
from scoreray.data.extras import check_installed
from scoreray.data.fields.encoding import Encoding
from scoreray.trainer.encoders.base import Autoencoder
from scoreray.trainer.encoders.files import absolute, digest, local_folder
from scoreray.trainer.networks.pretrained_folder import (
    DIFFUSERS_OPTIONS,
    WEIGHTS,
    load_pretrained,
    read_json,
    weight_files,
)


@dataclass(frozen=True)
class _Class:
    """output: the attribute of what `encode` returns.  levels: the key of the config that lists the encoder's levels,
    each of which but the last halves height and width.  latent_channels: the key of their number."""

    output: str
    levels: str
    latent_channels: str = "latent_channels"


CLASSES = {
    "AutoencoderKL": _Class("latent_dist", "block_out_channels"),
    "AutoencoderKLFlux2": _Class("latent_dist", "block_out_channels"),
    "AsymmetricAutoencoderKL": _Class("latent_dist", "down_block_out_channels"),
    "AutoencoderTiny": _Class("latents", "encoder_block_out_channels"),
    "AutoencoderDC": _Class("latent", "encoder_block_out_channels"),
    "VQModel": _Class("latents", "block_out_channels"),
}
"""Of images, by name. A class that differs from these in names only is added here."""


class DiffusersAutoencoder(Autoencoder):
    kind = "diffusers"
    module: Any  # of a class that is known when it is loaded

    def __init__(self, path: str) -> None:
        """Raises UserError (no such folder or class, a pickle, diffusers is missing), DataError."""
        check_installed("diffusers", f"{self.kind}={path}", "diffusers")
        import diffusers

        self.path = absolute(path)
        with local_folder(path, f"{self.kind}=") as root:
            folder = _folder_of(root)
            config = read_json(folder / "config.json")
            if not config:
                raise UserError(f"{self.name}: has no {_shown(folder, root)}config.json; give an autoencoder's folder, "
                                "or a pipeline's that has one in vae/")  # fmt: skip
            name = str(config.get("_class_name"))
            if name not in CLASSES:
                raise UserError(f"{self.name}: _class_name '{shortened(name)}': {nearest(name, CLASSES)}")
            self.sha256 = digest(folder)
            loaded = load_pretrained("diffusers", getattr(diffusers, name), folder, WEIGHTS, **DIFFUSERS_OPTIONS)
        vae: Any = loaded
        self.module = vae.requires_grad_(False).eval()
        self._class, config = CLASSES[name], dict(vae.config)  # with the class's defaults
        self.channels, self.latent_channels = config["in_channels"], config[self._class.latent_channels]
        if name == "VQModel" and config["vq_embed_dim"] is not None:
            self.latent_channels = config["vq_embed_dim"]
        self.factor = 2 ** (len(config[self._class.levels]) - 1)
        self.is_variational = self._class.output == "latent_dist"

    @torch.no_grad()
    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = getattr(self.module.encode(x), self._class.output)
        return (found.mean, found.std) if self.is_variational else (found, torch.zeros_like(found))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.module.decode(z).sample


def autoencoder_files(encoding: Encoding) -> dict[str, bytes]:
    """The files of the autoencoder that made a field, by name: what a folder needs to be loaded as one. Raises
    UserError, DataError (it is another than was recorded)."""
    with local_folder(encoding.path, f"{encoding.kind}=") as root:
        folder = _folder_of(root)
        if digest(folder) != encoding.sha256:
            raise DataError(
                f"{encoding.name}: has changed since it encoded the data; put the one that did in its place"
            )
        indices = list(folder.glob("*.safetensors.index.json"))
        return {file.name: file.read_bytes() for file in (folder / "config.json", *indices, *weight_files(folder))}


def _folder_of(root: Path) -> Path:
    """Of a pipeline its vae/."""
    return root / "vae" if (root / "model_index.json").is_file() else root


def _shown(folder: Path, root: Path) -> str:
    return "" if folder == root else f"{folder.name}/"
