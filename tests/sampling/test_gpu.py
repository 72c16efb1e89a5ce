"""What a GPU draws is what a CPU draws: every sampler, fast forms, batches of unlike requests. Needs CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scoreray.data.fields.encoding import Encoding
from scoreray.sampling.measures.likelihood import log_likelihood
from scoreray.sampling.model import fast
from scoreray.sampling.model.decode import decode
from scoreray.sampling.model.load import LoadedDenoiser, load
from scoreray.sampling.model.row_queue import decode_queue
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import SAMPLERS, sample
from scoreray.sampling.samplers.sigmas import karras
from scoreray.sampling.service.batcher import StepBatcher
from scoreray.sampling.service.request import SampleRequest
from scoreray.trainer.encoders.base import Autoencoder
from scoreray.trainer.encoders.load import load_encoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL = {"ncsn": {"num_steps": 2}, "ncsnv2": {"num_steps": 2}}


@pytest.fixture(scope="module")
def url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_run(str(tmp_path_factory.mktemp("runs") / "small"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_what_it_draws_on_a_cpu(name: str, mixture: Callable[..., torch.Tensor]) -> None:
    ends = []
    for device in ("cpu", "cuda"):
        noise = SampleNoise(range(64))
        x = 20.0 * noise.normal((64, 2), torch.float64, device)
        denoiser = _moved(mixture, device)
        ends.append(
            sample(denoiser, x, karras(12, 0.02, 20.0), sampler=name, generator=noise, **SMALL.get(name, {})).cpu()
        )
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-6)


def _moved(mixture: Callable[..., torch.Tensor], device: str) -> Callable[..., torch.Tensor]:
    moved = type(mixture)()
    moved.means, moved.weights = moved.means.to(device), moved.weights.to(device)  # type: ignore[attr-defined]
    return moved


@pytest.mark.parametrize(("precision", "compile_"), [("fp32", "off"), ("bf16", "off"), ("fp32", "on"), ("bf16", "on")])
def test_fast_forms_are_close_to_the_exact_one(url: str, precision: str, compile_: str) -> None:
    exact: LoadedDenoiser = load(url, device="cuda")
    made = fast.make_fast(exact, 8, precision=precision, compile_=compile_)
    assert made.difference < fast.TOLERANCE
    x, sigma = torch.randn(5, 1, 8, 8, device="cuda"), torch.linspace(0.05, 10, 5, device="cuda")
    labels = torch.arange(5, device="cuda") % 3
    assert (made.denoiser(x, sigma, labels) - exact(x, sigma, labels)).abs().mean() < 0.05


def test_unlike_requests_in_one_batch_get_what_each_gets_alone(url: str) -> None:
    denoiser = load(url, device="cuda")
    requests = [
        SampleRequest(range(10 * i, 10 * i + 3), (1, 8, 8), karras(steps, 0.02, 20.0), name)
        for i, (name, steps) in enumerate((("heun", 6), ("dpmpp_2m", 9), ("ddpm", 7), ("euler", 11)))
    ]
    with StepBatcher(denoiser, max_batch=8, device="cuda") as batcher:
        together = [ticket.result(60) for ticket in [batcher.submit(request) for request in requests]]
    for request, drawn in zip(requests, together, strict=True):
        noise = SampleNoise(request.seeds)
        x = float(request.sigmas[0]) * noise.normal((3, 1, 8, 8), torch.float32, "cuda")
        alone = sample(denoiser, x, request.sigmas, sampler=request.sampler, generator=noise)
        assert (drawn.cuda() - alone).abs().max() < 1e-2


def test_likelihoods_are_the_cpu_s(url: str, tmp_path: Path) -> None:
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = [log_likelihood(load(url, device=device), x.to(device), seeds=range(4)) for device in ("cpu", "cuda")]
    torch.testing.assert_close(found[1].nats.cpu(), found[0].nats, rtol=1e-3, atol=1e-2)


def test_latents_are_decoded_in_bf16_close_to_what_a_cpu_makes_of_them(tiny_vae: str) -> None:
    exact = load_encoder(f"diffusers={tiny_vae}", "cpu")
    assert isinstance(exact, Autoencoder)
    encoding = Encoding("diffusers", tiny_vae, exact.sha256, "image", "image", [1, 8, 8])
    z = torch.randn(20, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    waiting = decode_queue(lambda latents: decode(encoding, latents))
    found = waiting.submit(z).result(60)
    waiting.close()
    assert (found - exact.decode(z)).abs().max() < 0.05
