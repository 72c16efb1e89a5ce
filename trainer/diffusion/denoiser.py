"""One denoiser D(x, sigma) = E[x_0 | x] for x = x_0 + sigma z, whatever its network was trained to output.

Every parameterization is linear, D = a(sigma) x + b(sigma) q, with q what the network gives. `COEFFICIENTS` holds
(a, b) of each; the denoiser and the conversion between any two of them are made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import BeforeValidator, ConfigDict
from torch import Tensor, nn

from scoreray.data import checks
from scoreray.data.errors import UserError
from scoreray.trainer.diffusion.condition import (
    LABEL,
    AnyCondition,
    Condition,
    Conditions,
    as_condition,
    conditions_of,
    encoded,
)
from scoreray.trainer.diffusion.condition_shapes import check_condition, check_labels
from scoreray.trainer.diffusion.energy import conservative_output, energy
from scoreray.trainer.diffusion.layers import allow_double_backward
from scoreray.trainer.diffusion.levels import as_angles, level_names

Parameterization = Literal[
    "edm", "noise", "score", "denoised", "velocity", "v", "energy_dot", "energy_residual", "energy_norm"
]
PARAMETERIZATIONS: tuple[Parameterization, ...] = get_args(Parameterization)
_ENERGY = "energy_"


def _edm(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data * total.rsqrt()


def _noise(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    return torch.ones_like(sigma), -sigma


def _score(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    return torch.ones_like(sigma), sigma**2


def _denoised(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(sigma), torch.ones_like(sigma)


def _velocity(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    return 1 / (1 + sigma), -sigma / (1 + sigma)


def _v(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    return 1 / (1 + sigma**2), -sigma * (1 + sigma**2).rsqrt()


# What q can be, for x = x_0 + sigma z:
#   edm       F of Karras 2022, eq. 7: c_skip x + c_out F
#   noise     z (Ho 2020)
#   score     grad ln p(x; sigma) (Vincent 2011)
#   denoised  x_0
#   velocity  z - x_0, of x_t = (1 - t) x_0 + t z with t = sigma / (1 + sigma) (Lipman 2023)
#   v         cos z - sin x_0 with tan = sigma (Salimans & Ho 2022)
COEFFICIENTS: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "edm": _edm,
    "noise": _noise,
    "score": _score,
    "denoised": _denoised,
    "velocity": _velocity,
    "v": _v,
}


def _number_or_auto(value: Any) -> Any:
    """A number, or "auto": one message, where pydantic would report a mistake for each member of the union."""
    try:
        if value != "auto":
            return float("true" if isinstance(value, bool) else value)
        return value
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{str(value)[:40]!r} is not accepted; it should be a number above 0, or auto") from None


@dataclass(frozen=True)
class DenoiserConfig:
    """What the network outputs, and the standard deviation of the data that its scaling assumes.

    `parameterization`: what the network outputs: EDM's F, the noise, the score, the clean sample ("denoised"), flow
    matching's "velocity", "v" of VP processes, or an energy whose gradient is used (docs/mathematics.md).
    `sigma_data`: "auto" takes the manifest's; a run keeps the number that it began with (`data_scale.py`).
    """

    parameterization: Parameterization = "edm"
    sigma_data: Annotated[float | Literal["auto"], BeforeValidator(_number_or_auto)] = 0.5

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        checks.choose("denoiser.parameterization", self.parameterization, dict.fromkeys(PARAMETERIZATIONS))
        if self.sigma_data != "auto":
            checks.noise_level("denoiser", sigma_data=self.resolved_sigma_data)

    @property
    def resolved_sigma_data(self) -> float:
        """sigma_data where it is a number: of a config whose data were looked at, of every checkpoint's."""
        assert self.sigma_data != "auto", "resolve_sigma_data() comes first"
        return self.sigma_data


