"""The chunks of an evaluation, each computed alone and stored: samples' features, likelihoods, losses, restorations.

`run_task(plan, task)` does one, wherever it is called. What comes out depends on the numbers of the chunk's samples, on
the batch and on the number of threads, all of which the plan fixes. Two threads that call it keep a process busy: one
chunk is read or stored while another one is computed.
"""

from __future__ import annotations

import contextlib
import io
import math
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoreray.data.errors import UserError
from scoreray.data.reading.samples import Samples
from scoreray.data.storage.store import NotFound, Store, open_store
from scoreray.sampling.evaluation.plan import EvaluationPlan, Task, labels_of
from scoreray.sampling.evaluation.protocol import PROJECTIONS, restoration, trace_of
from scoreray.sampling.guidance.inverse import LinearInverse
from scoreray.sampling.measures import ais, distances, features
from scoreray.sampling.measures.features import IDENTITY_VALUES, Extract, ExtractorChoice
from scoreray.sampling.measures.likelihood import dequantize, log_likelihood
from scoreray.sampling.model.load import LoadedDenoiser, LoadedMachine, load_model
from scoreray.sampling.offline.generate import prepare
from scoreray.sampling.samplers.noise import SAMPLING_SEED, SampleNoise
from scoreray.sampling.samplers.sample import sample
from scoreray.trainer.diffusion import noise
from scoreray.trainer.networks.rbm import RBM
from scoreray.trainer.step import to_uint8, to_unit_range

LOSS_STREAM = 1 << 22  # noise of the loss, far from a sampler's draws
NUM_BETAS = 500
AIS_IMAGES = 1024  # whose energies are told beside a partition function
KEPT_PICTURES = 8  # of restorations
_computing = threading.Lock()  # the number of torch's threads is the process's, and two would halve each other's speed

Rows = tuple[Tensor, Tensor, Tensor]  # samples of the reference, labels, numbers int64


def run_task(plan: EvaluationPlan, task: Task) -> int:
    """Compute and store one chunk, unless it is there; returns its number of samples."""
    store = plan.folder(task.stage)
    if not store.exists(task.key):
        compute = TASKS[task.stage]
        rows = _rows(plan, task)
        with _computing, fixed_threads(plan.settings.threads):
            found = compute(plan, task, rows)
        put_arrays(store, task.key, found)
    return task.size


@contextlib.contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """torch on so many threads: sums are cut by threads, so their number is part of a result."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def put_arrays(store: Store, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes named arrays as one object."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    store.put(key, buffer.getvalue())


def get_arrays(store: Store, key: str) -> dict[str, np.ndarray]:
    """Reads them back."""
    with np.load(io.BytesIO(store.get(key)), allow_pickle=False) as file:
        return dict(file)


def keeps_values(plan: EvaluationPlan) -> bool:
    """Whether all samples themselves are kept: few values, for a density estimate."""
    return math.prod(plan.info.image_shape) <= IDENTITY_VALUES


def _reference(plan: EvaluationPlan, task: Task, rows: Rows) -> dict[str, np.ndarray]:
    images, _, _ = rows
    found = _extracted(plan, images)
    found.pop("logits", None)
    if keeps_values(plan):
        found["values"] = images.numpy()
    return found


def _samples(plan: EvaluationPlan, task: Task, rows: Rows) -> dict[str, np.ndarray]:
    request, parts = plan.request, []
    draw = prepare(_model(plan), request)
    for first in range(task.first, task.last, request.batch_size):
        last = min(first + request.batch_size, task.last)
        parts.append(draw(first, labels_of(plan, first, last)))
    samples = torch.cat(parts)
    if plan.manifest.dtype == "uint8":
        samples = to_uint8(samples)
    found = _extracted(plan, samples)
    logits = found.pop("logits", None)
    if logits is not None:
        sums = [distances.ClassSums.of(batch) for batch in torch.from_numpy(logits).split(request.batch_size)]
        found["counts"] = np.array([one.count for one in sums])
        found["probabilities"] = torch.stack([one.probabilities for one in sums]).numpy()
        found["negentropies"] = np.array([one.negentropy for one in sums])
    if keeps_values(plan):
        found["values"] = samples.numpy()
    if task.first == 0:
        found["pictures"] = samples.numpy()
    return found


def _extracted(plan: EvaluationPlan, samples: Tensor) -> dict[str, np.ndarray]:
    """Features, logits and projections of samples, in batches of the plan's size."""
    extract = _extractor(plan)
    found: dict[str, list[Tensor]] = {"features": [], "logits": [], "projections": []}
    lines = _lines(samples[0].numel())
    with torch.no_grad():
        for batch in samples.split(plan.settings.batch_size):
            rows, logits = extract(batch.to(plan.settings.device))
            found["features"].append(rows.cpu())
            if logits is not None:
                found["logits"].append(logits.cpu())
            found["projections"].append(to_unit_range(batch).flatten(1) @ lines.T)
    return {name: torch.cat(parts).numpy() for name, parts in found.items() if parts}


