"""Stochastic-gradient Langevin dynamics on the weights: training that draws from a posterior instead of ending in a
minimum."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self

import torch
from pydantic import ConfigDict, Field

from scoreray.data import checks
from scoreray.data.errors import UserError
from scoreray.data.units import Count, CountOrZero
from scoreray.trainer.diffusion.noise import STREAM_WEIGHTS, normal
from scoreray.trainer.optim.ema import EMAConfig
from scoreray.trainer.optim.muon import MuonConfig
from scoreray.trainer.optim.optimizer import AveragingOptimizer, OptimizerConfig

CHUNK = 1 << 20  # elements whose noise is made at once: 8 MiB of hashes


@dataclass(frozen=True)
class SGLDConfig:
    """SGLD (Welling & Teh 2011), preconditioned by RMSprop (pSGLD, Li 2016) or not.

    The stationary law of the weights is exp(-(num_data loss + |w|^2 / (2 prior_std^2)) / temperature): the posterior
    where the loss is the mean of -ln p(sample | w), and of any other objective the Gibbs posterior. A step is

        w - learning_rate G (grad loss + w / (num_data prior_std^2)) + sqrt(2 learning_rate temperature G / num_data) z,

    the paper's with its step size eps = 2 learning_rate / num_data, so that a learning rate is of the usual size.
    G is 1, or with `preconditioned` 1 / (eps + sqrt(v)), v the average of squared gradients with factor `beta`, without
    the derivative of G, as Li 2016 leave it out.
    `learning_rate`: of the first step.  `temperature`: 1 is the posterior's.  `preconditioned`: by RMSprop.  `beta`,
    `eps`: of the preconditioner.  `decay`, `decay_images`: of the polynomial schedule.
    `num_data`: None takes the data set's number of samples. `prior_std`: null for a flat prior. `seed`: null takes the
    run's. `schedule`: "polynomial" is learning_rate (1 + images / decay_images)^-decay, the paper's; or "constant".
    `gradient_clip`: 0 for none; clipped gradients are another law's. `skip_nonfinite`, `frozen`: as of adamw.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    learning_rate: float = 1e-4
    temperature: float = 1.0
    prior_std: float | None = 1.0
    num_data: Count | None = None
    preconditioned: bool = False
    beta: float = 0.99
    eps: float = 1e-5
    gradient_clip: float = 0.0
    schedule: Literal["constant", "polynomial"] = "polynomial"
    decay: float = 0.55
    decay_images: Count = 10_000_000
    skip_nonfinite: CountOrZero = 0
    frozen: tuple[str, ...] = ()
    seed: int | None = None
    kind: Literal["sgld"] = field(default="sgld", kw_only=True)

    def __post_init__(self) -> None:
        checks.positive("optimizer", learning_rate=self.learning_rate, eps=self.eps)
        if self.prior_std is not None:
            checks.positive("optimizer", prior_std=self.prior_std)
        checks.between("optimizer", 0, checks.LARGEST, temperature=self.temperature, gradient_clip=self.gradient_clip)
        if not 0 <= self.beta < 1:
            raise UserError(f"optimizer.beta: {self.beta} must be in [0, 1)")
        if not 0.5 < self.decay <= 1:
            raise UserError(
                f"optimizer.decay: {self.decay} must be in (0.5, 1], where the steps' sum diverges and that of their "
                "squares does not (Welling & Teh 2011, eq. 2)"
            )

    def rate(self, images_seen: int, total_images: float) -> float:
        """Learning rate of the step that ends at `images_seen` of `total_images`."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + images_seen / self.decay_images) ** -self.decay

    def for_run(self, seed: int, num_data: int | None) -> Self:
        """The config with what it takes from the run filled in. Raises UserError where the data do not say."""
        if self.num_data is None and not num_data:
            raise UserError("optimizer.num_data: missing, and these data do not say how many samples they have; set it")
        return replace(
            self,
            seed=seed if self.seed is None else self.seed,
            num_data=num_data if self.num_data is None else self.num_data,
        )

    def build(self, params: Iterable[torch.nn.Parameter], ema: EMAConfig) -> AveragingOptimizer:
        return AveragingSGLD(params, self, ema)


AnyOptimizer = Annotated[OptimizerConfig | MuonConfig | SGLDConfig, Field(discriminator="kind")]
"""The type of a config's `optimizer` section."""


class AveragingSGLD(AveragingOptimizer):
    """SGLD that averages. The noise of an element is keyed by (seed, step, the element's position among all trained
    parameters), so it is the same under any partition and after any resume."""

    def __init__(self, params: Iterable[torch.nn.Parameter], config: SGLDConfig, ema: EMAConfig) -> None:
        assert config.num_data is not None, "for_run() fills it in"
        assert config.seed is not None, "for_run() fills it in"
        super().__init__(params, {"lr": config.learning_rate})
        self._config, self._seed = config, config.seed
        self.moments = ("exp_avg_sq",) if config.preconditioned else ()
        self._shrink = 0.0 if config.prior_std is None else 1 / (config.num_data * config.prior_std**2)
        self._heat = 2 * config.temperature / config.num_data
        self._places: dict[torch.Tensor, list[tuple[int, int, int]]] = {}
        self.average_by(ema)

    def place(self, parameter: torch.Tensor, offset: int, length: int, position: int) -> None:
        self._places.setdefault(parameter, []).append((offset, length, position))

    def update(self, parameters: list[torch.Tensor]) -> None:
        rates = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] += 1
            step = int(state["step"])
            for offset, length, position in self._places[parameter]:
                for first in range(0, length, CHUNK):
                    at = slice(offset + first, offset + min(first + CHUNK, length))
                    self._move(parameter, at, position + first, step, rates[id(parameter)])

    def _move(self, parameter: torch.Tensor, at: slice, position: int, step: int, rate: float) -> None:
        assert parameter.grad is not None
        weights, gradient = parameter.detach().view(-1)[at], parameter.grad.view(-1)[at]
        positions = torch.arange(position, position + len(weights), device=weights.device)
        noise = normal(self._seed, positions, stream=STREAM_WEIGHTS + step).to(weights.dtype)
        drift = torch.add(gradient, weights, alpha=self._shrink)
        noise.mul_(math.sqrt(rate * self._heat))
        if self._config.preconditioned:
            square = self.state[parameter]["exp_avg_sq"].view(-1)[at]
            square.mul_(self._config.beta).addcmul_(gradient, gradient, value=1 - self._config.beta)
            inverse = square.sqrt().add_(self._config.eps)
            drift.div_(inverse)
            noise.div_(inverse.sqrt())
        weights.sub_(drift, alpha=rate).add_(noise)
