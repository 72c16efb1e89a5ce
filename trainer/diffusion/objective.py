"""What is minimised: an estimate of the denoising error E |D(x, sigma) - x_0|^2 per dimension, weighted by sigma.

Denoising, flow matching, DDPM and EDM objectives take that error from the clean sample; they are one loss and differ
in their default weighting and noise levels only. Implicit and sliced score matching never look at the clean sample:
Stein's identity gives the same error in expectation from D and its Jacobian alone,

    E |D - x_0|^2 = E |D - x|^2 + 2 sigma^2 tr dD/dx - d sigma^2,

which for D = x + sigma^2 s is implicit score matching, 2 sigma^4 (tr ds/dx + |s|^2 / 2), plus a constant
(Hyvarinen 2005; Stein 1981). Contrastive divergence has the gradient of the same error. So any weighting goes with any
objective, and all but the contrastive losses can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from scoreray.data import checks
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.contrastive import PersistentChains, denoiser_divergence
from scoreray.trainer.diffusion.denoiser import Denoiser, like
from scoreray.trainer.diffusion.sigma_sampling import LadderUniform, LogNormal, SigmaSampling, UniformT
from scoreray.trainer.diffusion.weighting import EDMWeighting, Sigma2, Velocity, Weighting

AnyWeighting = Annotated[Weighting, Field(discriminator="kind")]
AnySampling = Annotated[SigmaSampling, Field(discriminator="kind")]
Probe = Literal["rademacher", "gaussian"]


@dataclass(frozen=True)
class _Objective:
    weighting: AnyWeighting = field(default=Sigma2())
    sigma_sampling: AnySampling = field(default=UniformT())
    label_dropout: float = 0.0
    """Share of samples whose label is hidden (-1), for classifier-free guidance."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        checks.fraction("objective", label_dropout=self.label_dropout)


@dataclass(frozen=True)
class EDMObjective(_Objective):
    """EDM's: lambda = 1 / c_out^2, ln sigma normal (Karras 2022)."""

    weighting: AnyWeighting = field(default=EDMWeighting())
    sigma_sampling: AnySampling = field(default=LogNormal())
    _: KW_ONLY
    kind: Literal["edm"] = "edm"


@dataclass(frozen=True)
class DenoisingObjective(_Objective):
    """Denoising score matching: sigma^2 |score error|^2, t uniform (Vincent 2011; Song 2019; Song 2021)."""

    _: KW_ONLY
    kind: Literal["denoising"] = "denoising"


@dataclass(frozen=True)
class DDPMObjective(_Objective):
    """DDPM's simple loss: |noise error|^2 over the discrete ladder (Ho 2020, eq. 14)."""

    sigma_sampling: AnySampling = field(default=LadderUniform())
    _: KW_ONLY
    kind: Literal["ddpm"] = "ddpm"


@dataclass(frozen=True)
class FlowMatchingObjective(_Objective):
    """Conditional flow matching: |velocity error|^2, t uniform (Lipman 2023)."""

    weighting: AnyWeighting = field(default=Velocity())
    _: KW_ONLY
    kind: Literal["flow_matching"] = "flow_matching"


@dataclass(frozen=True)
class ImplicitObjective(_Objective):
    """Implicit score matching with the exact trace (Hyvarinen 2005): one backward pass per dimension, for points."""

    _: KW_ONLY
    kind: Literal["implicit"] = "implicit"


@dataclass(frozen=True)
class _Sliced(_Objective):
    num_probes: int = 1
    probe: Probe = "rademacher"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, num_probes=self.num_probes)


@dataclass(frozen=True)
class SlicedObjective(_Sliced):
    """Sliced score matching: trace and norm through random projections v (Song 2019b, eq. 7)."""

    _: KW_ONLY
    kind: Literal["sliced"] = "sliced"


@dataclass(frozen=True)
class SlicedVRObjective(_Sliced):
    """Sliced score matching with reduced variance: the norm exactly, the trace through v (Song 2019b, eq. 8)."""

    _: KW_ONLY
    kind: Literal["sliced_vr"] = "sliced_vr"


@dataclass(frozen=True)
class ContrastiveObjective(_Objective):
    """Contrastive divergence of an energy by short chains (Hinton 2002).

    `chain`: "langevin" for an energy parameterization, at each noise level, num_steps of step_size sigma^2 with
    noise_scale times Langevin's noise; "gibbs" for the machines of `network.kind` rbm and gaussian_rbm, num_steps
    block-Gibbs sweeps, without noise levels and weighting.
    `start`: where chains begin: at the (noised) sample ("data"), at noise ("noise"; Nijkamp 2019), or where they ended
    last ("persistent"; Tieleman 2008; Du 2019): num_chains of them, None for one a sample of the global batch, each
    beginning anew with probability `restart` and each at a noise level of its own, that its samples share.
    """

    num_steps: int = 1
    step_size: float = 0.1
    start: Literal["data", "noise", "persistent"] = "data"
    chain: Literal["langevin", "gibbs"] = "langevin"
    noise_scale: float = 1.0
    num_chains: int | None = None
    restart: float = 0.0
    _: KW_ONLY
    kind: Literal["contrastive"] = "contrastive"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, num_steps=self.num_steps)
        checks.positive("objective", step_size=self.step_size, noise_scale=self.noise_scale)
        checks.fraction("objective", restart=self.restart)
        if self.num_chains is not None:
            checks.at_least("objective", 1, num_chains=self.num_chains)


ObjectiveConfig = (
    EDMObjective
    | DenoisingObjective
    | DDPMObjective
    | FlowMatchingObjective
    | ImplicitObjective
    | SlicedObjective
    | SlicedVRObjective
    | ContrastiveObjective
)

