"""What drawing many samples costs beside the network itself, against diffusers' pipelines, and how exact bf16 is.

    pip install -e .[benchmarks]
    python benchmarks/offline.py PART [--checkpoint URL --data URL] [--threads 2]

PART, each under 4 minutes on 2 cores:
  null      the driver's own time per step with a network that does nothing, beside diffusers' pipeline loop with one
  driver    samples as WebDataset shards in memory (drawn, encoded, hashed) against a bare loop of the network's calls
  unet dit  samples a second against a diffusers pipeline as it comes (fp32, eager): networks of equal FLOPs, same steps
  exact     a trained model (--checkpoint, --data): samples and denoising error in bf16, and compiled, against fp32
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from scoreray.data.fields.normalisation import to_uint8, to_unit_range
from scoreray.sampling.model.describe import ModelInfo
from scoreray.sampling.model.load import LoadedDenoiser, load
from scoreray.sampling.offline.driver import ROWS, Form, in_form
from scoreray.sampling.offline.generate import Request, prepare
from scoreray.sampling.offline.plan import SamplePlan
from scoreray.sampling.offline.record import SampleJob
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import drive, start
from scoreray.sampling.samplers.sigmas import karras
from scoreray.trainer.config import load_config
from scoreray.trainer.engine.cpu import keep_large_tensors_on_the_heap
from scoreray.trainer.networks.flops import flops

SHAPE = (3, 32, 32)
NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"kind": "unet", "model_channels": 32, "channel_mult": [1, 2, 2], "head_channels": 32},
    "dit": {"kind": "dit", "patch_size": 4, "hidden_size": 192, "depth": 6, "num_heads": 6},
}
STEPS = 10
NULL_STEPS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--checkpoint")
    parser.add_argument("--data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    print(f"# {arguments.part}: {platform.machine()} CPU, {arguments.threads} threads, torch {torch.__version__}\n")
    began = time.perf_counter()
    PARTS[arguments.part](arguments)
    print(f"\n{time.perf_counter() - began:.0f} s in all.")


def model_of(kind: str) -> LoadedDenoiser:
    """A network with random weights, none of them zero."""
    config = load_config(
        {
            "run": {"name": kind, "storage": "none"},
            "data": {"url": "none", "global_batch_size": 16},
            "network": NETWORKS[kind],
            "duration": {"images": 1},
        }
    )
    torch.manual_seed(0)
    network = config.network.build(SHAPE)
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model = LoadedDenoiser(network, "edm", 0.5)
    model.info = ModelInfo("memory", 0, "none", SHAPE, (), config)
    return model.requires_grad_(False).eval()


def null(arguments: argparse.Namespace) -> None:
    """Microseconds a step: everything but the network, on 16 rows of 3 x 32 x 32."""
    import diffusers

    keep_large_tensors_on_the_heap()
    x, seeds, sigmas = SampleNoise(range(ROWS)).normal((ROWS, *SHAPE)), torch.arange(ROWS), karras(NULL_STEPS)
    denoised, names = torch.zeros_like(x), ("euler", "dpmpp_2m", "ddim", "ddpm", "heun")
    rows: dict[str, Callable[[], object]] = {
        f"scoreray {name}": lambda name=name: drive(start(name, x, sigmas, seeds), lambda x, sigma: denoised)
        for name in names
    }

    def loop(scheduler: Any) -> None:
        """What diffusers' pipelines do around the network."""
        scheduler.set_timesteps(NULL_STEPS)
        state = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scheduler.scale_model_input(state, t)
            state = scheduler.step(denoised, t, state).prev_sample

    schedulers = ("EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler")
    for name in schedulers:
        rows[f"diffusers {name}"] = lambda s=getattr(diffusers, name)(): loop(s)  # noqa: B008
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(4 * arguments.rounds):
        for name, run in rows.items():
            times[name].append(timed(run) / (2 * NULL_STEPS - 1 if name.endswith("heun") else NULL_STEPS))
    for name, own in times.items():
        print(f"{name:45} {1e6 * statistics.median(own[1:]):6.0f} us a step, at best {1e6 * min(own):.0f}")


