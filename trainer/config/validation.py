"""Cross-section validation of a config: sections that are each valid but contradict each other, a line a mistake."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from scoreray.data.errors import UserError
from scoreray.data.own_code.part import OwnPart
from scoreray.trainer.diffusion.condition import LABEL, Conditions
from scoreray.trainer.diffusion.denoiser import DenoiserConfig
from scoreray.trainer.diffusion.process import EDM, Process
from scoreray.trainer.networks.autoencoder import AutoencoderConfig
from scoreray.trainer.networks.diffusers_network import DiffusersNetworkConfig
from scoreray.trainer.networks.dit import TransformerConfig
from scoreray.trainer.networks.network import LadderNetworkConfig, NetworkConfig
from scoreray.trainer.networks.preconditioned import PreconditionedNetworkConfig
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective
from scoreray.trainer.objectives.base import FewStepObjective
from scoreray.trainer.objectives.denoising import FlowMatchingObjective
from scoreray.trainer.objectives.energy_based import ContrastiveObjective, EnergyObjective, NoiseContrastiveObjective
from scoreray.trainer.objectives.flow_maps import FlowMapObjective
from scoreray.trainer.objectives.maximum_likelihood import MaximumLikelihoodObjective
from scoreray.trainer.objectives.objective import ObjectiveConfig, needs_second_derivatives
from scoreray.trainer.objectives.progressive import ProgressiveObjective

NO_NOISE_LEVEL = ("weighting", "sigma_sampling", "label_dropout", "step_size", "noise_scale", "width")  # of machines


def mistakes(
    network: NetworkConfig,
    process: Process,
    denoiser: DenoiserConfig,
    objective: ObjectiveConfig | AutoencodingObjective,
    global_batch_size: int,
    compile: bool,
) -> list[str]:
    """Every mistake in how the parts of a config go together."""
    if isinstance(objective, AutoencodingObjective):
        return _autoencoder_mistakes(network, process, denoiser)
    if isinstance(network, AutoencoderConfig):
        return [
            f"objective.kind: '{objective.kind}' trains a denoiser, and network.kind '{network.kind}' is none; choose "
            "objective.kind autoencoding"
        ]
    found = chain_mistakes(objective, global_batch_size) + alignment_mistakes(objective, network)
    if network.is_machine:
        return found + _machine_mistakes(network, process, denoiser, objective, compile)
    if isinstance(objective, ContrastiveObjective) and objective.chain == "gibbs":
        return [
            *found,
            f"objective.chain: 'gibbs' moves the layers of an RBM, and network.kind is '{network.kind}'; choose "
            "network.kind rbm or gaussian_rbm, or objective.chain langevin",
        ]
    required = network.required_sigma_data
    if required is not None and denoiser.sigma_data != required:
        found.append(
            f"denoiser.sigma_data: {denoiser.sigma_data} scales the input otherwise than network.kind '{network.kind}' "
            f"was trained on; set it to {required:g}"
        )
    found += objective_mistakes(objective, denoiser.parameterization)
    found += _flow_mistakes(objective) + _few_step_mistakes(objective) + _level_mistakes(objective, network)
    if compile and needs_second_derivatives(objective, denoiser.parameterization):
        found.append(
            f"engine.compile: objective '{objective.kind}' with parameterization '{denoiser.parameterization}' "
            "differentiates twice, which torch.compile can't; set engine.compile=false"
        )
    return found


def objective_mistakes(objective: ObjectiveConfig, parameterization: str) -> list[str]:
    """Where an objective can't train a parameterization."""
    if isinstance(objective, FlowMapObjective) and parameterization.startswith("energy_"):
        return [
            f"denoiser.parameterization: '{parameterization}' is a gradient, whose derivative along a path objective "
            f"'{objective.kind}' would need; choose another, or objective.kind consistency"
        ]
    if not isinstance(objective, EnergyObjective):
        return []
    found = []
    if not parameterization.startswith("energy_"):
        found.append(
            f"objective '{objective.kind}' needs an energy, and denoiser.parameterization is '{parameterization}': "
            "choose energy_dot, energy_residual or energy_norm"
        )
    if objective.weighting.needs_error:
        found.append(
            f"objective '{objective.kind}' has a gradient but no error that weighting '{objective.weighting.kind}' "
            "could learn from: choose another weighting"
        )
    return found


def chain_mistakes(objective: ObjectiveConfig, global_batch_size: int) -> list[str]:
    """Where the chains of contrastive divergence do not fit each other or the batch."""
    if not isinstance(objective, ContrastiveObjective):
        return []
    if objective.start != "persistent":
        return [
            f"objective.{name}: {getattr(objective, name)} is for chains that persist, and objective.start is "
            f"'{objective.start}'; leave it out or set objective.start=persistent"
            for name in ("num_chains", "restart")
            if getattr(objective, name) != _default(objective, name)
        ]
    if objective.num_chains is not None and objective.num_chains % global_batch_size:
        return [
            f"objective.num_chains: {objective.num_chains} is no multiple of data.global_batch_size "
            f"{global_batch_size}, so that a chain would be wanted twice in a step"
        ]
    return []


def _flow_mistakes(objective: ObjectiveConfig) -> list[str]:
    """Noise levels of an objective that has none."""
    if not isinstance(objective, MaximumLikelihoodObjective):
        return []
    return [
        f"objective.{name}: kind 'maximum_likelihood' integrates over all noise levels and weighs none; leave it out"
        for name in ("weighting", "sigma_sampling", "alignment")
        if getattr(objective, name) != _default(objective, name)
    ]


