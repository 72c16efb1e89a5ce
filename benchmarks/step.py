"""Training speed as ratios: the bare step against engines of ours, and the demo's full run against a bare loop.

    python benchmarks/step.py [--workers 2] [--network demo|unet|dit|dit50] [--stages 0 1 2 3] [--batch 64]
                              [--precision fp32] [--conditions] [--parts] [--deepspeed] [--adam deepspeed] [--meta]
                              [--diffusers] [--clock cpu] [--full [--images 16384] [--stage auto]] [--seconds 90]

In one run, on this machine: a bare torch loop (same network, batch, precision, AdamW; no EMA, no data pipeline, no
logging) on each of `workers` processes, gradients averaged by one all-reduce, against engines of ours in the same
processes. Cases take turns, a few steps each, until `seconds` are over; the median counts.

--conditions the network takes a sequence of vectors, a vector, a coarse grid and a class instead of a class alone: the
             bare loop gives them as they are, ours normalises them and drops each in a tenth of the samples
--parts      also forward and backward passes alone: what the optimizer with EMA costs beside them
--deepspeed  also DeepSpeed's own loop at each sharded stage, as its documentation has it (--adam: its CPU Adam), with
             gradients summed in fp32 as ours are, and in the weights' precision, which is its default
--meta       (DiT only) also Meta's DiT of the same size, in the same loop
--diffusers  also the loop of diffusers' unconditional example, a U-Net of equal FLOPs in its default precision, fp32
--clock cpu  time that this process's threads computed for, over their number: for a machine that does other things too
             (what a case waits for, such as other ranks, does not count)
--full       also `scoreray train` on Ray with data from a local S3 server, EMA, logging and commits as the demo has:
             one run before the other cases and one after, as a machine's speed drifts
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TURN_S, WARM_UP = 1.0, 2  # a case's turn; steps before the first one
MOST_ROUNDS = 12
ADAMW = "optimizer.kind=adamw"  # what every case steps by; the demo takes Muon, which ZeRO can not shard
NETWORKS = {
    "demo": {"kind": "unet", "model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "patch_size": 2},
    "unet": {"kind": "unet", "model_channels": 48, "channel_mult": [1, 2], "num_blocks": 1},
    "dit": {"kind": "dit", "patch_size": 4, "hidden_size": 192, "depth": 5, "num_heads": 3},  # 3 M
    "dit50": {"kind": "dit", "patch_size": 4, "hidden_size": 640, "depth": 8, "num_heads": 10},  # 50 M
}


def main() -> None:
    arguments = parse()
    if arguments.rank is not None:
        rank_main(arguments)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, so that no rank is left
    with tempfile.TemporaryDirectory(prefix="step-") as folder:
        before = full_run(Path(folder, "before"), arguments) if arguments.full else []
        rates = rates_of_ranks(Path(folder))
        if arguments.full:
            name = f"full run (Ray, S3, EMA, commits), ZeRO {arguments.stage}"
            rates[name] = before + full_run(Path(folder, "after"), arguments)
    bare = statistics.median(rates["bare torch loop"])
    about = (
        f"{arguments.network}, batch {arguments.batch}, {arguments.workers} workers, {threads(arguments)} threads each"
    )
    print(f"{'case':50} images/s   ratio   ({about})")
    for name, values in rates.items():
        rate = statistics.median(values)
        spread = f"{len(values)} turns, min {min(values):.1f} max {max(values):.1f}"
        print(f"{name:50} {rate:8.1f}   {rate / bare:5.3f}   {spread}")


def rates_of_ranks(folder: Path) -> dict[str, list[float]]:
    """Images/s of each case, from as many processes as there are workers; all end when one fails."""
    arguments, out = parse(), folder / "rates.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = ["--port", str(port), "--out", str(out), "--parent", str(os.getpid()), *sys.argv[1:]]
    ranks = [
        subprocess.Popen([sys.executable, __file__, "--rank", str(rank), *own], env=environment(rank))
        for rank in range(arguments.workers)
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(rank.returncode for rank in ranks):
        sys.exit("a rank failed")
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="demo")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stages", nargs="*", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--deepspeed", action="store_true")
    parser.add_argument("--meta", action="store_true")
    parser.add_argument("--diffusers", action="store_true")
    parser.add_argument("--conditions", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--adam", choices=["torch", "deepspeed"], default="torch")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--seconds", type=float, default=90, help="for all turns, set-up and the full run not counted")
    parser.add_argument("--stage", default="auto", help="of the full run")
    parser.add_argument("--images", type=int, default=16384, help="of the full run")
    parser.add_argument("--full", action="store_true", help="also the whole run on Ray, and a bare loop beside it")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def threads(arguments: argparse.Namespace) -> int:
    return max(1, (os.cpu_count() or 1) // arguments.workers)


def environment(rank: int) -> dict[str, str]:
    from scoreray.cluster.verbs.demo import demo_config
    from scoreray.trainer.on_ray.run import worker_environment

    return {**os.environ, **worker_environment(demo_config()), "LOCAL_RANK": str(rank)}


def rank_main(arguments: argparse.Namespace) -> None:
    """Every case on this rank, interleaved; rank 0 writes the rates."""
    import torch
    import torch.distributed as dist

    from scoreray.cluster.verbs.demo import demo_config
    from scoreray.trainer.config import load_config
    from scoreray.trainer.engine import resolve_precision

    end_with(arguments.parent)
    torch.set_num_threads(threads(arguments))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    rank, world = arguments.rank, arguments.workers
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{arguments.port}", rank=rank, world_size=world)
    config = load_config(
        demo_config(workers=world).model_dump(mode="json")
        | {"network": NETWORKS[arguments.network]}
        | {"engine": {"precision": arguments.precision}},
        [f"data.global_batch_size={arguments.batch}", ADAMW],
    )
    precision = resolve_precision(config.engine.precision, torch.device("cpu"))
    rows = config.data.global_batch_size // world
    generator = torch.Generator().manual_seed(rank)
    images = torch.randint(0, 256, (rows, 1, 28, 28), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (rows,), generator=generator)
    if arguments.conditions:
        labels = conditions_for(labels, generator)

    cases = {"bare torch loop": bare_step(config, precision, images, labels, world)}
    if arguments.meta:
        meta = meta_network(config)
        cases["bare torch loop, Meta's DiT"] = bare_step(config, precision, images, labels, world, meta)
    if arguments.diffusers:
        cases["diffusers' example, U-Net of equal FLOPs, fp32"] = diffusers_step(config, images, world)
    if arguments.parts:
        cases["forward and backward alone"] = passes_alone(config, images, labels, world)
    for stage in arguments.stages:
        if arguments.deepspeed and stage:
            for fp32_sums in (True, False) if precision == torch.bfloat16 else (True,):
                name = f"DeepSpeed's loop, stage {stage}, no EMA, {'fp32' if fp32_sums else 'bf16'} sums"
                options = {"adam": arguments.adam, "fp32_sums": fp32_sums}
                cases[name] = deepspeed_step(config, stage, precision, images, labels, world, options)
        cases[f"engine, zero_stage {stage}, with EMA"] = engine_step(config, stage, images, labels, world)
    rates = in_turns(cases, rows * world, arguments)
    if rank == 0:
        arguments.out.write_text(json.dumps(rates))
    dist.destroy_process_group()


def end_with(parent: int) -> None:
    """Linux ends this process when the one that started it ends, however that is."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit("the benchmark has ended")


