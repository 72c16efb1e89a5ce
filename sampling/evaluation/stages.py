"""The chunks of an evaluation, each computed alone and stored: samples' features, likelihoods, losses, restorations.

`run_chunk(plan, chunk)` does one, wherever it is called. What comes out depends on the numbers of the chunk's samples,
on the batch and on the number of threads, all of which the plan fixes. Two threads that call it keep a process busy:
one chunk is read or stored while another one is computed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoreray.data.fields.normalisation import to_uint8, to_unit_range
from scoreray.sampling.evaluation.density_chunks import (
    bound_chunk,
    fisher_chunk,
    likelihood_of,
    own_likelihood_chunk,
    residual_chunk,
)
from scoreray.sampling.evaluation.ensembles import condition_hashes, ensemble_chunk, num_ensembles
from scoreray.sampling.evaluation.importance_chunks import NUM_BETAS, importance_chunk
from scoreray.sampling.evaluation.loaded import fixed_threads, loaded_denoiser, loaded_model, once
from scoreray.sampling.evaluation.sample_chunks import (
    KEPT_PICTURES,
    RECONSTRUCTION,
    codes_chunk,
    condition_rule,
    reconstruction_chunk,
    reconstructs,
    records_of,
    reference_chunk,
    sample_chunk,
)
from scoreray.sampling.guidance.inverse import LinearInverse
from scoreray.sampling.guidance.operators import BRIGHTNESS, restoration_task
from scoreray.sampling.measures import ais
from scoreray.sampling.measures.held_out import (
    LOSS_STREAM,
    HeldOut,
    denoising_errors,
    read_held_out,
    trace_of,
)
from scoreray.sampling.measures.similarity import image_similarity
from scoreray.sampling.metrics.chunks import (
    AnnealingChunk,
    ChunkArrays,
    LikelihoodChunk,
    LossChunk,
    RestorationChunk,
    write_chunk,
)
from scoreray.sampling.metrics.plan import Chunk, EvaluationInputs, EvaluationPlan
from scoreray.sampling.metrics.registry import metric_of
from scoreray.sampling.metrics.stored import StoredChunks
from scoreray.sampling.model.load import LoadedDenoiser, LoadedMachine
from scoreray.sampling.samplers.noise import SAMPLING_SEED, SampleNoise
from scoreray.sampling.samplers.sample import sample
from scoreray.trainer.diffusion import noise
from scoreray.trainer.networks.rbm import RBM, GaussianBernoulliRBM

CHUNK = 256  # samples, about: a multiple of the batch
LIKELIHOOD_CHUNK = 16  # each takes hundreds of passes
REFERENCE_BYTES, MOST_REFERENCE = 64 << 20, 1024  # of a chunk of the reference, which costs less a sample
AIS_IMAGES = 1024  # whose energies stand beside a partition function

_computing = threading.Lock()  # the number of torch's threads is the process's, and two would halve each other's speed


@dataclass(frozen=True)
class Stage:
    """One kind of chunk.

    count: its rows in all. chunk_size: rows of a chunk, about, rounded up to whole batches unless `exact`.
    protocol: the settings on which its numbers depend, as the record has them. numbers: which samples of the reference
    a chunk reads, before it is computed.
    """

    count: Callable[[EvaluationInputs], int]
    chunk_size: Callable[[EvaluationInputs], int]
    protocol: Callable[[EvaluationInputs], dict[str, Any]]
    compute: Callable[[EvaluationPlan, Chunk, HeldOut], ChunkArrays]
    numbers: Callable[[EvaluationInputs, Chunk], np.ndarray]
    exact: bool = False

    def chunks(self, name: str, inputs: EvaluationInputs) -> list[Chunk]:
        count, size, batch = self.count(inputs), self.chunk_size(inputs), inputs.settings.batch_size
        size = size if self.exact or size < batch else -(-size // batch) * batch
        return [Chunk(name, i, first, min(first + size, count)) for i, first in enumerate(range(0, count, size))]


def stages_of(plan: EvaluationPlan) -> list[str]:
    """The stages whose chunks a plan's metrics are computed from, in their order."""
    wanted = {stage for name in plan.metrics for stage in metric_of(name).stages}
    return [stage for stage in STAGES if stage in wanted]