def _few_step_mistakes(objective: ObjectiveConfig) -> list[str]:
    """What an objective of few-step models lacks, or has no use for."""
    if not isinstance(objective, FewStepObjective):
        return []
    found = []
    if objective.needs_teacher and objective.teacher is None:
        found.append(f"objective.teacher: kind '{objective.kind}' needs one; name its checkpoint")
    if isinstance(objective, ProgressiveObjective) and objective.sigma_sampling != _default(
        objective, "sigma_sampling"
    ):
        found.append(
            "objective.sigma_sampling: kind 'progressive' trains at the levels of objective.steps; leave it out"
        )
    return found


def _level_mistakes(objective: ObjectiveConfig, network: NetworkConfig) -> list[str]:
    """Inputs that a network of another library, or one of a ladder, can't take or be differentiated by."""
    found = []
    if isinstance(network, DiffusersNetworkConfig | PreconditionedNetworkConfig) and objective.levels:
        found.append(
            f"objective.kind: '{objective.kind}' gives the network {' and '.join(objective.levels)}, which "
            f"network.kind '{network.kind}' can't take; choose objective.kind consistency with one number for "
            "objective.teacher.guidance"
        )
    if isinstance(network, LadderNetworkConfig) and isinstance(objective, FlowMapObjective):
        found.append(
            f"objective.kind: '{objective.kind}' differentiates by the noise level, and network.kind 'ladder' knows "
            "its rungs only; choose network.network's kind, or objective.kind consistency"
        )
    return found


def condition_mistakes(objective: ObjectiveConfig, conditions: Conditions) -> list[str]:
    """Where an objective can't train on conditions."""
    if isinstance(objective, FlowMatchingObjective) and objective.coupling.group_size > 1:
        return [
            f"objective.coupling: kind '{objective.coupling.kind}' would pair noise with values of condition '{name}' "
            f"({spec.kind}), and samples are drawn from all noise whatever their condition; classes alone are paired "
            "each by itself: leave the condition or the coupling out"
            for name, spec in conditions.items()
            if spec.kind != "class"
        ]
    persistent = isinstance(objective, ContrastiveObjective) and objective.start == "persistent"
    if not persistent or not conditions or objective.label_dropout == 1:
        return []
    classes = {spec.num_classes for spec in conditions.values()}
    met = f"samples of all {classes.pop()} classes" if list(conditions) == [LABEL] else "samples of all conditions"
    without = "classes" if list(conditions) == [LABEL] else "conditions"
    return [
        f"objective.start: a chain that persists meets {met}, so it can have none; set objective.label_dropout=1 to "
        f"train without {without}, or objective.start=noise"
    ]


def alignment_mistakes(objective: ObjectiveConfig, network: NetworkConfig) -> list[str]:
    """Where a network has no hidden tokens that features could be compared with."""
    alignment = objective.alignment
    if alignment is None:
        return []
    if isinstance(objective, EnergyObjective):
        return [
            f"objective.alignment: objective '{objective.kind}' denoises no sample whose features are known; "
            "leave it out"
        ]
    if not isinstance(network, TransformerConfig):
        return [
            f"objective.alignment: network.kind '{network.kind}' has no tokens to align; choose dit or mmdit, or leave "
            "it out"
        ]
    if alignment.layer > network.depth:
        return [f"objective.alignment.layer: {alignment.layer}; the network has {network.depth} blocks (network.depth)"]
    return []


def refuse(mistakes: list[str]) -> None:
    """Raises UserError with all of the mistakes, if there are any."""
    if mistakes:
        raise UserError("\n".join(mistakes))


def _without_noise_level(what: str, process: Process, denoiser: DenoiserConfig) -> list[str]:
    """The sections that something without a noise level has no use for, where they are given."""
    return [
        f"{name}: {what} knows no noise level, so it has no {name}; leave the section out"
        for name, value, default in (("process", process, EDM()), ("denoiser", denoiser, DenoiserConfig()))
        if value != default
    ]


def _autoencoder_mistakes(network: NetworkConfig, process: Process, denoiser: DenoiserConfig) -> list[str]:
    found = _without_noise_level("objective.kind 'autoencoding'", process, denoiser)
    if isinstance(network, AutoencoderConfig | OwnPart):  # whether somebody else's has encode and decode: once built
        return found
    return [
        *found,
        f"network.kind: '{network.kind}' is trained as a denoiser, not by objective.kind 'autoencoding'; choose "
        "network.kind autoencoder",
    ]


def _machine_mistakes(
    network: NetworkConfig, process: Process, denoiser: DenoiserConfig, objective: ObjectiveConfig, compile: bool
) -> list[str]:
    kind = network.kind
    found = _without_noise_level(f"network.kind '{kind}'", process, denoiser)
    if compile:
        found.append(f"engine.compile: the chains of network.kind '{kind}' are not compiled; set engine.compile=false")
    if not isinstance(objective, ContrastiveObjective | NoiseContrastiveObjective):
        return [
            *found,
            f"objective.kind: '{objective.kind}' can't train network.kind '{kind}'; choose objective.kind contrastive "
            "with objective.chain gibbs, or noise_contrastive",
        ]
    if isinstance(objective, ContrastiveObjective) and objective.chain != "gibbs":
        return [
            *found,
            f"objective.chain: network.kind '{kind}' moves by 'gibbs', not by '{objective.chain}'; set "
            "objective.chain=gibbs",
        ]
    owner = (
        "chains of block Gibbs have" if isinstance(objective, ContrastiveObjective) else f"network.kind '{kind}' has"
    )
    return found + [
        f"objective.{name}: {owner} none; leave it out"
        for name in NO_NOISE_LEVEL
        if name in vars(objective) and getattr(objective, name) != _default(objective, name)
    ]


def _default(section: Any, name: str) -> Any:
    return next(field.default for field in fields(section) if field.name == name)
