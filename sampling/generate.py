"""Drawing many samples from one denoiser, and writing them where they are wanted."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from scoreray.data.errors import UserError, nearest
from scoreray.data.inspect import picture_grid
from scoreray.data.store import Store, open_store
from scoreray.sampling.guidance import ClassifierFree
from scoreray.sampling.load import LoadedDenoiser, ModelInfo
from scoreray.sampling.noise import SampleNoise
from scoreray.sampling.samplers import SAMPLERS, sample
from scoreray.trainer.step import to_uint8

MAX_SHEET = 256


@dataclass(frozen=True)
class Request:
    """Which samples: `count` of them, numbered, each with a seed of its own, so sample i is the same in any batch.

    class_label: None draws classes in turn (0, 1, 2, ...) from a model that has classes.
    guidance: classifier-free, 1 for none; needs a model that was trained with label dropout.
    """

    count: int
    sampler: str = "heun"
    steps: int = 18
    seed: int = 0
    class_label: str | int | None = None
    guidance: float = 1.0
    batch_size: int = 64
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 1 or self.steps < 1 or self.batch_size < 1:
            raise UserError("count, steps and batch size must be at least 1")
        if self.count >= 2**32 or not 0 <= self.seed < 2**31:
            raise UserError("count must be below 2^32 and seed in [0, 2^31): together they number the samples")
        if self.sampler not in SAMPLERS:
            raise UserError(f"unknown sampler '{self.sampler}': {nearest(self.sampler, SAMPLERS)}")

    def sample_seeds(self, first: int, last: int) -> torch.Tensor:
        """Seeds int64 of samples [first, last); no two samples of any two requests with different seeds share one."""
        return torch.arange(first, last, dtype=torch.int64) + (self.seed << 32)

    def labels(self, first: int, last: int, info: ModelInfo) -> torch.Tensor:
        """Classes int64 of samples [first, last), -1 for none. Raises UserError for a class that is not there."""
        if self.class_label is None and info.classes:
            return torch.arange(first, last) % len(info.classes)
        return torch.full((last - first,), info.class_number(self.class_label), dtype=torch.int64)


def generate(
    denoiser: LoadedDenoiser, request: Request, done: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (samples float32 [b, ...] in the model's range, labels int64 [b]) batch by batch; `done(b)` after each."""
    for first in range(0, request.count, request.batch_size):
        last = min(first + request.batch_size, request.count)
        labels = request.labels(first, last, denoiser.info)
        yield draw(denoiser, request, first, labels), labels
        done(last - first)


def draw(denoiser: LoadedDenoiser, request: Request, first: int, labels: torch.Tensor) -> torch.Tensor:
    """Samples first, first + 1, ... of a request in one batch, float32 [b, ...], of `labels` int64 [b] (-1: none)."""
    device = next(denoiser.parameters()).device
    sigmas = denoiser.info.sigmas(request.steps)
    guided = denoiser if request.guidance == 1 else ClassifierFree(denoiser, request.guidance)
    seeds = request.sample_seeds(first, first + len(labels)).to(device)
    noise = SampleNoise(seeds).normal((len(labels), *denoiser.info.image_shape), torch.float32, device)
    return sample(
        guided,
        noise * float(sigmas[0]),
        sigmas,
        sampler=request.sampler,
        generator=seeds,
        class_labels=labels.to(device),
        **request.options,
    ).cpu()


def check_writable(url: str) -> None:
    """Finds out before samples are drawn whether `write_samples` can put them there. Raises StorageError, UserError."""
    _place(url)[0].check_writable()


def write_samples(batches: Iterator[tuple[torch.Tensor, torch.Tensor]], url: str) -> list[str]:
    """Writes all samples and returns where. A url ending in .npz: one file (samples, labels); else a folder or
    prefix of pictures 000000.png, ... with a sheet of the first of them, samples.png.
    """
    store, name = _place(url)
    if name:
        parts = list(batches)
        samples = torch.cat([x for x, _ in parts])
        array = to_uint8(samples).permute(0, 2, 3, 1).numpy() if samples.ndim == 4 else samples.numpy()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=array, labels=torch.cat([y for _, y in parts]).numpy())
        store.put(name, buffer.getvalue())
        return [store.url(name)]
    number = 0
    first: list[torch.Tensor] = []
    for x, _ in batches:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise UserError(f"samples of shape {list(x.shape[1:])} are no pictures; give a url that ends in .npz")
        images = to_uint8(x)
        if sum(map(len, first)) < MAX_SHEET:
            first.append(images)
        for image in images:
            store.put(f"{number:06d}.png", png(image))
            number += 1
    sheet = torch.cat(first)[:MAX_SHEET]
    store.put("samples.png", png_of_sheet(sheet))
    return [store.url("samples.png")]


def _place(url: str) -> tuple[Store, str]:
    """The store that samples go to, and the file's name in it where they are to be one .npz ("" else)."""
    if not url.endswith(".npz"):
        return open_store(url), ""
    parent, _, name = url.rpartition("/")
    return open_store(parent or "."), name


def png(image: torch.Tensor) -> bytes:
    """A uint8 picture [C, H, W] as PNG."""
    from PIL import Image

    array = image.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()


def png_of_sheet(images: torch.Tensor) -> bytes:
    """A sheet of uint8 pictures [N, C, H, W] as PNG."""
    buffer = io.BytesIO()
    picture_grid(images).save(buffer, "PNG")
    return buffer.getvalue()
