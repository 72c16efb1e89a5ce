"""What a run would take of the machines that it is planned for: memory of each way to shard, its time, its storage."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from scoreray.cluster.doctor.machine import Machine, gib
from scoreray.cluster.finding import Finding
from scoreray.data.errors import UserError
from scoreray.data.units import counted_noun
from scoreray.trainer.config import Config
from scoreray.trainer.config.run_fields import RunFields
from scoreray.trainer.engine import resolve_precision
from scoreray.trainer.engine.buckets import bucket_sizes
from scoreray.trainer.engine.communication import GpuNodes, Sharding, StepTime, Work, shardings, step_time
from scoreray.trainer.engine.planner import (
    NODE_RANKS,
    Memory,
    activation_bytes,
    advise,
    choose_sharding,
    memory,
    memory_of_rank,
    work_of_rank,
)
from scoreray.trainer.networks.network import build_network, num_frozen_parameters, num_parameters
from scoreray.trainer.step import build_training_module

PARTS = ("weights", "gradients", "masters", "moments", "averages", "buffers", "activations")


Predict = Callable[[Sharding], StepTime]


@dataclass(frozen=True)
class Plan:
    """A run's fewest workers, each way to shard over them (with the optimizer on the device, or not), and what each
    takes."""

    workers: int
    ranks_per_node: int
    half: bool
    rows: int
    memories: dict[tuple[Sharding, bool], Memory]
    predict: Predict | None
    """None: on CPUs, of which nothing is known, and of one worker, which sends nothing."""

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.workers / self.ranks_per_node)


def plan(config: Config, fields: RunFields | None, shape: tuple[int, ...], machine: Machine) -> list[Finding]:
    """Memory and predicted time of each ZeRO stage, what fits, what to set, and how much the run will keep."""
    try:
        module, network = _built(config, fields, shape)
    except UserError as error:
        return [Finding("network", "problem", str(error))]
    num_params = num_parameters(module)
    num_frozen = num_frozen_parameters(module)
    device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        half = config.engine.precision != "fp32"
    else:
        half = resolve_precision(config.engine.precision, device) != torch.float32
    rows, activations = _activations(config, network, shape, half)
    workers = config.scaling.range[0]
    per_node = _ranks_per_node(config, machine, workers)
    memories = {
        (one, offload): memory(
            num_params,
            one.stage,
            workers,
            half=half,
            num_averages=len(config.ema.names),
            offload=offload,
            partition_group=one.partition_group,
            activations=activations,
            bucket_elements=bucket_sizes(num_params, one.stage)["reduce_bucket_size"] if one.stage else 0,
            num_frozen=num_frozen,
        )
        for one in shardings(workers, per_node)
        for offload in ((False, True) if one.stage else (False,))
    }
    predictor = Predictor.of(config, module, shape, per_node, machine.gpu, half)
    predict = predictor.for_workers(workers) if predictor and workers > 1 else None
    found = Plan(workers, per_node, half, rows, memories, predict)
    facts = {
        "num_params": num_params,
        "num_frozen": num_frozen,
        "workers": workers,
        "nodes": found.num_nodes,
        "precision": "bf16" if half else "fp32",
        "micro_batch_size": rows,
        "stages": [
            asdict(p)
            | {
                "total": p.total,
                "bytes_per_parameter": p.state / max(num_params, 1),
                "offload": offload,
                "partition_group": one.partition_group,
            }
            for (one, offload), p in memories.items()
        ],
    }
    frozen = f" and {num_frozen:,} frozen" if num_frozen else ""
    head = (
        f"{num_params:,} parameters{frozen} in {facts['precision']}, {counted_noun(workers, 'worker')} on "
        f"{counted_noun(found.num_nodes, 'node')}, {rows} rows a forward pass, {len(config.ema.names)} averages; "
        "a rank's peak:"
    )
    state: Literal["good", "note"] = "good"
    if fields is None and config.data.conditions:
        state, head = "note", f"without what data.conditions add, whose sizes only the data set knows: {head}"
    findings = [Finding("memory", state, head + "\n" + table(memories, num_params), facts)]
    findings.append(_fits(config, found, machine, num_params, num_frozen))
    if predictor is not None and config.world_sizes[-1] > 1:
        findings.append(_times(config, found, predictor))
    findings.append(_kept(config, num_params, num_frozen))
    return findings


def _ranks_per_node(config: Config, machine: Machine, workers: int) -> int:
    if machine.num_nodes is not None:
        if workers % machine.num_nodes:
            raise UserError(
                f"--nodes {machine.num_nodes}: does not divide the run's {workers} workers; give one that does"
            )
        return workers // machine.num_nodes
    return min(workers, machine.gpus_per_node or NODE_RANKS) if config.scaling.use_gpu else workers


@dataclass(frozen=True)
class Predictor:
    """Of the times of a step; `work` is that of one image."""

    config: Config
    nodes: GpuNodes
    work: Work

    @classmethod
    def of(
        cls,
        config: Config,
        module: torch.nn.Module,
        shape: tuple[int, ...],
        per_node: int,
        gpu: str,
        half: bool,
    ) -> Predictor | None:
        """None: on CPUs."""
        if not config.scaling.use_gpu:
            return None
        if not gpu and torch.cuda.is_available() and "RAY_ADDRESS" not in os.environ:
            gpu = torch.cuda.get_device_name(0)
        nodes = GpuNodes.of(gpu, per_node, config.engine.internode_gbit_s)
        return cls(config, nodes, work_of_rank(module, shape, 1, 1, half=half))

    def for_workers(self, workers: int) -> Predict:
        images = self.config.data.global_batch_size // workers
        micro = self.config.engine.num_micro_batches(images)
        work = replace(self.work, images_per_gpu=images, num_micro_batches=micro)
        return partial(step_time, num_gpus=workers, work=work, nodes=self.nodes)


def _built(config: Config, fields: RunFields | None, shape: tuple[int, ...]) -> tuple[torch.nn.Module, Any]:
    """(all that is trained, the network) for samples of `shape` on the meta device. Raises UserError."""
    with torch.device("meta"):
        if fields is None:
            network: Any = build_network(config.network, shape, {})
            return network, network
        module: Any = build_training_module(config, replace(fields, shape=list(shape)))
    return module, module.denoiser.network


def _activations(config: Config, network: Any, shape: tuple[int, ...], half: bool) -> tuple[int, float]:
    """Rows of one forward pass on a rank, and the bytes that it keeps."""
    rows = config.data.global_batch_size // config.scaling.range[0]
    rows = config.engine.micro_batch_size or rows
    try:
        every, recomputed = activation_bytes(network, shape, torch.bfloat16 if half else torch.float32)
    except (TypeError, AttributeError, RuntimeError, NotImplementedError):
        return rows, 0.0  # an energy, an RBM, somebody else's autoencoder: no forward pass of this form
    inner = getattr(config.network, "network", config.network)  # of one on a ladder
    return rows, float(rows * (recomputed if getattr(inner, "activation_checkpointing", False) else every))


def _fits(config: Config, plan: Plan, machine: Machine, num_params: int, num_frozen: int) -> Finding:
    available = _memory_of_worker(config, machine)
    if available is None:
        return Finding(
            "fit", "note", "no GPU is in this machine: give what a rank has with --memory, e.g. --memory 80G"
        )
    highest = config.max_zero_stage
    offload = config.engine.offload != "none"
    memories = {key: plan for key, plan in plan.memories.items() if key[0].stage <= highest}
    advice = advise(memories, available, plan.predict)
    facts = {"memory_bytes": available, **asdict(advice)}
    if advice.stage is None:
        text = (
            f"no stage fits a rank: {advice.why}; more workers, a smaller engine.micro_batch_size (now {plan.rows}), "
        )
        return Finding("fit", "problem", text + "or network.activation_checkpointing", facts)
    setting = f"engine.zero_stage={advice.stage}"
    setting += " engine.offload=optimizer" if advice.offload else ""
    setting += f" engine.partition_group={advice.partition_group}" if advice.partition_group > 1 else ""
    if config.engine.zero_stage == "auto":
        taken, why = choose_sharding(
            num_params,
            plan.workers,
            int(available),
            half=plan.half,
            num_averages=len(config.ema.names),
            offload=offload,
            num_frozen=num_frozen,
            max_stage=highest,
            ranks_per_node=plan.ranks_per_node,
            predict=plan.predict,
        )
        facts |= {"auto": {"stage": taken.stage, "partition_group": taken.partition_group, "why": why}}
        subject = f"engine.zero_stage auto takes {taken}, which"
    else:
        taken = Sharding(config.engine.zero_stage, config.engine.partition_group)
        subject = f"engine.zero_stage {taken.stage}"
    chosen = memories.get((taken, offload))
    if chosen is not None and chosen.total > available:
        text = f"{subject} needs {gib(chosen.total)}, a rank has {gib(available)}; set {setting}"
        return Finding("fit", "problem", text, facts)
    text = f"{setting} is the quickest that fits a rank: {advice.why}"
    if config.engine.zero_stage == "auto":
        text += f"; engine.zero_stage auto takes {taken}: {why}"
    return Finding("fit", "good", text, facts)


def _memory_of_worker(config: Config, machine: Machine) -> float | None:
    """Bytes; None where that is a GPU's and this machine has none."""
    gpu = config.scaling.use_gpu
    if machine.memory_bytes is not None:
        return machine.memory_bytes
    if gpu and not torch.cuda.is_available():
        return None
    available: float = memory_of_rank(torch.device("cuda" if gpu else "cpu"))
    return available if gpu or "RAY_ADDRESS" in os.environ else available / config.scaling.range[0]