def stored_chunks(plan: EvaluationPlan) -> StoredChunks:
    """The chunks of a plan, for metrics and pages to read."""
    return StoredChunks(plan, {name: stage.chunks(name, plan.inputs) for name, stage in STAGES.items()})


def run_chunk(plan: EvaluationPlan, chunk: Chunk) -> int:
    """Compute and store one chunk, unless it is stored already; returns its number of samples."""
    store, inputs = plan.folder(chunk.stage), plan.inputs
    if not store.exists(chunk.key):
        stage = STAGES[chunk.stage]
        reference = once("reference", inputs.reference.sha256, lambda: inputs.reference)
        rows = read_held_out(reference, stage.numbers(inputs, chunk), inputs.info)
        with _computing, fixed_threads(inputs.settings.threads):
            found = stage.compute(plan, chunk, rows)
        write_chunk(store, chunk.key, found)
    return chunk.size


def _own_rows(inputs: EvaluationInputs, chunk: Chunk) -> np.ndarray:
    return inputs.numbers(STAGES[chunk.stage].count(inputs))[chunk.first : chunk.last]


def _likelihood(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> LikelihoodChunk:
    found = likelihood_of(plan.inputs, loaded_denoiser(plan.inputs), rows)
    return LikelihoodChunk(found.nats.numpy(), found.bpd.numpy(), np.array(found.nfe))


def _loss(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> LossChunk:
    inputs, settings = plan.inputs, plan.inputs.settings
    return LossChunk(
        denoising_errors(loaded_denoiser(inputs), rows, inputs.sigmas, settings.batch_size, settings.device).numpy()
    )


def _restoration(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> RestorationChunk:
    inputs = plan.inputs
    if reconstructs(inputs.info, inputs.settings.restoration):
        return reconstruction_chunk(plan, chunk, rows)
    settings, info, request = inputs.settings, inputs.info, inputs.request
    x0 = to_unit_range(rows.images).to(settings.device)
    operator = restoration_task(settings.restoration, info.image_shape)
    observed = operator.apply(x0)
    sigma_data = info.config.denoiser.resolved_sigma_data
    denoiser = LinearInverse(loaded_denoiser(inputs), operator, observed, data_std=sigma_data)
    assert request.steps is not None
    assert request.grid is not None
    assert request.sampler is not None
    seeds = request.sample_seeds(chunk.first, chunk.last).to(settings.device)
    sigmas = info.sigmas(request.steps, request.grid)
    x = SampleNoise(seeds).normal(x0.shape, torch.float32, settings.device) * float(sigmas[0])
    given = None if rows.condition is None else rows.condition.to(settings.device)
    restored = sample(denoiser, x, sigmas, sampler=request.sampler, generator=seeds, condition=given,
                      **request.options).clamp(-1, 1)  # fmt: skip
    psnr, ssim = image_similarity(restored, x0)
    mse = (restored - x0).double().flatten(1).square().mean(1).cpu()
    shown = operator.transpose(observed) * (1 / operator.transpose(operator.apply(torch.ones_like(x0))).clamp_min(1e-6))
    pictures = torch.stack([x0, shown, restored], 1)[:KEPT_PICTURES]
    return RestorationChunk(
        psnr.numpy(),
        ssim.numpy(),
        to_uint8(pictures.cpu()).numpy() if chunk.number == 0 else np.zeros(0, np.uint8),
        mse.numpy(),
    )


def _num_restored(inputs: EvaluationInputs) -> int:
    """An autoencoder reconstructs all of the reference that is read, by a forward pass; a restoration takes many."""
    restored = inputs.at_most(inputs.settings.restoration_count)
    return inputs.num_reference if inputs.info.is_autoencoder else restored


def _ais(plan: EvaluationPlan, chunk: Chunk, rows: HeldOut) -> AnnealingChunk:
    """ln Z of the energy by annealing, and the energies of the reference: log p = -E - ln Z."""
    model, x = loaded_model(plan.inputs), rows.x0
    betas = torch.linspace(0, 1, NUM_BETAS + 1, dtype=torch.float64)
    if isinstance(model, LoadedMachine):
        machine = model.machine
        assert isinstance(machine, RBM | GaussianBernoulliRBM)
        path: ais.Path = ais.machine_path(machine)
        energies = machine.free_energy(machine.visible(x, SAMPLING_SEED, rows.numbers))
    else:
        assert isinstance(model, LoadedDenoiser)  # the plan has refused autoencoders
        shape = plan.inputs.info.image_shape
        sigma = 0.25 * plan.inputs.info.config.denoiser.resolved_sigma_data  # where a denoiser's energy is normalised
        std = math.sqrt(model.sigma_data**2 + sigma**2)

        def energy(flat: Tensor) -> Tensor:
            return model.energy(flat.view(-1, *shape).float(), sigma).double()

        path = ais.GaussianPath(energy, math.prod(shape), std=1.5 * std, step_size=0.3 * sigma**2)
        noisy = x + sigma * noise.normal(SAMPLING_SEED, rows.numbers, shape, stream=LOSS_STREAM)
        with torch.no_grad():
            energies = energy(noisy.flatten(1))
    found = ais.ais(path, betas, torch.arange(chunk.first, chunk.last))
    return AnnealingChunk(found.log_weights.detach().cpu().numpy(), energies.detach().double().cpu().numpy())


def _of_latents(inputs: EvaluationInputs) -> dict[str, Any]:
    """What a record says of numbers that are of latents: their field, and the autoencoder's hash."""
    info = inputs.info
    if info.encoding is None or info.target is None:
        return {}
    return {"of": {"latents": info.target.name, "sha256": info.encoding.sha256}}


def _reconstructs(inputs: EvaluationInputs) -> bool:
    return reconstructs(inputs.info, inputs.settings.restoration)


def _code_protocol(inputs: EvaluationInputs) -> dict[str, Any]:
    """How codes are made, beside their model."""
    is_denoiser = not (inputs.info.is_machine or inputs.info.is_autoencoder)
    return {"codes": asdict(inputs.settings.code_options())} if is_denoiser else {}


def _of_densities(inputs: EvaluationInputs, count: int) -> dict[str, Any]:
    """Of what density numbers are, and of how many of the reference's samples."""
    low, high = inputs.info.sigma_range
    dequantize = inputs.info.encoding is None and inputs.manifest.dtype == "uint8"
    return {
        "count": inputs.at_most(count),
        "sigma_min": low,
        "sigma_max": high,
        "dequantize": dequantize,
        **_of_latents(inputs),
    }


def _at_levels(inputs: EvaluationInputs) -> dict[str, Any]:
    """How errors at the fixed noise levels are measured."""
    return {
        "count": inputs.at_most(inputs.settings.loss_count),
        "sigma_min": inputs.info.sigma_range[0],
        "sigma_max": inputs.info.sigma_range[1],
        "levels": len(inputs.sigmas),
        "sigma_data": inputs.info.config.denoiser.resolved_sigma_data,
        **_of_latents(inputs),
    }


def _stage_of_levels(compute: Callable[[EvaluationPlan, Chunk, HeldOut], ChunkArrays]) -> Stage:
    """A stage of errors at the fixed noise levels."""
    return Stage(
        count=lambda inputs: inputs.at_most(inputs.settings.loss_count),
        chunk_size=lambda inputs: CHUNK,
        protocol=_at_levels,
        compute=compute,
        numbers=_own_rows,
    )


STAGES: dict[str, Stage] = {
    "reference": Stage(
        count=lambda inputs: inputs.num_reference,
        chunk_size=lambda inputs: max(
            CHUNK, min(MOST_REFERENCE, REFERENCE_BYTES // (4 * math.prod(inputs.manifest.shape)))
        ),
        protocol=lambda inputs: {
            "url": inputs.reference.url,
            "name": inputs.manifest.name,
            "sha256": inputs.reference.sha256,
            "count": inputs.num_reference,
            "of": inputs.manifest.num_samples,
        },
        compute=reference_chunk,
        numbers=_own_rows,
    ),
    "samples": Stage(
        count=lambda inputs: inputs.settings.count,
        chunk_size=lambda inputs: CHUNK,
        protocol=lambda inputs: {"count": inputs.settings.count, "classes": condition_rule(inputs.info, inputs)},
        compute=sample_chunk,
        numbers=lambda inputs, chunk: np.unique(records_of(inputs, chunk)),
    ),
    "ensembles": Stage(
        count=num_ensembles,
        chunk_size=lambda inputs: max(1, CHUNK // inputs.settings.per_condition),
        protocol=lambda inputs: {
            "count": num_ensembles(inputs),
            "members": inputs.settings.per_condition,
            "conditions": condition_hashes(inputs),
        },
        compute=ensemble_chunk,
        numbers=_own_rows,
        exact=True,
    ),
    "likelihood": Stage(
        count=lambda inputs: inputs.at_most(inputs.settings.likelihood_count),
        chunk_size=lambda inputs: LIKELIHOOD_CHUNK,
        protocol=lambda inputs: {
            **_of_densities(inputs, inputs.settings.likelihood_count),
            "solver": "rk45",
            "rtol": inputs.settings.rtol,
            "trace": trace_of(inputs.info.image_shape),
            "probes": 1,
        },
        compute=_likelihood,
        numbers=_own_rows,
    ),
    "bound": Stage(
        count=lambda inputs: inputs.at_most(inputs.settings.likelihood_count),
        chunk_size=lambda inputs: CHUNK,
        protocol=lambda inputs: _of_densities(inputs, inputs.settings.likelihood_count),
        compute=bound_chunk,
        numbers=_own_rows,
    ),
    "loss": _stage_of_levels(_loss),
    "fisher": _stage_of_levels(fisher_chunk),
    "residuals": _stage_of_levels(residual_chunk),
    "own_likelihood": Stage(
        count=lambda inputs: inputs.at_most(inputs.settings.likelihood_count),
        chunk_size=lambda inputs: LIKELIHOOD_CHUNK,
        protocol=lambda inputs: {
            **_of_densities(inputs, inputs.settings.likelihood_count),
            "rtol": inputs.settings.rtol,
            "trace": trace_of(inputs.info.image_shape),
        },
        compute=own_likelihood_chunk,
        numbers=_own_rows,
    ),
    "restoration": Stage(
        count=_num_restored,
        chunk_size=lambda inputs: CHUNK if inputs.info.is_autoencoder else inputs.settings.batch_size,
        protocol=lambda inputs: {
            "task": RECONSTRUCTION if _reconstructs(inputs) else inputs.settings.restoration,
            "count": _num_restored(inputs),
            **(_code_protocol(inputs) if _reconstructs(inputs) and not inputs.info.is_autoencoder else {}),
            **({"brightness": list(BRIGHTNESS)} if inputs.settings.restoration == "gray" else {}),
        },
        compute=_restoration,
        numbers=_own_rows,
        exact=True,
    ),
    "importance": Stage(
        count=lambda inputs: inputs.at_most(inputs.settings.likelihood_count),
        chunk_size=lambda inputs: inputs.settings.likelihood_count,
        protocol=lambda inputs: {
            "count": inputs.at_most(inputs.settings.likelihood_count),
            **({"chains": inputs.settings.chains} if inputs.info.is_machine else {}),
        },
        compute=importance_chunk,
        numbers=_own_rows,
        exact=True,
    ),
    "ais": Stage(
        count=lambda inputs: inputs.settings.chains,
        chunk_size=lambda inputs: inputs.settings.chains,
        protocol=lambda inputs: {"chains": inputs.settings.chains},
        compute=_ais,
        numbers=lambda inputs, chunk: inputs.numbers(inputs.at_most(AIS_IMAGES)),  # one partition function for all
        exact=True,
    ),
    "codes": Stage(
        count=lambda inputs: inputs.at_most(inputs.settings.codes_count),
        chunk_size=lambda inputs: CHUNK,
        protocol=lambda inputs: {
            "count": inputs.at_most(inputs.settings.codes_count),
            **_code_protocol(inputs),
            **_of_latents(inputs),
        },
        compute=codes_chunk,
        numbers=_own_rows,
    ),
}
"""What metrics are computed from, in the order in which it is computed."""
