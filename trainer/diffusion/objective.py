"""What is minimised: an estimate of the denoising error E |D(x, sigma) - x_0|^2 per dimension, weighted by sigma.

Denoising, flow matching, DDPM and EDM objectives take that error from the clean sample; they are one loss and differ
in their default weighting and noise levels only. Implicit and sliced score matching never look at the clean sample:
Stein's identity gives the same error in expectation from D and its Jacobian alone,

    E |D - x_0|^2 = E |D - x|^2 + 2 sigma^2 tr dD/dx - d sigma^2,

which for D = x + sigma^2 s is implicit score matching, 2 sigma^4 (tr ds/dx + |s|^2 / 2), plus a constant
(Hyvarinen 2005; Stein 1981). Contrastive divergence has the gradient of the same error. So any weighting goes with any
objective, and all but the losses of energies (`EnergyObjective`) can be compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, get_args

import torch
from pydantic import ConfigDict
from torch import Tensor

from scoreray.data import checks
from scoreray.data.own_code.part import PartOf
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.condition import AnyCondition
from scoreray.trainer.diffusion.contrastive import PersistentChains, denoiser_divergence
from scoreray.trainer.diffusion.denoiser import Denoiser, like
from scoreray.trainer.diffusion.gaussian_process import GaussianProcess
from scoreray.trainer.diffusion.jacobian import exact_trace, projected_trace
from scoreray.trainer.diffusion.sigma_sampling import (
    BaseSigmaSampling,
    LadderUniform,
    LogNormal,
    SigmaSampling,
    UniformT,
)
from scoreray.trainer.diffusion.weighting import (
    BaseWeighting,
    Constant,
    EDMWeighting,
    LevelFunction,
    Sigma2,
    Velocity,
    Weighting,
)
from scoreray.trainer.energies.langevin import recovery_chain
from scoreray.trainer.energies.nce import noise_contrastive_loss
from scoreray.trainer.flows.continuous_flow import Integration, Solver, log_density
from scoreray.trainer.flows.couplings import AnyCoupling, IndependentCoupling
from scoreray.trainer.flows.sources import DataSetSource, FlowSource, GaussianSource

AnyWeighting = Annotated[Weighting, PartOf("weighting", ("weight", "build"), BaseWeighting)]
AnySampling = Annotated[SigmaSampling, PartOf("sigma sampling", ("quantile",), BaseSigmaSampling)]
Probe = Literal["rademacher", "gaussian"]
NORMALISER_FEATURES = 64  # harmonics of ln sigma, as many as the learned weighting has by default


@dataclass(frozen=True)
class NoisedBatch:
    """x [B, ...] = x0 + sigma z at sigma [B]. probes: of `draw_probes`; chains: the persistent ones, of `positions`;
    process: of the run. Of an interpolant with noise of its own, x0 is what D is to estimate
    (`trainer/flows/sources.py`).  log_partition: the log-normaliser that an objective learns beside the energy, of
    `build_log_partition`."""

    x0: Tensor
    x: Tensor
    sigma: Tensor
    condition: AnyCondition = None
    probes: Tensor | None = None
    positions: Tensor | None = None
    chains: PersistentChains | None = None
    process: GaussianProcess | None = None
    log_partition: LevelFunction | None = None


@dataclass(frozen=True)
class AlignmentConfig:
    """Draws hidden tokens of a transformer to features of the clean sample, which `field` holds (`networks/alignment`).

    field: a sequence or array of one feature vector a token.  layer: the block whose output is drawn to them.  weight:
    of 1 - cosine similarity beside the loss.  hidden_size: of the perceptron in between.
    The defaults are REPA's of DiT-XL (Yu 2024).
    """

    field: str
    layer: int = 8
    weight: float = 0.5
    hidden_size: int = 2048

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        checks.at_least("objective.alignment", 1, layer=self.layer, hidden_size=self.hidden_size)
        checks.positive("objective.alignment", weight=self.weight)


@dataclass(frozen=True)
class BaseObjective:
    """What every objective has: its weighting, its noise levels, and the error that both are of.

    A subclass is a frozen dataclass with a `kind`; what it does not override is denoising score matching.
    """

    weighting: AnyWeighting = field(default=Sigma2())
    sigma_sampling: AnySampling = field(default=UniformT())
    label_dropout: float = 0.0
    """Share of samples whose label is hidden (-1), for classifier-free guidance."""
    alignment: AlignmentConfig | None = field(default=None, kw_only=True)

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    needs_jacobian: ClassVar[bool] = False
    """The error itself holds derivatives of the denoiser, so that a training step differentiates twice."""
    has_noise_levels: ClassVar[bool] = True
    """Each sample's loss is at one noise level."""
    only_flow: ClassVar[bool] = False
    """D gives the velocity of a flow whose densities are not those of x0 + sigma z with z independent of x0, so that
    (D - x) / sigma^2 is not their score: samplers of the ODE are right, those that add noise are not."""
    max_zero_stage: ClassVar[Literal[0, 1, 2, 3]] = 3
    """The highest `engine.zero_stage` that it can be trained under."""

    def __post_init__(self) -> None:
        checks.fraction("objective", label_dropout=self.label_dropout)

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """The random directions [B, P, *shape] that `error` needs beside the noise; None where it needs none."""
        return None

    def build_log_partition(self) -> LevelFunction | None:
        """What learns the energy's log-normaliser at each noise level beside it; None where nothing does."""
        return None

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """The denoising error per dimension [B].

        For implicit and sliced objectives an unbiased estimate of it, which can be negative. Persistent chains go on
        from, and in training mode back to, the batch's. Nothing here waits for the device or draws a number.
        """
        denoised = denoiser.denoise(batch.x, batch.sigma, batch.condition)
        return (denoised - batch.x0).flatten(1).square().mean(1)


