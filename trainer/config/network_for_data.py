"""The network that is suggested for data on a machine: a perceptron, a U-Net or a transformer, and its size.

The numbers are assumptions, where to start from: what a kind of machine trains in hours.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scoreray.data.fields.field import Field
from scoreray.trainer.engine.cpu import has_bf16_units

# What is taken for an autoencoder's latents: channels, the longest side, and how far a channel's mean may be from 0 in
# its standard deviations, and these from each other (those of Stable Diffusion's, unscaled: 1.4, and a factor of 1.4).
# Temperatures in kelvin, or fields of several units, are further.
LATENT_CHANNELS, LATENT_SIZE, LATENT_MEAN, LATENT_APART = range(4, 33), 64, 3.0, 4.0
DIT = {
    "cpu": {"hidden_size": 192, "depth": 6, "num_heads": 3},
    "cuda": {"hidden_size": 768, "depth": 12, "num_heads": 12},
}


@dataclass(frozen=True)
class _Scale:
    """What a kind of machine trains in hours, by the number of a sample's spatial dimensions, 0 to 3.

    places: of feature maps at full resolution; patches make up for more.  width: of a U-Net.  batch: of one worker.
    images: least and most that a run sees.
    """

    places: tuple[int, int, int, int]
    width: tuple[int, int, int, int]
    batch: tuple[int, int, int, int]
    num_blocks: int
    images: tuple[int, int]


SCALES = {
    "cpu": _Scale((1, 1024, 1024, 2048), (0, 32, 32, 16), (512, 32, 32, 4), 1, (100_000, 1_000_000)),
    "cuda": _Scale((1, 8192, 4096, 32768), (0, 64, 128, 32), (4096, 256, 256, 32), 2, (1_000_000, 100_000_000)),
}


@dataclass(frozen=True)
class Hardware:
    """What a run would compute on. memory_bytes: of a GPU."""

    cores: int
    num_gpus: int = 0
    has_bf16: bool = False

    @property
    def device(self) -> str:
        return "cuda" if self.num_gpus else "cpu"

    @staticmethod
    def here() -> Hardware:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device("cuda" if gpus else "cpu")
        return Hardware(len(os.sched_getaffinity(0)), gpus, has_bf16_units(device))


def network_for(shape: Sequence[int], target: Field, machine: Hardware) -> tuple[dict[str, Any], list[str]]:
    """(section `network` of a config, why it is so) for samples of this shape, those of `target`."""
    channels, grid, scale = shape[0], shape[1:], SCALES[machine.device]
    if not grid:
        width = 128 if channels <= 8 else 256 if channels <= 64 else 512
        why = "points of one number" if channels == 1 else f"points of {channels} numbers"
        return {"kind": "mlp", "hidden_size": width, "num_layers": 4}, [why]
    patch = _patch(grid, scale.places[len(grid)])
    if _like_latents(target):
        return {"kind": "dit", "patch_size": max(patch, 2), **DIT[machine.device]}, [
            f"{channels} channels of like spread about 0 are taken for an autoencoder's latents: a transformer over",
            "patches (Peebles & Xie 2023). If that is wrong, kind: unet may be the better start",
        ]
    smallest = min(-(-length // patch) for length in grid)
    levels = max(1, min(4, smallest.bit_length() - 3))  # down to feature maps of 8
    values = {
        "kind": "unet", "model_channels": scale.width[len(grid)], "channel_mult": [1, 2, 2, 4][:levels],
        "num_blocks": scale.num_blocks, "patch_size": patch,
    }  # fmt: skip
    if machine.num_gpus and len(grid) == 3:
        values["activation_checkpointing"] = True
    why = f"samples of {' x '.join(map(str, grid))}: a U-Net"
    if patch > 1:
        pad = "" if all(length % patch == 0 for length in grid) else ", filled up with zeros at the end"
        why += f", on patches of {patch}{pad}, so that a step fits this machine"
    return values, [why]


def _like_latents(target: Field) -> bool:
    """A guess, by shape and statistics."""
    if target.kind != "array" or len(target.shape) != 3 or not target.std or min(target.std) <= 0:
        return False
    channels, *grid = target.shape
    far = max(abs(mean) / std for mean, std in zip(target.mean, target.std, strict=True))
    is_even = far <= LATENT_MEAN and max(target.std) <= LATENT_APART * min(target.std)
    return channels in LATENT_CHANNELS and max(grid) <= LATENT_SIZE and is_even


def _patch(grid: Sequence[int], most: int) -> int:
    """The smallest patch that leaves at most so many places; of these one that divides the grid, if one up to twice as
    large does."""
    sizes = [size for size in range(1, max(grid) + 1) if math.prod(-(-length // size) for length in grid) <= most]
    dividing = [size for size in sizes if all(length % size == 0 for length in grid) and size <= 2 * sizes[0]]
    return (dividing or sizes)[0]
