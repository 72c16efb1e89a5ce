"""What the demo measures of its model: samples with the estimates on their way, FID on held-out images, copies."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoreray.cluster.verbs.demo_page import Copies, Fid
from scoreray.data.fields.normalisation import to_uint8
from scoreray.sampling.evaluation.evaluate import Bar, evaluate
from scoreray.sampling.measures.distances import nearest
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.sampling.metrics.sample_metrics import COPY_RATIO
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.generate import Request, SampleConditions, prepare
from scoreray.sampling.samplers.sample import SamplerState

SHOWN = 8  # samples beside the images nearest to them


@dataclass
class _Estimates:
    """Collects the denoised estimate at each noise level of a sampler, the first one where it asks twice."""

    done: Callable[[int], None]
    lowest: float = float("inf")

    def __post_init__(self) -> None:
        self.frames: list[Tensor] = []

    def __call__(self, state: SamplerState) -> None:
        sigma = float(torch.as_tensor(state.sigma).max())
        if sigma < self.lowest:
            self.frames.append(to_uint8(state.denoised.cpu()))
            self.lowest = sigma
            self.done(1)


def drawn(
    checkpoint: str, count: int, steps: int, guidance: float, done: Callable[[int], None]
) -> tuple[Tensor, list[Tensor]]:
    """uint8 [count, C, H, W]: samples, and the estimates of them at each noise level, ending in the samples."""
    model, request = load(checkpoint), Request(count, sampler="dpmpp_2m", steps=steps, guidance=guidance)
    estimates = _Estimates(done)
    draw, conditions = prepare(model, request), SampleConditions(request, model.info)
    samples = to_uint8(draw(request.sample_seeds(0, count), conditions.of(0, count), callback=estimates).cpu())
    return samples, [*estimates.frames, samples]


def fid_of(checkpoint: str, held_out: str, count: int, classifier_images: int, guidance: float, bar: Bar) -> Fid:
    """FID of `count` samples, drawn in few steps, against held-out images; as `scoreray evaluate`, which it is."""
    settings = EvaluationSettings(
        checkpoint, held_out, metrics=("fid",), count=count, reference_count=10_000, sampler="dpmpp_2m", steps=8,
        guidance=guidance, classifier_images=classifier_images, threads=os.cpu_count() or 1,
    )  # fmt: skip
    found = evaluate(settings, bar=bar).record.metrics["fid"]
    return Fid(found.value, found.std_error, found.get("floor"), count)


def copies_of(samples: Tensor, trained_on: Tensor, held_out: Tensor) -> Copies:
    """How near samples are to the images that were trained on, in pixels, and held-out images, which are no copies.

    uint8 [N, C, H, W]. A copy is much nearer to one image than to the next (Yoon 2023). The shown ones are nearest.
    """
    images = trained_on.flatten(1).float()
    apart, numbers = nearest(samples.flatten(1).float(), images, 2)
    of_real, _ = nearest(held_out[: len(samples)].flatten(1).float(), images, 2)

    def share(distances: Tensor) -> float:
        return float((distances[:, 0] / distances[:, 1].clamp_min(1e-12) < COPY_RATIO).double().mean())

    closest = apart[:, 0].argsort()[:SHOWN]
    pairs = np.concatenate([samples[closest].numpy(), trained_on[numbers[closest, 0]].numpy()])
    return Copies(share(apart), share(of_real), float(apart[:, 0].median()), float(of_real[:, 0].median()), pairs)