def _times(config: Config, plan: Plan, predictor: Predictor) -> Finding:
    """What a step is predicted to take, with the fewest workers and with the most."""
    lines, rows = [f"predicted, nothing measured (docs/scaling.md); {predictor.nodes}"], []
    images = config.data.global_batch_size
    for workers in sorted({plan.workers, config.world_sizes[-1]}):
        lines.append(f"  {counted_noun(workers, 'GPU')}, {images // workers:,} images each")
        predict = predictor.for_workers(workers)
        for one in shardings(workers, plan.ranks_per_node):
            time = predict(one)
            line = f"    {one!s:22} {1e3 * time.total_s:10,.1f} ms a step, {1e3 * time.exposed_s:8,.1f} of them waiting"
            if time.compute_s:
                line += f"; {images / time.total_s:,.0f} images/s, {time.efficiency:.1%} of computing alone"
            lines.append(line)
            rows.append({"workers": workers, **asdict(one), **asdict(time)})
    return Finding("step time", "good", "\n".join(lines), {"predictions": rows})


def _kept(config: Config, num_params: int, num_frozen: int) -> Finding:
    """Bytes that the run leaves in its storage."""
    k, checkpoint, images = len(config.ema.names), config.checkpoint, config.duration.images
    num_frozen = 0 if config.lora is not None else num_frozen  # a LoRA's checkpoints hold its adapters alone
    each = num_params * 4 * (3 + k) + num_frozen * 4
    text = f"a checkpoint is {gib(each)}, {checkpoint.keep} are kept"
    facts = {"checkpoint_bytes": each, "kept": checkpoint.keep, "snapshot_bytes": 0, "snapshots": 0}
    if checkpoint.snapshot_every_images and images is not None:
        count = images // max(checkpoint.snapshot_every_images, checkpoint.every_images)
        half = num_params * 2 * k + num_frozen * 2
        text += f"; {count:,} snapshots of the averages, {gib(half)} each, will be {gib(half * count)} at the end"
        facts |= {"snapshot_bytes": half, "snapshots": count}
    return Finding("kept", "good", text, facts)


def table(plans: dict[tuple[Sharding, bool], Memory], num_params: int) -> str:
    """A row for each plan: bytes per parameter of the state, then GiB of each part."""
    lines = [f"  {'':33}{'B/param':>8}" + "".join(f"{part:>13}" for part in PARTS) + f"{'total':>13}{'on host':>13}"]
    for (one, offload), p in sorted(plans.items(), key=lambda item: item[0][1]):
        name = f"{one}" + (", offloaded" if offload else "")
        row = "".join(f" {gib(getattr(p, part)):>12}" for part in PARTS)
        lines.append(f"  {name:33}{p.state / num_params:8.2f}{row} {gib(p.total):>12} {gib(p.host):>12}")
    return "\n".join(lines)
