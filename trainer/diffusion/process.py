"""The forward processes that a config can name, each its alpha(t) and sigma(t).

A process is its dataclass, so a config's `process` section is one; what follows from the two functions is in
`gaussian_process.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from scoreray.data import checks
from scoreray.data.errors import UserError, nearest
from scoreray.data.own_code import is_own
from scoreray.data.own_code.part import OwnPart, PartOf
from scoreray.trainer.diffusion.gaussian_process import GaussianProcess

BetaSchedule = Literal["linear", "scaled_linear", "squared_cosine"]


@dataclass(frozen=True)
class VE(GaussianProcess):
    """Variance exploding, SMLD: sigma(t) = sigma_min (sigma_max / sigma_min)^t (Song 2021).

    By default twice the paper's 0.01 to 50: its pictures are from 0 to 1, ours from -1 to 1.
    sigma_min: the lowest noise level.  sigma_max: the highest; about the largest distance of two samples (technique 1
    of Song & Ermon 2020), which `scoreray data inspect` shows.
    """

    sigma_min: float = 0.02
    sigma_max: float = 100.0
    kind: Literal["ve"] = field(default="ve", kw_only=True)

    def __post_init__(self) -> None:
        _check_sigmas("process", self.sigma_min, self.sigma_max)
        super().__post_init__()

    @property
    def sampling_t_min(self) -> float:
        return 1e-5  # as in Song 2021: VE is sampled down to 1e-5, VP to 1e-3

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (math.log(self.sigma_max / self.sigma_min) * t).exp()

    def _time_of(self, ratio: Tensor) -> Tensor:
        return (ratio / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class _LinearBeta(GaussianProcess):
    """alpha = e^(-B/2), B the integral of a beta(t) that rises linearly from beta_min to beta_max.

    beta_min: beta at t = 0.  beta_max: beta at t = 1.  t_min: the smallest t that training sees.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        _check_betas(self.beta_min, self.beta_max)
        _check_times(self.t_min, 1.0)
        super().__post_init__()

    @property
    def sampling_t_min(self) -> float:
        return max(self.t_min, 1e-3)

    def _alpha(self, t: Tensor) -> Tensor:
        return (-_beta_integral(self, t) / 2).exp()


@dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance preserving, DDPM in continuous time: alpha = e^(-B/2), B the integral of beta(t) (Song 2021)."""

    kind: Literal["vp"] = field(default="vp", kw_only=True)

    def _variance(self, t: Tensor) -> Tensor:
        return -torch.expm1(-_beta_integral(self, t))  # 1 - e^-B cancels at small t, expm1 does not

    def _sigma(self, t: Tensor) -> Tensor:
        return self._variance(t).sqrt()

    def _time_of(self, ratio: Tensor) -> Tensor:
        return _beta_time(self, torch.log1p(ratio**2))  # B, from ratio^2 = e^B - 1


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    """Sub-VP: VP's alpha with the smaller sigma = 1 - e^(-B), so that g^2 = beta (1 - e^(-2B)) (Song 2021)."""

    kind: Literal["sub_vp"] = field(default="sub_vp", kw_only=True)

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-_beta_integral(self, t))

    def _time_of(self, ratio: Tensor) -> Tensor:
        return _beta_time(self, 2 * torch.asinh(ratio / 2))  # as sigma / alpha = 2 sinh(B / 2)


