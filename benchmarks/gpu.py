"""The training step alone on one GPU, without Ray: images/s and MFU against the measured matmul rate.

    python benchmarks/gpu.py [--case dit unet dit-text] [--batch 64 256] [--no-compile] [--steps 30]
    python benchmarks/gpu.py --device cpu --tiny          the same path on a CPU, in seconds

A DiT of 130 M parameters on 32 x 32 x 4 latents and a U-Net of 131 M on 64 x 64 x 3, both with classes, and the DiT
with 1 to 77 tokens of 768 numbers that every block attends to. bf16 weights with fp32 masters, AdamW with two averages
in the step (the engine at zero_stage 0), torch.compile on. FLOPs are the network's forward and backward pass, counted
on the meta device; the rate is the best of square bf16 matrix products on the same device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from scoreray.trainer.config import Config, load_config
from scoreray.trainer.diffusion.condition import LABEL, Condition, ConditionSpec, class_condition
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.engine import build_engine, resolve_precision
from scoreray.trainer.networks.flops import matmul_rate, training_flops
from scoreray.trainer.networks.network import num_parameters
from scoreray.trainer.step import TrainingModule

TOKENS = {"t5": ConditionSpec("sequence", (77, 768))}
CLASSES = class_condition([str(number) for number in range(1000)])
CASES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "dit": ({"kind": "dit", "patch_size": 2, "hidden_size": 768, "depth": 12, "num_heads": 12}, (4, 32, 32)),
    "unet": ({"kind": "unet", "model_channels": 192, "channel_mult": [1, 2, 3], "num_blocks": 3}, (3, 64, 64)),
}
CASES["dit-text"] = CASES["dit"]
TINY: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "dit": ({"kind": "dit", "patch_size": 4, "hidden_size": 64, "depth": 2, "num_heads": 2}, (4, 16, 16)),
    "unet": ({"kind": "unet", "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}, (3, 16, 16)),
}
TINY["dit-text"] = TINY["dit"]
WARM_UP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small networks, to try the path anywhere")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is here; --device cpu --tiny tries the same path")
    rows: list[dict[str, Any]] = []
    for name in arguments.case:
        for batch in [8] if arguments.tiny else arguments.batch:
            rows.append(measure(name, batch, device, arguments))
            if not arguments.json:
                show(rows[-1], first=len(rows) == 1)
    if arguments.json:
        print(json.dumps(rows))


def show(row: dict[str, Any], *, first: bool) -> None:
    """A line for each case as soon as it is measured: compiling takes minutes, and a later one may fail."""
    if first:
        print(f"{row['device']}, {row['precision']}, matmul {row['matmul_tflops']:.1f} TFLOP/s")
        print(
            f"{'case':9}{'params':>10}{'batch':>7}{'compiled':>9}"
            f"{'images/s':>10}{'ms/step':>9}{'MFU':>7}{'peak GiB':>10}"
        )
    size, peak = f"{row['params'] / 1e6:.1f} M", row["peak_bytes"] / 2**30
    head = f"{row['case']:9}{size:>10}{row['batch']:7}{row['compiled']!s:>9}{row['images_per_s']:10.1f}"
    print(f"{head}{row['ms']:9.1f}{row['mfu']:7.1%}{peak:10.1f}", flush=True)


def measure(name: str, batch: int, device: torch.device, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.compiler.reset()  # else the second batch size would be compiled for any size
    network_config, shape = (TINY if arguments.tiny else CASES)[name]
    config = run_config(network_config, batch, compiled=not arguments.no_compile)
    torch.manual_seed(0)
    network = config.network.build(shape, TOKENS if name == "dit-text" else CLASSES)
    num_params, work = num_parameters(network), training_flops(network, shape)
    denoiser = Denoiser(network, config.denoiser.parameterization, config.denoiser.resolved_sigma_data)
    module = TrainingModule(denoiser, config.objective, config.process, seed=0, global_batch_size=batch)
    parts = config.engine, config.optimizer, config.ema
    engine = build_engine(module, *parts, global_batch_size=batch, world_size=1, device=device)
    images = torch.randn(batch, *shape, device=device)
    condition = condition_of(name, batch).to(device)
    seconds = []
    for step in range(WARM_UP + arguments.steps):
        start = time.perf_counter()
        loss, _ = engine.module(images, condition, torch.arange(batch, device=device) + step * batch)
        engine.backward(loss.mean())
        engine.step(1e-4, config.ema.decays(step + 1, batch))  # reads the norm, so the step has ended here
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    precision = resolve_precision(config.engine.precision, device)
    rate = matmul_rate(device, precision)
    median = statistics.median(seconds)
    return {
        "case": name,
        "params": num_params,
        "batch": batch,
        "images_per_s": batch / median,
        "ms": 1e3 * median,
        "mfu": work * batch / median / rate,
        "flops_per_image": work,
        "matmul_tflops": rate / 1e12,
        "precision": str(precision).removeprefix("torch."),
        "compiled": config.engine.compile,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    }


def condition_of(case: str, batch: int) -> Condition:
    """Classes, or tokens of 1 to 77."""
    if case != "dit-text":
        return Condition({LABEL: torch.randint(0, 1000, (batch,))})
    length, width = TOKENS["t5"].shape
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch, 1))
    return Condition({"t5": torch.randn(batch, length, width)}, {"t5": mask})


def run_config(network: dict[str, Any], batch: int, *, compiled: bool) -> Config:
    return load_config(
        {
            "run": {"name": "gpu", "storage": "nowhere"},
            "data": {"url": "nowhere", "global_batch_size": batch},
            "network": network,
            "engine": {"zero_stage": 0, "precision": "bf16", "compile": compiled},
            "duration": {"images": batch},
        }
    )


if __name__ == "__main__":
    main()
