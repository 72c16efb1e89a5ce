"""What every engine has, and the config that chooses one.

Engines own the module (in the compute precision), fp32 masters and one `AveragingOptimizer`, and give their state out
as fragments (`trainer/optim/fragments.py`), so that checkpoints know no engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import ConfigDict, Field

from scoreray.data.errors import UserError
from scoreray.data.units import Count
from scoreray.trainer.engine.communication import GBIT_S
from scoreray.trainer.engine.cpu import has_bf16_units
from scoreray.trainer.optim.fragments import MASTER, Fragment
from scoreray.trainer.optim.optimizer import AveragingOptimizer


@dataclass(frozen=True)
class EngineConfig:
    """How one step is computed. None of it changes what is learnt, except `precision`, by rounding.

    `micro_batch_size`: rows per forward pass on one worker; None takes the worker's whole share of the batch.
    `zero_stage`: "auto" takes the stage with the quickest predicted step whose state fits a rank's memory (on CPUs the
    lowest), may set a `partition_group`, and says which.
    `precision`: "bf16" keeps bf16 weights with fp32 masters; "auto" takes bf16 where the device gains from it.
    `partition_group`: with ZeRO-3, ranks (those of a node) that hold a second copy of the weights among them, so that
    the backward pass gathers inside the node only (ZeRO++ hpZ, Wang 2023); 1 for none.
    `offload`: "optimizer" keeps masters, moments and averages in the host's memory, with ZeRO stages 1 to 3.
    `compile`: the network by torch.compile.
    `internode_gbit_s`: what the network between nodes carries each way for each GPU, by which steps are predicted.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    micro_batch_size: Count | None = None
    offload: Literal["none", "optimizer"] = "none"
    compile: bool = False
    partition_group: Annotated[int, Field(ge=1)] = 1
    internode_gbit_s: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = GBIT_S

    def __post_init__(self) -> None:
        if self.offload != "none" and self.zero_stage == 0:
            raise UserError(f"engine.offload: {self.offload} needs engine.zero_stage 1, 2, 3 or auto, this is 0")
        if self.partition_group > 1 and self.zero_stage != 3:
            raise UserError(
                f"engine.partition_group: {self.partition_group} needs engine.zero_stage 3, this is {self.zero_stage}"
            )

    def num_micro_batches(self, rank_batch_size: int) -> int:
        """Forward and backward passes of one step, for a rank that has so many rows of the global batch."""
        return rank_batch_size // (self.micro_batch_size or rank_batch_size)


class Engine(Protocol):
    """`module` computes losses; `backward` each micro-batch's mean loss, then `step` once."""

    module: Any
    optimizer: AveragingOptimizer
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

    def frozen_fragments(self) -> Iterator[Fragment]:
        """This rank's share of the parameters that are not trained: masters without state."""
        ...

    def publish(self, num_steps: int) -> None:
        """After what both kinds of fragments hold was written: derive the module's weights from it."""
        ...


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """torch.bfloat16 or float32; "auto" takes bf16 on GPUs and CPUs that have units for it."""
    half = has_bf16_units(device) if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if half else torch.float32


def fragment_of(
    optimizer: AveragingOptimizer, name: str, start: int, length: int, flat: torch.Tensor, offset: int
) -> Fragment:
    """Elements [start, start + length) of a parameter, stored in `flat` and its optimizer state from `offset` on."""
    state, part = optimizer.state[flat], slice(offset, offset + length)
    tensors = {MASTER: flat.detach()[part]} | {key: state[key][part] for key in optimizer.state_keys}
    return Fragment(name, start, length, tensors)