@dataclass(frozen=True)
class DDPM(GaussianProcess):
    """The DDPM's discrete ladder: alpha-bar_k = prod(1 - beta_i) over num_steps (Ho 2020).

    Step k is t = k / num_steps; between steps ln alpha-bar is linear in t. At the steps it is the ladder exactly.
    num_steps: of the ladder.  beta_min: of its first step.  beta_max: of its last.
    schedule: beta rises from beta_min to beta_max, linearly ("linear"), or its square root does ("scaled_linear",
    Rombach 2022); or alpha-bar is a squared cosine and no beta above 0.999 ("squared_cosine", Nichol 2021, eq. 17),
    which knows neither end.  betas: num_steps numbers in the schedule's place.
    """

    beta_min: float = 1e-4
    beta_max: float = 0.02
    num_steps: int = 1000
    schedule: BetaSchedule = "linear"
    betas: tuple[float, ...] = ()
    kind: Literal["ddpm"] = field(default="ddpm", kw_only=True)

    def __post_init__(self) -> None:
        _check_betas(self.beta_min, self.beta_max)
        checks.at_least("process", 2, num_steps=self.num_steps)
        checks.ordered("process", "beta_max", "the largest variance", self.beta_max, 1.0)
        checks.choose("process.schedule", self.schedule, dict.fromkeys(get_args(BetaSchedule)))
        if self.betas and len(self.betas) != self.num_steps:
            raise UserError(f"process.betas: {len(self.betas)} numbers for num_steps {self.num_steps}: give as many")
        if wrong := [beta for beta in self.betas if not 0 < beta < 1]:
            raise UserError(f"process.betas: {wrong[0]} is not accepted; give numbers above 0 and below 1")
        super().__post_init__()

    @property
    def t_min(self) -> float:
        return 1 / self.num_steps

    def _alpha(self, t: Tensor) -> Tensor:
        return (-self._exponent(t) / 2).exp()

    def _variance(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._exponent(t))

    def _sigma(self, t: Tensor) -> Tensor:
        return self._variance(t).sqrt()

    def _exponent(self, t: Tensor) -> Tensor:
        """-ln alpha-bar(t)."""
        table = _ddpm_table(self, t.device)
        place = t * self.num_steps
        step = place.detach().floor().clamp(0, self.num_steps - 1).to(torch.int64)
        # take(), as indexing with a tensor of no dimension would wait for the device.
        low, high = table.take(step), table.take(step + 1)
        return low + (place - step) * (high - low)

    def _time_of(self, ratio: Tensor) -> Tensor:
        exponent = torch.log1p(ratio**2)
        table = _ddpm_table(self, ratio.device)
        step = (torch.bucketize(exponent.contiguous(), table, right=True) - 1).clamp(0, self.num_steps - 1)
        return (step + (exponent - table[step]) / (table[step + 1] - table[step])) / self.num_steps


@dataclass(frozen=True)
class FlowMatching(GaussianProcess):
    """Flow matching along straight lines: alpha = 1 - t, sigma = t (Lipman 2023; Liu 2023).

    The signal is gone at t = 1 and the noise at t = 0, between which t stays.
    t_min: the smallest t.  t_max: the largest.
    shift: above 1, even steps of t dwell at high noise: sigma = shift t / (1 + (shift - 1) t), so that sigma / alpha is
    shift times what it is without (Esser 2024, eq. 23).
    """

    t_min: float = 1e-3
    t_max: float = 0.999
    shift: float = 1.0
    kind: Literal["flow_matching"] = field(default="flow_matching", kw_only=True)

    def __post_init__(self) -> None:
        _check_times(self.t_min, self.t_max)
        checks.positive("process", shift=self.shift)
        super().__post_init__()

    def _alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + (self.shift - 1) * t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def _time_of(self, ratio: Tensor) -> Tensor:
        return ratio / (self.shift + ratio)


@dataclass(frozen=True)
class Cosine(GaussianProcess):
    """The cosine schedule: alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Nichol 2021; Kingma 2021 without offset).

    t_min: the smallest t, where hardly any noise is left.  t_max: the largest, where hardly any signal is.
    """

    t_min: float = 1e-3
    t_max: float = 0.999
    kind: Literal["cosine"] = field(default="cosine", kw_only=True)

    def __post_init__(self) -> None:
        _check_times(self.t_min, self.t_max)
        super().__post_init__()

    def _alpha(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).cos()

    def _sigma(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).sin()

    def _time_of(self, ratio: Tensor) -> Tensor:
        return ratio.atan() * (2 / math.pi)


