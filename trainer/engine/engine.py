"""Engines: what turns a loss into an update of weights, moments and averages, on one process or sharded over many.

Both engines own the module (in the compute precision), fp32 masters and one `AveragingAdamW`, and show their state
as fragments (see `fragments.py`). `FlatEngine` needs torch alone: one flat buffer, replicated on every rank.
`DeepSpeedEngine` partitions optimizer state (ZeRO-1), gradients (2) and parameters (3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist

from scoreray.trainer.config import Config
from scoreray.trainer.engine.cpu import has_bf16_units
from scoreray.trainer.engine.overlap import OverlappedSum
from scoreray.trainer.engine.planner import choose_stage, memory_of_rank
from scoreray.trainer.monitoring.stopping import NonFiniteError
from scoreray.trainer.optim.fragments import MASTER, Fragment
from scoreray.trainer.optim.optimizer import AveragingAdamW


class Engine(Protocol):
    """`module` computes losses; `backward` each micro-batch's mean loss, then `step` once."""

    module: Any
    optimizer: AveragingAdamW
    device: torch.device
    num_micro_batches: int
    replicated: bool
    """every rank holds the whole state, so one rank's fragments are a checkpoint"""

    def backward(self, loss: torch.Tensor) -> None: ...
    def step(self, learning_rate: float, decays: list[float]) -> float:
        """Update everything; returns the gradient's norm before clipping. Raises NonFiniteError, changing nothing."""
        ...

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share of the state, one fragment per parameter that it holds a part of."""
        ...

    def publish(self, num_steps: int) -> None:
        """After masters and state were written through `fragments`: derive the module's weights from them."""
        ...


def build_engine(module: torch.nn.Module, config: Config, *, world_size: int, device: torch.device) -> Engine:
    """The engine that `config` asks for; `module` has fp32 parameters, equal on all ranks."""
    config, _ = settle_stage(config, module, world_size=world_size, device=device)
    precision = resolve_precision(config.engine.precision, device)
    rows = config.data.global_batch_size // world_size
    num_micro_batches = rows // (config.engine.micro_batch_size or rows)
    if config.engine.zero_stage == 0:
        return FlatEngine(module, config, precision, world_size, num_micro_batches, device)
    return DeepSpeedEngine(module, config, precision, world_size, num_micro_batches, device)


def settle_stage(
    config: Config, module: torch.nn.Module, *, world_size: int, device: torch.device
) -> tuple[Config, str]:
    """`config` with a number for engine.zero_stage "auto", equal on all ranks (which all call it), and the reason."""
    if config.engine.zero_stage != "auto":
        return config, ""
    memory = torch.tensor(memory_of_rank(device), device=device)
    if world_size > 1:
        dist.all_reduce(memory, op=dist.ReduceOp.MIN)
    stage, why = choose_stage(
        sum(p.numel() for p in module.parameters() if p.requires_grad),
        world_size,
        int(memory),
        half=resolve_precision(config.engine.precision, device) != torch.float32,
        num_averages=len(config.ema.names),
        offload=config.engine.offload != "none",
    )
    engine = config.engine.model_copy(update={"zero_stage": stage})
    return config.model_copy(update={"engine": engine}), why


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """torch.bfloat16 or float32; "auto" takes bf16 on GPUs and CPUs that have units for it."""
    half = has_bf16_units(device) if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if half else torch.float32


CHUNK = 1 << 20
ALIGNED = 128  # elements; DeepSpeed takes even buffers only


class FlatEngine:
    """Replicated training with all parameters, gradients and state in flat buffers: one fused update, no DeepSpeed.

    With several ranks, gradients are averaged in fp32, behind the last micro-batch's backward pass (`overlap.py`).
    """

    replicated = True

    def __init__(
        self,
        module: torch.nn.Module,
        config: Config,
        precision: torch.dtype,
        world_size: int,
        num_micro_batches: int,
        device: torch.device,
    ) -> None:
        self.device, self.num_micro_batches = device, num_micro_batches
        self._world_size, self._clip = world_size, config.optimizer.gradient_clip
        module.to(device)
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._slices: list[tuple[str, int, int]] = []
        offset = 0
        for name, parameter in named:
            self._slices.append((name, offset, parameter.numel()))
            offset += parameter.numel()
        self._master = torch.nn.Parameter(torch.cat([p.detach().float().reshape(-1) for _, p in named]))
        self._master.grad = torch.zeros_like(self._master)
        half = precision != torch.float32
        self._weights = self._master.detach().to(precision) if half else self._master.detach()
        self._gradient = torch.zeros_like(self._weights) if half else self._master.grad
        for (_, start, length), (_, parameter) in zip(self._slices, named, strict=True):
            parameter.data = self._weights[start : start + length].view(parameter.shape)
            parameter.grad = self._gradient[start : start + length].view(parameter.shape)
        self._sum: OverlappedSum | None = None
        if world_size > 1:
            places = [(p, start) for (_, start, _), (_, p) in zip(self._slices, named, strict=True)]
            self._sum = OverlappedSum(places, self._master.grad, self._collect)
        self._micro_batches_done = 0
        self.optimizer = AveragingAdamW([self._master], config.optimizer, config.ema)
        self.optimizer.init_state(self._master)
        self.module: Any = torch.compile(module, dynamic=False) if config.engine.compile else module

    def backward(self, loss: torch.Tensor) -> None:
        self._micro_batches_done += 1
        summing = self._sum is not None and self._micro_batches_done == self.num_micro_batches
        if self._sum is not None and summing:
            self._sum.begin()
        (loss / self.num_micro_batches).backward()
        if not summing:
            self._collect(slice(0, len(self._master)))

    def _collect(self, part: slice) -> None:
        """Move half-precision gradients of a range into the fp32 sum; fp32 ones lie there already."""
        gradient = self._master.grad
        assert gradient is not None
        if self._gradient is gradient:
            return
        for total, half in zip(gradient[part].split(CHUNK), self._gradient[part].split(CHUNK), strict=True):
            total.add_(half)  # in chunks: torch widens the half-precision part first
            half.zero_()

    def step(self, learning_rate: float, decays: list[float]) -> float:
        gradient = self._master.grad
        assert gradient is not None
        self._micro_batches_done = 0
        if self._sum is not None:
            self._sum.finish()
        scale = 1 / self._world_size
        norm = float(torch.linalg.vector_norm(gradient)) * scale
        if not math.isfinite(norm):
            gradient.zero_()
            raise NonFiniteError(f"the gradient's norm is {norm}")
        if 0 < self._clip < norm:
            scale *= self._clip / norm
        if scale != 1:
            gradient.mul_(scale)
        self.optimizer.prepare_step(learning_rate, decays)
        self.optimizer.step()
        gradient.zero_()
        self._copy_to_weights()
        return norm

    def fragments(self) -> Iterator[Fragment]:
        for name, offset, length in self._slices:
            yield _fragment(self.optimizer, name, 0, length, self._master, offset)

    def publish(self, num_steps: int) -> None:
        self.optimizer.state[self._master]["step"].fill_(num_steps)
        self._copy_to_weights()

    def _copy_to_weights(self) -> None:
        if self._weights.dtype != self._master.dtype:
            self._weights.copy_(self._master.detach())