def _likelihood(plan: EvaluationPlan, task: Task, rows: Rows) -> dict[str, np.ndarray]:
    images, labels, seeds = rows
    denoiser = _denoiser(plan)
    if plan.manifest.dtype == "uint8":
        x, width = dequantize(images, seeds)
    else:
        x, width = images, math.nan
    low, high = plan.info.sigma_range
    found = log_likelihood(
        denoiser,
        x.to(plan.settings.device),
        sigma_min=low,
        sigma_max=high,
        trace=trace_of(plan.info),
        seeds=seeds,
        rtol=plan.settings.rtol,
        atol=plan.settings.rtol,
        data_mean=_mean(plan),
        class_labels=labels.to(plan.settings.device) if plan.info.classes else None,
    )
    nats = found.nats.double().cpu()
    bits = found.bits_per_dim(width).double().cpu() if width == width else nats * math.nan
    return {"nats": nats.numpy(), "bpd": bits.numpy(), "nfe": np.array(found.nfe)}


def _loss(plan: EvaluationPlan, task: Task, rows: Rows) -> dict[str, np.ndarray]:
    """Denoising error per dimension [n, levels] at the fixed levels; a sample's noise is the same at each of them."""
    images, labels, seeds = rows
    denoiser, device = _denoiser(plan), plan.settings.device
    x0 = to_unit_range(images)
    errors = []
    with torch.no_grad():
        for part in torch.arange(len(x0)).split(plan.settings.batch_size):
            z = noise.normal(SAMPLING_SEED, seeds[part], tuple(x0.shape[1:]), stream=LOSS_STREAM).to(device)
            clean, classes = x0[part].to(device), labels[part].to(device) if plan.info.classes else None
            levels = []
            for sigma in plan.sigmas:
                denoised = denoiser(clean + sigma * z, torch.full((len(part),), sigma, device=device), classes)
                levels.append((denoised - clean).double().flatten(1).square().mean(1))
            errors.append(torch.stack(levels, 1).cpu())
    return {"errors": torch.cat(errors).numpy()}


def _restoration(plan: EvaluationPlan, task: Task, rows: Rows) -> dict[str, np.ndarray]:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    images, labels, _ = rows
    settings, info = plan.settings, plan.info
    x0 = to_unit_range(images).to(settings.device)
    operator = restoration(settings.restoration, info.image_shape)
    observed = operator.apply(x0)
    denoiser = LinearInverse(_denoiser(plan), operator, observed, data_std=info.config.denoiser.resolved_sigma_data)
    request = plan.request
    assert request.steps is not None
    assert request.grid is not None
    assert request.sampler is not None
    seeds = request.sample_seeds(task.first, task.last).to(settings.device)
    sigmas = info.sigmas(request.steps, request.grid)
    x = SampleNoise(seeds).normal(x0.shape, torch.float32, settings.device) * float(sigmas[0])
    classes = labels.to(settings.device) if info.classes else None
    restored = sample(denoiser, x, sigmas, sampler=request.sampler, generator=seeds, class_labels=classes,
                      **request.options).clamp(-1, 1)  # fmt: skip
    psnr = peak_signal_noise_ratio(restored, x0, data_range=2.0, reduction="none", dim=(1, 2, 3))
    ssim: Any = structural_similarity_index_measure(
        restored, x0, data_range=2.0, reduction="none", kernel_size=_ssim_window(x0)
    )
    shown = operator.transpose(observed) * (1 / operator.transpose(operator.apply(torch.ones_like(x0))).clamp_min(1e-6))
    pictures = torch.stack([x0, shown, restored], 1)[:KEPT_PICTURES]
    return {
        "psnr": psnr.double().cpu().numpy(),
        "ssim": ssim.double().cpu().numpy().reshape(-1),
        "pictures": to_uint8(pictures.cpu()).numpy() if task.number == 0 else np.zeros(0, np.uint8),
    }


def _ssim_window(images: Tensor) -> int:
    """SSIM's usual window of 11 pixels, smaller (odd) for images that it would not fit into."""
    side = min(images.shape[2:])
    return min(11, side - 1 + side % 2)