@dataclass(frozen=True)
class EDM(GaussianProcess):
    """alpha = 1 and sigma = t, so that t is the noise level itself (Karras 2022).

    sigma_min: the lowest noise level.  sigma_max: the highest.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    kind: Literal["edm"] = field(default="edm", kw_only=True)

    def __post_init__(self) -> None:
        _check_sigmas("process", self.sigma_min, self.sigma_max)
        super().__post_init__()

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def sampling_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t

    def _time_of(self, ratio: Tensor) -> Tensor:
        return ratio


Process = VE | VP | SubVP | DDPM | FlowMatching | Cosine | EDM
AnyProcess = Annotated[Process, PartOf("process", ("_alpha",), GaussianProcess)]
"""The type of a config's `process` section: one of ours, or somebody else's."""

PROCESSES: dict[str, type[Process]] = {config.kind: config for config in get_args(Process)}


def process_of(value: Any) -> GaussianProcess:
    """A process from what a request or a command line gives: its kind, its section with `kind`, or itself.

    Raises UserError, which names the section's key.
    """
    if isinstance(value, GaussianProcess | OwnPart):
        return value  # type: ignore[return-value]
    section = {"kind": value} if isinstance(value, str) else value
    kind = section.get("kind") if isinstance(section, Mapping) else None
    if not isinstance(kind, str) or (kind not in PROCESSES and not is_own(kind)):
        hint = nearest(kind, PROCESSES) if isinstance(kind, str) else f"a kind ({', '.join(PROCESSES)}) or its section"
        raise UserError(f"{hint}, as {{kind: vp, beta_max: 10}}")
    try:
        return _any_process().validate_python(section)  # type: ignore[no-any-return]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != kind)
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "unexpected_keyword_argument" and kind in PROCESSES:
            message = f"unknown key; {nearest(where, [one.name for one in fields(PROCESSES[kind])])}"
        raise UserError(f"process.{where}: {message}" if where else message) from None


def process_section(process: GaussianProcess) -> dict[str, Any]:
    """What `process_of` makes the same process of: plain values, as JSON has them."""
    return _any_process().dump_python(process, mode="json")  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _any_process() -> TypeAdapter[Any]:
    return TypeAdapter(AnyProcess, config=ConfigDict(extra="forbid", allow_inf_nan=False))


def _beta_integral(process: _LinearBeta, t: Tensor) -> Tensor:
    """B(t), the integral of beta(t) = beta_min + t (beta_max - beta_min)."""
    return t * (process.beta_min + t * ((process.beta_max - process.beta_min) / 2))


def _beta_time(process: _LinearBeta, integral: Tensor) -> Tensor:
    """The t at which B(t) is `integral`; the root in the form without cancellation at small t."""
    slope = process.beta_max - process.beta_min
    return 2 * integral / (process.beta_min + (process.beta_min**2 + 2 * slope * integral).sqrt())


@lru_cache(maxsize=16)
def _ddpm_table(process: DDPM, device: torch.device) -> Tensor:
    """-ln alpha-bar_k for k = 0 .. num_steps, float64."""
    on_cpu: Any = {"dtype": torch.float64, "device": "cpu"}  # also while a model is built on the meta device
    low, high, num_steps = process.beta_min, process.beta_max, process.num_steps
    if process.betas:
        betas = torch.tensor(process.betas, **on_cpu)
    elif process.schedule == "linear":
        betas = torch.linspace(low, high, num_steps, **on_cpu)
    elif process.schedule == "scaled_linear":
        betas = torch.linspace(math.sqrt(low), math.sqrt(high), num_steps, **on_cpu) ** 2
    else:
        alpha_bar = ((torch.linspace(0, 1, num_steps + 1, **on_cpu) + 0.008) * (math.pi / 2 / 1.008)).cos() ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    return torch.cat([torch.zeros(1, **on_cpu), -torch.log1p(-betas).cumsum(0)]).to(device)


def _check_sigmas(owner: str, sigma_min: float, sigma_max: float) -> None:
    checks.positive(owner, sigma_min=sigma_min, sigma_max=sigma_max)
    checks.ordered(owner, "sigma_min", "sigma_max", sigma_min, sigma_max)


def _check_betas(beta_min: float, beta_max: float) -> None:
    checks.positive("process", beta_min=beta_min, beta_max=beta_max)
    checks.ordered("process", "beta_min", "beta_max", beta_min, beta_max)


def _check_times(t_min: float, t_max: float) -> None:
    checks.positive("process", t_min=t_min, t_max=t_max)
    checks.ordered("process", "t_min", "t_max", t_min, t_max)
    if t_max > 1:
        checks.fraction("process", t_max=t_max)
