"""Runs of autoencoders: resumed bitwise, begun from another, made of somebody else's network, refused in a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.data.errors import DataError, UserError
from scoreray.data.reading.manifest import Manifest
from scoreray.sampling.model.describe import describe
from scoreray.sampling.model.export import export
from scoreray.sampling.model.load import LoadedAutoencoder, load, load_model
from scoreray.trainer.config import load_config
from scoreray.trainer.encoders.base import VALUES, Autoencoder
from scoreray.trainer.encoders.load import _loaded, load_encoder
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.prepare import check_run
from scoreray.trainer.run_folder import run_store

TINY = {"kind": "autoencoder", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attention": False}
SECTIONS = {"network": TINY, "objective": {"kind": "autoencoding", "kl_weight": 1e-3}}

OWN = """
from torch import nn

class Halves(nn.Module):
    def __init__(self, shape, width: int = 2):
        super().__init__()
        self.down = nn.Conv2d(shape[0], 2 * width, 2, 2)
        self.up = nn.ConvTranspose2d(width, shape[0], 2, 2)

    def encode(self, x):
        mean, log_std = self.down(x).chunk(2, 1)
        return mean, log_std.exp()

    def decode(self, z):
        return self.up(z)
"""


def weights(config: Any) -> dict[str, torch.Tensor]:
    return describe(run_store(config).url()).weights()


def test_an_interrupted_run_ends_bitwise_like_an_uninterrupted_one(small_run: Any, tmp_path: Path) -> None:
    whole, broken = (load_config(small_run(name, tmp_path, 64, **SECTIONS)) for name in ("whole", "broken"))
    assert train(whole) == 64
    assert train(broken, requested=lambda: LoopRequest.STOP) == 16
    assert train(broken) == 64
    assert not whole.data.conditions  # the data have classes
    one, other = weights(whole), weights(broken)
    assert all(torch.equal(one[name], other[name]) for name in one)
    model = load_model(run_store(whole).url())
    assert isinstance(model, LoadedAutoencoder)
    mean, std = model.encode(torch.zeros(2, 1, 8, 8))
    assert mean.shape == std.shape == (2, 4, 4, 4)
    assert model.decode(mean).shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="an autoencoder draws no samples; train on its latents, which `scoreray data"):
        load(run_store(whole).url())

    begun = load_config(small_run("begun", tmp_path, 16, **SECTIONS, init={"checkpoint": run_store(whole).url()}))
    assert "begins from" in check_run(begun).notes[0]
    still = begun.model_copy(update={"optimizer": load_config(small_run(
        "still", tmp_path, 16, optimizer={"learning_rate": 1e-12, "warmup_images": 0})).optimizer})  # fmt: skip
    train(still)
    for name, value in weights(still).items():
        torch.testing.assert_close(value, one[name], rtol=0, atol=1e-6)


def test_somebody_elses_network_is_trained_and_loaded(
    own_package: Callable[..., Any], small_run: Any, tmp_path: Path
) -> None:
    own_package("halves", network=OWN)
    sections = {"network": {"kind": "halves.network:Halves", "width": 3}, "objective": {"kind": "autoencoding"}}
    config = load_config(small_run("own", tmp_path, 32, **sections))
    check_run(config)
    assert train(config) == 32
    model = load_model(run_store(config).url())
    assert isinstance(model, LoadedAutoencoder)
    assert model.encode(torch.zeros(1, 1, 8, 8))[0].shape == (1, 3, 4, 4)


def test_a_run_is_an_encoder_and_its_export_the_same_one(small_run: Any, small_set: str, tmp_path: Path) -> None:
    config = load_config(small_run("run", tmp_path, 32, **SECTIONS))
    train(config)
    url = run_store(config).url()
    export(url, str(tmp_path / "model"))
    ours, exported = (load_encoder(f"scoreray={path}", "cpu") for path in (url, tmp_path / "model"))
    assert isinstance(ours, Autoencoder)
    assert ours.sha256 == exported.sha256
    model, x = load_model(url, device="cpu"), torch.rand(2, 1, 8, 8) * 2 - 1
    assert isinstance(model, LoadedAutoencoder)
    mean, _ = ours.moments(x)
    assert torch.equal(mean, model.encode(x)[0])
    assert torch.equal(ours.decode(mean), model.decode(mean))
    field = Manifest.at(small_set).target
    made = ours.output(field)
    assert (made.shape, made.encoding and made.encoding.moments) == ([8, 4, 4], True)
    pixels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    assert ours.encode(pixels)[VALUES].shape == (2, 8, 4, 4)
    assert ours.decoded_shape((4, 4, 4)) == (1, 8, 8)

    denoiser = load_config(small_run("denoiser", tmp_path, 16))
    train(denoiser)
    with pytest.raises(UserError, match=r"a model of objective.kind 'edm' is no autoencoder"):
        load_encoder(f"scoreray={run_store(denoiser).url()}", "cpu")
    train(load_config(small_run("run", tmp_path, 48, **SECTIONS)))
    _loaded.clear()
    with pytest.raises(DataError, match="has changed since it encoded the data"):
        load_encoder(f"scoreray={url}", "cpu", ours.sha256)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"network": {"kind": "unet"}}, "network.kind: 'unet' is trained as a denoiser"),
        ({"objective": {"kind": "edm"}}, "objective.kind: 'edm' trains a denoiser, and network.kind 'autoencoder' is"),
        ({"process": {"kind": "vp"}}, "process: objective.kind 'autoencoding' knows no noise level"),
        ({"denoiser": {"sigma_data": 1.0}}, "denoiser: objective.kind 'autoencoding' knows no noise level"),
        ({"evaluation": {"sheet": 4}}, "evaluation.sheet: an autoencoder draws no samples"),
        ({"objective": {"kind": "autoencoding", "weighting": {"kind": "edm"}}}, "objective.weighting: unknown key"),
        ({"objective": {"kind": "autoencoding", "kl_weight": -1.0}}, "objective.kl_weight is -1.0"),
    ],
)
def test_sections_that_contradict_each_other_are_named(
    small_run: Any, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_config(small_run("bad", tmp_path, 16, **{**SECTIONS, **sections}))


def test_conditions_are_refused(small_run: Any, small_set: str, tmp_path: Path) -> None:
    data = {"url": small_set, "global_batch_size": 16, "conditions": {"label": {}}}
    with pytest.raises(UserError, match=r"data.conditions: objective.kind 'autoencoding' takes none; leave them out"):
        load_config(small_run("bad", tmp_path, 16, **SECTIONS, data=data))