JACOBIAN_OBJECTIVES = (ImplicitObjective, SlicedObjective, SlicedVRObjective)

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "edm": EDMObjective,
    "denoising": DenoisingObjective,
    "ddpm": DDPMObjective,
    "flow_matching": FlowMatchingObjective,
    "implicit": ImplicitObjective,
    "sliced": SlicedObjective,
    "sliced_vr": SlicedVRObjective,
    "contrastive": ContrastiveObjective,
}


def needs_second_derivatives(objective: ObjectiveConfig, parameterization: str) -> bool:
    """Whether a training step differentiates twice, which torch.compile (2.13) and fused attention can't."""
    return isinstance(objective, JACOBIAN_OBJECTIVES) or parameterization.startswith("energy_")


def draw_probes(
    objective: ObjectiveConfig, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    """The random directions [B, P, *shape] that `loss_per_sample` needs beside the noise; None where it needs none."""
    if isinstance(objective, SlicedObjective | SlicedVRObjective):
        draw = noise.rademacher if objective.probe == "rademacher" else noise.normal
        return draw(seed, positions, (objective.num_probes, *shape), stream=noise.STREAM_PROBE, dtype=dtype)
    if isinstance(objective, ContrastiveObjective):
        count = objective.num_steps + (objective.start != "data")
        return noise.normal(seed, positions, (count, *shape), stream=noise.STREAM_CHAIN, dtype=dtype)
    return None


def loss_per_sample(
    objective: ObjectiveConfig,
    weighting: Callable[[Tensor, Tensor], Tensor],
    denoiser: Denoiser,
    x0: Tensor,
    sigma: Tensor,
    z: Tensor,
    class_labels: Tensor | None = None,
    probes: Tensor | None = None,
    positions: Tensor | None = None,
    chains: PersistentChains | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss [B], error [B]) of x0 [B, ...] at sigma [B] with the standard normal z [B, ...].

    The error is the denoising error per dimension (an unbiased estimate of it, that can be negative, for implicit and
    sliced objectives); the loss is what `weighting(error, sigma)` (`weighting.build_weighting`) makes of it.
    Some need `draw_probes`; persistent chains go on from, and in training mode back to, the `chains` of `positions`.
    Nothing here waits for the device or draws a number.
    """
    x = x0 + like(sigma, x0) * z
    if isinstance(objective, JACOBIAN_OBJECTIVES):
        error = _stein_error(objective, denoiser, x, sigma, class_labels, probes)
    elif isinstance(objective, ContrastiveObjective):
        error = _contrastive_error(objective, denoiser, x, sigma, class_labels, probes, positions, chains)
    else:
        error = (denoiser.denoise(x, sigma, class_labels) - x0).flatten(1).square().mean(1)
    return weighting(error, sigma), error.detach()


def _contrastive_error(
    objective: ContrastiveObjective,
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    class_labels: Tensor | None,
    probes: Tensor | None,
    positions: Tensor | None,
    chains: PersistentChains | None,
) -> Tensor:
    assert probes is not None, "contrastive divergence needs probes"
    start = None
    if objective.start != "data":
        width = (sigma**2 + denoiser.sigma_data**2).sqrt()
        start, probes = like(width, x) * probes[:, -1], probes[:, :-1]
    if chains is not None and start is not None and positions is not None:
        start = chains.take(positions, start)
    error, ends = denoiser_divergence(
        denoiser,
        x,
        sigma,
        class_labels,
        probes,
        step_size=objective.step_size,
        noise_scale=objective.noise_scale,
        start=start,
    )
    if chains is not None and positions is not None and chains.training:
        chains.put(positions, ends)
    return error


def _stein_error(
    objective: ImplicitObjective | SlicedObjective | SlicedVRObjective,
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    class_labels: Tensor | None,
    probes: Tensor | None,
) -> Tensor:
    """(|D - x|^2 + 2 sigma^2 tr dD/dx) / d - sigma^2, the squared norm and the trace each exact or through probes."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        denoised = denoiser.denoise(x, sigma, class_labels)
        step = (denoised - x).flatten(1)
        if isinstance(objective, ImplicitObjective):
            trace, squared = _exact_trace(denoised, x), step.square().sum(1)
        else:
            assert probes is not None, "sliced objectives need probes"
            directions = probes.flatten(2)
            trace = _projected_trace(denoised, x, directions)
            projected = (directions * step[:, None]).sum(2).square().mean(1)
            squared = projected if isinstance(objective, SlicedObjective) else step.square().sum(1)
    return (squared + 2 * sigma**2 * trace) / step.shape[1] - sigma**2


def _exact_trace(denoised: Tensor, x: Tensor) -> Tensor:
    outputs = denoised.flatten(1)
    trace = torch.zeros_like(outputs[:, 0])
    for i in range(outputs.shape[1]):
        (row,) = torch.autograd.grad(outputs[:, i].sum(), x, create_graph=True)
        trace = trace + row.flatten(1)[:, i]
    return trace


def _projected_trace(denoised: Tensor, x: Tensor, directions: Tensor) -> Tensor:
    """The mean of v . (dD/dx)^T v over directions [B, P, d] (Hutchinson 1989)."""
    total = torch.zeros_like(directions[:, 0, 0])
    for v in directions.unbind(1):
        (product,) = torch.autograd.grad((denoised.flatten(1) * v).sum(), x, create_graph=True)
        total = total + (product.flatten(1) * v).sum(1)
    return total / directions.shape[1]