class _ByJacobian(BaseObjective):
    """Objectives that never look at x0: (|D - x|^2 + 2 sigma^2 tr dD/dx) / d - sigma^2, by Stein's identity."""

    needs_jacobian = True

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        x, sigma = batch.x.detach().requires_grad_(), batch.sigma
        with torch.enable_grad():
            denoised = denoiser.denoise(x, sigma, batch.condition)
            step = (denoised - x).flatten(1)
            trace, squared = self.trace_and_norm(denoised, x, step, batch.probes)
        return (squared + 2 * sigma**2 * trace) / step.shape[1] - sigma**2

    def trace_and_norm(self, denoised: Tensor, x: Tensor, step: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """tr dD/dx [B] and |D - x|^2 [B], where step [B, d] is D - x: each exact or through probes."""
        raise NotImplementedError


@dataclass(frozen=True)
class EDMObjective(BaseObjective):
    """EDM's: lambda = 1 / c_out^2, ln sigma normal (Karras 2022)."""

    weighting: AnyWeighting = field(default=EDMWeighting())
    sigma_sampling: AnySampling = field(default=LogNormal())
    kind: Literal["edm"] = field(default="edm", kw_only=True)


@dataclass(frozen=True)
class DenoisingObjective(BaseObjective):
    """Denoising score matching: sigma^2 |score error|^2, t uniform (Vincent 2011; Song 2019; Song 2021)."""

    kind: Literal["denoising"] = field(default="denoising", kw_only=True)


@dataclass(frozen=True)
class DDPMObjective(BaseObjective):
    """DDPM's simple loss: |noise error|^2 over the discrete ladder (Ho 2020, eq. 14)."""

    sigma_sampling: AnySampling = field(default=LadderUniform())
    kind: Literal["ddpm"] = field(default="ddpm", kw_only=True)


@dataclass(frozen=True)
class FlowMatchingObjective(BaseObjective):
    """Conditional flow matching: |velocity error|^2, t uniform (Lipman 2023).

    coupling: which sample of the source each sample is paired with; source: noise, or another data set (`flows/`).
    """

    weighting: AnyWeighting = field(default=Velocity())
    coupling: AnyCoupling = field(default=IndependentCoupling(), kw_only=True)
    source: FlowSource = field(default=GaussianSource(), kw_only=True)
    kind: Literal["flow_matching"] = field(default="flow_matching", kw_only=True)

    @property
    def only_flow(self) -> bool:  # type: ignore[override]
        return self.coupling.group_size > 1 or isinstance(self.source, DataSetSource)


@dataclass(frozen=True)
class ImplicitObjective(_ByJacobian):
    """Implicit score matching with the exact trace (Hyvarinen 2005): one backward pass per dimension, for points."""

    kind: Literal["implicit"] = field(default="implicit", kw_only=True)

    def trace_and_norm(self, denoised: Tensor, x: Tensor, step: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        return exact_trace(denoised, x, create_graph=True), step.square().sum(1)


def draw_directions(
    objective: _Sliced | MaximumLikelihoodObjective,
    seed: int,
    positions: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Tensor:
    """An objective's random directions [B, num_probes, *shape] for its estimate of a trace."""
    draw = noise.rademacher if objective.probe == "rademacher" else noise.normal
    return draw(seed, positions, (objective.num_probes, *shape), stream=noise.STREAM_PROBE, dtype=dtype)


@dataclass(frozen=True)
class _Sliced(_ByJacobian):
    num_probes: int = 1
    probe: Probe = "rademacher"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, num_probes=self.num_probes)

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return draw_directions(self, seed, positions, shape, dtype)

    def trace_and_norm(self, denoised: Tensor, x: Tensor, step: Tensor, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        assert probes is not None, "sliced objectives need probes"
        directions = probes.flatten(2)
        return projected_trace(denoised, x, directions, create_graph=True), self.norm(step, directions)

    def norm(self, step: Tensor, directions: Tensor) -> Tensor:
        """|step|^2 [B] of step [B, d]."""
        return step.square().sum(1)


@dataclass(frozen=True)
class SlicedObjective(_Sliced):
    """Sliced score matching: trace and norm through random projections v (Song 2019b, eq. 7)."""

    kind: Literal["sliced"] = field(default="sliced", kw_only=True)

    def norm(self, step: Tensor, directions: Tensor) -> Tensor:
        return (directions * step[:, None]).sum(2).square().mean(1)


@dataclass(frozen=True)
class SlicedVRObjective(_Sliced):
    """Sliced score matching with reduced variance: the norm exactly, the trace through v (Song 2019b, eq. 8)."""

    kind: Literal["sliced_vr"] = field(default="sliced_vr", kw_only=True)


@dataclass(frozen=True)
class MaximumLikelihoodObjective(BaseObjective):
    """-ln p(x0; sigma_min) per dimension through the probability-flow ODE, in nats (Chen 2018; Grathwohl 2019, FFJORD).

    solver: adaptive steps to rtol and atol (bosh3, dopri5, dopri8), which the samples of a micro-batch share, or so
    many fixed `steps` (euler, midpoint, rk4): a network learns to exploit the error of too few.  adjoint: gradients by
    the adjoint equation, in the memory of one step, or through the solver.  trace: of the velocity's Jacobian, exact or
    over num_probes random directions a sample.
    """

    weighting: AnyWeighting = field(default=Constant())
    solver: Solver = "dopri5"
    steps: int = 16
    rtol: float = 1e-5
    atol: float = 1e-5
    adjoint: bool = False
    trace: Literal["exact", "hutchinson"] = "hutchinson"
    num_probes: int = 1
    probe: Probe = "rademacher"
    kind: Literal["maximum_likelihood"] = field(default="maximum_likelihood", kw_only=True)

    needs_jacobian = True
    has_noise_levels = False
    max_zero_stage = 2  # the network is called all along a path, and stage 3 frees its weights in between

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, steps=self.steps, num_probes=self.num_probes)
        checks.positive("objective", rtol=self.rtol, atol=self.atol)

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        return None if self.trace == "exact" else draw_directions(self, seed, positions, shape, dtype)

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """-ln p(x0; sigma_min) [B] in nats per dimension."""
        assert batch.process is not None

        def divergence(outputs: Tensor, inputs: Tensor) -> Tensor:
            if batch.probes is None:
                return exact_trace(outputs, inputs, create_graph=True)
            return projected_trace(outputs, inputs, batch.probes.flatten(2), create_graph=True)

        nats = log_density(
            lambda x, sigma: denoiser.denoise(x, sigma, batch.condition),
            divergence,
            batch.x0,
            batch.process.sigma_range(),
            denoiser.sigma_data,
            Integration(self.solver, self.steps, self.rtol, self.atol, self.adjoint),
            list(denoiser.parameters()),
        )
        return -nats / batch.x0[0].numel()


class EnergyObjective(BaseObjective):
    """Objectives that need an energy, and whose loss is not the denoising error, though it has its minimum."""


@dataclass(frozen=True)
class ContrastiveObjective(EnergyObjective):
    """Contrastive divergence of an energy by short chains (Hinton 2002).

    `chain`: "langevin" for an energy parameterization, at each noise level, num_steps of step_size sigma^2 with
    noise_scale times Langevin's noise; "gibbs" for the machines of `network.kind` rbm and gaussian_rbm, num_steps
    block-Gibbs sweeps, without noise levels and weighting.
    `start`: where chains begin: at the (noised) sample ("data"), at noise ("noise"; Nijkamp 2019), or where they ended
    last ("persistent"; Tieleman 2008; Du 2019): num_chains of them, None for one a sample of the global batch, each
    restarting with probability `restart` and each at a noise level of its own, that its samples share.
    """

    num_steps: int = 1
    step_size: float = 0.1
    start: Literal["data", "noise", "persistent"] = "data"
    chain: Literal["langevin", "gibbs"] = "langevin"
    noise_scale: float = 1.0
    num_chains: int | None = None
    restart: float = 0.0
    kind: Literal["contrastive"] = field(default="contrastive", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, num_steps=self.num_steps)
        checks.positive("objective", step_size=self.step_size, noise_scale=self.noise_scale)
        checks.fraction("objective", restart=self.restart)
        if self.num_chains is not None:
            checks.at_least("objective", 1, num_chains=self.num_chains)

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = self.num_steps + (self.start != "data")
        return noise.normal(seed, positions, (count, *shape), stream=noise.STREAM_CHAIN, dtype=dtype)

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """What has the gradient of the error, and not its value (`contrastive.denoiser_divergence`)."""
        x, sigma, probes, positions, chains = batch.x, batch.sigma, batch.probes, batch.positions, batch.chains
        assert probes is not None, "contrastive divergence needs probes"
        start = None
        if self.start != "data":
            width = (sigma**2 + denoiser.sigma_data**2).sqrt()
            start, probes = like(width, x) * probes[:, -1], probes[:, :-1]
        if chains is not None and start is not None and positions is not None:
            start = chains.take(positions, start)
        scale = self.noise_scale
        error, ends = denoiser_divergence(
            denoiser, x, sigma, batch.condition, probes, step_size=self.step_size, noise_scale=scale, start=start
        )
        if chains is not None and positions is not None and chains.training:
            chains.put(positions, ends)
        return error


@dataclass(frozen=True)
class NoiseContrastiveObjective(EnergyObjective):
    """Noise-contrastive estimation of an energy and of its log-normaliser (Gutmann & Hyvarinen 2010).

    Each sample is classified against `num_noise` values of noise. Of an energy parameterization: at each noise level,
    from N(0, width^2 (sigma^2 + sigma_data^2) I), width 1 being the Gaussian of the noised data's own variance; of the
    machines of `network.kind` rbm and gaussian_rbm: from independent units of the data's mean and variance.
    Data that this noise hardly resembles (many dimensions) teach little.
    """

    weighting: AnyWeighting = field(default=Constant())
    num_noise: int = 1
    width: float = 1.0
    kind: Literal["noise_contrastive"] = field(default="noise_contrastive", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, num_noise=self.num_noise)
        checks.positive("objective", width=self.width)

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return noise.normal(seed, positions, (self.num_noise, *shape), stream=noise.STREAM_CHAIN, dtype=dtype)

    def build_log_partition(self) -> LevelFunction:
        """Of ln Z - d/2 ln(2 pi (sigma^2 + sigma_data^2)): 0 where the energy is the quadratic alone."""
        return LevelFunction(NORMALISER_FEATURES)

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """The logistic loss [B], whose gradient for many values of noise is that of the log-likelihood."""
        assert batch.probes is not None, "noise-contrastive estimation draws noise"
        assert batch.log_partition is not None, "noise-contrastive estimation learns a log-normaliser"
        variance = batch.sigma**2 + denoiser.sigma_data**2
        log_z = batch.log_partition.at(batch.sigma)

        def log_ratio(x: Tensor) -> Tensor:
            """ln p_model - ln p_noise; the Gaussians' d/2 ln(2 pi variance) cancels."""
            squared = x.flatten(1).square().sum(1) / (2 * self.width**2 * variance)
            energy = denoiser.energy(x, batch.sigma, batch.condition)
            return squared + x[0].numel() * math.log(self.width) - energy - log_z

        drawn = self.width * like(variance.sqrt(), batch.x)[:, None] * batch.probes
        return noise_contrastive_loss(log_ratio(batch.x), torch.stack([log_ratio(y) for y in drawn.unbind(1)], 1))


@dataclass(frozen=True)
class RecoveryLikelihoodObjective(EnergyObjective):
    """Diffusion recovery likelihood of an energy: of a noised sample x given a noisier one (Gao 2021).

    With x~ = x + s z, s^2 = (ratio^2 - 1) sigma^2, so that x~ is at noise level ratio sigma, p(x | x~) has the energy
    E(x; sigma) + |x~ - x|^2 / (2 s^2): nearly a Gaussian where the ratio is near 1, which num_steps of Langevin
    dynamics from x~ sample, each over a time of step_size s^2 (`recovery_chain`).
    """

    ratio: float = 1.2
    num_steps: int = 20
    step_size: float = 0.1
    kind: Literal["recovery_likelihood"] = field(default="recovery_likelihood", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.at_least("objective", 1, num_steps=self.num_steps)
        checks.positive("objective", step_size=self.step_size)
        checks.between("objective", 1.001, 1000, ratio=self.ratio)

    def draw_probes(self, seed: int, positions: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return noise.normal(seed, positions, (1 + self.num_steps, *shape), stream=noise.STREAM_CHAIN, dtype=dtype)

    def error(self, denoiser: Denoiser, batch: NoisedBatch) -> Tensor:
        """E(x) - E(sample of p(x | x~)), times 2 sigma^4 / (s^2 d): for a ratio near 1 it has the gradient of the
        denoising error at x~, for any of -ln p(x | x~)."""
        x, sigma, condition, probes = batch.x, batch.sigma, batch.condition, batch.probes
        assert probes is not None, "recovery likelihood needs probes"
        growth = self.ratio**2 - 1
        with torch.no_grad():
            added = math.sqrt(growth) * like(sigma, x)
            score = lambda y: denoiser.score(y, sigma, condition)  # noqa: E731
            recovered = recovery_chain(score, x + added * probes[:, 0], added, self.step_size, probes[:, 1:])
        difference = denoiser.energy(x, sigma, condition) - denoiser.energy(recovered, sigma, condition)
        return difference * 2 * sigma**2 / (growth * x[0].numel())


@dataclass(frozen=True)
class AutoencodingObjective:
    """Reconstruction and Kullback-Leibler divergence of an autoencoder (Kingma & Welling 2014; Rombach 2022).

    Of a sample of d values with latent z ~ N(mean, std^2): (|x - decode(z)| or its square, summed, + kl_weight
    KL(N(mean, std^2) | N(0, 1))) / d, and perceptual_weight times the distance of features where `perceptual` names
    what takes them: `package.module:Name`, or a file of TorchScript (`trainer/perceptual.py`). With "mse", kl_weight is
    twice the variance of the Gaussian decoder whose evidence bound is maximised (docs/mathematics.md).
    """

    reconstruction: Literal["mse", "l1"] = "mse"
    kl_weight: float = 1e-6
    perceptual: str | None = None
    perceptual_weight: float = 1.0
    kind: Literal["autoencoding"] = field(default="autoencoding", kw_only=True)

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        checks.between("objective", 0, checks.LARGEST, kl_weight=self.kl_weight)
        checks.positive("objective", perceptual_weight=self.perceptual_weight)

    def error(self, x: Tensor, reconstruction: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """The loss [B] without its perceptual term, of x [B, ...] and latents' mean and std [B, ...]."""
        difference = (reconstruction - x).flatten(1)
        found = difference.square() if self.reconstruction == "mse" else difference.abs()
        return found.mean(1) + self.kl_weight / difference.shape[1] * kl_from_standard_normal(mean, std)


def kl_from_standard_normal(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) | N(0, 1)) of independent values [B, ...], summed over each sample's: [B], in nats."""
    return (mean.square() + std.square() - 1 - 2 * std.log()).flatten(1).sum(1) / 2


ObjectiveConfig = (
    EDMObjective
    | DenoisingObjective
    | DDPMObjective
    | FlowMatchingObjective
    | ImplicitObjective
    | SlicedObjective
    | SlicedVRObjective
    | MaximumLikelihoodObjective
    | ContrastiveObjective
    | NoiseContrastiveObjective
    | RecoveryLikelihoodObjective
)

AnyObjective = Annotated[ObjectiveConfig | AutoencodingObjective, PartOf("objective", ("error",), BaseObjective)]
"""The type of a config's `objective` section: one of ours, of a denoiser or an autoencoder, or somebody else's."""

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {config.kind: config for config in get_args(ObjectiveConfig)}


def needs_second_derivatives(objective: ObjectiveConfig, parameterization: str) -> bool:
    """Whether a training step differentiates twice, which torch.compile (2.13) and fused attention can't."""
    return objective.needs_jacobian or parameterization.startswith("energy_")