def in_turns(cases, images, arguments):  # type: ignore[no-untyped-def]
    """Images/s of each case by rounds, until the time is over; rank 0's clock decides for all."""
    import torch
    import torch.distributed as dist

    def agreed(value: float) -> float:
        shared = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(shared, 0)
        return float(shared)

    def timed(step, count):  # type: ignore[no-untyped-def]
        dist.barrier()
        start, cpu = time.perf_counter(), time.process_time()
        for k in range(count):
            step(k)
        if arguments.clock == "cpu":
            return (time.process_time() - cpu) / threads(arguments)
        dist.barrier()
        return time.perf_counter() - start

    end = time.perf_counter() + arguments.seconds
    counts = {}
    for name, step in cases.items():
        timed(step, WARM_UP)
        counts[name] = max(1, int(agreed(TURN_S / timed(step, 1))))
    rates = {name: [] for name in cases}
    while agreed(len(rates[name]) < MOST_ROUNDS and (time.perf_counter() < end or not rates[name])):
        for name, step in cases.items():
            rates[name].append(counts[name] * images / timed(step, counts[name]))
    return rates


def conditions_built_for():  # type: ignore[no-untyped-def]
    """Of a network with `--conditions`: tokens, a vector, a coarse grid and a class."""
    from scoreray.data.fields.normalisation import Normaliser
    from scoreray.trainer.diffusion.condition import ConditionSpec

    unit = {size: Normaliser("channel", (0.0,) * size, (1.0,) * size) for size in (1, 8, 64)}
    return {
        "tokens": ConditionSpec("sequence", (16, 64), normaliser=unit[64]),
        "place": ConditionSpec("vector", (8,), normaliser=unit[8]),
        "coarse": ConditionSpec("concat", (1, 7, 7), normaliser=unit[1]),
        "label": ConditionSpec("class", classes=tuple(map(str, range(10)))),
    }


