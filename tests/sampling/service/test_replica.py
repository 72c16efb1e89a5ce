"""A replica: its samples are to the last bit those of the sampler alone, and its failures are classified by type."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scoreray.data.errors import DataError, ScorerayError, UserError
from scoreray.sampling.http.parse import parse
from scoreray.sampling.model.load import load
from scoreray.sampling.offline.driver import in_same_rows
from scoreray.sampling.offline.generate import Request, generate
from scoreray.sampling.samplers.noise import SampleNoise
from scoreray.sampling.samplers.sample import sample
from scoreray.sampling.service.batcher import BatcherStopped
from scoreray.sampling.service.body import SampleBody, make_request
from scoreray.sampling.service.config import Limits, Refused, ServeConfig
from scoreray.sampling.service.models import look_up
from scoreray.sampling.service.replica import Replica, failed
from scoreray.sampling.service.request import Completed, Event, Failed, Preview, SampleRequest
from scoreray.sampling.service.ticket import NonFiniteSamplesError
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.prepare import prepare_run
from scoreray.trainer.run_folder import run_store


@pytest.fixture(scope="module")
def run_url(new_run: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_run(str(tmp_path_factory.mktemp("runs") / "exact"))


def drawn(url: str, *requests: SampleRequest) -> list[list[Event]]:
    """The events of requests that are drawn at the same time."""

    async def main() -> list[list[Event]]:
        replica = Replica(ServeConfig((("exact", url),), precision="fp32", compile="off"))
        try:
            return await asyncio.gather(*(everything(replica, request) for request in requests))
        finally:
            await replica.close()

    async def everything(replica: Replica, request: SampleRequest) -> list[Event]:
        return [event async for event in replica.draw(request)]

    return asyncio.run(main())


def test_from_body_to_answer_the_samples_are_bitwise_those_of_the_sampler_alone(run_url: str) -> None:
    """Every step on the way (check, request, parts, batches, encoding) leaves each float32 as it is."""
    served, denoiser = look_up("exact", run_url), in_same_rows(load(run_url, device="cpu"), 32)
    bodies = [
        b'{"count": 5, "seed": 7, "sampler": "edm_sde", "steps": 5, "format": "npy", "options": {"s_churn": 4.0}}',
        b'{"count": 11, "seed": 8, "steps": 4, "grid": "process", "class_label": 2, "format": "npy"}',
        b'{"count": 2, "seed": 2147483647, "sampler": "ddpm", "steps": 6, "format": "npy"}',
    ]
    requests = [make_request(parse(body), served, Limits(), "application/x-npz", parse(body).seed) for body in bodies]
    for body, request, events in zip(bodies, requests, drawn(run_url, *requests), strict=True):
        assert isinstance(events[-1], Completed)
        arrays = np.load(io.BytesIO(events[-1].body))
        seeds = (parse(body).seed << 32) + torch.arange(parse(body).count)
        noise = SampleNoise(seeds).normal((len(seeds), *request.shape), torch.float32)
        alone = sample(
            denoiser,
            noise * request.sigmas[0],
            request.sigmas,
            sampler=request.sampler,
            generator=seeds,
            condition=request.condition,
            **request.options,
        )
        assert np.array_equal(arrays["samples"], alone.numpy()), body
        assert arrays["labels"].tolist() == request.condition.values["label"].tolist()


def test_latents_are_decoded_in_answers_and_previews_are_pictures_of_them(
    latent_set: str, small_run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = small_run("latents", tmp_path, 16)
    settings["data"] = {"url": latent_set, "target": "latent", "global_batch_size": 16}
    train(config := prepare_run(load_config(settings)).config)
    url = run_store(config).url()
    served, model = look_up("exact", url), load(url, device="cpu")
    page = served.page(Limits())
    assert (page["shape"], page["pictures"]) == ([1, 8, 8], True)
    assert {key: page["target"][key] for key in ("name", "kind", "shape", "dtype")} == {
        "name": "image", "kind": "image", "shape": [1, 8, 8], "dtype": "uint8",
    }  # fmt: skip
    body = parse(b'{"count": 2, "seed": 7, "sampler": "euler", "steps": 4, "stream": true, "previews": 1}')
    ((*_, preview, done),) = drawn(url, make_request(body, served, Limits(), "application/json", 7))
    assert isinstance(preview, Preview)
    assert preview.b64_json
    assert isinstance(done, Completed)
    wanted = torch.cat([x for x, _ in generate(model, Request(2, "euler", 4, seed=7, class_label=-1))])
    for item, picture in zip(json.loads(done.body), model.info.in_data_units(wanted), strict=True):
        array = np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))).astype(int)
        assert np.abs(array - picture[0].numpy()).max() <= 1

    body = parse(b'{"count": 2, "seed": 7, "sampler": "euler", "steps": 4, "raw": true}')
    ((*_, done),) = drawn(url, make_request(body, served, Limits(), "application/x-npz", 7))
    assert isinstance(done, Completed)
    found = np.load(io.BytesIO(done.body))["samples"]
    np.testing.assert_allclose(found, model.info.unscaled(wanted).numpy(), rtol=1e-4, atol=1e-4)


def test_raw_samples_are_of_models_of_latents_alone_and_a_key_of_before_it_is_the_same(run_url: str) -> None:
    body = parse(b'{"raw": true}')
    with pytest.raises(Refused, match="models no latents"):
        make_request(body, look_up("exact", run_url), Limits(), "application/json", 7)
    without = body.model_copy(update={"raw": False})
    assert without.fingerprint("") == SampleBody().fingerprint("") != body.fingerprint("")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NonFiniteSamplesError("sampler 'x' ended in values that are not finite"), "not_finite"),
        (UserError("a step of this size leads to numbers that are not finite"), "invalid"),
        (BatcherStopped("the batcher stopped"), "unavailable"),
    ],
)
def test_a_failure_has_its_code_by_its_type_whatever_its_words(error: ScorerayError, code: str) -> None:
    assert failed(error) == Failed(code, str(error))


def test_what_is_no_failure_of_a_request_is_a_bug() -> None:
    with pytest.raises(DataError):
        failed(DataError("the denoiser gave float64"))


def test_a_checkpoint_that_is_gone_is_storage(run_url: str) -> None:
    request = make_request(parse(b"{}"), look_up("exact", run_url), Limits(), "application/json", 0)
    origin = request.origin._replace(checkpoint=f"{run_url}/checkpoints/none")
    ((*_, last),) = drawn(run_url, SampleRequest((1,), request.shape, request.sigmas, origin=origin, ema=request.ema))
    assert isinstance(last, Failed)
    assert last.code == "storage"
