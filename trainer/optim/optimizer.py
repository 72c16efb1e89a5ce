"""Optimizers whose step also averages the weights that it updates, so that EMA is optimizer state (design, idea 5).

Under ZeRO an optimizer sees this rank's flat fp32 slice of the masters; so do the averages: they cost no
communication and are partitioned, saved and resharded exactly as the moments are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import ConfigDict
from torch.optim.swa_utils import get_ema_multi_avg_fn

from scoreray.data import checks
from scoreray.data.errors import UserError
from scoreray.data.units import Count, CountOrZero
from scoreray.trainer.optim.ema import EMAConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate as a function of images seen.

    `learning_rate`: after the warm-up.  `betas`: factors of the moments' averages.  `eps`: beside the second moment's
    root.  `weight_decay`: decoupled, in units of the learning rate.  `gradient_clip`: the gradient's largest norm; 0
    for none.  `warmup_images`: images of the linear warm-up.  `decay_images`: of "inverse_sqrt" alone.
    `skip_nonfinite`: how many steps of a run may have a loss or gradient that is not finite; such a step changes
    nothing and is counted. One more stops the run; the default stops at the first.
    `schedule`: after a linear warm-up over `warmup_images`, "constant"; "cosine" down to 0 at the run's end; or
    "inverse_sqrt": learning_rate / sqrt(max(images / decay_images, 1)) (Karras 2024, eq. 67).
    `frozen`: parameters of the network that are not trained, by globs over their names ("down.*"); of several that fit
    a name the last decides, and one that begins with "!" trains: ["*", "!embedding.*"].
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    warmup_images: CountOrZero = 0
    decay_images: Count = 10_000_000
    skip_nonfinite: CountOrZero = 0
    frozen: tuple[str, ...] = ()
    kind: Literal["adamw"] = field(default="adamw", kw_only=True)

    max_zero_stage: ClassVar[Literal[0, 1, 2, 3]] = 3

    def __post_init__(self) -> None:
        checks.positive("optimizer", learning_rate=self.learning_rate, eps=self.eps)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas: {list(self.betas)} must both lie in [0, 1)")
        checks.between("optimizer", 0, checks.LARGEST, weight_decay=self.weight_decay, gradient_clip=self.gradient_clip)

    def rate(self, images_seen: int, total_images: float) -> float:
        """Learning rate of the step that ends at `images_seen` of `total_images` (inf: not known yet, but many)."""
        rate = self.learning_rate
        if self.schedule == "cosine":
            rate *= 0.5 + 0.5 * math.cos(math.pi * min(images_seen / total_images, 1.0))
        elif self.schedule == "inverse_sqrt":
            rate /= math.sqrt(max(images_seen / self.decay_images, 1.0))
        return rate * min(images_seen / self.warmup_images, 1.0) if self.warmup_images else rate

    def for_run(self, seed: int, num_data: int | None) -> Self:
        """The config as a run uses it: AdamW needs neither its seed nor the number of its samples."""
        return self

    def build(self, params: Iterable[torch.nn.Parameter], ema: EMAConfig) -> AveragingOptimizer:
        return AveragingAdamW(params, self, ema)


def _without_compiler() -> None:
    """Spare a process that compiles nothing the second that importing torch's compiler takes: torch marks methods of
    optimizers as not to be compiled by a wrapper that imports it at the first call, unless it finds this attribute."""
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            setattr(method, "__dynamo_disable", method)


_without_compiler()
# The step itself, for the same reason: its wrapper imports the compiler to mark where a graph would break.
_UPDATE: Any = getattr(torch.optim.AdamW.step, "__wrapped__", torch.optim.AdamW.step)


class AveragingOptimizer(torch.optim.Optimizer):
    """An optimizer that also keeps exponential moving averages of its parameters.

    Parameters may be whole tensors or a rank's flat partition. `prepare_step` must be called before each step. Each
    state tensor has the parameter's shape: those of `moments`, then `ema_<name>`.
    """

    moments: tuple[str, ...] = ()

    def average_by(self, ema: EMAConfig) -> None:
        """The lengths to average over, before the first step."""
        self.ema_keys = tuple(f"ema_{name}" for name in ema.names)
        self._decays = [0.0] * len(self.ema_keys)

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the state tensors that a checkpoint must hold for each parameter beside the master."""
        return self.moments + self.ema_keys

    def place(self, parameter: torch.Tensor, offset: int, length: int, position: int) -> None:
        """Says that elements [offset, offset + length) of a parameter are the run's from `position` on, of all its
        trained parameters one after another. For noise that no partition changes."""

    def place_matrices(
        self, parameter: torch.Tensor, named: Iterable[tuple[str, int, Sequence[int]]], dtype: torch.dtype
    ) -> None:
        """Says which tensors a flat parameter holds whole: (name, first element, shape); dtype: of the weights."""

    def prepare_step(self, learning_rate: float, decays: list[float]) -> None:
        """Set the next step's learning rate and each average's decay (`EMAConfig.decays`)."""
        for group in self.param_groups:
            group["lr"] = learning_rate
        self._decays = decays

    def init_state(self, parameter: torch.Tensor) -> dict[str, Any]:
        """The state of `parameter`, made if it has none: moments 0, averages equal to the parameter."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key in self.moments:
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            for key in self.ema_keys:
                state[key] = parameter.detach().clone(memory_format=torch.preserve_format)
        return state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        updated = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in updated:
            self.init_state(parameter)
        self.update(updated)
        for key, decay in zip(self.ema_keys, self._decays, strict=True):
            # average = decay average + (1 - decay) weight, the one just written, in one kernel.
            averages = [self.state[parameter][key] for parameter in updated]
            if averages:
                get_ema_multi_avg_fn(decay)(averages, updated, 0)

    def update(self, parameters: list[torch.Tensor]) -> None:
        """The step without the averages, in place, of parameters that have a gradient."""
        raise NotImplementedError


class AveragingAdamW(AveragingOptimizer, torch.optim.AdamW):
    """AdamW (decoupled weight decay) that averages."""

    moments = MOMENTS

    def __init__(self, params: Iterable[torch.nn.Parameter], config: OptimizerConfig, ema: EMAConfig) -> None:
        torch.optim.AdamW.__init__(
            self,
            params,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,  # one kernel that reads and writes each moment once, instead of one per operation
        )
        self.average_by(ema)

    def update(self, parameters: list[torch.Tensor]) -> None:
        _UPDATE(self)