class Denoiser(nn.Module):
    """denoiser(x [B, ...], sigma [B] or a number, condition or None) -> E[x_0 | x] [B, ...], dtype of x.

    The network sees c_in x, which has unit variance at every sigma, and c_noise = ln(sigma) / 4 (Karras 2022, eq. 7);
    x is cast to the network's dtype on the way in and back on the way out, so bf16 weights and autocast both work.
    Under "score" the network outputs sigma times the score, as NCSN's does. The energy parameterizations read a scalar
    out of the network (`energy.READOUTS`) and use its negative gradient as EDM's F: the score is then a gradient field.

    condition: a `Condition` of what the network was built for, or labels int64 [B] of its one class condition.
    A network that takes a target level gives D(x, sigma, rho) (`levels.py`); rows without one have rho = sigma.
    sigma must be above 0 and finite, labels -1 (the null class) or below the network's num_classes, where it has any.
    A call checks values on the CPU only, where looking costs no synchronisation; `check_inputs` checks it anywhere.
    Raises UserError.
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., Tensor],
        parameterization: str = DenoiserConfig.parameterization,
        sigma_data: float = 0.5,
    ):
        super().__init__()
        checks.choose("parameterization", parameterization, dict.fromkeys(PARAMETERIZATIONS))
        checks.positive("denoiser", sigma_data=sigma_data)
        self.network = network
        self.parameterization = parameterization
        self.sigma_data = float(sigma_data)
        self.readout = parameterization.removeprefix(_ENERGY) if parameterization.startswith(_ENERGY) else None
        if self.readout is not None and isinstance(network, nn.Module):
            allow_double_backward(network)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        condition: AnyCondition = None,
        *,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """class_labels: the same as labels given as the condition, for callers that know classes only."""
        condition = class_labels if condition is None else condition
        sigma = _as_batch(x, sigma)
        if not torch.compiler.is_compiling():
            if sigma.device.type == "cpu":
                _check_sigma(sigma)
            known = self.conditions
            if condition is not None and (known is not None or isinstance(condition, Tensor)):
                check_condition(condition, known or {}, len(x))
        return self.denoise(x, sigma, condition)

    @property
    def conditions(self) -> Conditions | None:
        """What the network was built for; None of one that does not say it, and takes what it is given."""
        found = getattr(self.network, "conditions", None)
        num_classes = getattr(self.network, "num_classes", None)
        return conditions_of(num_classes) if found is None and num_classes is not None else found

    def encode(self, condition: Condition) -> Condition:
        """`condition` with what the network makes of it at any noise level computed: texts are read (`encoded`)."""
        known = self.conditions
        if known is not None:
            check_condition(condition, known, len(condition))
        return encoded(self.network, condition)

    def denoise(self, x: Tensor, sigma: Tensor, condition: AnyCondition = None) -> Tensor:
        """As calling the denoiser, without any check of values: for training steps, sigma [B] on the device of x."""
        wide = torch.promote_types(x.dtype, torch.float32)  # c_skip x + c_out F loses x's digits in bf16
        sigma = sigma.to(wide)
        known = self.conditions
        if known is not None and level_names(known):
            condition = as_angles(as_condition(condition, known), known, sigma, self.sigma_data)
        output = self._output(x.to(wide), sigma, condition).to(wide)
        if output.shape != x.shape:
            raise UserError(f"the network gave {tuple(output.shape)} for x {tuple(x.shape)}: both must be the same")
        if self.parameterization == "score":  # the score itself grows as 1 / sigma: no network could output it
            output = output / like(sigma, x)
        a, b = COEFFICIENTS["edm" if self.readout else self.parameterization](sigma, self.sigma_data)
        return (like(a, x) * x + like(b, x) * output).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor | float, condition: AnyCondition = None) -> Tensor:
        """grad ln p(x; sigma), [B, ...] like x, by Tweedie's formula."""
        sigma = _as_batch(x, sigma)
        return tweedie(self(x, sigma, condition), x, sigma)

    def energy(self, x: Tensor, sigma: Tensor | float, condition: AnyCondition = None) -> Tensor:
        """E(x; sigma) [B] with score = -grad E, up to a constant of sigma; energy parameterizations only.

        E = |x|^2 / (2 (sigma^2 + sigma_data^2)) + (sigma_data / sigma) e(c_in x): its gradient is what `score` gives.
        """
        if self.readout is None:
            names = ", ".join(name for name in PARAMETERIZATIONS if name.startswith(_ENERGY))
            raise UserError(f"parameterization '{self.parameterization}' has no energy; those that have one: {names}")
        sigma = _as_batch(x, sigma).to(torch.promote_types(x.dtype, torch.float32))
        scaled = self._scaled(x.to(sigma.dtype), sigma)
        quadratic = x.to(sigma.dtype).flatten(1).square().sum(1) / (2 * (sigma**2 + self.sigma_data**2))
        return quadratic + self.sigma_data / sigma * energy(
            self.network, self.readout, scaled, sigma.log() / 4, condition
        )

    def _scaled(self, x: Tensor, sigma: Tensor) -> Tensor:
        """c_in x in the dtype of the network's weights."""
        scaled = x * like((sigma**2 + self.sigma_data**2).rsqrt(), x)
        return scaled.to(_network_dtype(self.network, scaled.dtype))

    def _output(self, x: Tensor, sigma: Tensor, condition: AnyCondition) -> Tensor:
        scaled, c_noise = self._scaled(x, sigma), sigma.log() / 4
        if self.readout is None:
            return self.network(scaled, c_noise, condition)
        create_graph = torch.is_grad_enabled()
        return conservative_output(self.network, self.readout, scaled, c_noise, condition, create_graph)


