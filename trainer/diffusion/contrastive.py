"""Contrastive divergence: energy down at the data, up where short chains of the model end (Hinton 2002).

Chains begin at the data (CD), at noise (short-run; Nijkamp 2019) or where they ended last (persistent; Tieleman 2008).
They move by block Gibbs where the model has it (`rbm`), else by Langevin dynamics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from scoreray.data import checks
from scoreray.trainer.diffusion import noise
from scoreray.trainer.diffusion.buffers import ExactBuffers
from scoreray.trainer.diffusion.condition import AnyCondition
from scoreray.trainer.diffusion.denoiser import Denoiser, like
from scoreray.trainer.energies.langevin import langevin_chain


class GibbsModel(Protocol):
    def free_energy(self, v: Tensor) -> Tensor: ...

    def gibbs(self, v: Tensor, num_sweeps: int, source: torch.Generator | noise.ChainNoise | None = None) -> Tensor: ...


def contrastive_loss(energy: Callable[[Tensor], Tensor], data: Tensor, negatives: Tensor) -> Tensor:
    """E(data) - E(negatives), [B]; its mean has the gradient of -ln p(data) where the negatives follow the model."""
    return energy(data) - energy(negatives.detach())


def gibbs_divergence(
    model: GibbsModel,
    data: Tensor,
    start: Tensor,
    num_sweeps: int = 1,
    source: torch.Generator | noise.ChainNoise | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss [B], where the chains end), by block Gibbs from `start`: the data for CD-k, their own ends for PCD."""
    negatives = model.gibbs(start, num_sweeps, source)
    return contrastive_loss(model.free_energy, data, negatives), negatives


def denoiser_divergence(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    condition: AnyCondition,
    noises: Tensor,
    *,
    step_size: float,
    noise_scale: float = 1.0,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Contrastive divergence of an energy denoiser at noisy data x [B, ...]: (an estimate of the denoising error [B],
    where the chains end [B, ...]).

    Langevin steps of e = step_size sigma^2, as many as noises [B, K, ...] has, begin at `start` (x for None). The
    energy difference times 2 sigma^4 / (K e d) has, for small steps from the data, the gradient of the implicit score
    matching error (Hyvarinen 2007): so weightings mean the same as for other objectives. Its value is not that error.
    """
    with torch.no_grad():
        score = lambda y: denoiser.score(y, sigma, condition)  # noqa: E731
        e = step_size * like(sigma, x) ** 2
        negatives = langevin_chain(score, x if start is None else start, e, noises, noise_scale)
    difference = denoiser.energy(x, sigma, condition) - denoiser.energy(negatives, sigma, condition)
    return difference * 2 * sigma**2 / (step_size * noises.shape[1] * x[0].numel()), negatives


class PersistentChains(ExactBuffers):
    """A pool of `count` chains [count, *shape] that continue from where they ended (Tieleman 2008; Du 2019).

    The chain of a sample is its position in the run modulo `count`, and it restarts with probability `restart`, by a
    number that (seed, position) fixes. So what a chain does is the same in any micro-batch and at any world size. Every
    rank holds the whole pool, a buffer like any other for checkpoints; `put` shares what the ranks' chains came to.
    `count` must be a multiple of the global batch, so that no chain is taken twice in a step.
    """

    pool: Tensor

    def __init__(self, count: int, shape: tuple[int, ...], restart: float = 0.0, seed: int = 0):
        super().__init__()
        checks.at_least("chains", 1, count=count)
        checks.fraction("chains", restart=restart)
        self.count, self.restart, self.seed = count, restart, seed
        self.register_buffer("pool", torch.zeros(count, *shape))

    def take(self, positions: Tensor, fresh: Tensor) -> Tensor:
        """The chains [B, ...] of the samples at `positions` int64 [B]; one that starts or restarts is at `fresh`."""
        u = noise.uniform(self.seed, positions, stream=noise.STREAM_RESTART)
        restarts = (u < self.restart) | (positions < self.count)
        return torch.where(like(restarts, fresh), fresh, self.pool[positions % self.count].to(fresh.dtype))

    @torch.no_grad()
    def put(self, positions: Tensor, chains: Tensor) -> None:
        """Keeps where the chains of `positions` ended, on every rank; each rank must bring as many."""
        chains = chains.detach().to(self.pool.dtype)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            positions, chains = _of_all_ranks(positions), _of_all_ranks(chains)
        self.pool[positions % self.count] = chains


def _of_all_ranks(rows: Tensor) -> Tensor:
    gathered = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)
