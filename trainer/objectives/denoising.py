"""Denoising score matching and its kin: one loss, whose kinds differ in their default weighting and noise levels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from scoreray.trainer.diffusion.sigma_sampling import (
    LadderUniform,
    LogNormal,
)
from scoreray.trainer.diffusion.weighting import (
    EDMWeighting,
    Velocity,
)
from scoreray.trainer.flows.couplings import AnyCoupling, IndependentCoupling
from scoreray.trainer.flows.sources import DataSetSource, FlowSource, GaussianSource
from scoreray.trainer.objectives.base import AnySampling, AnyWeighting, BaseObjective


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