def conditions_for(labels, generator):  # type: ignore[no-untyped-def]
    import torch

    from scoreray.trainer.diffusion.condition import Condition

    rows = len(labels)
    values = {
        name: torch.randn(rows, *spec.shape, generator=generator)
        for name, spec in conditions_built_for().items()
        if spec.kind != "class"
    }
    lengths = torch.randint(1, 17, (rows, 1), generator=generator)
    return Condition(values | {"label": labels}, {"tokens": torch.arange(16) < lengths})


def module_of(config, world):  # type: ignore[no-untyped-def]
    import torch

    from scoreray.trainer.diffusion.denoiser import Denoiser
    from scoreray.trainer.step import TrainingModule

    torch.manual_seed(0)
    conditions = conditions_built_for() if parse().conditions else 10
    network = config.network.build((1, 28, 28), conditions)
    denoiser = Denoiser(network, config.denoiser.parameterization, config.denoiser.resolved_sigma_data)
    batch = config.data.global_batch_size
    dropout = dict.fromkeys(conditions, 0.1) if parse().conditions else {}
    return TrainingModule(denoiser, config.objective, config.process, seed=0, global_batch_size=batch, dropout=dropout)


def meta_network(config):  # type: ignore[no-untyped-def]
    import torch
    from baselines import MetaDiT

    torch.manual_seed(0)
    return MetaDiT(config.network, (1, 28, 28), 10)


def edm_loss(network, config, precision, images, labels):  # type: ignore[no-untyped-def]
    """EDM's loss in a few lines, with torch's noise."""
    import torch

    objective, sd = config.objective, config.denoiser.resolved_sigma_data
    mean, std = objective.sigma_sampling.P_mean, objective.sigma_sampling.P_std
    x0 = images.float() / 127.5 - 1
    sigma = (torch.randn(len(x0)) * std + mean).exp()
    s = sigma.view(-1, 1, 1, 1)
    x = x0 + s * torch.randn_like(x0)
    output = network((x * (s**2 + sd**2).rsqrt()).to(precision), sigma.log() / 4, labels).float()
    denoised = sd**2 / (s**2 + sd**2) * x + s * sd * (s**2 + sd**2).rsqrt() * output
    return ((s**2 + sd**2) / (s * sd) ** 2 * (denoised - x0).square()).mean()


def deepspeed_step(config, stage, precision, images, labels, world, options):  # type: ignore[no-untyped-def]
    import torch
    from baselines import bare_deepspeed

    network = module_of(config, world).denoiser.network
    batch, clip = config.data.global_batch_size, config.optimizer.gradient_clip
    engine = bare_deepspeed(network, stage, precision == torch.bfloat16, batch, world, clip, **options)

    def step(k: int) -> None:
        engine.backward(edm_loss(engine, config, precision, images, labels))
        engine.step()

    return step


def diffusers_step(config, images, world):  # type: ignore[no-untyped-def]
    from baselines import diffusers_loop

    from scoreray.trainer.networks.flops import training_flops

    goal = training_flops(module_of(config, world).denoiser.network, (1, 28, 28))
    return diffusers_loop(goal, images, world)


