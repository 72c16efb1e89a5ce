"""ZeRO stages 1, 2 and 3: DeepSpeed partitions optimizer state (1), gradients (2) and parameters (3).

Checkpoints at another world size need to know which elements of which parameter a rank's flat fp32 partition holds. No
public function of DeepSpeed's says so: it is the arithmetic of `_layout`, which every new engine compares with the
weights themselves. Names of DeepSpeed's that are not documented are looked for before they are used:

| name | without it |
|---|---|
| `fp32_partitioned_groups_flat` of the ZeRO-3 optimizer | stage 3 is refused with a line; the other stages work |
| `ops.__compatible_ops__` | on a CPU DeepSpeed compiles an extension for inference at its first start |
| `pre_bwd_fn`, `post_bwd_fn` of stage 3's modules, `zero3_linear_wrap` | flow maps are refused with a line at stage 3 |
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from itertools import accumulate, chain
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from scoreray.data.errors import UserError
from scoreray.trainer.engine.base import EngineConfig, fragment_of, resolve_precision
from scoreray.trainer.engine.buckets import bucket_sizes
from scoreray.trainer.engine.deepspeed_import import import_deepspeed
from scoreray.trainer.engine.frozen import FrozenParameters
from scoreray.trainer.monitoring.stopping import NonFiniteError
from scoreray.trainer.optim.ema import EMAConfig
from scoreray.trainer.optim.fragments import Fragment
from scoreray.trainer.optim.optimizer import OptimizerConfig
from scoreray.trainer.optim.sgld import SGLDConfig

LINEAR = F.linear  # torch's own: DeepSpeed's stage 3 puts another one in its place
PARTITIONS = "fp32_partitioned_groups_flat"  # attribute of DeepSpeed's ZeRO-3 optimizer


class DeepSpeedEngine:
    """ZeRO stages 1, 2 and 3 by DeepSpeed around our optimizer. The default process group must exist."""

    replicated = False

    def __init__(
        self,
        module: torch.nn.Module,
        config: EngineConfig,
        optimizer: OptimizerConfig | SGLDConfig,
        ema: EMAConfig,
        *,
        rank_batch_size: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        deepspeed = import_deepspeed()
        # A C++ extension for inference that DeepSpeed would compile at start on a CPU; training does not use it.
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
        assert config.zero_stage != "auto", "build_engine() chooses a stage first"
        self.device, self.num_micro_batches = device, config.num_micro_batches(rank_batch_size)
        self._stage = config.zero_stage
        self._micro_batches_done = 0
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._sizes = {name: p.numel() for name, p in self._parameters.items()}  # whole: ZeRO-3 empties them
        self._frozen = FrozenParameters(module, dist.get_rank(), world_size)
        self.optimizer = optimizer.build(self._parameters.values(), ema)
        if device.type == "cuda":
            module.to(device)
        settings: dict[str, Any] = {
            "train_batch_size": rank_batch_size * world_size,
            "train_micro_batch_size_per_gpu": rank_batch_size // self.num_micro_batches,
            "gradient_accumulation_steps": self.num_micro_batches,
            "gradient_clipping": optimizer.gradient_clip,
            **zero_settings(config, resolve_precision(config.precision, device), sum(self._sizes.values())),
        }
        self._engine, self._sharded, _, _ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        _differentiate_forward(module)
        if config.compile:
            self._engine.compile()
        self.module = self._engine
        self._check_layout()
        for partition in self._partitions():
            self.optimizer.init_state(partition)
        positions = dict(zip(self._sizes, accumulate(self._sizes.values(), initial=0), strict=False))
        for name, start, length, partition, offset in self._layout():
            self.optimizer.place(partition, offset, length, positions[name] + start)

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
        if not self._engine.was_step_applied():
            raise NonFiniteError("the gradient's norm is not finite")
        return float(self._engine.get_global_grad_norm())

    def _partitions(self) -> list[torch.Tensor]:
        """This rank's flat fp32 masters, which together hold its share of the parameters in their order."""
        if self._stage == 3:
            return list(getattr(self._sharded, PARTITIONS))
        return [partition for group in self.optimizer.param_groups for partition in group["params"]]

    def fragments(self) -> Iterator[Fragment]:
        for name, start, length, partition, offset in self._layout():
            yield fragment_of(self.optimizer, name, start, length, partition, offset)

    def frozen_fragments(self) -> Iterator[Fragment]:
        return self._frozen.fragments()

    def _layout(self) -> Iterator[tuple[str, int, int, torch.Tensor, int]]:
        """(parameter, first element that this rank holds, number of elements, their flat partition, offset in it).

        Stages 1 and 2 cut all parameters, one after the other, into a piece for each rank. Stage 3 cuts each parameter,
        padded to equal shares, and fills its partitions (sub-groups) with a rank's shares, one after the other.
        """
        partitions = iter(self._partitions())
        partition = next(partitions)
        if self._stage < 3:
            first, at = dist.get_rank() * partition.numel(), 0
            for name, size in self._sizes.items():
                start, end = max(first, at), min(first + partition.numel(), at + size)
                if start < end:
                    yield name, start - at, end - start, partition, start - first
                at += size
            return
        offset = 0
        for name, size in self._sizes.items():
            share = -(-size // dist.get_world_size())
            if offset == partition.numel():
                partition, offset = next(partitions, partition), 0
            start = share * dist.get_rank()
            if start < size:
                yield name, start, min(share, size - start), partition, offset
            offset += share

    def _check_layout(self) -> None:
        """Raises UserError where DeepSpeed does not hold this rank's masters where `_layout` looks for them."""
        from deepspeed.utils import safe_get_local_fp32_param

        try:
            for name, start, length, partition, offset in self._layout():
                if self._stage == 3:
                    held = safe_get_local_fp32_param(self._parameters[name])[:length]
                else:
                    held = self._parameters[name].detach().flatten()[start : start + length]
                if not torch.equal(partition.detach()[offset : offset + length].to(held), held):
                    raise LookupError(name)
        except (AttributeError, LookupError):
            raise UserError(
                f"engine.zero_stage: {self._stage}: DeepSpeed {importlib.metadata.version('deepspeed')} arranges "
                "its fp32 weights in a way that checkpoints do not know; take zero_stage 0, or another deepspeed"
            ) from None

    def publish(self, num_steps: int) -> None:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        for partition in self._partitions():
            self.optimizer.state[partition]["step"].fill_(num_steps)
        trained = ((one, safe_get_full_fp32_param(one)) for one in self._parameters.values())
        # One at a time: under ZeRO-3 this rank has no room for all.
        for parameter, whole in chain(trained, self._frozen.whole(self.device)):
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0, enabled=self._stage == 3):
                parameter.data.copy_(whole.view(parameter.shape))


def _differentiate_forward(module: torch.nn.Module) -> None:
    """Gives what stage 3 puts around layers (0.19) a forward derivative, which objectives of flow maps need: identities
    on each submodule's input and output, and a `linear` whose own backward has no use where there is no gradient.
    Without these names nothing is done."""
    for one in module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            if function := one.__dict__.get(name):
                function.jvp = staticmethod(lambda ctx, tangent: tangent.view_as(tangent))
    found = F.linear
    if getattr(found, "__name__", "") == "zero3_linear_wrap":

        def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return (found if torch.is_grad_enabled() else LINEAR)(input, weight, bias)

        F.linear = linear


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
        "bf16": {"enabled": half, "check_grad_overflow": True},
        # Gradients are summed in fp32 also where weights are bf16 (stage 1 in bf16 would take another optimizer class).
        "data_types": {"grad_accum_dtype": "fp32"} if half and config.zero_stage > 1 else {},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
