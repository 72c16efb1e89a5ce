"""From a config to the engine that it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from scoreray.trainer.engine.base import Engine, EngineConfig, resolve_precision
from scoreray.trainer.engine.communication import GpuNodes, Sharding, Stage, StepTime, step_time
from scoreray.trainer.engine.deepspeed import DeepSpeedEngine
from scoreray.trainer.engine.flat import FlatEngine
from scoreray.trainer.engine.planner import choose_sharding, memory_of_rank, ranks_of_node, work_of_rank
from scoreray.trainer.networks.network import num_frozen_parameters, num_parameters
from scoreray.trainer.optim.ema import EMAConfig
from scoreray.trainer.optim.optimizer import OptimizerConfig
from scoreray.trainer.optim.sgld import SGLDConfig


def build_engine(
    module: torch.nn.Module,
    config: EngineConfig,
    optimizer: OptimizerConfig | SGLDConfig,
    ema: EMAConfig,
    *,
    global_batch_size: int,
    world_size: int,
    device: torch.device,
    image_shape: Sequence[int] | None = None,
    max_stage: Stage = 3,
    note: Callable[[str], None] = lambda line: None,
) -> Engine:
    """The engine that `config` asks for; every rank calls it, and `module` has fp32 parameters, equal on all ranks.

    image_shape: of a sample, by which a step's time is predicted; None: as if computing took none.
    max_stage: the highest that "auto" may take.  note: gets a line about the stage that zero_stage "auto" stands for.
    """
    if config.zero_stage == "auto":
        sharding, why = _chosen(
            module, config, len(ema.names), global_batch_size // world_size, world_size, device, image_shape, max_stage
        )
        note(f"{sharding}: {why}")
        config = replace(config, zero_stage=sharding.stage, partition_group=sharding.partition_group)
    engine = FlatEngine if config.zero_stage == 0 else DeepSpeedEngine
    rank_batch_size = global_batch_size // world_size
    return engine(module, config, optimizer, ema, rank_batch_size=rank_batch_size, world_size=world_size, device=device)


def _chosen(
    module: torch.nn.Module,
    config: EngineConfig,
    num_averages: int,
    rank_batch_size: int,
    world_size: int,
    device: torch.device,
    image_shape: Sequence[int] | None,
    max_stage: Stage,
) -> tuple[Sharding, str]:
    """(the sharding that fits the rank with the least memory, for the slowest GPUs, so equal on all ranks; why)."""
    half = resolve_precision(config.precision, device) != torch.float32
    nodes = GpuNodes.of(
        torch.cuda.get_device_name(device) if device.type == "cuda" else "", ranks_of_node(), config.internode_gbit_s
    )
    # Machines may differ, and ranks of different stages would wait for each other's collectives forever.
    here = [memory_of_rank(device), nodes.flops_per_s, nodes.inside_bytes_per_s]
    least = torch.tensor([*here, ranks_of_node(), -ranks_of_node()], dtype=torch.float64, device=device)
    if world_size > 1:
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    memory_bytes, flops, inside, fewest, most = least.tolist()
    nodes = replace(nodes, flops_per_s=flops, inside_bytes_per_s=inside, gpus_per_node=int(fewest))
    predict: Callable[[Sharding], StepTime] | None = None
    if device.type == "cuda" and world_size > 1:  # of CPUs nothing is known, and one rank sends nothing
        work = work_of_rank(module, image_shape, rank_batch_size, config.num_micro_batches(rank_batch_size), half=half)
        predict = partial(step_time, num_gpus=world_size, work=work, nodes=nodes)
    sharding, why = choose_sharding(
        num_parameters(module),
        world_size,
        int(memory_bytes),
        half=half,
        num_averages=num_averages,
        offload=config.offload != "none",
        num_frozen=num_frozen_parameters(module),
        max_stage=max_stage,
        ranks_per_node=int(fewest) if fewest == -most else 1,
        predict=predict,
    )
    return sharding, f"{why} ({nodes})" if predict else why
