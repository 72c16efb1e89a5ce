"""One training step's loss as a module: what an engine wraps, shards and calls on (images, labels, positions)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from scoreray.trainer import noise
from scoreray.trainer.denoiser import Denoiser
from scoreray.trainer.layers import allow_double_backward
from scoreray.trainer.network import build_network
from scoreray.trainer.objective import (
    ObjectiveConfig,
    check_objective,
    draw_probes,
    loss_per_sample,
    needs_second_derivatives,
)
from scoreray.trainer.process import Process
from scoreray.trainer.sigma_sampling import sample_sigma
from scoreray.trainer.weighting import build_weighting

if TYPE_CHECKING:
    from scoreray.data.manifest import Manifest
    from scoreray.trainer.config import Config


class TrainingModule(nn.Module):
    """(images [B, ...], labels int64 [B] or None, positions int64 [B]) -> (loss [B], sigma [B]), both float32.

    uint8 images become [-1, 1]; floating-point ones are used as they are. Noise, noise level, label dropout and probes
    are functions of (seed, position): a sample's loss does not depend on its rank, its micro-batch or the world size.
    The network may compute in bf16, by its weights or under autocast; what stands around it stays float32.
    Parameters: `denoiser.network.*` and, where the weighting learns, `weighting.*`.
    """

    def __init__(
        self, denoiser: Denoiser, objective: ObjectiveConfig, process: Process, *, seed: int, global_batch_size: int
    ):
        super().__init__()
        check_objective(objective, denoiser.parameterization)
        self.denoiser = denoiser
        self.objective, self.process = objective, process
        self.seed, self.global_batch_size = seed, global_batch_size
        self.weighting = build_weighting(objective.weighting, process, denoiser.sigma_data)
        if needs_second_derivatives(objective, denoiser.parameterization):
            allow_double_backward(denoiser)

    def forward(self, images: Tensor, labels: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        x0 = to_unit_range(images)
        shape = tuple(x0.shape[1:])
        sigma = sample_sigma(
            self.objective.sigma_sampling, self.process, self.seed, positions, self.global_batch_size, x0.dtype
        )
        z = noise.normal(self.seed, positions, shape, stream=noise.STREAM_NOISE, dtype=x0.dtype)
        labels = None if labels is None else self._hide(labels, positions)
        probes = draw_probes(self.objective, self.seed, positions, shape, x0.dtype)
        loss, _ = loss_per_sample(self.objective, self.weighting, self.denoiser, x0, sigma, z, labels, probes)
        return loss.float(), sigma.float()

    def _hide(self, labels: Tensor, positions: Tensor) -> Tensor:
        if not self.objective.label_dropout:
            return labels
        u = noise.uniform(self.seed, positions, stream=noise.STREAM_LABEL_DROPOUT)
        return labels.masked_fill(u < self.objective.label_dropout, -1)


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 [0, 255] as float32 [-1, 1]; floating-point images unchanged (float32 at least)."""
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    return images.to(torch.promote_types(images.dtype, torch.float32))


def to_uint8(x: Tensor) -> Tensor:
    """The inverse: values in [-1, 1] as uint8 [0, 255], those outside clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def build_training_module(config: Config, manifest: Manifest) -> TrainingModule:
    """The module that `config` trains on data of this manifest. Weights come from torch's global generator."""
    network = build_network(config.network, manifest.shape, len(manifest.classes))
    return TrainingModule(
        Denoiser(network, config.denoiser.parameterization, config.denoiser.sigma_data),
        config.objective,
        config.process,
        seed=config.run.seed,
        global_batch_size=config.data.global_batch_size,
    )
