"""ZeRO stages 1, 2 and 3: DeepSpeed partitions optimizer state (1), gradients (2) and parameters (3).

DeepSpeed (0.19.8) has no public way to read or write the fp32 partitions in place, which checkpoints at another world
size need: `fragments` and `publish` use attributes of its ZeRO optimizers. `tests/trainer/engine/test_engine.py`
compares every stage with the flat engine, so a version that renames or rearranges them fails there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from scoreray.trainer.engine.base import EngineConfig, fragment_of, resolve_precision
from scoreray.trainer.monitoring.stopping import NonFiniteError
from scoreray.trainer.optim.ema import EMAConfig
from scoreray.trainer.optim.fragments import Fragment
from scoreray.trainer.optim.optimizer import AveragingAdamW, OptimizerConfig

ALIGNED = 128  # elements; DeepSpeed takes even buffers only


class DeepSpeedEngine:
    """ZeRO stages 1, 2 and 3 by DeepSpeed around our optimizer. The default process group must exist."""

    replicated = False

    def __init__(
        self,
        module: torch.nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        ema: EMAConfig,
        *,
        rank_batch_size: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        import deepspeed

        # A C++ extension for inference that DeepSpeed would compile at start on a CPU; training does not use it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        assert config.zero_stage != "auto", "build_engine() chooses a stage first"
        self.device, self.num_micro_batches = device, config.num_micro_batches(rank_batch_size)
        self._stage = config.zero_stage
        self._micro_batches_done = 0
        parameters = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._names = {id(parameter): name for name, parameter in parameters}
        self.optimizer = AveragingAdamW([p for _, p in parameters], optimizer, ema)
        if device.type == "cuda":
            module.to(device)
        num_params = sum(p.numel() for _, p in parameters)
        settings: dict[str, Any] = {
            "train_batch_size": rank_batch_size * world_size,
            "train_micro_batch_size_per_gpu": rank_batch_size // self.num_micro_batches,
            "gradient_accumulation_steps": self.num_micro_batches,
            "gradient_clipping": optimizer.gradient_clip,
            **zero_settings(config, resolve_precision(config.precision, device), num_params),
        }
        self._engine, self._sharded, _, _ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        if config.compile:
            self._engine.compile()
        self.module = self._engine
        for partition in self._partitions():
            self.optimizer.init_state(partition)
        # In fp32 DeepSpeed (0.19.8) looks for no overflow: a NaN gradient would enter weights and averages.
        self.optimizer.may_update = self._norm_is_finite

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)
        self._micro_batches_done += 1
        # DeepSpeed counts micro-batches by its own step(), which updates nothing before the last one.
        if self._micro_batches_done < self.num_micro_batches:
            self._engine.step()

    def step(self, learning_rate: float, decays: list[float]) -> float:
        self._micro_batches_done = 0
        self.optimizer.prepare_step(learning_rate, decays)
        self._engine.step()
        if self._sharded.overflow or not self._norm_is_finite():
            raise NonFiniteError("the gradient's norm is not finite")
        return float(self._sharded._global_grad_norm)

    def _norm_is_finite(self) -> bool:
        norm = float(self._sharded._global_grad_norm)
        return math.isfinite(norm) and norm >= 0  # DeepSpeed's norm helpers report NaN as -1

    def _partitions(self) -> list[torch.Tensor]:
        if self._stage == 3:
            return list(self._sharded.fp32_partitioned_groups_flat)
        return list(self._sharded.single_partition_of_fp32_groups)

    def fragments(self) -> Iterator[Fragment]:
        for name, start, length, partition, offset in self._layout():
            yield fragment_of(self.optimizer, name, start, length, partition, offset)

    def _layout(self) -> Iterator[tuple[str, int, int, torch.Tensor, int]]:
        """(parameter, first element that this rank holds, number of elements, their flat partition, offset in it)."""
        if self._stage == 3:
            for group, partition in zip(
                self._sharded.fp16_groups, self._sharded.fp32_partitioned_groups_flat, strict=True
            ):
                offset = 0
                for parameter in group:
                    share = parameter.ds_tensor.ds_numel
                    start = share * dist.get_rank()
                    length = min(share, parameter.ds_numel - start)
                    if length > 0:
                        yield self._names[id(parameter)], start, length, partition, offset
                    offset += share
            return
        for group, partition in zip(
            self._sharded.bit16_groups, self._sharded.single_partition_of_fp32_groups, strict=True
        ):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    in_parameter, in_partition = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield (
                        self._names[id(parameter)],
                        in_parameter.start,
                        in_parameter.numel,
                        partition,
                        in_partition.start,
                    )

    def publish(self, num_steps: int) -> None:
        for partition in self._partitions():
            self.optimizer.state[partition]["step"].fill_(num_steps)
        if self._stage < 3:
            self._sharded.update_lp_params()
            for i in range(len(self._sharded.bit16_groups)):
                self._sharded._update_model_bit16_weights(i)
            return
        for i in range(len(self._sharded.fp16_groups)):
            self._sharded._reassign_or_swap_out_partitioned_parameters(i)
        persistent = self._sharded.persistent_parameters
        if persistent:  # small ones stay gathered and would keep their old values
            persistent[0].all_gather(persistent)


def bucket_sizes(num_params: int, stage: int) -> dict[str, int]:
    """Elements of DeepSpeed's communication buffers, as parts of the model.

    DeepSpeed's defaults are 500 M elements (2 GB) for each buffer, and at stage 3 they keep a network of less than a
    billion parameters gathered after its first use: a small model would cost a rank twice what ZeRO promises
    (benchmarks/RESULTS.md). At least 2 M elements (8 MB): below that, sums and gathers cost more than they save. So of
    a network of less than 2 M parameters stage 3 keeps all weights gathered between steps, and a partition group (hpZ)
    has no backward gathers left to spare.
    """
    bucket = _part(num_params, 16 if stage == 3 else 8)
    sizes = {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if stage == 3:
        ahead = _part(num_params, 32)
        sizes |= {
            "stage3_max_live_parameters": ahead,
            "stage3_max_reuse_distance": ahead,
            "stage3_prefetch_bucket_size": ahead,
            "stage3_param_persistence_threshold": min(10_000, ahead),
            "sub_group_size": bucket,
        }
    return sizes


def _part(num_params: int, share: int) -> int:
    elements = min(max(num_params // share, 1 << 21), num_params, 200_000_000)
    return -(-elements // ALIGNED) * ALIGNED


def zero_settings(config: EngineConfig, precision: torch.dtype, num_params: int) -> dict[str, Any]:
    """What DeepSpeed's own configuration says of sharding and precision."""
    assert config.zero_stage != "auto"
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": torch.cuda.is_available()}
    zero |= bucket_sizes(num_params, config.zero_stage)
    if config.zero_stage < 3:
        # What DeepSpeed calls reduce_scatter is an all-reduce below stage 3, with two more copies of every gradient.
        zero["reduce_scatter"] = False
    if config.partition_group > 1:
        zero["zero_hpz_partition_size"] = config.partition_group
    if config.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    half = precision == torch.bfloat16
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": half},
        # Gradients are summed in fp32 also where weights are bf16 (stage 1 in bf16 would take another optimizer class).
        "data_types": {"grad_accum_dtype": "fp32"} if half and config.zero_stage > 1 else {},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
