"""Samples of restricted Boltzmann machines by block Gibbs, each chain with its own numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scoreray.data import checks
from scoreray.sampling.samplers.noise import SAMPLING_SEED
from scoreray.trainer.diffusion.noise import ChainNoise
from scoreray.trainer.networks.rbm import BoltzmannMachine

GIBBS = "gibbs"  # the word that chooses it where samplers are chosen
NUM_SWEEPS = 1000  # by default: a sweep costs two small matrix products


def gibbs(machine: BoltzmannMachine, seeds: Tensor | Sequence[int], num_sweeps: int = NUM_SWEEPS) -> Tensor:
    """Visible units [B, num_visible] after `num_sweeps` sweeps from noise; a row depends on its seed alone.

    Chains that are too short are not yet at the machine's distribution; hidden, then visible layer (Hinton 2002).
    """
    checks.at_least("gibbs", 1, num_sweeps=num_sweeps)
    positions = torch.as_tensor(seeds, dtype=torch.int64, device=machine.visible_bias.device)
    source = ChainNoise(SAMPLING_SEED, positions)
    return machine.gibbs(machine.fresh(source), num_sweeps, source)