def _ais(plan: EvaluationPlan, task: Task, rows: Rows) -> dict[str, np.ndarray]:
    """ln Z of the energy by annealing, and the energies of the reference: log p = -E - ln Z."""
    model = _model(plan)
    betas = torch.linspace(0, 1, NUM_BETAS + 1, dtype=torch.float64)
    seeds = torch.arange(task.first, task.last)
    images, _, places = rows
    x = to_unit_range(images)
    if isinstance(model, LoadedMachine):
        machine = model.machine
        path: ais.Path = ais.RBMPath(machine) if isinstance(machine, RBM) else ais.GaussianRBMPath(machine)
        energies = machine.free_energy(machine.visible(x, SAMPLING_SEED, places))
    else:
        shape, sigma = plan.info.image_shape, ais_sigma(plan)
        std = math.sqrt(model.sigma_data**2 + sigma**2)

        def energy(flat: Tensor) -> Tensor:
            return model.energy(flat.view(-1, *shape).float(), sigma).double()

        path = ais.GaussianPath(energy, math.prod(shape), std=1.5 * std, step_size=0.3 * sigma**2)
        noisy = x + sigma * noise.normal(SAMPLING_SEED, places, shape, stream=LOSS_STREAM)
        with torch.no_grad():
            energies = energy(noisy.flatten(1))
    found = ais.ais(path, betas, seeds)
    return {
        "log_weights": found.log_weights.detach().cpu().numpy(),
        "energies": energies.detach().double().cpu().numpy(),
    }


def ais_sigma(plan: EvaluationPlan) -> float:
    """The noise level at which a denoiser's energy is normalised: a quarter of the data's own spread."""
    return 0.25 * plan.info.config.denoiser.resolved_sigma_data


TASKS: dict[str, Callable[[EvaluationPlan, Task, Rows], dict[str, np.ndarray]]] = {
    "reference": _reference,
    "samples": _samples,
    "likelihood": _likelihood,
    "loss": _loss,
    "restoration": _restoration,
    "ais": _ais,
}


def _rows(plan: EvaluationPlan, task: Task) -> Rows:
    """What a task needs of the reference: samples are drawn from nothing, a partition function is one for all."""
    settings = plan.settings
    counts = {"reference": plan.num_reference, "likelihood": settings.likelihood_count, "loss": settings.loss_count,
              "restoration": settings.restoration_count, "ais": AIS_IMAGES, "samples": 0}  # fmt: skip
    numbers = plan.numbers(min(counts[task.stage], plan.manifest.num_samples))
    if task.stage != "ais":
        numbers = numbers[task.first : task.last]
    images, labels = _reference_set(settings.reference).read(numbers)
    if tuple(plan.manifest.classes) != plan.info.classes:
        labels = torch.full_like(labels, -1)
    return images, labels, torch.from_numpy(numbers.astype(np.int64))


def _mean(plan: EvaluationPlan) -> Tensor | float:
    mean = torch.tensor(plan.manifest.mean, dtype=torch.float32)
    shape = plan.info.image_shape
    if mean.numel() == math.prod(shape):
        return mean.view(shape).to(plan.settings.device)
    return mean.view(-1, *[1] * (len(shape) - 1)).to(plan.settings.device)


@lru_cache(maxsize=1)
def _lines(dims: int) -> Tensor:
    return distances.directions(dims, PROJECTIONS).float()


@lru_cache(maxsize=1)
def _loaded(url: str, ema: str, device: str) -> LoadedDenoiser | LoadedMachine:
    return load_model(url, ema, device)


def _model(plan: EvaluationPlan) -> LoadedDenoiser | LoadedMachine:
    return _loaded(plan.info.url, plan.info.ema, plan.settings.device)


def _denoiser(plan: EvaluationPlan) -> LoadedDenoiser:
    model = _model(plan)
    assert isinstance(model, LoadedDenoiser)  # the plan has refused what does not fit a machine
    return model


@lru_cache(maxsize=1)
def _reference_set(url: str) -> Samples:
    return Samples(url)


@lru_cache(maxsize=1)
def _built(choice: ExtractorChoice, cache: str, device: str) -> Extract:
    data = b"" if choice.kind == "identity" else _weights(choice, open_store(cache))
    return features.build(choice, data, device)


def _weights(choice: ExtractorChoice, cache: Store) -> bytes:
    try:
        return cache.get(choice.key)
    except NotFound:
        raise UserError(
            f"{cache.url(choice.key)}: the extractor's weights are gone; start the evaluation again"
        ) from None


def _extractor(plan: EvaluationPlan) -> Extract:
    return _built(plan.extractor, plan.cache, plan.settings.device)