def engine_of(config, stage, module, batch, world):  # type: ignore[no-untyped-def]
    import torch

    from scoreray.trainer.engine import build_engine

    section, device = dataclasses.replace(config.engine, zero_stage=stage), torch.device("cpu")
    parts = section, config.optimizer, config.ema
    return build_engine(module, *parts, global_batch_size=batch, world_size=world, device=device)


def passes_alone(config, images, labels, world):  # type: ignore[no-untyped-def]
    """Our network and loss without any optimizer, sum or norm."""
    import torch

    from scoreray.trainer.engine.cpu import onednn_products

    engine = engine_of(config, 0, module_of(config, world), len(images), 1)

    def step(k: int) -> None:
        with onednn_products(engine.device):
            loss, _ = engine.module(images, labels, torch.arange(len(images)) + k * len(images))
            loss.mean().backward()

    return step


def bare_step(config, precision, images, labels, world, network=None):  # type: ignore[no-untyped-def]
    """What one writes by hand: EDM's loss in a few lines, torch's noise, one all-reduce, fused AdamW, clipping.

    In bf16 its weights are bf16 with fp32 masters, as ours are.
    """
    import torch
    import torch.distributed as dist

    network = (network or module_of(config, world).denoiser.network).to(precision)
    weights = list(network.parameters())
    masters = [torch.nn.Parameter(w.detach().float().clone()) for w in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, betas=config.optimizer.betas, fused=True)

    def step(k: int) -> None:
        edm_loss(network, config, precision, images, labels).backward()
        flat = torch.cat([w.grad.flatten().float() for w in weights])
        if world > 1:
            dist.all_reduce(flat)
            flat /= world
        for master, part in zip(masters, flat.split([w.numel() for w in weights]), strict=True):
            master.grad = part.view_as(master)
        torch.nn.utils.clip_grad_norm_(masters, config.optimizer.gradient_clip or float("inf"))
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        for weight in weights:
            weight.grad = None

    return step


def engine_step(config, stage, images, labels, world):  # type: ignore[no-untyped-def]
    import torch

    from scoreray.trainer.engine.cpu import onednn_products

    engine = engine_of(config, stage, module_of(config, world), config.data.global_batch_size, world)
    count = 0

    def step(k: int) -> None:
        nonlocal count
        count += 1
        positions = torch.arange(len(images)) + count * len(images)
        with onednn_products(engine.device):
            loss, _ = engine.module(images, labels, positions)
            engine.backward(loss.mean())
        engine.step(1e-4, config.ema.decays(count, config.data.global_batch_size))

    return step


def full_run(folder: Path, arguments: argparse.Namespace) -> list[float]:
    """Rates between the run's own records, the first left out: waiting for data, logging and commits are all inside."""
    from scoreray.cluster.verbs.demo import BUCKET, demo_config
    from scoreray.cluster.verbs.pack import pack_with_bar
    from scoreray.cluster.verbs.train import train_to_end
    from scoreray.data import fashion_mnist_path
    from scoreray.data.storage.local_s3 import LocalS3
    from scoreray.trainer.config import load_config
    from scoreray.trainer.prepare import prepare_run

    with LocalS3(folder) as server:
        os.environ.update(server.env)
        server.create_bucket(BUCKET)
        pack_with_bar(str(fashion_mnist_path()), str(demo_config().data.url), samples_per_shard=1000, workers=1)
        stage = arguments.stage if arguments.stage == "auto" else int(arguments.stage)
        prepared = prepare_run(
            load_config(
                demo_config(workers=arguments.workers).model_dump(mode="json")
                | {"network": NETWORKS[arguments.network]}
                | {"engine": {"precision": arguments.precision, "zero_stage": stage}},
                [
                    f"data.global_batch_size={arguments.batch}",
                    f"duration.images={arguments.images}",
                    ADAMW,
                    f"scaling.cpus_per_worker={threads(arguments)}",  # as many threads as the other cases have
                ],
            )
        )
        return [record.images_per_s for record in train_to_end(prepared).records[1:]]


if __name__ == "__main__":
    main()
