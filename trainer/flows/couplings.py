"""Couplings: which sample of the source (the noise, or another data set) each sample of the data is paired with.

A coupling only permutes the source's samples within groups of a global batch, so both marginals stay what they are. A
group is fixed by positions in the run (`groups_of`) and is always one rank's, so that pairs are the same at every world
size, in every micro-batch and after every resume.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from scoreray.data import checks
from scoreray.data.own_code.part import PartOf


@dataclass(frozen=True)
class BaseCoupling:
    """A subclass is a frozen dataclass with a `kind`, a `group_size` and `partners`.

    group_size: samples that are paired among themselves; it divides the rows of every rank.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    group_size: int = 1
    """Neighbours in the run that are paired with each other's samples of the source; of 1 with their own."""

    def __post_init__(self) -> None:
        checks.at_least("objective.coupling", 1, group_size=self.group_size)

    def partners(self, x0: Tensor, source: Tensor) -> Tensor:
        """int64 [n]: the row of `source` [n, d] that each row of x0 [n, d] is paired with, a permutation."""
        raise NotImplementedError


@dataclass(frozen=True)
class IndependentCoupling(BaseCoupling):
    """Each sample with the source's sample of its own position (Lipman 2023)."""

    group_size: Literal[1] = 1
    kind: Literal["independent"] = field(default="independent", kw_only=True)

    def partners(self, x0: Tensor, source: Tensor) -> Tensor:
        return torch.arange(len(x0), device=x0.device)


@dataclass(frozen=True)
class OptimalTransportCoupling(BaseCoupling):
    """Minibatch optimal transport: the permutation with the least sum of |x0 - source|^2 (Tong 2024; Pooladian 2023).

    Exact, by SciPy's linear_sum_assignment on the CPU: on a GPU each step waits for its groups' costs.
    """

    group_size: int = 64
    kind: Literal["optimal_transport"] = field(default="optimal_transport", kw_only=True)

    def partners(self, x0: Tensor, source: Tensor) -> Tensor:
        from scipy.optimize import linear_sum_assignment

        # |x0|^2 and |source|^2 have the same sum under every permutation, so the inner products alone decide.
        gain = (x0.to(torch.float64) @ source.to(torch.float64).T).cpu().numpy()
        return torch.from_numpy(linear_sum_assignment(gain, maximize=True)[1]).to(x0.device)


Coupling = IndependentCoupling | OptimalTransportCoupling
AnyCoupling = Annotated[Coupling, PartOf("coupling", ("partners",), BaseCoupling)]


def groups_of(positions: Tensor, global_batch_size: int, num_lanes: int, group_size: int) -> Tensor:
    """int64 [B]: the number of each position's group, where `group_size` divides the rows of a rank.

    A rank owns neighbouring lanes (lane = position mod num_lanes) and so neighbouring rows of a global batch that is
    ordered by lane; a group is `group_size` neighbours of these rows.
    """
    lane, batch = positions % num_lanes, positions // global_batch_size
    row = lane * (global_batch_size // num_lanes) + positions % global_batch_size // num_lanes
    return batch * (global_batch_size // group_size) + row // group_size


def paired(coupling: BaseCoupling, x0: Tensor, source: Tensor, groups: Tensor) -> Tensor:
    """`source` [B, ...] in the order of its partners in x0 [B, ...]: rows change places with rows of their group alone.
    `groups`: int64 [B] or [B, k], whose equal rows are a group."""
    result = source.clone()
    _, group = groups.unique(dim=0, return_inverse=True)
    for number in range(int(group.max()) + 1):
        rows = (group == number).nonzero().flatten()
        if len(rows) > 1:
            result[rows] = source[rows[coupling.partners(x0[rows].flatten(1), source[rows].flatten(1))]]
    return result
