"""Muon: AdamW whose steps of the matrices inside a network's blocks are made orthogonal."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.trainer.optim.ema import EMAConfig
from scoreray.trainer.optim.optimizer import AveragingAdamW, AveragingOptimizer, OptimizerConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Jordan 2024: singular values end in about 0.7 to 1.2 after 5 iterations
ITERATIONS = 5
RMS = 0.2  # of AdamW's usual step, in units of the learning rate (Liu 2025)


@dataclass(frozen=True)
class MuonConfig(OptimizerConfig):
    """Muon (Jordan 2024) for the matrices of a network's blocks, AdamW for all else; the fields are AdamW's.

    A matrix is a parameter of two or more dimensions of a block (a member of a module list): a convolution's is [out,
    in times kernel]. Its step is the orthogonal matrix nearest to Nesterov's momentum, of factor betas[0], times 0.2
    sqrt(max(rows, columns)) (Liu 2025), by which one learning rate serves both. Needs whole gradients: ZeRO stage 0,
    whose ranks must be machines of one kind, as each takes the step itself.
    """

    betas: tuple[float, float] = (0.95, 0.99)
    kind: Literal["muon"] = field(default="muon", kw_only=True)  # type: ignore[assignment]

    max_zero_stage: ClassVar[Literal[0, 1, 2, 3]] = 0

    def build(self, params: Iterable[torch.nn.Parameter], ema: EMAConfig) -> AveragingOptimizer:
        return AveragingMuon(params, self, ema)


class AveragingMuon(AveragingAdamW):
    """AdamW that averages, and takes Muon's step where `place_matrices` found matrices.

    AdamW's first moment is the momentum, so a checkpoint has the same state keys as AdamW's.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], config: OptimizerConfig, ema: EMAConfig) -> None:
        super().__init__(params, config, ema)
        self._matrices: dict[Tensor, dict[tuple[int, int], list[int]]] = {}
        self._dtype = torch.float32

    def place_matrices(
        self, parameter: Tensor, named: Iterable[tuple[str, int, Sequence[int]]], dtype: torch.dtype
    ) -> None:
        """named: (name, first element in `parameter`, shape) of each tensor in the flat `parameter`; dtype: in which
        steps are made orthogonal. Raises UserError where none is a matrix of a block."""
        places = defaultdict[tuple[int, int], list[int]](list)
        for name, start, shape in named:
            if is_matrix_of_block(name, shape):
                places[shape[0], math.prod(shape[1:])].append(start)
        if not places:
            raise UserError("optimizer.kind: muon is for matrices in blocks, and this network has none; choose adamw")
        self._matrices[parameter], self._dtype = dict(places), dtype

    def update(self, parameters: list[Tensor]) -> None:
        before = [parameter.detach().clone() for parameter in parameters]
        super().update(parameters)
        group = self.param_groups[0]
        rate, beta, decay = group["lr"], group["betas"][0], group["weight_decay"]
        for parameter, old in zip(parameters, before, strict=True):
            assert parameter.grad is not None
            assert parameter in self._matrices, "an engine that cuts matrices would take AdamW's steps without a word"
            weights = parameter.detach()
            ahead = torch.lerp(parameter.grad, self.state[parameter]["exp_avg"], beta).to(self._dtype)
            for (rows, columns), starts in self._matrices[parameter].items():
                size = rows * columns
                steps = orthogonal(
                    torch.stack([ahead[start : start + size] for start in starts]).view(-1, rows, columns)
                )
                length = rate * RMS * math.sqrt(max(rows, columns))
                for start, step in zip(starts, steps.float().flatten(1), strict=True):
                    at = slice(start, start + size)
                    torch.add(old[at].mul_(1 - rate * decay), step, alpha=-length, out=weights[at])


def is_matrix_of_block(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter of this name is one of a block, a numbered member of a module list, and not a vector."""
    parts = name.split(".")
    return len(shape) > 1 and "embedding" not in parts and any(part.isdigit() for part in parts)


def orthogonal(matrices: Tensor) -> Tensor:
    """[N, rows, columns], each about U V^T of its own singular value decomposition U S V^T, by Newton and Schulz's
    iteration (Jordan 2024): many small matrices of one shape in each product."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.float().square().sum((1, 2), keepdim=True).sqrt().clamp_(min=1e-7).to(x.dtype)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
