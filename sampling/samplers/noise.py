"""Where a sampler's normal numbers come from: each row's own stream, or a torch generator."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.trainer.diffusion import noise as counter

SAMPLING_SEED = 0x5C0E
"""Key of every sampling stream, so that a sample's numbers are not those of a training image at the same position."""

AHEAD = 1 << 18
"""Normal numbers that are drawn at once where that many are expected: enough to fill several threads."""


class Noise(Protocol):
    """What a stochastic sampler draws from."""

    def like(self, x: Tensor) -> Tensor:
        """Standard normal numbers of the shape, dtype and device of `x` [B, ...]; a new draw at every call."""


class Acceptance:
    """How many proposals the Metropolis samplers made, of all rows together, and how many were accepted."""

    def __init__(self) -> None:
        self.proposed = 0
        self._accepted: Tensor | int = 0  # on the device: to read it at every step would wait for it

    @property
    def accepted(self) -> int:
        return int(self._accepted)

    @property
    def rate(self) -> float | None:
        """None where nothing was proposed: of other samplers."""
        return self.accepted / self.proposed if self.proposed else None

    def counts(self) -> dict[str, int]:
        """As a record stores them, to be added up; none where nothing was proposed."""
        return {"accepted": self.accepted, "proposed": self.proposed} if self.proposed else {}

    def decide(self, log_ratio: Tensor, normal: Tensor) -> Tensor:
        """Whether each row is accepted, with probability min(1, exp(log_ratio)), float64 [B]; NaN is rejected.

        normal: the row's own standard normal number [B], whose distribution function is uniform.
        """
        accepted = torch.special.log_ndtr(normal.double()) < log_ratio
        self._accepted = self._accepted + accepted.sum()
        self.proposed += len(accepted)
        return accepted


class SampleNoise:
    """Standard normal numbers in which row i depends on seeds[i] and the draw's number only.

    So a sample does not depend on who shared its batch, nor on the rank or the machine that drew it.
    `seeds` int64 [B], one for each sample. `draw` is the number of the next draw: 0 is the initial noise.
    `acceptance`: where samplers that accept or reject count, one of its own by default.
    """

    def __init__(self, seeds: Tensor | Sequence[int], draw: int = 0, acceptance: Acceptance | None = None) -> None:
        self.acceptance = acceptance or Acceptance()
        self.seeds = torch.as_tensor(seeds)
        if self.seeds.ndim != 1 or self.seeds.is_floating_point() or self.seeds.dtype == torch.bool:
            raise UserError(
                f"seeds of shape {list(self.seeds.shape)}, {self.seeds.dtype}: must be [B] integers, one per sample"
            )
        self.seeds = self.seeds.to(torch.int64)
        self.draw = draw
        self._expected = 0
        self._ahead: Iterator[Tensor] = iter(())
        self._kind: object = None

    def expect(self, draws: int) -> None:
        """Announces about how many draws follow: some are then made in one call, which is quicker."""
        self._expected = draws

    def normal(
        self, shape: Sequence[int], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Draws [B, ...] of `shape`; raises UserError when B is not the number of seeds."""
        if not len(shape) or shape[0] != len(self.seeds):
            raise UserError(f"noise of shape {list(shape)} for {len(self.seeds)} seeds: must have one row per seed")
        kind = (tuple(shape), dtype or torch.get_default_dtype(), torch.device(device))
        drawn = next(self._ahead, None) if kind == self._kind else None
        if drawn is None:
            self._ahead, self._kind = iter(self._draws(*kind)), kind
            drawn = next(self._ahead)
        self.draw += 1
        self._expected -= 1
        return drawn

    def _draws(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The next draws, [n, *shape]: as many as are expected, up to AHEAD numbers in all; one at least."""
        self.seeds = self.seeds.to(device)
        n = max(1, min(self._expected, AHEAD // max(1, math.prod(shape))))
        streams = range(self.draw, self.draw + n)
        return counter.normals(SAMPLING_SEED, self.seeds, shape[1:], streams=streams, dtype=dtype, device=device)

    def like(self, x: Tensor) -> Tensor:
        return self.normal(x.shape, x.dtype, x.device)


class TorchNoise:
    """Standard normal numbers of a torch.Generator (None: torch's global one), for use off line."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def like(self, x: Tensor) -> Tensor:
        device = self.generator.device if self.generator is not None else x.device
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype, device=device).to(x.device)


def acceptance_of(noise: Noise) -> Acceptance:
    """Where a sampler counts what it accepts: the source's own, as callers keep that; else one that nobody reads."""
    found = getattr(noise, "acceptance", None)
    return found if isinstance(found, Acceptance) else Acceptance()


def as_noise(generator: Noise | torch.Generator | Tensor | Sequence[int] | None) -> Noise:
    """A sampler's source of noise from what `sample` takes: a Noise, a torch.Generator, one seed per row, or None.

    Seeds start at draw 1: draw 0 made the initial noise of the same samples.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return TorchNoise(generator)
    if hasattr(generator, "like"):
        return generator
    return SampleNoise(generator, draw=1)
