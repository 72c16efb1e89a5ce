"""Codes of trained models: closed forms of a Gaussian one, the way back, what is stored, and metrics over them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from scoreray.cluster.cli.main import app
from scoreray.data.errors import UserError
from scoreray.data.fields.field import FieldRequest
from scoreray.data.packing.pack import pack
from scoreray.data.reading.samples import SampleReader
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.sampling.model.load import load_machine
from scoreray.sampling.representations.codes import CodeOptions
from scoreray.sampling.representations.encoder import ModelEncoder, load_any_encoder
from scoreray.sampling.representations.scores import measure_field
from scoreray.sampling.samplers.sample import sample
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0
MLP = {"network": {"kind": "mlp", "hidden_size": 16, "num_layers": 2}, "denoiser": {"sigma_data": SIGMA_DATA}}
GIBBS = {"kind": "contrastive", "chain": "gibbs", "start": "data", "num_steps": 1, "label_dropout": 0.0}
AUTOENCODER = {
    "network": {"kind": "autoencoder", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1},
    "objective": {"kind": "autoencoding"},
}


def packed(folder: Path, name: str, samples: np.ndarray, labels: np.ndarray) -> str:
    np.savez(folder / f"{name}.npz", images=samples, labels=labels.astype(np.uint8))
    pack(str(folder / f"{name}.npz"), str(folder / name), samples_per_shard=100)
    return str(folder / name)


def trained(folder: Path, data: str, name: str, **changes: Any) -> str:
    """A run of one step that moves no weight by more than 1e-9: a denoiser is that of N(0, sigma_data^2 I)."""
    settings: dict[str, Any] = {
        "run": {"name": name, "storage": str(folder / "runs")},
        "data": {"url": data, "global_batch_size": 16},
        "optimizer": {"learning_rate": 1e-9, "warmup_images": 0},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": 16},
        **changes,
    }
    train(load_config(settings))
    return str(folder / "runs" / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("codes")


@pytest.fixture(scope="module")
def points(folder: Path) -> tuple[str, str]:
    """(run whose model is N(0, 0.25 I) in 4 dimensions, 300 points in three clusters with their class)."""
    rng, labels = np.random.default_rng(0), np.arange(300) % 3
    centres = 2 * np.eye(4)[labels]
    data = packed(folder, "points", (centres + 0.2 * rng.standard_normal((300, 4))).astype(np.float32), labels)
    return trained(folder, data, "gaussian", **MLP), data


@pytest.fixture(scope="module")
def pictures(folder: Path) -> str:
    """120 grey pictures of 8x8, each of three classes bright in its own columns."""
    rng, labels = np.random.default_rng(1), np.arange(120) % 3
    images = rng.integers(0, 60, (120, 8, 8), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, 2 * label : 2 * label + 2] += 180
    return packed(folder, "pictures", images, labels)


def stored(url: str | Path, name: str) -> torch.Tensor:
    reader = SampleReader(str(url))
    return reader.read_fields(range(reader.manifest.num_samples), [FieldRequest(name)]).fields[name]


def scoreray(*arguments: str) -> Any:
    found = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found


@pytest.mark.parametrize("options", ["sampler=rk45,rtol=1e-7", "sampler=heun,steps=200", "sampler=euler,steps=300"])
def test_the_code_of_gaussian_data_is_the_closed_form_and_decodes_to_the_sample(points, options):
    """The flow of N(0, s^2) multiplies by sqrt((s^2 + sigma_max^2) / (s^2 + sigma_min^2))."""
    run, data = points
    x0, encoder = stored(data, "array"), ModelEncoder(f"{run}?{options}")
    code = encoder.code(x0, torch.arange(len(x0)))
    ratio = math.sqrt((SIGMA_DATA**2 + SIGMA_MAX**2) / (SIGMA_DATA**2 + SIGMA_MIN**2)) / SIGMA_MAX
    error = {"r": 1e-5, "h": 1e-3, "e": 3e-2}[options[8]]
    torch.testing.assert_close(code, ratio * x0, rtol=error, atol=error)
    torch.testing.assert_close(encoder.decode(code), x0, rtol=error, atol=error)
    assert float((encoder.decode(code) - x0).square().mean()) < error**2


def test_a_sampler_draws_the_sample_from_its_code(points):
    """Whatever starts at noise times the largest level, as `scoreray sample` does."""
    run, data = points
    x0, encoder = stored(data, "array"), ModelEncoder(f"{run}?steps=200")
    levels = encoder.info.sigmas(200)
    drawn = sample(encoder.model, encoder.code(x0, torch.arange(len(x0))) * float(levels[0]), levels)
    torch.testing.assert_close(drawn, x0, rtol=3e-3, atol=3e-3)


def test_encode_is_data_encode_by_another_name_and_keeps_the_factors(points, folder):
    run, data = points
    answer = json.loads(
        scoreray(
            "encode",
            run,
            data,
            str(folder / "codes"),
            "--steps",
            "32",
            "--batch-size",
            "100",
            "--actors",
            "0",
            "--json",
        ).stdout
    )
    assert {name: one["kind"] for name, one in answer["fields"].items()} == {"label": "class", "code": "vector"}
    scoreray("data", "encode", data, str(folder / "same"), "--encoder", f"scoreray={run}?steps=32", "--field", "array",
             "--to", "code", "--dtype", "float32", "--actors", "0", "--batch-size", "100")  # fmt: skip
    codes = stored(folder / "codes", "code")
    assert torch.equal(codes, stored(folder / "same", "code"))
    assert codes.shape == (300, 4)
    encoding = SampleReader(str(folder / "codes")).manifest.find_field("code", "").encoding
    assert encoding is not None
    assert not encoding.can_decode  # a run on codes draws codes
    encoder = load_any_encoder(encoding.name, sha256=encoding.sha256)
    assert isinstance(encoder, ModelEncoder)
    torch.testing.assert_close(encoder.decode(codes), stored(data, "array"), rtol=0.05, atol=0.05)


def test_a_machines_code_is_its_hidden_probabilities(pictures, folder):
    run = trained(folder, pictures, "rbm", network={"kind": "rbm", "num_hidden": 6}, objective=GIBBS)
    scoreray("encode", run, pictures, str(folder / "hidden"), "--actors", "0", "--keep", "image")
    machine, images = load_machine(run, device="cpu"), stored(pictures, "image")
    v = (images.flatten(1) > 127).float()
    torch.testing.assert_close(stored(folder / "hidden", "code"), (v @ machine.weight + machine.hidden_bias).sigmoid())
    with pytest.raises(UserError, match=r"layer, sigma: options of denoisers, and the model is of network\.kind 'rbm'"):
        load_any_encoder(f"scoreray={run}?layer=middle.0,sigma=1", "cpu")
    with pytest.raises(UserError, match="--codes: steps: options of denoisers"):
        evaluate(EvaluationSettings(run, pictures, metrics=("probe",), codes="steps=8"))
    made = evaluate(EvaluationSettings(run, pictures, metrics=("mse", "psnr", "probe", "v_measure")))
    decoded = (
        2 * ((v @ machine.weight + machine.hidden_bias).sigmoid() @ machine.weight.T + machine.visible_bias).sigmoid()
        - 1
    )
    error = (decoded - (images.flatten(1).float() / 127.5 - 1)).double().square().mean()
    assert made.record.metrics["mse"].value == pytest.approx(float(error), rel=1e-4)
    assert made.record.protocol["restoration"]["task"] == "reconstruction"


def test_an_autoencoders_codes_are_its_means_and_its_metrics_are_those_of_before(pictures, folder):
    run = trained(folder, pictures, "autoencoder", **AUTOENCODER)
    scoreray("encode", run, pictures, str(folder / "latents"), "--actors", "0", "--keep", "image")
    moments = stored(folder / "latents", "code")
    encoder = load_any_encoder(f"scoreray={run}", "cpu")
    torch.testing.assert_close(
        moments[:, : moments.shape[1] // 2], encoder.moments(stored(pictures, "image").float() / 127.5 - 1)[0]
    )  # type: ignore[attr-defined]
    found = evaluate(EvaluationSettings(run, pictures, extractor="identity")).record.metrics
    assert set(found) == {"mse", "psnr", "ssim", "reconstruction_fid"}
    assert set(evaluate(EvaluationSettings(run, pictures, metrics=("probe",))).record.metrics) == {"probe"}


def test_activations_are_the_mean_over_positions_of_a_layer(points):
    run, data = points
    x0, numbers = stored(data, "array"), torch.arange(300)
    names = [name for name, _ in ModelEncoder(run).model.network.named_modules() if name]
    encoder = ModelEncoder(f"{run}?layer={names[-1]},sigma=0.1")
    code = encoder.code(x0, numbers)
    assert code.shape[0] == 300
    torch.testing.assert_close(code[:7], encoder.code(x0[:7], numbers[:7]))
    assert not torch.equal(code, encoder.code(x0, numbers + 1))  # noise of another sample
    with pytest.raises(UserError, match="layer = nowhere: the network has no such module"):
        ModelEncoder(f"{run}?layer=nowhere").code(x0, numbers)


def test_metrics_of_codes_are_those_of_separate_clusters(points):
    """The flow of a Gaussian only scales: its codes are as far apart as the data, which are three clusters."""
    run, data = points
    names = ("homogeneity", "completeness", "v_measure", "probe", "mig", "sap")
    made = evaluate(
        EvaluationSettings(
            run, data, metrics=(*names, "mse"), codes="steps=8", restoration="reconstruction",
            metric_options={"mig": {"bins": 10}},
        )
    )  # fmt: skip
    found = {name: made.record.metrics[name].value for name in made.record.metrics}
    assert [found[name] for name in names[:4]] == pytest.approx([1, 1, 1, 1])
    assert made.record.protocol["mig"] == {"bins": 10}
    assert made.record.protocol["codes"]["codes"]["steps"] == 8
    assert 0 <= found["mse"] < 1e-2
    assert made.record.metrics["probe"].get("largest_class") == pytest.approx(1 / 3, abs=0.15)
    with pytest.raises(UserError, match="metric dci does not fit: it needs 2 or more fields of kind class or scalar"):
        evaluate(EvaluationSettings(run, data, metrics=("dci",)))


def test_codes_that_are_a_field_are_measured_by_the_same_scores(points):
    """The data themselves are three clusters; what is no field of numbers, or no metric of codes, is one line."""
    _, data = points
    words = ("data", "codes", data, "--field", "array", "--metrics", "v_measure,probe,mig", "--metric-option")
    found = json.loads(scoreray(*words, "mig.bins=5", "--json").stdout)
    assert [found[name]["value"] for name in ("v_measure", "probe")] == pytest.approx([1, 1])
    assert found["probe"]["parts"]["label"]["value"] == pytest.approx(1)
    assert "probe 1" in scoreray("data", "codes", data, "--field", "array", "--metrics", "probe").stdout
    for field, metrics, message in (("label", "probe", "codes are numbers"), ("array", "fid", "--metrics fid")):
        with pytest.raises(UserError, match=message):
            measure_field(data, field, (metrics,), {}, 100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step=8", "encoder 'scoreray' has no option 'step': did you mean 'steps'|has no option 'step'"),
        ("sampler=ddpm", r"sampler = 'ddpm': did you mean 'dpm2'\? must be one of euler, heun, dpm2, rk45"),
        ("steps=0", r"steps = 0: must be an integer in \[2, 10000\]"),
        ("steps", "write NAME=VALUE"),
    ],
)
def test_options_of_codes_are_checked_in_one_line(text, message):
    with pytest.raises(UserError, match=message):
        CodeOptions.parse(text, "--codes")
    with pytest.raises(UserError, match=message):
        EvaluationSettings("a", "b", codes=text)
