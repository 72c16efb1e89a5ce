"""From a config to the engine that it names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from scoreray.trainer.engine.base import Engine, EngineConfig, resolve_precision
from scoreray.trainer.engine.deepspeed import DeepSpeedEngine
from scoreray.trainer.engine.flat import FlatEngine
from scoreray.trainer.engine.planner import Stage, choose_stage, memory_of_rank
from scoreray.trainer.networks.network import num_parameters
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
    max_stage: Stage = 3,
    note: Callable[[str], None] = lambda line: None,
) -> Engine:
    """The engine that `config` asks for; every rank calls it, and `module` has fp32 parameters, equal on all ranks.

    max_stage: the highest that "auto" may take.  note: gets a line about the stage that zero_stage "auto" stands for.
    """
    if config.zero_stage == "auto":
        stage, why = _cheapest_stage(module, config, len(ema.names), world_size, device, max_stage)
        note(f"ZeRO-{stage}: {why}")
        config = replace(config, zero_stage=stage)
    engine = FlatEngine if config.zero_stage == 0 else DeepSpeedEngine
    rank_batch_size = global_batch_size // world_size
    return engine(module, config, optimizer, ema, rank_batch_size=rank_batch_size, world_size=world_size, device=device)


def _cheapest_stage(
    module: torch.nn.Module,
    config: EngineConfig,
    num_averages: int,
    world_size: int,
    device: torch.device,
    max_stage: Stage,
) -> tuple[Stage, str]:
    """(the stage that fits the rank with the least memory, so equal on all ranks; why)."""
    # Machines may differ, and ranks of different stages would wait for each other's collectives forever.
    memory = torch.tensor(memory_of_rank(device), device=device)
    if world_size > 1:
        dist.all_reduce(memory, op=dist.ReduceOp.MIN)
    return choose_stage(
        num_parameters(module),
        world_size,
        int(memory),
        half=resolve_precision(config.precision, device) != torch.float32,
        num_averages=num_averages,
        offload=config.offload != "none",
        num_frozen=sum(p.numel() for p in module.parameters() if not p.requires_grad),
        max_stage=max_stage,
    )