def driver(arguments: argparse.Namespace) -> None:
    """The whole of a shard's making over a bare loop of as many calls of the same form of the network."""
    keep_large_tensors_on_the_heap()
    for kind in NETWORKS:
        model, count = model_of(kind), 64
        form = Form("bf16", compiled=False)
        request = Request(count, "dpmpp_2m", STEPS).fitted(model.info)
        job = SampleJob("none", "none", "none", "", request, "webdataset", count, "bf16", "off", form)
        samples, network = SamplePlan(job, "none", model), in_form(model, form)
        x, sigma = torch.randn(ROWS, *SHAPE), torch.ones(ROWS)

        def bare(network: Any = network, x: torch.Tensor = x, sigma: torch.Tensor = sigma) -> None:
            for _ in range(STEPS * count // ROWS):  # noqa: B023
                network(x, sigma)

        make = lambda samples=samples: samples.make(0, Path())  # noqa: E731
        make()
        pairs = []
        for turn in range(4 * arguments.rounds):  # each first in its turn: a machine drifts
            runs = [timed(run) for run in ((bare, make) if turn % 2 else (make, bare))]
            pairs.append(runs[0] / runs[1] if turn % 2 else runs[1] / runs[0])
        shown = f"{statistics.median(pairs):.3f} ({min(pairs):.3f} to {max(pairs):.3f})"
        print(f"{kind}: {count} samples, {STEPS} steps, bf16 as it is: bare loop / driver {shown}, {len(pairs)} pairs")


def pipeline(arguments: argparse.Namespace) -> None:
    kind = arguments.part
    keep_large_tensors_on_the_heap()
    model, count = model_of(kind), 32
    request = Request(count, "euler", STEPS, batch_size=ROWS).fitted(model.info)
    draws: dict[str, Callable[[], object]] = {"diffusers, fp32": lambda: theirs(count)}
    theirs, theirs_flops = diffusers_pipeline(kind)
    own = flops(model.network, SHAPE) / 1e6
    print(f"FLOPs of a call for one sample: ours {own:.0f} M, theirs {theirs_flops:.0f} M\n")
    for form in (Form(), Form("bf16"), Form("bf16", compiled=True)):
        draw = prepare(in_form(model, form), request)

        def ours(draw: Callable[..., torch.Tensor] = draw) -> list[torch.Tensor]:
            labels = torch.full((ROWS,), -1)
            return [to_uint8(draw(first, labels)) for first in range(0, count, ROWS)]

        began = time.perf_counter()
        ours()
        draws[f"scoreray, {form.name}"] = ours
        print(f"scoreray, {form.name}: first draw {time.perf_counter() - began:.1f} s", flush=True)
    theirs(count)
    times: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(arguments.rounds):
        for name, run in draws.items():
            times[name].append(timed(run))
    base = statistics.median(times["diffusers, fp32"])
    print(f"\n| {kind}, {STEPS} steps, batches of {ROWS} | samples/s | range | against diffusers |\n|---|---|---|---|")
    for name, took in times.items():
        low, middle, high = count / max(took), count / statistics.median(took), count / min(took)
        print(f"| {name} | {middle:.1f} | {low:.1f} to {high:.1f} | {base / statistics.median(took):.2f} |")


def diffusers_pipeline(kind: str) -> tuple[Callable[[int], object], float]:
    """(draws so many samples, MFLOPs of a call for one sample): a pipeline with DDIM's scheduler, as it comes."""
    import diffusers
    import numpy as np
    from torch.utils.flop_counter import FlopCounterMode

    diffusers.utils.logging.set_verbosity_error()
    scheduler = diffusers.DDIMScheduler()
    if kind == "unet":
        unet = diffusers.UNet2DModel(
            sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, norm_num_groups=8,
            attention_head_dim=32,
        ).eval()  # fmt: skip
        pipe = diffusers.DDIMPipeline(unet, scheduler)
        pipe.set_progress_bar_config(disable=True)

        def draw(count: int) -> object:
            return [pipe(batch_size=ROWS, num_inference_steps=STEPS, output_type="np") for _ in range(0, count, ROWS)]

        call = lambda: unet(torch.randn(1, *SHAPE), torch.tensor([5]))  # noqa: E731
    else:
        dit = diffusers.DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=32, in_channels=3, out_channels=3, num_layers=6, sample_size=32,
            patch_size=4, num_embeds_ada_norm=10, norm_num_groups=3,
        ).eval()  # fmt: skip
        labels = torch.zeros(ROWS, dtype=torch.int64)

        def draw(count: int) -> object:
            """DiTPipeline's loop without its autoencoder, which pixels do not need."""
            images = []
            for _ in range(0, count, ROWS):
                scheduler.set_timesteps(STEPS)
                x = torch.randn(ROWS, *SHAPE)
                for t in scheduler.timesteps:
                    output = dit(scheduler.scale_model_input(x, t), timestep=t.expand(ROWS), class_labels=labels).sample
                    x = scheduler.step(output, t, x).prev_sample
                images.append(np.asarray((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)))
            return images

        call = lambda: dit(torch.randn(1, *SHAPE), timestep=torch.tensor([5]), class_labels=labels[:1])  # noqa: E731
    with FlopCounterMode(display=False) as counter:
        call()
    return draw, counter.get_total_flops() / 1e6


