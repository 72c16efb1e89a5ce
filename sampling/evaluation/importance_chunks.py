"""The chunk of importance sampling: weights of latents for samples of the reference, and an RBM's ln Z."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.sampling.evaluation.loaded import loaded_model
from scoreray.sampling.measures.ais import ais, machine_path
from scoreray.sampling.measures.held_out import HeldOut
from scoreray.sampling.measures.importance import (
    autoencoder_log_weights,
    log_gaussian,
    log_laplace,
    machine_log_weights,
)
from scoreray.sampling.metrics.chunks import ImportanceChunk
from scoreray.sampling.metrics.plan import Chunk, EvaluationInputs, EvaluationPlan
from scoreray.sampling.metrics.registry import all_options
from scoreray.sampling.model.load import LoadedAutoencoder, LoadedMachine
from scoreray.sampling.samplers.noise import SAMPLING_SEED
from scoreray.trainer.networks.rbm import MAX_ENUMERATED, RBM, GaussianBernoulliRBM

NUM_BETAS = 500


def importance_chunk(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> ImportanceChunk:
    inputs, model = plan.inputs, loaded_model(plan.inputs)
    options = all_options("iwae", inputs.settings.metric_options)
    if isinstance(model, LoadedMachine):
        machine = model.machine
        assert isinstance(machine, RBM | GaussianBernoulliRBM)
        v = machine.visible(rows.x0, SAMPLING_SEED, rows.numbers).to(machine.weight.device)
        weights = machine_log_weights(machine, v, rows.numbers, options["samples"], options["proposal"])
        log_z, error = log_partition(machine, inputs.settings.chains)
        return ImportanceChunk(weights.cpu().numpy(), np.array(log_z), np.array(error))
    assert isinstance(model, LoadedAutoencoder)  # the plan has refused what has no latent variables
    likelihood = decoder_of(inputs, options["scale"])
    parts = [
        autoencoder_log_weights(model, x.to(inputs.settings.device), numbers, options["samples"], likelihood,
                                options["proposal"]).cpu()
        for x, numbers in zip(*(one.split(inputs.settings.batch_size) for one in (rows.x0, rows.numbers)), strict=True)
    ]  # fmt: skip
    return ImportanceChunk(torch.cat(parts).numpy(), np.zeros(()), np.zeros(()))


def log_partition(machine: RBM | GaussianBernoulliRBM, chains: int) -> tuple[float, float]:
    """ln Z and its standard error: enumerated where a layer has few units, else by annealing."""
    layers = machine.weight.shape if isinstance(machine, RBM) else machine.weight.shape[1:]
    if min(layers) <= MAX_ENUMERATED:
        with torch.no_grad():
            return float(machine.log_partition()), 0.0
    found = ais(machine_path(machine), torch.linspace(0, 1, NUM_BETAS + 1, dtype=torch.float64), range(chains))
    return found.log_z, found.std_error


def decoder_of(inputs: EvaluationInputs, scale: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    """ln p(x | z) of an autoencoder, (x, decoded) -> [B]: Gaussian where it learned squares, Laplace where absolute
    errors, of the width whose evidence bound its kl_weight maximised unless `scale` is given. Raises UserError."""
    objective: Any = inputs.info.config.objective
    if scale is None and not objective.kl_weight > 0:
        raise UserError("iwae: objective.kl_weight is 0, which is no decoder's variance; give option iwae.scale")
    if objective.reconstruction == "l1":
        width = objective.kl_weight if scale is None else scale
        return lambda x, decoded: log_laplace(x, decoded, width)
    std = math.sqrt(objective.kl_weight / 2) if scale is None else scale
    return lambda x, decoded: log_gaussian(x, decoded, std)
