"""What a GPU computes is what a CPU computes: keyed numbers, losses, steps of the engine, whole runs. Needs CUDA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.process import EDM
from scoreray.trainer.engine import build_engine
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.unet import UNetConfig
from scoreray.trainer.objectives.denoising import EDMObjective
from scoreray.trainer.run_folder import run_store
from scoreray.trainer.step import TrainingModule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPE, B = (3, 16, 16), 16
NETWORKS = {
    "unet": UNetConfig(model_channels=32, channel_mult=(1, 2), num_blocks=1, attention_resolutions=(8,)),
    "dit": DiTConfig(patch_size=4, hidden_size=64, depth=2, num_heads=2),
}


@pytest.fixture(autouse=True)
def exact_products() -> Any:
    """float32 products in float32, not TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def module(name: str) -> TrainingModule:
    torch.manual_seed(0)
    network = NETWORKS[name].build(SHAPE, 10)
    with torch.no_grad():  # the last layers begin at 0, which would hide what is before them
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return TrainingModule(Denoiser(network), EDMObjective(label_dropout=0.1), EDM(), seed=3, global_batch_size=B)


def batch(step: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (B, *SHAPE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (B,), generator=generator)
    return images.to(device), labels.to(device), (torch.arange(B) + step * B).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keyed_numbers_are_the_cpu_s(dtype: torch.dtype) -> None:
    positions = torch.arange(1000) * 7919
    for seed in (0, 2**62):
        on_cpu = noise.uniform(seed, positions, (3, 65), stream=4, dtype=dtype)
        on_gpu = noise.uniform(seed, positions.cuda(), (3, 65), stream=4, dtype=dtype)
        assert torch.equal(on_cpu, on_gpu.cpu())
        signs = noise.rademacher(seed, positions.cuda(), (3, 65), stream=4)
        assert torch.equal(noise.rademacher(seed, positions, (3, 65), stream=4), signs.cpu())
        on_cpu = noise.normal(seed, positions, (3, 65), stream=2, dtype=dtype)
        on_gpu = noise.normal(seed, positions.cuda(), (3, 65), stream=2, dtype=dtype)
        assert torch.equal(on_cpu, on_gpu.cpu())
        compiled = torch.compile(lambda at: noise.normal(seed, at, (3, 65), stream=2, dtype=dtype), fullgraph=True)  # noqa: B023
        assert torch.equal(on_cpu, compiled(positions.cuda()).cpu())


@pytest.mark.parametrize("name", NETWORKS)
def test_losses_and_gradients_are_the_cpu_s(name: str) -> None:
    on_cpu, on_gpu = module(name), module(name).cuda()
    losses, sigmas = on_cpu(*batch(0, "cpu"))
    losses_gpu, sigmas_gpu = on_gpu(*batch(0, "cuda"))
    losses.mean().backward()
    losses_gpu.mean().backward()
    torch.testing.assert_close(sigmas_gpu.cpu(), sigmas, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses_gpu.cpu(), losses, rtol=1e-4, atol=1e-5)
    for (key, a), b in zip(on_cpu.named_parameters(), on_gpu.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad.cpu()).norm() <= 1e-3 * a.grad.norm() + 1e-7, key


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("precision", "compiled"), [("fp32", False), ("bf16", False), ("bf16", True)])
def test_the_engine_s_steps_follow_the_cpu_s(name: str, precision: str, compiled: bool) -> None:
    ends = {}
    for device in ("cpu", "cuda"):
        quick = device == "cuda"
        settings = config(Path("nowhere"), "nowhere", name, precision if quick else "fp32", compiled and quick)
        engine = build_engine(
            module(name).to(device),
            settings.engine,
            settings.optimizer,
            settings.ema,
            global_batch_size=settings.data.global_batch_size,
            world_size=1,
            device=torch.device(device),
        )
        for step in range(4):
            loss, _ = engine.module(*batch(step, device))
            engine.backward(loss.mean())
            engine.step(1e-3, settings.ema.decays(step + 1, B))
        ends[device] = {
            (f.name, key): tensor.float().cpu().clone() for f in engine.fragments() for key, tensor in f.tensors.items()
        }
    tolerance = 1e-3 if precision == "fp32" else 0.05
    for key, on_cpu in ends["cpu"].items():
        if key[1] == "master":
            assert (ends["cuda"][key] - on_cpu).norm() <= tolerance * on_cpu.norm() + 1e-4 * on_cpu.numel() ** 0.5, key


def config(storage: Path, data_url: str, name: str = "unet", precision: str = "fp32", compiled: bool = False) -> Config:
    network = {"unet": {"kind": "unet", "model_channels": 16, "channel_mult": [1], "num_blocks": 1}}
    return load_config(
        {
            "run": {"name": "run", "storage": str(storage)},
            "data": {"url": data_url, "global_batch_size": 16},
            "network": network.get(
                name, {"kind": "dit", "patch_size": 4, "hidden_size": 64, "depth": 2, "num_heads": 2}
            ),
            "engine": {"zero_stage": 0, "precision": precision, "compile": compiled},
            "duration": {"images": 320},
            "checkpoint": {"every_images": 96},
        }
    )


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(small_set: str, tmp_path: Path) -> None:
    ends = []
    for name in ("whole", "broken"):
        settings = config(tmp_path / name, small_set)
        if name == "broken":
            requests = iter([LoopRequest.NOTHING] * 7 + [LoopRequest.STOP] * 2)
            assert 0 < train(settings, device="cuda", requested=lambda requests=requests: next(requests)) < 320
        assert train(settings, device="cuda") == 320
        checkpoint = latest(run_store(settings))
        assert checkpoint is not None
        ends.append(checkpoint.full_state())
    for key, whole in ends[0].items():
        torch.testing.assert_close(ends[1][key], whole, rtol=1e-4, atol=1e-5)
