"""What tests of sampling share: exact denoisers (E[x0 | x0 + sigma z = x], row by row), a run, a service on a port."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from waiting import PATIENCE_S

from scoreray.data.storage.store import open_store
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.checkpoints.writer import CheckpointWriter
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion.condition import ConditionSpec
from scoreray.trainer.optim.fragments import Fragment

if TYPE_CHECKING:
    from scoreray.sampling.service.config import ServeConfig
    from scoreray.sampling.service.service import Service


def rows(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


class Gaussian:
    """Data N(mean, std^2 I): denoised = mean + (x - mean) std^2 / (std^2 + sigma^2)."""

    def __init__(self, mean: float = 0.0, std: float = 0.5) -> None:
        self.mean, self.std = mean, std

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        kept = rows(self.std**2 / (self.std**2 + sigma**2), x)
        return self.mean + (x - self.mean) * kept

    def ode_end(self, x: Tensor, sigma: float, sigma_end: float = 0.0) -> Tensor:
        """Where the probability-flow ODE takes x from `sigma` to `sigma_end`."""
        ratio = math.sqrt((self.std**2 + sigma_end**2) / (self.std**2 + sigma**2))
        return self.mean + (x - self.mean) * ratio

    def draw(self, shape: tuple[int, ...], seed: int) -> Tensor:
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self.mean + self.std * noise


class Mixture:
    """Equal-covariance mixture of points with spread `std` in the plane, weights given."""

    means = torch.tensor([[-1.5, -0.5], [1.0, 1.2], [1.0, -1.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    std = 0.3

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        means, variance = self.means.to(x.dtype), rows(self.std**2 + sigma**2, x)
        logits = self.weights.to(x.dtype).log() - (x[:, None, :] - means).square().sum(-1) / (2 * variance)
        posterior = logits.softmax(1)
        center = (posterior[:, :, None] * means).sum(1)
        return center + (x - center) * (self.std**2 / variance)

    def draw(self, n: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.means[which] + self.std * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        centered = self.means - self.mean
        return (self.weights[:, None] * centered).T @ centered + self.std**2 * torch.eye(2, dtype=torch.float64)


@pytest.fixture
def gaussian() -> Gaussian:
    return Gaussian()


@pytest.fixture
def mixture() -> Mixture:
    return Mixture()


@pytest.fixture
def make_gaussian() -> type[Gaussian]:
    return Gaussian


@pytest.fixture(scope="session")
def lora_urls(small_run: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Runs: base; ink and style, LoRAs of it of unlike ranks and layers; other, a LoRA of ink."""
    from scoreray.trainer.loop import train
    from scoreray.trainer.run_folder import run_store

    storage, found = tmp_path_factory.mktemp("loras"), dict[str, str]()
    network = {"kind": "dit", "hidden_size": 16, "depth": 1, "num_heads": 2}
    loras = {
        "base": None,
        "ink": {"rank": 2},
        "style": {"rank": 3, "alpha": 9, "targets": ["mlp_*"]},
        "other": {"rank": 1},
    }
    for name, lora in loras.items():
        base = None if lora is None else {"checkpoint": found["ink" if name == "other" else "base"]}
        optimizer = {"learning_rate": 0.1}
        config = load_config(small_run(name, storage, 32, network=network, optimizer=optimizer, lora=lora, init=base))
        train(config)
        found[name] = run_store(config).url()
    return found


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """Mean over fixed directions of the 1-Wasserstein distance of equally many points [N, 2]."""
    angles = torch.arange(directions, dtype=torch.float64) * math.pi / directions
    lines = torch.stack([angles.cos(), angles.sin()])
    return ((a @ lines).sort(0).values - (b @ lines).sort(0).values).abs().mean().item()


@pytest.fixture
def distance():
    return sliced_wasserstein


def write_run(
    url: str,
    images: int = 64,
    *,
    seed: int = 0,
    shape: tuple[int, ...] = (1, 8, 8),
    other_shapes: tuple[tuple[int, ...], ...] = (),
    classes: int | list[str] = 3,
    hidden_size: int = 16,
    target: TargetField | None = None,
    conditions: dict[str, ConditionSpec] | None = None,
    network: dict[str, Any] | None = None,
    sections: dict[str, Any] | None = None,
) -> str:
    """Commits a checkpoint of a small network with random weights (none of them zero) to a run; returns its url.
    other_shapes: of a run on data in buckets, those beside `shape`."""
    names = classes if isinstance(classes, list) else [f"class-{i}" for i in range(classes)]
    storage, _, name = url.rpartition("/")
    unet = {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    mlp = {"kind": "mlp", "hidden_size": hidden_size}
    config = load_config(
        {
            "run": {"name": name, "storage": storage},
            "data": {"url": "s3://none/none", "global_batch_size": 16},
            "network": network or (unet if len(shape) == 3 else mlp),
            "duration": {"images": 1000},
            **(sections or {}),
        }
    )
    torch.manual_seed(seed)
    module = torch.nn.Module()
    module.denoiser = torch.nn.Module()
    module.denoiser.network = config.network.build(shape, len(names) if conditions is None else conditions)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    values = dict(module.named_parameters())
    marker = Marker(
        images,
        images // 16,
        config=config.model_dump(mode="json"),
        shapes={name: list(value.shape) for name, value in values.items()},
        state_keys=["ema_0.050", "ema_0.100"],
        files={},
        world_size=1,
        image_shape=list(shape),
        image_shapes=[list(one) for one in (shape, *other_shapes)] if other_shapes else [],
        classes=names,
        target=target,
        conditions=conditions,
    )
    fragments = [
        Fragment(
            name,
            0,
            value.numel(),
            {"master": flat, "ema_0.050": flat, "ema_0.100": 0.9 * flat},
        )
        for name, value in values.items()
        for flat in [value.detach().flatten()]
    ]
    writer = CheckpointWriter(open_store(url), attempt=f"try{seed}", rank=0, world_size=1, keep=2)
    writer.save(marker, fragments, module)
    writer.wait()
    writer.close()
    return url


@pytest.fixture(scope="session")
def new_run() -> Callable[..., str]:
    return write_run


@contextlib.contextmanager
def _served(config: ServeConfig) -> Iterator[tuple[str, Service]]:
    """The service on a port of this machine, its replica in this process."""
    import uvicorn

    from scoreray.sampling.http.app import make_app
    from scoreray.sampling.service.replica import Replica
    from scoreray.sampling.service.service import LocalBackend, Service

    started, box = threading.Event(), dict[str, Any]()

    async def serve() -> None:
        replica = Replica(config)
        service = Service(config, LocalBackend(replica))
        await service.start()
        server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="error"))
        box.update(service=service, server=server)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        box["url"] = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
        started.set()
        await task
        await service.stop()
        await replica.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert started.wait(PATIENCE_S)
        yield box["url"], box["service"]
    finally:
        box["server"].should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def served() -> Callable[[ServeConfig], contextlib.AbstractContextManager[tuple[str, Service]]]:
    """`with served(config) as (url, service)`"""
    return _served


@pytest.fixture(scope="session")
def mlp_config() -> Config:
    """The config of a model whose denoiser a test puts in its place."""
    return load_config({
        "run": {"name": "exact", "storage": "none"},
        "data": {"url": "s3://none/none", "global_batch_size": 16},
        "network": {"kind": "mlp", "hidden_size": 16},
        "duration": {"images": 1000},
    })  # fmt: skip
