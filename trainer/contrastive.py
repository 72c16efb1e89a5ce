"""Contrastive divergence: energy down at the data, up where short chains of the model end (Hinton 2002).

Chains begin at the data (CD), at noise (short-run; Nijkamp 2019) or where they ended last (persistent; Tieleman 2008).
They move by block Gibbs where the model has it (`rbm`), else by Langevin dynamics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from scoreray.trainer import checks
from scoreray.trainer.buffers import ExactBuffers
from scoreray.trainer.denoiser import Denoiser, like


class GibbsModel(Protocol):
    def free_energy(self, v: Tensor) -> Tensor: ...

    def gibbs(self, v: Tensor, num_sweeps: int, generator: torch.Generator | None = None) -> Tensor: ...


def contrastive_loss(energy: Callable[[Tensor], Tensor], data: Tensor, negatives: Tensor) -> Tensor:
    """mean E(data) - mean E(negatives); it has the gradient of -ln p(data) where the negatives follow the model."""
    return energy(data).mean() - energy(negatives.detach()).mean()


def gibbs_divergence(
    model: GibbsModel, data: Tensor, start: Tensor, num_sweeps: int = 1, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, where the chains end) for block-Gibbs chains from `start`: the data for CD-k, their last end for PCD."""
    negatives = model.gibbs(start, num_sweeps, generator)
    return contrastive_loss(model.free_energy, data, negatives), negatives


def langevin_chain(score: Callable[[Tensor], Tensor], x: Tensor, step_size: Tensor | float, noises: Tensor) -> Tensor:
    """x after one step x + e score(x) + sqrt(2 e) z for each z of noises [B, K, ...]; no gradient flows through it.

    step_size e: a number, or a tensor that broadcasts against x [B, ...].
    """
    e = torch.as_tensor(step_size, dtype=x.dtype, device=x.device)
    x = x.detach()
    for z in noises.unbind(1):
        x = x + e * score(x).detach() + (2 * e).sqrt() * z
    return x


def denoiser_divergence(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    class_labels: Tensor | None,
    noises: Tensor,
    *,
    step_size: float,
    start: Tensor | None = None,
) -> Tensor:
    """Contrastive divergence of an energy denoiser at noisy data x [B, ...], as an estimate of the denoising error [B].

    Langevin steps of e = step_size sigma^2, as many as noises [B, K, ...] has, begin at `start` (x for None). The
    energy difference times 2 sigma^4 / (K e d) has, for small steps from the data, the gradient of the implicit score
    matching error (Hyvarinen 2007): so weightings mean here what they mean elsewhere. Its value is not that error.
    """
    with torch.no_grad():
        score = lambda y: denoiser.score(y, sigma, class_labels)  # noqa: E731
        negatives = langevin_chain(score, x if start is None else start, step_size * like(sigma, x) ** 2, noises)
    difference = denoiser.energy(x, sigma, class_labels) - denoiser.energy(negatives, sigma, class_labels)
    return difference * 2 * sigma**2 / (step_size * noises.shape[1] * x[0].numel())


class PersistentChains(ExactBuffers):
    """A pool of chains that go on where they ended: `take` a random part of it, run them, `put` them back (Du 2019).

    A share `restart` of what is taken begins anew, from `fresh` [count, ...] that the caller gives.
    """

    pool: Tensor

    def __init__(self, begin: Tensor, restart: float = 0.05):
        super().__init__()
        checks.fraction("chains", restart=restart)
        self.restart = restart
        self.register_buffer("pool", begin.detach().clone())

    def take(self, fresh: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(chains like fresh [count, ...], their places in the pool [count])."""
        count, device = len(fresh), self.pool.device
        checks.at_least("chains.pool", count, size=len(self.pool))
        places = torch.randperm(len(self.pool), generator=generator, device=device)[:count]
        anew = torch.rand(count, generator=generator, device=device) < self.restart
        return torch.where(like(anew, fresh), fresh, self.pool[places]), places

    def put(self, chains: Tensor, places: Tensor) -> None:
        """The chains' ends go where they were taken."""
        self.pool[places] = chains.detach().to(self.pool.dtype)
