"""Augmentation of training images, drawn again each epoch as a function of (seed, position)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict
from torch import Tensor

from scoreray.data import checks
from scoreray.trainer.diffusion.noise import STREAM_AUGMENTATION, uniform


@dataclass(frozen=True)
class AugmentationConfig:
    """Each is the probability with which an image is changed; 0 for all leaves the data as they are.

    horizontal_flip: left and right exchanged (0.5 in Ho 2020 and Song 2021). What is trained is then the distribution
    of images and their mirror images together: not for text, digits or anything else that has a handedness.
    """

    horizontal_flip: float = 0.0

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        checks.fraction("augmentation", horizontal_flip=self.horizontal_flip)


NO_AUGMENTATION = AugmentationConfig()


def augment(images: Tensor, config: AugmentationConfig, seed: int, positions: Tensor) -> Tensor:
    """images [B, C, H, W] of any dtype, changed as `config` says by numbers that (seed, positions [B]) alone decide."""
    if not config.horizontal_flip:
        return images
    flipped = uniform(seed, positions, stream=STREAM_AUGMENTATION) < config.horizontal_flip
    # Every image is flipped and one of the two is taken: selecting rows by a mask would wait for the device.
    return images.flip(-1).where(flipped[:, None, None, None], images)


def augmentation_mistakes(config: AugmentationConfig, shape: Sequence[int]) -> list[str]:
    """Where an augmentation can't be done to samples of `shape`."""
    if not config.horizontal_flip or len(shape) == 3:
        return []
    return [
        f"augmentation.horizontal_flip: {config.horizontal_flip} is for images [channels, height, width], and the "
        f"data set's samples are {tuple(shape)}; leave it out"
    ]