def _fragment(
    optimizer: AveragingAdamW, name: str, start: int, length: int, flat: torch.Tensor, offset: int
) -> Fragment:
    """Elements [start, start + length) of a parameter, which lie in `flat` and its optimizer state from `offset` on."""
    state, here = optimizer.state[flat], slice(offset, offset + length)
    tensors = {MASTER: flat.detach()[here]} | {key: state[key][here] for key in optimizer.state_keys}
    return Fragment(name, start, length, tensors)


class DeepSpeedEngine:
    """ZeRO stages 1, 2 and 3 by DeepSpeed around our optimizer. The default process group must exist."""

    replicated = False

    def __init__(
        self,
        module: torch.nn.Module,
        config: Config,
        precision: torch.dtype,
        world_size: int,
        num_micro_batches: int,
        device: torch.device,
    ) -> None:
        import deepspeed

        # A C++ extension for inference that DeepSpeed would compile at start on a CPU; training does not use it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.device, self.num_micro_batches = device, num_micro_batches
        self._stage = int(config.engine.zero_stage)
        self._micro_batches_done = 0
        parameters = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._names = {id(parameter): name for name, parameter in parameters}
        self.optimizer = AveragingAdamW([p for _, p in parameters], config.optimizer, config.ema)
        if device.type == "cuda":
            module.to(device)
        num_params = sum(p.numel() for _, p in parameters)
        settings = deepspeed_settings(config, precision, world_size, num_micro_batches, num_params)
        self._engine, self._sharded, _, _ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=settings, dist_init_required=False
        )
        if config.engine.compile:
            self._engine.compile()
        self.module = self._engine
        for partition in self._partitions():
            self.optimizer.init_state(partition)
        self.optimizer.may_update = self._norm_is_finite

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)
        self._micro_batches_done += 1
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
            yield _fragment(self.optimizer, name, start, length, partition, offset)

    def _layout(self) -> Iterator[tuple[str, int, int, torch.Tensor, int]]:
        """(parameter, its first element here, how many, the flat partition that holds them, offset in it)."""
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
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield self._names[id(parameter)], here.start, here.numel, partition, there.start

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
        if persistent:
            persistent[0].all_gather(persistent)


def bucket_sizes(num_params: int, stage: int) -> dict[str, int]:
    """Elements of DeepSpeed's communication buffers, as parts of the model.

    DeepSpeed's defaults are 500 M elements (2 GB) for each buffer, and at stage 3 they keep a network of less than a
    billion parameters gathered after its first use: a small model would cost a rank twice what ZeRO promises
    (benchmarks/RESULTS.md). At least 2 M elements (8 MB): below that, sums and gathers cost more than they save.
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


def deepspeed_settings(
    config: Config, precision: torch.dtype, world_size: int, num_micro_batches: int, num_params: int
) -> dict[str, Any]:
    """DeepSpeed's own configuration for this run."""
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage, "overlap_comm": torch.cuda.is_available()}
    assert engine.zero_stage != "auto"
    zero |= bucket_sizes(num_params, engine.zero_stage)
    if engine.zero_stage < 3:
        # What DeepSpeed calls reduce_scatter is an all-reduce here too, with two more copies of every gradient.
        zero["reduce_scatter"] = False
    if engine.partition_group > 1:
        zero["zero_hpz_partition_size"] = engine.partition_group
    if engine.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    half = precision == torch.bfloat16
    return {
        "train_batch_size": config.data.global_batch_size,
        "train_micro_batch_size_per_gpu": config.data.global_batch_size // world_size // num_micro_batches,
        "gradient_accumulation_steps": num_micro_batches,
        "zero_optimization": zero,
        "bf16": {"enabled": half},
        # Gradients are summed in fp32 also where weights are bf16 (stage 1 in bf16 would take another optimizer class).
        "data_types": {"grad_accum_dtype": "fp32"} if half and int(engine.zero_stage) > 1 else {},
        "communication_data_type": "fp32",
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
