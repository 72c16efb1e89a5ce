"""Training loops that `benchmarks/quality.py` compares: scoreray's own run, and what others would write or take.

A line trains on images in memory (scoreray's on a packed set, as a run does) until `between` stops it, and is asked for
weights whenever `between` says so. Peers keep their networks, losses, optimizers, averages and settings; the loop
around these is ours, since theirs read folders of pictures in processes of their own, whose time would count too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import torch
from torch import Tensor, nn

from scoreray.sampling.model.load import load
from scoreray.sampling.samplers.sample import sample
from scoreray.sampling.samplers.sigmas import karras
from scoreray.trainer.checkpoints.checkpoint import committed
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.networks.network import build_network
from scoreray.trainer.prepare import prepare_run
from scoreray.trainer.run_folder import run_store

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"
CIFAR = 3  # channels: which of k-diffusion's two configs is taken
Denoise = Callable[..., Tensor]


class Next(IntEnum):
    """What a loop does between two steps."""

    GO_ON = 0
    KEEP = 1  # the weights, to be measured later
    STOP = 2


Between = Callable[[int], Next]
"""Of the images seen so far."""


@dataclass(frozen=True)
class Task:
    """images: uint8 [N, C, H, W]. packed: the same as a packed set. total: the run's length in images, which schedules
    are made for. folder: where its weights are kept."""

    images: Tensor
    packed: str
    seed: int
    total: int
    folder: Path

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def batches(self, size: int) -> Iterator[Tensor]:
        """Rows [size, C, H, W] in [-1, 1], each epoch in another order."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            for rows in torch.randperm(len(self.images), generator=generator).split(size):
                if len(rows) == size:
                    yield self.images[rows].float() / 127.5 - 1


class Line:
    """What is trained, measured and drawn from, by the loop of a run or of a peer."""

    task: Task

    @property
    def drawn_shape(self) -> tuple[int, ...]:
        """Of what the network models."""
        return self.task.shape

    def as_images(self, drawn: Tensor) -> Tensor:
        """Samples [B, *drawn_shape] in the shape of the images."""
        return drawn


class Ours(Line):
    """A run in one process without Ray, by `trainer/loop.py`: stream, keyed noise, engine, EMA, commits."""

    def __init__(self, task: Task, config: str = "", precision: str = "") -> None:
        self.task, self.path, self.precision = task, config or DEMO, precision

    def config(self) -> Config:
        task = self.task
        changes = [
            f"data.url={task.packed}",
            f"run.storage={task.folder}",
            "run.name=run",
            f"run.seed={task.seed}",
            "objective.label_dropout=0",
            "engine.zero_stage=0",
            "scaling.workers=1",
            f"duration.images={task.total}",
            f"checkpoint.every_images={task.total}",
            "checkpoint.keep=100",
        ]
        if self.precision:
            changes.append(f"engine.precision={self.precision}")
        if task.shape[0] == CIFAR:
            changes.append("denoiser.sigma_data=auto")
        return load_config(self.path, changes)

    def train(self, between: Between) -> None:
        config = prepare_run(self.config()).config
        size, steps = config.data.global_batch_size, 0

        def requested() -> LoopRequest:
            nonlocal steps
            steps += 1
            return (LoopRequest.NOTHING, LoopRequest.SAVE, LoopRequest.STOP)[between(steps * size)]

        train(config, requested=requested)

    def denoiser(self, kept: int) -> Denoise:
        run = run_store(self.config())
        return load(run.url(committed(run)[kept]))

    def own_samples(self, denoise: Denoise, count: int, seeds: list[int]) -> Tensor:
        return heun(denoise, self.task.shape, seeds)

    def network(self) -> nn.Module:
        return of_config(self.path, self.task.shape)