def like(per_sample: Tensor, x: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to meet x [B, ...]."""
    return per_sample.reshape(-1, *(1,) * (x.ndim - 1))


def tweedie(denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The score (denoised - x) / sigma^2 for x [B, ...] and sigma [B] (Robbins 1956; Efron 2011)."""
    return (denoised - x) / like(sigma.to(x.dtype) ** 2, x)


def convert(value: Tensor, x: Tensor, sigma: Tensor | float, source: str, target: str, sigma_data: float) -> Tensor:
    """The quantity `target` at x [B, ...] and sigma [B] from the quantity `source`, names of `COEFFICIENTS`.

    D = a_s x + b_s q_s = a_t x + b_t q_t is solved for q_t in one step, in float64; the dtype of `value` comes back.
    """
    source_pair = checks.choose("parameterization", source, COEFFICIENTS)
    target_pair = checks.choose("parameterization", target, COEFFICIENTS)
    wide = _as_batch(x, sigma).to(torch.float64)
    a_source, b_source = source_pair(wide, sigma_data)
    a_target, b_target = target_pair(wide, sigma_data)
    of_x, of_value = (a_source - a_target) / b_target, b_source / b_target
    return (like(of_x, x) * x + like(of_value, x) * value).to(value.dtype)


def check_inputs(x: Tensor, sigma: Tensor | float, condition: AnyCondition, num_classes: int | None) -> None:
    """Checks shapes and values wherever they are (a synchronisation on a GPU). Raises UserError naming the mistake."""
    _check_sigma(_as_batch(x, sigma))
    if not bool(x.isfinite().all()):
        raise UserError(f"x has {int((~x.isfinite()).sum())} values that are not finite: give finite numbers")
    if isinstance(condition, Tensor) and num_classes:
        check_labels(LABEL, condition, num_classes)


def _as_batch(x: Tensor, sigma: Tensor | float) -> Tensor:
    """sigma as [B] on the device of x."""
    if not x.is_floating_point():
        raise UserError(f"x is {x.dtype}: give floating-point samples ([-1, 1] for images: `to_unit_range`)")
    if not isinstance(sigma, Tensor):
        if not (math.isfinite(sigma) and sigma > 0):
            raise UserError(f"sigma is {sigma}: give a finite noise level above 0")
        return x.new_full((len(x),), sigma, dtype=torch.promote_types(x.dtype, torch.float32))
    if sigma.ndim == 0 or sigma.shape == (1,):
        return sigma.expand(len(x))
    if sigma.shape != x.shape[:1]:
        raise UserError(f"sigma has shape {tuple(sigma.shape)} and x {tuple(x.shape)}: give a number or one per sample")
    return sigma


def _check_sigma(sigma: Tensor) -> None:
    if not len(sigma):
        return
    low, high = sigma.aminmax()
    if not 0 < float(low) <= float(high) < math.inf:  # NaN comes through both, and compares as false
        bad = sigma[~((sigma > 0) & sigma.isfinite())]
        raise UserError(f"sigma is {bad[0].item()}: give finite noise levels above 0")


def _network_dtype(network: Any, default: torch.dtype) -> torch.dtype:
    if not isinstance(network, nn.Module):
        return default
    for parameter in network.parameters():
        return parameter.dtype
    return default
