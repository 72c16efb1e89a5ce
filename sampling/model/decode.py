"""Latents decoded by the autoencoder that their field's record names, and previews of them without it.

The autoencoder is loaded once in a process. A call has a fixed number of rows on a CPU, where kernels are chosen by
shape: a sample's bits then do not depend on which others are decoded with it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoreray.data.fields.encoding import Encoding, linear_preview
from scoreray.trainer.encoders.load import load_autoencoder
from scoreray.trainer.engine.cpu import has_bf16_units

PIXELS = {"cpu": 1 << 16, "cuda": 1 << 20}  # of a call: a wide decoder's activations are 2 KB a pixel
MOST_ROWS = 16


def decode(encoding: Encoding, z: Tensor) -> Tensor:
    """Unscaled latents [b, c, h, w] -> float32 [b, C, H, W] on the CPU, pictures from about -1 to 1.

    On a GPU that has units for it, in bf16. Raises UserError, DataError and StorageError where the autoencoder is gone,
    is another than was recorded, or has latents of other channels.
    """
    model = load_autoencoder(encoding)
    shape = model.decoded_shape(z.shape[1:])
    rows = max(1, min(MOST_ROWS, PIXELS.get(model.device.type, PIXELS["cuda"]) // math.prod(shape[1:])))
    bf16 = model.device.type != "cpu" and has_bf16_units(model.device)
    parts = []
    for part in z.float().split(rows):
        missing = rows - len(part) if model.device.type == "cpu" else 0
        filled = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]).to(model.device)
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            parts.append(model.decode(filled)[: len(part)].float().cpu())
    return torch.cat(parts)


def preview(encoding: Encoding, z: Tensor) -> Tensor | None:
    """A picture [b, C, h, w] in [-1, 1] of latents, at their height and width, by the recorded linear map; None where
    none was recorded."""
    return linear_preview(encoding.preview, z).clamp(-1, 1) if encoding.preview else None
