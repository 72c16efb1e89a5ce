"""One training step's loss as a module: what an engine wraps, shards and calls on (images, condition, positions)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoreray.data.errors import UserError
from scoreray.data.fields.encoding import drawn
from scoreray.data.fields.normalisation import Normaliser, to_unit_range
from scoreray.data.reading.order import default_lanes
from scoreray.trainer.config import Config
from scoreray.trainer.config.condition_values import normalised
from scoreray.trainer.config.data_scale import resolve_sigma_data
from scoreray.trainer.config.run_fields import RunFields, TargetField
from scoreray.trainer.config.validation import chain_mistakes, condition_mistakes, objective_mistakes, refuse
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.augmentation import NO_AUGMENTATION, AugmentationConfig, augment, augmentation_mistakes
from scoreray.trainer.diffusion.condition import LABEL, AnyCondition, Condition, as_condition
from scoreray.trainer.diffusion.contrastive import PersistentChains
from scoreray.trainer.diffusion.denoiser import Denoiser, like
from scoreray.trainer.diffusion.layers import allow_double_backward
from scoreray.trainer.diffusion.levels import data_conditions, with_guidance_weight, with_levels
from scoreray.trainer.diffusion.process import Process
from scoreray.trainer.diffusion.sigma_sampling import sample_sigma
from scoreray.trainer.energies.nce import LogPartition, noise_contrastive_loss
from scoreray.trainer.flows.couplings import groups_of, paired
from scoreray.trainer.flows.sources import SOURCE_SEED, DataSetSource, interpolant
from scoreray.trainer.networks.alignment import Alignment
from scoreray.trainer.networks.autoencoder import AutoencoderNetwork, check_autoencoder
from scoreray.trainer.networks.lora import add_adapters
from scoreray.trainer.networks.network import build_network, freeze
from scoreray.trainer.networks.rbm import BoltzmannMachine, GaussianRBMConfig, RBMConfig
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective
from scoreray.trainer.objectives.base import NoisedBatch
from scoreray.trainer.objectives.denoising import FlowMatchingObjective
from scoreray.trainer.objectives.energy_based import ContrastiveObjective, NoiseContrastiveObjective
from scoreray.trainer.objectives.objective import ObjectiveConfig, needs_second_derivatives
from scoreray.trainer.objectives.teacher import Teacher
from scoreray.trainer.perceptual import perceptual_distance


class TrainingModule(nn.Module):
    """(images [B, ...], condition or None, positions int64 [B]) -> (loss [B], sigma [B]), both float32.

    images: the field that is modelled, and the condition's values, in the data's own units. `normaliser` takes images
    to the model's; without one uint8 becomes [-1, 1] and floating-point values stay as they are. `moments`: images are
    means and standard deviations [B, 2C, ...] of an encoder, and the run trains on draws [B, C, ...] from them. The
    normalisers of conditions are those that the network was built with. Labels int64 [B] alone are the one class
    condition.

    Augmentation, draws of latents, noise, noise level, dropout of conditions and probes are functions of (seed,
    position): a sample's loss does not depend on its rank, its micro-batch or the world size. `dropout`: the share of
    samples that lose a condition on its own, by name. The network may compute in bf16, by its weights or under
    autocast; what stands around it stays float32. Parameters: `denoiser.network.*` and, where the weighting learns,
    `weighting.*`, where an energy's log-normaliser is learnt beside it, `log_partition.*`. `shape` of a sample:
    persistent chains need it; their pool is the buffer `chains.pool`.
    With `alignment` (parameters `alignment.*`) the features of the samples are a further argument. So is `source`
    [B, ...], what each sample is paired with in the place of the noise of its position (`paired_source`).
    `teacher`: set before the first step where the objective names one; it is no submodule.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: ObjectiveConfig,
        process: Process,
        *,
        seed: int,
        global_batch_size: int,
        shape: Sequence[int] = (),
        augmentation: AugmentationConfig = NO_AUGMENTATION,
        normaliser: Normaliser | None = None,
        moments: bool = False,
        dropout: Mapping[str, float] | None = None,
        alignment: Alignment | None = None,
        num_lanes: int | None = None,
        source_target: TargetField | None = None,
    ):
        super().__init__()
        self.conditions = denoiser.conditions
        refuse(
            objective_mistakes(objective, denoiser.parameterization)
            + chain_mistakes(objective, global_batch_size)
            + condition_mistakes(objective, self.conditions or {})
        )
        self.denoiser, self.normaliser, self.moments = denoiser, normaliser, moments
        names = sorted(data_conditions(self.conditions or {}))
        self.dropout = {name: (rate, names.index(name)) for name, rate in (dropout or {}).items() if rate}
        self.objective, self.process = objective, process
        self.augmentation = augmentation
        self.seed, self.global_batch_size = seed, global_batch_size
        self.num_lanes, self.source_target = num_lanes or default_lanes(global_batch_size), source_target
        self.weighting = objective.weighting.build(process, denoiser.sigma_data)
        self.chains = build_chains(objective, seed, global_batch_size, shape)
        self.log_partition = objective.build_log_partition()
        self.alignment = alignment
        self.teacher: Teacher | None = None
        if needs_second_derivatives(objective, denoiser.parameterization):
            allow_double_backward(denoiser)

    def forward(
        self,
        images: Tensor,
        condition: AnyCondition,
        positions: Tensor,
        features: Tensor | None = None,
        source: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        x0 = self._x0(images, positions)
        shape = tuple(x0.shape[1:])
        sigma = self._sigma(positions, x0.dtype)
        level = like(sigma, x0)
        z = noise.normal(self.seed, positions, shape, stream=noise.STREAM_NOISE, dtype=x0.dtype)
        given = self._with_guidance(self._given(condition, positions), positions, x0)
        probes = self.objective.draw_probes(self.seed, positions, shape, x0.dtype)
        if isinstance(self.objective, FlowMatchingObjective) and isinstance(self.objective.source, DataSetSource):
            assert source is not None, "a flow from a data set needs its samples"
            x, x0 = interpolant(x0, source, level, self.objective.source.gamma, z)
        else:
            x = x0 + level * (z if source is None else source)
        batch = NoisedBatch(
            x0, x, sigma, given, probes, positions, self.chains, self.process, self.log_partition, self.teacher
        )
        error = one_per_sample("objective", self.objective, self.objective.error(self.denoiser, batch), sigma)
        loss = one_per_sample("weighting", self.objective.weighting, self.weighting(error, sigma), sigma)
        importance = self.objective.level_sampling.importance(sigma, self.process)
        if importance is not None:
            loss = loss * importance
        if self.alignment is not None:
            assert features is not None, "alignment needs features"
            flipped = augment(self.alignment.on_grid(features), self.augmentation, self.seed, positions)
            loss = loss + self.alignment(self.denoiser.network, flipped)
        return loss.float(), sigma.float()

    @torch.no_grad()
    def paired_source(
        self, images: Tensor, condition: Condition | None, positions: Tensor, stored: Tensor | None
    ) -> Tensor | None:
        """What the rank's rows of a global batch are paired with, [B, ...]; None of pairs with each position's noise.

        stored: the other data set's samples at these positions, in its units, for `source: {kind: data}`. Called with
        all rows at once, as a group of the coupling may be larger than a micro-batch. Samples of different classes
        change no places: what a class is paired with is distributed as all of the source.
        """
        objective = self.objective
        if not isinstance(objective, FlowMatchingObjective) or not objective.only_flow:
            return None
        x0 = self._x0(images, positions)
        if stored is None:
            shape = tuple(x0.shape[1:])
            source = noise.normal(self.seed, positions, shape, stream=noise.STREAM_NOISE, dtype=x0.dtype)
        else:
            assert self.source_target is not None
            target = self.source_target
            source = modelled(
                stored, positions, self.seed + SOURCE_SEED, NO_AUGMENTATION, target.normaliser, target.holds_moments
            )
        coupling = objective.coupling
        if coupling.group_size == 1:
            return source
        groups = groups_of(positions, self.global_batch_size, self.num_lanes, coupling.group_size)
        classes = [] if condition is None else [one for one in condition.values.values() if one.dtype == torch.int64]
        return paired(coupling, x0, source, torch.stack([groups, *classes], dim=1))

    def _x0(self, images: Tensor, positions: Tensor) -> Tensor:
        return modelled(images, positions, self.seed, self.augmentation, self.normaliser, self.moments)

    def _sigma(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.objective.has_noise_levels:
            return torch.zeros(len(positions), dtype=dtype, device=positions.device)
        batch = self.global_batch_size
        if self.chains is not None:  # a persistent chain stays at its noise level, so its samples come at that one
            positions, batch = positions % self.chains.count, self.chains.count
        sampling = self.objective.level_sampling
        sigma = sample_sigma(sampling, self.process, self.seed, positions, batch, dtype)
        return one_per_sample("sigma_sampling", sampling, sigma, positions)

    def _given(self, condition: AnyCondition, positions: Tensor) -> Condition | None:
        """The condition as the network sees it: changed with the images, normalised, dropped in some rows."""
        if self.conditions is not None:
            condition = as_condition(condition, self.conditions)
        elif isinstance(condition, Tensor):  # a network that does not say what it takes
            condition = Condition({LABEL: condition})
        if condition is None:
            return None
        if self.conditions:
            condition = normalised(self._augmented(condition, positions), self.conditions)
        return self._dropped(condition, positions)

    def _with_guidance(self, condition: Condition | None, positions: Tensor, x0: Tensor) -> Condition | None:
        """With a weight of the teacher's guidance for each sample, where the network learns any."""
        teacher = getattr(self.objective, "teacher", None)
        if teacher is None or teacher.guidance_range is None:
            return condition
        low, high = teacher.guidance_range
        u = noise.uniform(self.seed, positions, stream=noise.STREAM_GUIDANCE, dtype=x0.dtype)
        return with_guidance_weight(condition, low + (high - low) * u, x0)

    def _augmented(self, condition: Condition, positions: Tensor) -> Condition:
        """Grids are flipped with the images that they belong to."""
        if not self.augmentation.horizontal_flip or self.conditions is None:
            return condition
        grids = {name for name in condition.values if self.conditions[name].kind == "concat"}
        flipped = {
            name: augment(value, self.augmentation, self.seed, positions) if name in grids else value
            for name, value in condition.values.items()
        }
        return Condition(flipped, condition.masks)

    def _dropped(self, condition: Condition, positions: Tensor) -> Condition:
        """All conditions of a row together, or each by a stream of its own, so that no pair of names is alike."""
        rows: dict[str, Tensor] = {}
        if self.objective.label_dropout:
            u = noise.uniform(self.seed, positions, stream=noise.STREAM_LABEL_DROPOUT)
            rows = dict.fromkeys(condition.values, u < self.objective.label_dropout)
        for name, (rate, number) in self.dropout.items():
            if name in condition.values:
                gone = noise.uniform(self.seed, positions, stream=noise.STREAM_CONDITION_DROPOUT + number) < rate
                rows[name] = rows[name] | gone if name in rows else gone
        return condition.drop(rows) if rows else condition


def one_per_sample(what: str, part: Any, found: Any, rows: Tensor) -> Tensor:
    """`found`, one number for each of the rows [B]; [B, 1] would be broadcast to a number for each pair of samples.
    Raises UserError where a part of somebody else's gave anything else."""
    if isinstance(found, Tensor) and found.shape == rows.shape:
        return found
    given = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
    raise UserError(f"{what}: kind '{part.kind}' gave {given}; {list(rows.shape)} is needed, a number for each sample")


class AutoencoderModule(nn.Module):
    """TrainingModule's counterpart for autoencoders: (images, None, positions) -> (loss [B], sigma [B], which is 0).

    A latent is drawn from its mean and standard deviation by noise of (seed, position). The network's parameters are
    named `denoiser.network.*`, as those of a denoiser's are. `perceptual`: of (x, reconstruction), a distance [B].
    """

    def __init__(
        self,
        network: AutoencoderNetwork,
        objective: AutoencodingObjective,
        *,
        seed: int,
        augmentation: AugmentationConfig = NO_AUGMENTATION,
        normaliser: Normaliser | None = None,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        assert isinstance(network, nn.Module)
        self.denoiser, self.normaliser = nn.ModuleDict({"network": network}), normaliser
        self.objective, self.augmentation, self.seed, self.perceptual = objective, augmentation, seed, perceptual

    def forward(self, images: Tensor, condition: AnyCondition, positions: Tensor) -> tuple[Tensor, Tensor]:
        """An autoencoder takes no condition."""
        network: Any = self.denoiser["network"]
        x = modelled(images, positions, self.seed, self.augmentation, self.normaliser)
        mean, std = network.encode(x)
        z = noise.normal(self.seed, positions, tuple(mean.shape[1:]), stream=noise.STREAM_LATENT, dtype=mean.dtype)
        reconstruction = network.decode(mean + std * z)
        loss = self.objective.error(x, reconstruction, mean, std)
        if self.perceptual is not None:
            loss = loss + self.objective.perceptual_weight * self.perceptual(x, reconstruction)
        return loss.float(), torch.zeros_like(loss, dtype=torch.float32)


class MachineModule(nn.Module):
    """TrainingModule's counterpart for the machines of `rbm`: contrastive divergence by block Gibbs, or
    noise-contrastive estimation; no noise level.

    The loss [B] is the free energy of the sample less that of its chain's end, or the logistic loss of the sample and
    of independent units of the data's `mean` and `std` (one a channel, in the model's range); sigma is 0. All random
    numbers are functions of (seed, position). The machine's parameters are named `denoiser.network.*`, as those of a
    denoiser's network are, so that checkpoints of both are loaded and exported by the same code; ln Z, where it is
    learnt, is `log_partition.value`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        machine: BoltzmannMachine,
        objective: ContrastiveObjective | NoiseContrastiveObjective,
        *,
        seed: int,
        global_batch_size: int,
        augmentation: AugmentationConfig = NO_AUGMENTATION,
        normaliser: Normaliser | None = None,
        moments: bool = False,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ):
        super().__init__()
        refuse(chain_mistakes(objective, global_batch_size))
        self.denoiser, self.normaliser = nn.ModuleDict({"network": machine}), normaliser
        self.moments = moments
        self.objective, self.augmentation, self.seed = objective, augmentation, seed
        self.chains = build_chains(objective, seed, global_batch_size, (machine.num_visible,))
        self.log_partition = None
        if isinstance(objective, NoiseContrastiveObjective):
            self.log_partition = LogPartition(machine.initial_log_partition)
            for name, values in (("mean", mean), ("std", std)):
                channels = torch.tensor(list(values))
                units = channels.repeat_interleave(machine.num_visible // len(channels))
                self.register_buffer(name, units, persistent=False)

    def forward(self, images: Tensor, condition: AnyCondition, positions: Tensor) -> tuple[Tensor, Tensor]:
        """A machine takes no condition."""
        machine: Any = self.denoiser["network"]
        x0 = modelled(images, positions, self.seed, self.augmentation, self.normaliser, self.moments)
        v = machine.visible(x0, self.seed, positions)
        source = noise.ChainNoise(self.seed, positions)
        if isinstance(self.objective, NoiseContrastiveObjective):
            loss = self._noise_contrast(self.objective, v, source)
        else:
            loss = self._contrast(self.objective, v, positions, source)
        return loss.float(), torch.zeros_like(loss, dtype=torch.float32)

    def _contrast(
        self, objective: ContrastiveObjective, v: Tensor, positions: Tensor, source: noise.ChainNoise
    ) -> Tensor:
        machine: Any = self.denoiser["network"]
        start = v if objective.start == "data" else machine.fresh(source)
        if self.chains is not None:
            start = self.chains.take(positions, start)
        loss: Tensor
        loss, ends = machine(v, start=start, num_sweeps=objective.num_steps, source=source)
        if self.chains is not None and self.training:
            self.chains.put(positions, ends)
        return loss

    def _noise_contrast(self, objective: NoiseContrastiveObjective, v: Tensor, source: noise.ChainNoise) -> Tensor:
        machine: Any = self.denoiser["network"]
        assert self.log_partition is not None, "noise-contrastive estimation learns a log-normaliser"
        drawn = [machine.independent(self.mean, self.std, source) for _ in range(objective.num_noise)]
        units = torch.cat([v, *drawn])
        log_ratio = self.log_partition(machine(units)) - machine.log_independent(units, self.mean, self.std)
        of_data, *of_noise = log_ratio.split(len(v))
        return noise_contrastive_loss(of_data, torch.stack(of_noise, 1))


def build_chains(
    objective: ObjectiveConfig, seed: int, global_batch_size: int, shape: Sequence[int]
) -> PersistentChains | None:
    """The pool of an objective whose chains persist, None for any other."""
    if not isinstance(objective, ContrastiveObjective) or objective.start != "persistent":
        return None
    return PersistentChains(objective.num_chains or global_batch_size, tuple(shape), objective.restart, seed)


def modelled(
    images: Tensor, positions: Tensor, seed: int, augmentation: AugmentationConfig, normaliser: Normaliser | None,
    moments: bool = False,
) -> Tensor:  # fmt: skip
    """What a module models of a batch as it is stored: augmented, drawn where it holds moments, in the model's range.
    [B, C, ...] float32."""
    values = augment(images, augmentation, seed, positions)
    return to_model_range(drawn_latents(values, seed, positions) if moments else values, normaliser)


def drawn_latents(moments: Tensor, seed: int, positions: Tensor) -> Tensor:
    """[B, 2C, ...] -> [B, C, ...], float32; the noise is keyed by (seed, position), so it is another each epoch."""
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    return drawn(moments, noise.normal(seed, positions, shape, stream=noise.STREAM_LATENT))


def to_model_range(images: Tensor, normaliser: Normaliser | None) -> Tensor:
    """Values of the data set as the model sees them, float32 where there is a normaliser."""
    return to_unit_range(images) if normaliser is None else normaliser.apply(images).float()


def bucket_mistakes(config: Config, fields: RunFields) -> list[str]:
    """What needs samples of one shape, where the data are in buckets of several."""
    if not fields.shapes:
        return []
    found = []
    if isinstance(config.network, RBMConfig | GaussianRBMConfig):
        found.append(f"network.kind: {config.network.kind} has a unit for each pixel, and the buckets differ in size")
    elif isinstance(config.objective, ContrastiveObjective) and config.objective.start == "persistent":
        found.append("objective.start: persistent chains are of one size, and the buckets differ; take another start")
    return found


def _alignment(config: Config, fields: RunFields, network: nn.Module) -> Alignment | None:
    if config.alignment is None or fields.features is None:
        return None
    return Alignment(config.alignment, network, fields.shape, fields.features)


RunModule = TrainingModule | MachineModule | AutoencoderModule
"""What an engine trains."""


def build_training_module(config: Config, fields: RunFields) -> RunModule:
    """The module that `config` trains on these fields. Weights come from torch's global generator."""
    config = resolve_sigma_data(config, fields)
    refuse(augmentation_mistakes(config.augmentation, fields.shape) + bucket_mistakes(config, fields))
    objective, kind = config.objective, config.network.kind
    network = build_network(config.network, fields.shape, with_levels(fields.conditions, config.levels))
    freeze(network, config.optimizer.frozen)
    if config.lora is not None:
        add_adapters(network, config.lora)
    shared: dict[str, Any] = {
        "seed": config.run.seed,
        "augmentation": config.augmentation,
        "normaliser": fields.target.normaliser,
    }
    if isinstance(objective, AutoencodingObjective):
        if fields.target.encoding is not None:
            raise UserError(
                f"data.target: '{fields.target.name}' was made by {fields.target.encoding.name} already; name the "
                "field that it was made of"
            )
        autoencoder = check_autoencoder(network, kind, fields.shape)
        return AutoencoderModule(
            autoencoder, objective, perceptual=perceptual_distance(objective, fields.shape), **shared
        )
    shared |= {"global_batch_size": config.data.global_batch_size, "moments": fields.target.holds_moments}
    if isinstance(network, BoltzmannMachine):
        assert isinstance(objective, ContrastiveObjective | NoiseContrastiveObjective)  # the config has been checked
        if config.data.conditions:
            raise UserError(f"data.conditions: network.kind '{kind}' takes none; leave them out")
        return MachineModule(network, objective, mean=fields.mean, std=fields.std, **shared)
    return TrainingModule(
        Denoiser(network, config.denoiser.parameterization, config.denoiser.resolved_sigma_data),
        objective,
        config.process,
        shape=fields.shape,
        dropout=fields.dropout,
        alignment=_alignment(config, fields, network),
        num_lanes=config.data.num_lanes,
        source_target=None if fields.source is None else fields.source.fields.target,
        **shared,
    )