class Peer(Line):
    """A plain loop of somebody else's. Subclasses set network, optimizer, average and batch size, and give a loss."""

    batch_size: int
    model: nn.Module
    averaged: nn.Module
    optimizer: torch.optim.Optimizer
    accumulate = 1
    clip = math.inf

    def __init__(self, task: Task) -> None:
        self.task = task
        torch.manual_seed(task.seed)
        self.steps = 0
        self.build()

    def build(self) -> None:
        raise NotImplementedError

    def loss(self, batch: Tensor) -> Tensor:
        raise NotImplementedError

    def after_step(self) -> None:
        """Averages, schedules."""

    def batches(self) -> Iterator[Tensor]:
        return self.task.batches(self.batch_size)

    def train(self, between: Between) -> None:
        batches, seen, kept = self.batches(), 0, 0
        while seen < self.task.total:
            for _ in range(self.accumulate):
                (self.loss(next(batches)) / self.accumulate).backward()
            if self.clip < math.inf:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
            seen += self.batch_size * self.accumulate
            self.after_step()
            what = between(seen)
            if what is Next.STOP:
                break
            if what is Next.KEEP:
                self._keep(kept)
                kept += 1
        self._keep(kept)

    def _keep(self, number: int) -> None:
        torch.save(self.averaged.state_dict(), self.task.folder / f"{number}.pt")

    def denoiser(self, kept: int) -> Denoise:
        self.averaged.load_state_dict(torch.load(self.task.folder / f"{kept}.pt", weights_only=True))
        self.averaged.eval()
        return self.denoise

    def denoise(self, x: Tensor, sigma: Tensor, condition: None = None) -> Tensor:
        raise NotImplementedError

    def own_samples(self, denoise: Denoise, count: int, seeds: list[int]) -> Tensor:
        """[count, C, H, W] in [-1, 1] by the peer's own default sampler; `seeds` where it takes any."""
        raise NotImplementedError

    def network(self) -> nn.Module:
        """What is called with one sample of `drawn_shape` and one number: to count FLOPs."""
        return self.averaged


class PlainEDM(Peer):
    """Our network in a plain loop of Karras 2022: their preconditioning, loss, noise levels and EMA; Adam at 1e-3."""

    batch_size, sigma_data = 64, 0.5

    def build(self) -> None:
        self.model = of_config(DEMO, self.task.shape)
        self.averaged = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def precondition(self, model: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.float().view(-1, 1, 1, 1)
        total = level**2 + self.sigma_data**2
        out = model(x * total.rsqrt(), sigma.float().log() / 4)
        return self.sigma_data**2 / total * x + level * self.sigma_data * total.rsqrt() * out

    def loss(self, batch: Tensor) -> Tensor:
        sigma = (torch.randn(len(batch)) * 1.2 - 1.2).exp()
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        noised = batch + sigma.view(-1, 1, 1, 1) * torch.randn_like(batch)
        error = (self.precondition(self.model, noised, sigma) - batch).square().mean((1, 2, 3))
        return (weight * error).mean()

    def after_step(self) -> None:
        half_life = min(500_000, 0.05 * self.steps * self.batch_size)  # with their rampup_ratio
        lerp(self.averaged, self.model, 1 - 0.5 ** (self.batch_size / half_life))

    def denoise(self, x: Tensor, sigma: Tensor, condition: None = None) -> Tensor:
        return self.precondition(self.averaged, x, sigma)

    def own_samples(self, denoise: Denoise, count: int, seeds: list[int]) -> Tensor:
        return heun(denoise, self.task.shape, seeds)


def of_config(path: str | Path, shape: tuple[int, int, int]) -> nn.Module:
    return build_network(load_config(path).network, shape, {})


def heun(denoise: Denoise, shape: tuple[int, ...], seeds: list[int]) -> Tensor:
    """Karras' 18 steps: what EDM and scoreray draw by."""
    return sample(denoise, starts(shape, seeds) * 80, karras(18), sampler="heun", generator=seeds)


def starts(shape: tuple[int, ...], seeds: list[int]) -> Tensor:
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def lerp(average: nn.Module, model: nn.Module, weight: float) -> None:
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, weight)
    for mean, value in zip(average.buffers(), model.buffers(), strict=True):
        mean.copy_(value)
