"""What is minimised: an estimate of the denoising error E |D(x, sigma) - x_0|^2 per dimension, weighted by sigma.

Denoising, flow matching, DDPM and EDM objectives take that error from the clean sample; they are one loss and differ
in their default weighting and noise levels only. Implicit and sliced score matching never look at the clean sample:
Stein's identity gives the same error in expectation from D and its Jacobian alone,

    E |D - x_0|^2 = E |D - x|^2 + 2 sigma^2 tr dD/dx - d sigma^2,

which for D = x + sigma^2 s is implicit score matching, 2 sigma^4 (tr ds/dx + |s|^2 / 2), plus a constant
(Hyvarinen 2005; Stein 1981). Contrastive divergence has the gradient of the same error. So any weighting goes with any
objective, and all but the losses of energies (`EnergyObjective`) and of few-step models can be compared. These
(`FewStepObjective`) train no denoiser but a map along the paths of its probability-flow ODE.
"""

from __future__ import annotations

from typing import Annotated, get_args

from scoreray.data.own_code.part import PartOf
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective
from scoreray.trainer.objectives.base import BaseObjective
from scoreray.trainer.objectives.consistency import ConsistencyObjective
from scoreray.trainer.objectives.denoising import DDPMObjective, DenoisingObjective, EDMObjective, FlowMatchingObjective
from scoreray.trainer.objectives.energy_based import (
    ContrastiveObjective,
    NoiseContrastiveObjective,
    RecoveryLikelihoodObjective,
)
from scoreray.trainer.objectives.flow_maps import ContinuousConsistencyObjective, MeanFlowObjective
from scoreray.trainer.objectives.maximum_likelihood import MaximumLikelihoodObjective
from scoreray.trainer.objectives.progressive import ProgressiveObjective
from scoreray.trainer.objectives.score_matching import ImplicitObjective, SlicedObjective, SlicedVRObjective

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
    | ConsistencyObjective
    | ProgressiveObjective
    | ContinuousConsistencyObjective
    | MeanFlowObjective
)


AnyObjective = Annotated[ObjectiveConfig | AutoencodingObjective, PartOf("objective", ("error",), BaseObjective)]
"""The type of a config's `objective` section: one of ours, of a denoiser or an autoencoder, or somebody else's."""


OBJECTIVES: dict[str, type[ObjectiveConfig]] = {config.kind: config for config in get_args(ObjectiveConfig)}


def needs_second_derivatives(objective: ObjectiveConfig, parameterization: str) -> bool:
    """Whether a training step differentiates twice, which torch.compile (2.13) and fused attention can't."""
    return objective.needs_jacobian or parameterization.startswith("energy_")