def exact(arguments: argparse.Namespace) -> None:
    """How far bf16 and the compiled forward are from fp32: on samples of the same seeds, and in denoising error."""
    from scoreray.data.reading.samples import read_samples

    model, count = load(arguments.checkpoint), 128
    request = Request(count, seed=1).fitted(model.info)
    labels = request.labels(0, count, model.info)
    data = to_unit_range(read_samples(arguments.data, list(range(256))))
    forms = (Form(), Form("bf16"), Form("bf16", compiled=True), Form("fp32", compiled=True))
    samples, errors = {}, {}
    for form in forms:
        fast = in_form(model, form)
        samples[form.name] = prepare(fast, request)(0, labels)
        errors[form.name] = [denoising_error(fast, data, sigma) for sigma in (0.02, 0.2, 1.0, 5.0)]
    base = samples["fp32"]
    print(
        "| form | samples: rms difference | largest | bytes that differ | by more than 2 | denoising error, relative |"
    )
    print("|---|---|---|---|---|---|")
    for form in forms[1:]:
        off = (samples[form.name] - base).abs()
        pixels = (to_uint8(samples[form.name]).int() - to_uint8(base).int()).abs()
        changes = [f"{100 * (a / b - 1):+.3f}%" for a, b in zip(errors[form.name], errors["fp32"], strict=True)]
        print(
            f"| {form.name} | {off.square().mean().sqrt():.4f} | {off.max():.3f} | {(pixels > 0).float().mean():.1%} "
            f"| {(pixels > 2).float().mean():.2%} | {', '.join(changes)} |"
        )
    print(
        f"\n{count} samples (Heun, 18 steps, range [-1, 1]); denoising error of {len(data)} images at 0.02, 0.2, 1, 5."
    )


def denoising_error(denoiser: Any, data: torch.Tensor, sigma: float) -> float:
    noise = SampleNoise(range(len(data))).normal(data.shape)
    x, level = data + sigma * noise, torch.full((len(data),), sigma)
    return float((denoiser(x, level) - data).square().mean())


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


PARTS = {"null": null, "driver": driver, "unet": pipeline, "dit": pipeline, "exact": exact}


if __name__ == "__main__":
    main()
