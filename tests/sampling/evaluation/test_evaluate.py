"""Evaluations end to end, in one process: closed forms through the whole line, resumption, what is refused."""

from __future__ import annotations

import html
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from waiting import PATIENCE_S

from scoreray.cluster.verbs.evaluate import checked_inputs
from scoreray.data.errors import DataError, UserError
from scoreray.data.packing.pack import pack
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import SampleReader, spread
from scoreray.data.storage.store import PathStore, open_store
from scoreray.sampling.evaluation import loaded, stages
from scoreray.sampling.evaluation.compare import compare, comparison_text, notes
from scoreray.sampling.evaluation.evaluate import evaluate, find_finished
from scoreray.sampling.evaluation.follow import check_evaluation
from scoreray.sampling.evaluation.prepare import load_inputs, needs_training
from scoreray.sampling.metrics import sample_metrics, stored
from scoreray.sampling.metrics.chunks import AnnealingChunk, ChunkArrays, LossChunk, read_chunk, write_chunk
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.sampling.metrics.record import EvaluationRecord, read_record
from scoreray.sampling.metrics.registry import METRICS
from scoreray.sampling.model.load import LoadedAutoencoder, load_machine, load_model
from scoreray.sampling.representations.scores import SCORES
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train

SIGMA_DATA = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluate")


def packed(folder: Path, name: str, images: np.ndarray, labels: np.ndarray | None = None) -> str:
    np.savez(folder / f"{name}.npz", images=images, **({} if labels is None else {"labels": labels}))
    pack(str(folder / f"{name}.npz"), str(folder / name), samples_per_shard=200)
    return str(folder / name)


def trained(folder: Path, data: str, name: str, **changes: Any) -> str:
    """A run of one step that moves no weight by more than 1e-9: its denoiser is that of N(0, sigma_data^2 I)."""
    settings: dict[str, Any] = {
        "run": {"name": name, "storage": str(folder / "runs")},
        "data": {"url": data, "global_batch_size": 16},
        "network": {"kind": "mlp", "hidden_size": 16, "num_layers": 1},
        "denoiser": {"sigma_data": SIGMA_DATA},
        "optimizer": {"learning_rate": 1e-9, "warmup_images": 0},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": 16},
        **changes,
    }
    train(load_config(settings))
    return str(folder / "runs" / name)


@pytest.fixture(scope="module")
def points(folder: Path) -> tuple[str, str]:
    """(run whose model is N(0, 0.25 I) in 4 dimensions, 4,000 points of N(m, 0.49 I))."""
    rng = np.random.default_rng(0)
    mean = np.array([0.3, -0.2, 0.0, 0.1])
    data = packed(folder, "points", (mean + 0.7 * rng.standard_normal((4000, 4))).astype(np.float32))
    return trained(folder, data, "gaussian"), data


@pytest.fixture(scope="module")
def pictures(folder: Path) -> tuple[str, str]:
    """(run, 400 labelled 12 x 12 images): each of three classes bright in its own third."""
    rng = np.random.default_rng(1)
    labels = np.arange(400) % 3
    images = rng.integers(0, 120, (400, 12, 12), dtype=np.uint8)
    for i, label in enumerate(labels):
        images[i, 4 * label : 4 * label + 4] += 100
    data = packed(folder, "pictures", images, labels.astype(np.uint8))
    network = {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    return trained(folder, data, "pictures", network=network), data


QUICK = {"count": 150, "reference_count": 300, "steps": 4, "batch_size": 32, "loss_count": 64}


def test_a_gaussian_model_against_gaussian_data_gives_the_closed_forms(points: tuple[str, str], folder: Path) -> None:
    """Frechet distance, likelihood and loss of N(0, s^2 I) against N(m, S^2 I), through files, sampler and solver."""
    run, data = points
    made = evaluate(
        EvaluationSettings(
            run,
            data,
            metrics=("fid", "nats", "loss"),
            count=6000,
            steps=30,
            likelihood_count=64,
            loss_count=1000,
            rtol=1e-6,
        )
    )
    metrics = made.record.metrics
    with np.load(folder / "points.npz") as file:
        x = file["images"].astype(np.float64)
    sample_cov = np.cov(x.T)
    roots = np.sqrt(np.linalg.eigvalsh(sample_cov))
    exact = np.square(x.mean(0)).sum() + np.square(roots - SIGMA_DATA).sum()
    fid = metrics["fid"]
    assert abs(fid.value - exact) < 4 * fid.std_error + 1e-3
    assert fid.std_error < 0.05 * exact

    rows = read_rows(data, 64)
    variance = SIGMA_DATA**2 + 0.002**2
    nats = -0.5 * (np.square(rows).sum(1) / variance + 4 * math.log(2 * math.pi * variance))
    # At sigma_max the prior stands at the data's mean, which the model does not share: |m| |x| / sigma_max^2, 0.004.
    assert metrics["nats"].value == pytest.approx(nats.mean(), abs=4e-3)
    assert metrics["nats"].std_error == pytest.approx(nats.std(ddof=1) / 8, rel=2e-2)
    assert metrics["nats"].get("nfe") > 10

    sigmas, errors = np.array(metrics["loss"].get("sigmas")), np.array(metrics["loss"].get("errors"))
    kept = SIGMA_DATA**2 / (SIGMA_DATA**2 + sigmas**2)  # D = kept (x0 + sigma z)
    second = np.square(read_rows(data, 1000)).mean()
    assert errors == pytest.approx((kept - 1) ** 2 * second + kept**2 * sigmas**2, rel=0.05)


def read_rows(data: str, count: int) -> np.ndarray:
    return SampleReader(data).read(spread(count, 4000))[0].numpy().astype(np.float64)


def test_bits_per_dimension_of_a_gaussian_and_of_a_mixture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of four pixels: dequantised with the recorded noise, both densities are known."""
    rng = np.random.default_rng(2)
    data = packed(folder, "pixels", rng.integers(0, 256, (64, 2, 2), dtype=np.uint8))
    run = trained(folder, data, "pixels")
    settings = EvaluationSettings(run, data, metrics=("bpd",), likelihood_count=32, rtol=1e-6)
    from scoreray.sampling.measures.likelihood import dequantize

    numbers = spread(32, 64)
    images, _ = SampleReader(data).read(numbers)
    x = dequantize(images, torch.from_numpy(numbers))[0].double().flatten(1)

    def bits(log_density: torch.Tensor) -> float:
        return float((-log_density / (4 * math.log(2)) - math.log2(1 / 127.5)).mean())

    variance = SIGMA_DATA**2 + 0.002**2
    gaussian = -0.5 * (x.square() / variance + math.log(2 * math.pi * variance)).sum(1)
    assert evaluate(settings).record.metrics["bpd"].value == pytest.approx(bits(gaussian), abs=1e-3)

    from scoreray.trainer.diffusion.targets import Mixture

    means = torch.tensor([[-0.5, 0.3, 0.1, -0.6], [0.6, -0.4, 0.0, 0.2]]).double()
    exact = Mixture(means, std=0.3)
    monkeypatch.setattr(stages, "loaded_denoiser", lambda inputs: _Reshaped(exact))
    found = evaluate(EvaluationSettings(run, data, metrics=("bpd",), likelihood_count=32, rtol=2e-6))
    parts = -0.5 * ((x[:, None] - means).square() / (0.09 + 4e-6) + math.log(2 * math.pi * (0.09 + 4e-6))).sum(2)
    mixture = parts.logsumexp(1) - math.log(2)
    assert found.record.metrics["bpd"].value == pytest.approx(bits(mixture), abs=2e-3)


class _Reshaped:
    """A density of points as a denoiser of pictures."""

    sigma_data = SIGMA_DATA

    def __init__(self, exact: Any) -> None:
        self.exact = exact

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: Any = None) -> torch.Tensor:
        return self.exact(x.flatten(1).double(), sigma.double()).to(x.dtype).view(x.shape)


def test_density_estimates_and_annealing(folder: Path, points: tuple[str, str]) -> None:
    """KDE of exact samples is near the log-density; AIS finds the ln Z that a small machine's enumeration gives."""
    run, data = points
    record = evaluate(EvaluationSettings(run, data, metrics=("kde",), count=3000, reference_count=1000)).record
    x = read_rows(data, 1000)
    exact = -0.5 * (np.square(x).sum(1) / SIGMA_DATA**2 + 4 * math.log(2 * math.pi * SIGMA_DATA**2))
    assert record.metrics["kde"].value == pytest.approx(exact.mean(), abs=0.35)

    rng = np.random.default_rng(3)
    binary = packed(folder, "binary", 255 * rng.integers(0, 2, (64, 4, 4), dtype=np.uint8))
    machine = trained(
        folder,
        binary,
        "machine",
        network={"kind": "rbm", "num_hidden": 6},
        denoiser={},
        objective={"kind": "contrastive", "chain": "gibbs"},
        optimizer={"learning_rate": 0.05, "warmup_images": 0},
        duration={"images": 320},
    )
    made = evaluate(EvaluationSettings(machine, binary, metrics=("ais",), chains=256)).record.metrics["ais"]
    log_z = float(load_machine(machine).log_partition())
    assert abs(made.get("log_z") - log_z) < 4 * made.get("log_z_std_error") + 1e-3

    sampled = EvaluationSettings(machine, binary, metrics=("iwae",), metric_options={"iwae": {"samples": 2}})
    found, rbm = evaluate(sampled).record, load_machine(machine)
    v = torch.from_numpy((SampleReader(binary).read(np.arange(64))[0].numpy() > 0).astype(np.float32)).flatten(1)
    expected = float((-rbm.free_energy(v)).mean()) - log_z
    assert found.metrics["iwae"].value == pytest.approx(expected, abs=1e-4)  # p(h | v) is its own posterior
    assert found.metrics["iwae"].get("effective_samples") == pytest.approx(2)
    assert found.protocol["iwae"] == {"samples": 2, "proposal": "posterior"}


def test_an_energys_likelihood_by_annealing(energy: tuple[str, str]) -> None:
    """An energy model of N(0, s^2 I): ln Z at the noise level that AIS works at is the Gaussian's."""
    made = evaluate(EvaluationSettings(*energy, metrics=("ais",), chains=100)).record.metrics["ais"]
    variance = SIGMA_DATA**2 + (SIGMA_DATA / 4) ** 2
    normaliser = 2 * math.log(2 * math.pi * variance)
    assert abs(made.get("log_z") - normaliser) < 4 * made.get("log_z_std_error") + 0.02


MEASURED_ON = {
    "fid": "pictures",
    "kid": "pictures",
    "is": "pictures",
    "pr": "pictures",
    "sw": "pictures",
    "nn": "pictures",
    "loss": "pictures",
    "psnr": "pictures",
    "ssim": "pictures",
    "mse": "autoencoder",
    "reconstruction_fid": "autoencoder",
    "bpd": "pictures",
    "nats": "points",
    "kde": "points",
    "elbo": "pictures",
    "fisher": "points",
    "calibration": "points",
    "ood": "points",
    "ais": "energy",
    "crps": "pictures",
    "spread_skill": "pictures",
    "rmse": "pictures",
    "match": "pictures",
    "accuracy": "pictures",
    "spectrum": "pictures",
    "mmd": "points",
    "iwae": "autoencoder",
}
"""Every metric, and data of this module that it fits."""


def test_every_metric_is_measured_in_these_tests() -> None:
    """Those of codes are in `tests/sampling/representations/`."""
    assert {*MEASURED_ON, *SCORES} == set(METRICS)


@pytest.fixture
def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own module: a picture's class is the third that is brightest."""
    code = """
        class Scorer:
            def __call__(self, samples, requested):
                brightest = samples.float().unflatten(2, (3, 4)).mean((1, 3, 4)).argmax(1)
                right = brightest == torch.tensor([int(name) for name in requested["label"]])
                return {"third": right.double(), "brightness": samples.float().mean((1, 2, 3))}
    """
    (tmp_path / "brightest_third.py").write_text("import torch\n" + textwrap.dedent(code))
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="module")
def energy(folder: Path, points: tuple[str, str]) -> tuple[str, str]:
    """(run whose model is an energy of N(0, 0.25 I), its points)."""
    denoiser = {"sigma_data": SIGMA_DATA, "parameterization": "energy_dot"}
    return trained(folder, points[1], "energy", denoiser=denoiser), points[1]


@pytest.fixture(scope="module")
def autoencoder(folder: Path, pictures: tuple[str, str]) -> tuple[str, str]:
    """(run of one step of an autoencoder, its pictures)."""
    network = {"kind": "autoencoder", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "patch_size": 2}
    sections = {"network": network, "denoiser": {}, "objective": {"kind": "autoencoding"}}
    return trained(folder, pictures[1], "autoencoder", **sections), pictures[1]


@pytest.mark.parametrize(("kind", "figures"), [("pictures", 6), ("points", 1), ("energy", 0), ("autoencoder", 1)])
def test_every_metric_has_a_value_an_error_and_a_place_on_the_page(
    kind: str, figures: int, request: pytest.FixtureRequest
) -> None:
    """Figures: samples, neighbours, restorations, curves, spectra, ensembles."""
    run, data = request.getfixturevalue(kind)
    request.getfixturevalue("scorer")
    wanted = tuple(name for name, measured_on in MEASURED_ON.items() if measured_on == kind)
    counts: dict[str, Any] = {**QUICK, "restoration_count": 16, "likelihood_count": 4, "rtol": 1e-2, "chains": 16}
    counts |= {"ensembles": 6, "per_condition": 4, "scorer": "brightest_third:Scorer"}
    settings = EvaluationSettings(run, data, wanted, **counts, classifier_images=640)
    made = evaluate(settings)
    assert list(made.record.metrics) == sorted(wanted)
    for name, values in made.record.metrics.items():
        assert values.value is not None, name
        assert values.std_error is not None, name
        assert name in made.text()
    page = Path(made.report).read_text()
    titles = {METRICS[name].title for name in wanted} - {METRICS["pr"].title}  # two rows of their own
    assert all(html.escape(title) in page for title in titles)
    assert page.count("data:image/png;base64,") == figures
    assert "http" not in page.replace("http://www.w3.org", "")
    left = {path.name for path in Path(made.url).parent.iterdir()}
    assert left == {"record.json", "report.html"}  # chunks are gone
    assert evaluate(settings) == made  # found, not computed
    if kind in ("pictures", "autoencoder"):
        extractor = made.record.protocol["extractor"]
        assert extractor["kind"] == "classifier"
        assert len(extractor["sha256"]) == 64
        assert extractor["accuracy"] > 0.9


def test_reconstructions_are_measured_against_what_was_encoded(autoencoder: tuple[str, str]) -> None:
    """Without --metrics all that fit an autoencoder, of every sample of the reference that is read."""
    run, data = autoencoder
    record = evaluate(EvaluationSettings(run, data, **{**QUICK, "classifier_images": 640})).record  # type: ignore[arg-type]
    assert set(record.metrics) == {"mse", "psnr", "ssim", "reconstruction_fid"}
    assert record.protocol["restoration"] == {"task": "reconstruction", "count": 300}
    images = SampleReader(data).read(spread(300, 400))[0]
    model = load_model(run)
    assert isinstance(model, LoadedAutoencoder)
    x = images.float() / 127.5 - 1
    made = model.decode(model.encode(x)[0]).clamp(-1, 1)
    mse = (made - x).square().flatten(1).mean(1).double()
    assert record.metrics["mse"].value == pytest.approx(float(mse.mean()), rel=1e-4)
    assert record.metrics["psnr"].value == pytest.approx(float((10 * (4 / mse).log10()).mean()), rel=1e-4)
    for words in ({"metrics": ("fid",)}, {"metrics": ("loss",)}):
        with pytest.raises(UserError, match="does not fit: an autoencoder draws no samples and knows no noise level"):
            load_inputs(EvaluationSettings(run, data, **words))


HALF = """
from torch import eye, nn, ones_like

class Half(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.layer = nn.Linear(*shape, *shape, bias=False)
        self.layer.weight.data.copy_(0.5 * eye(*shape))

    def encode(self, x):
        return self.layer(x), ones_like(x)

    def decode(self, z):
        return z
"""


def test_an_autoencoder_that_halves_has_the_closed_forms(
    folder: Path, points: tuple[str, str], own_package: Any
) -> None:
    """Reconstructions x / 2 of x: MSE of |x|^2 / 4, Frechet distance |m|^2 / 4 + tr C / 4; of x itself both are 0."""
    own_package("halving", network=HALF)
    sections = {"network": {"kind": "halving.network:Half"}, "denoiser": {}, "objective": {"kind": "autoencoding"}}
    run, data = trained(folder, points[1], "halving", **sections), points[1]
    metrics = evaluate(
        EvaluationSettings(run, data, ("mse", "reconstruction_fid"), reference_count=4000)
    ).record.metrics
    x = read_rows(data, 4000)
    assert metrics["mse"].value == pytest.approx(np.square(x).mean() / 4, rel=1e-5)
    exact = np.square(x.mean(0)).sum() / 4 + np.cov(x.T).trace() / 4
    assert metrics["reconstruction_fid"].value == pytest.approx(exact, rel=1e-5)
    assert 0 < metrics["reconstruction_fid"].std_error < 0.1 * exact


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [("pictures", ("fid", "kid", "is", "pr", "sw", "nn", "loss", "psnr")), ("points", ("fid", "sw", "nats", "loss"))],
)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_is_null_in_the_record_with_a_warning(
    kind: str, wanted: tuple[str, ...], poison: float, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one number of each chunk that is not finite to record, page, text and comparison."""
    run, data = request.getfixturevalue(kind)

    def poisoned(store: Any, key: str, kind: Any) -> ChunkArrays:
        found = read_chunk(store, key, kind)
        arrays = {name: np.array(array) for name, array in vars(found).items() if array is not None}
        for array in arrays.values():
            if array.dtype.kind == "f" and array.ndim and key != "moments.npz":
                array[-1] = poison
        return kind(**arrays)

    monkeypatch.setattr(stored, "read_chunk", poisoned)
    monkeypatch.setattr(sample_metrics, "read_chunk", poisoned)
    seed = 3 if math.isnan(poison) else 4
    made = evaluate(
        EvaluationSettings(run, data, wanted, **QUICK, restoration_count=16, classifier_images=640, seed=seed)
    )  # type: ignore[arg-type]
    assert all(values.value is None for values in made.record.metrics.values()), made.record.metrics
    lines = [line for line in made.record.warnings if "not a finite number, so null in the record" in line]
    assert sorted(line.partition(":")[0] for line in lines) == sorted(wanted)
    strict = json.loads(Path(made.url).read_text(), parse_constant=lambda word: pytest.fail(word))
    assert strict == made.record.model_dump()
    assert "not finite" in Path(made.report).read_text()
    assert "not finite" in made.text()
    record = read_record(made.url)
    found = compare(record, record)
    assert {(one.first, one.difference, one.resolved) for one in found.values()} == {(None, None, None)}
    assert "not finite -> not finite" in comparison_text(found, [])
    finite = {"value": 1.0, "std_error": 0.1}
    fine = record.model_copy(
        update={"metrics": {name: one.model_copy(update=finite) for name, one in record.metrics.items()}}
    )
    assert all(one.difference is None for one in compare(record, fine).values())
    assert "not finite -> 1" in comparison_text(compare(record, fine), [])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(range(256)) * 4000, "not JSON"),
        (b"\x89PNG\r\n" + b"\0" * 5000, "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not the record of an evaluation"),
        (b'"' + b"x" * 100_000 + b'"', "not the record of an evaluation"),
        (b'{"kind": "' + b"x" * 100_000 + b'"}', "not the record of an evaluation"),
        (b'{"kind": "scoreray evaluation", "format": "' + b"9" * 100_000 + b'"}', "this version reads 1"),
        (b'{"kind": "scoreray evaluation", "format": 1}', "subject is missing or wrong"),
        (b'{"kind": "scoreray evaluation", "format": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_record_is_one_short_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=f"a.json: .*{message}") as caught:
        read_record(str(tmp_path / "a.json"))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("where", ["subject", "protocol", "versions", "metrics", "metrics.loss", "metrics.loss.value"])
def test_a_record_with_a_part_of_another_kind_is_one_line(records: Any, tmp_path: Path, where: str) -> None:
    for wrong in ("7", [1], 7, True):
        record = json.loads(records().to_json())
        *path, leaf = where.split(".")
        section = record
        for part in path:
            section = section[part]
        section[leaf] = wrong
        if where == "metrics.loss.value" and wrong == 7:
            continue
        (tmp_path / "a.json").write_text(json.dumps(record))
        with pytest.raises(DataError, match="is missing or wrong"):
            read_record(str(tmp_path / "a.json"))


def test_defaults_are_what_fits(points: tuple[str, str]) -> None:
    run, data = points
    made = evaluate(EvaluationSettings(run, data, **{**QUICK, "steps": 3}))  # type: ignore[arg-type]
    assert sorted(made.record.metrics) == ["fid", "kde", "kid", "loss", "nn", "pr", "sw"]
    assert made.record.protocol["extractor"]["kind"] == "identity"


KILLED = """
import sys
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.evaluation.follow import check_evaluation
from scoreray.sampling.metrics.plan import EvaluationSettings
run, data, out = sys.argv[1:]
evaluate(EvaluationSettings(run, data, ("fid", "loss"), out, count=640, reference_count=300, steps=8,
                            extractor="identity"))
"""


@pytest.mark.slow
def test_a_killed_evaluation_resumes_to_the_same_record(pictures: tuple[str, str], tmp_path: Path) -> None:
    """SIGKILL when some chunks are stored; what they hold is not computed again, and the record is the same bytes."""
    run, data = pictures
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", KILLED, run, data, str(out)])
    deadline = time.monotonic() + PATIENCE_S
    while not list(out.glob("*/samples/*.npz")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/samples/*.npz")}
    assert 0 < len(kept) < 3
    assert not list(out.glob("*/record.json"))
    settings: dict[str, Any] = {"count": 640, "reference_count": 300, "steps": 8, "extractor": "identity"}
    done: list[Path] = []
    real = stages.write_chunk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "write_chunk", lambda s, k, a: (done.append(Path(s.url(k))), real(s, k, a)))
        resumed = evaluate(EvaluationSettings(run, data, ("fid", "loss"), str(out), **settings))
    assert done
    assert not set(done) & set(kept)
    whole = evaluate(EvaluationSettings(run, data, ("fid", "loss"), str(tmp_path / "whole"), **settings))
    assert Path(resumed.url).read_bytes() == Path(whole.url).read_bytes()


@pytest.mark.parametrize("extractor", ["identity", "classifier"])
def test_what_an_evaluation_reads_is_loaded_once(
    extractor: str, pictures: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the check before Ray starts to a worker and the page: a manifest, a marker, weights, an extractor."""
    monkeypatch.setattr(loaded, "_loaded", {})
    read, real = list[str](), PathStore.get

    def get(self: PathStore, key: str, start: int | None = None, end: int | None = None) -> bytes:
        data = real(self, key, start, end)
        read.append(key.rpartition("/")[2])
        return data

    monkeypatch.setattr(PathStore, "get", get)
    settings = EvaluationSettings(*pictures, ("fid", "nn", "loss"), str(tmp_path / "out"), extractor=extractor,
                                  classifier_images=64, **QUICK)  # type: ignore[arg-type]  # fmt: skip
    evaluate(pickle.loads(pickle.dumps(checked_inputs(settings))))  # as they travel to a worker
    once = [name for name in read if name.endswith((".safetensors", "manifest.json", "COMMITTED.json"))]
    assert len(once) == len(set(once)) == 3 + (extractor == "classifier")


@pytest.mark.parametrize("data", [b"", b"PK", b"\x93NUMPY", b"\0" * 500])
def test_a_damaged_chunk_says_what_to_do(data: bytes, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.put("loss/000000.npz", data)
    with pytest.raises(DataError, match=r"loss/000000.npz: not a chunk of an evaluation .*remove it"):
        read_chunk(store, "loss/000000.npz", LossChunk)
    write_chunk(store, "loss/000000.npz", LossChunk(np.ones((2, 3))))
    assert read_chunk(store, "loss/000000.npz", LossChunk).errors.shape == (2, 3)
    with pytest.raises(DataError, match="unexpected keyword argument 'errors'"):  # another stage's
        read_chunk(store, "loss/000000.npz", AnnealingChunk)


def test_a_damaged_record_says_what_to_do(tmp_path: Path) -> None:
    plan: Any = SimpleNamespace(store=open_store(tmp_path))
    assert find_finished(plan) is None
    for data in (b"", b"{", b"[]", b"\0" * 90, b'{"kind": "' + b"x" * 9999):
        (tmp_path / "record.json").write_bytes(data)
        line = r"record.json: not the record of an evaluation.*; remove that file, and the same command evaluates "
        with pytest.raises(DataError, match=line):
            find_finished(plan)


@pytest.fixture(scope="module")
def records(points: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    run, data = points
    out = str(tmp_path_factory.mktemp("records"))

    def make(**changes: Any) -> EvaluationRecord:
        settings = {"metrics": ("fid", "sw", "loss"), "out": out, **QUICK, **changes}
        return read_record(evaluate(EvaluationSettings(run, data, **settings)).url)

    return make


def test_what_is_comparable_and_what_is_refused_by_name(records: Any, folder: Path, points: tuple[str, str]) -> None:
    """Another EMA length may be compared; another count, reference, sampler or seed is refused by what differs."""
    first = records()
    found = compare(first, records(ema="none"))
    assert set(found) == {"fid", "sw", "loss"}
    assert found["fid"].resolved is False  # the weights hardly moved
    assert "within the error" in comparison_text(found, notes(first, first))

    with pytest.raises(UserError, match=r"protocol.count|samples.count: 150 in the first, 200 in the second"):
        compare(first, records(count=200))
    with pytest.raises(UserError, match=r"reference\.count"):
        compare(first, records(reference_count=200))
    with pytest.raises(UserError, match=r"sampling\.steps: 4 in the first, 5 in the second.*--vary steps"):
        compare(first, records(steps=5))
    assert compare(first, records(steps=5), vary=["steps"])
    assert compare(first, records(steps=5), ["loss"])  # the loss knows no sampler
    with pytest.raises(UserError, match="did you mean 'fid'"):
        compare(first, first, ["fdi"])
    with pytest.raises(UserError, match="did you mean 'steps'"):
        compare(first, first, vary=["step"])
    other = packed(folder, "others", np.random.default_rng(5).standard_normal((4000, 4)).astype(np.float32))
    with pytest.raises(UserError, match=r"reference\.sha256"):
        compare(first, read_record(evaluate(EvaluationSettings(points[0], other, ("fid",), **QUICK)).url), ["fid"])  # type: ignore[arg-type]
    changed = first.model_copy(update={"versions": {**first.versions, "torch": "1.0"}})
    assert any("versions.torch" in line for line in notes(first, changed))
    assert compare(first, changed)


def test_a_record_holds_everything_that_changes_it(records: Any) -> None:
    record = records()
    assert record.subject.checkpoint.model_dump().keys() == {"url", "sha256", "images_seen", "ema"}
    assert {"sampler", "steps", "seed", "guidance", "grid", "options"} <= record.subject.sampling.model_dump().keys()
    assert {"torch", "numpy", "python", "scoreray"} <= record.versions.keys()
    assert record.protocol["reference"]["count"] == 300
    names = set(record.metrics)
    for change in ({"seed": 1}, {"steps": 5}, {"loss_count": 32}, {"count": 160}):
        other = records(**change)
        assert any(other.metrics[name] != record.metrics[name] for name in names), change


def test_every_metric_is_in_the_docs() -> None:
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()
    assert all(f"`{word}`" in page for word in METRICS)


def test_likelihood_of_images_without_classes_needs_no_extractor(folder: Path) -> None:
    images = np.random.default_rng(4).integers(0, 256, (40, 4, 4), dtype=np.uint8)
    data = packed(folder, "plain", images)
    run = trained(folder, data, "plain")
    assert set(evaluate(EvaluationSettings(run, data, ("loss",))).record.metrics) == {"loss"}
    small = packed(folder, "larger", np.random.default_rng(4).integers(0, 256, (40, 12, 12), dtype=np.uint8))
    larger = trained(folder, small, "larger")
    assert set(evaluate(EvaluationSettings(larger, small, ("loss",))).record.metrics) == {"loss"}
    with pytest.raises(UserError, match="give --extractor FILE"):
        evaluate(EvaluationSettings(larger, small, ("fid",)))


def test_what_does_not_fit_is_named_before_anything_is_computed(
    points: tuple[str, str], pictures: tuple[str, str], tmp_path: Path
) -> None:
    run, data = points
    with pytest.raises(UserError, match=r"bpd does not fit.*\n.*psnr does not fit.*\n?.*ais"):
        evaluate(EvaluationSettings(run, data, ("bpd", "psnr", "ais"), str(tmp_path / "out")))
    with pytest.raises(UserError, match=r"is does not fit.*identity"):
        evaluate(EvaluationSettings(run, data, ("is",)))
    with pytest.raises(UserError, match="did you mean 'kid'"):
        evaluate(EvaluationSettings(run, data, ("kidd",)))
    with pytest.raises(UserError, match=r"\[1, 12, 12\].*\[4\]"):
        evaluate(EvaluationSettings(run, pictures[1]))
    with pytest.raises(UserError, match="--restoration superresolution=5: the factor must be 2 or more and divide"):
        evaluate(EvaluationSettings(*pictures, ("psnr",), str(tmp_path / "out"), restoration="superresolution=5"))
    with pytest.raises(UserError, match="takes images"):
        evaluate(EvaluationSettings(run, data, ("fid",), extractor="weights.pth"))
    with pytest.raises(UserError, match="two classes"):
        evaluate(EvaluationSettings(run, data, ("fid",), extractor="classifier"))
    with pytest.raises(UserError, match="count = 3"):
        EvaluationSettings(run, data, count=3)
    assert not (tmp_path / "out").exists()


def bright(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 12, 12), dtype=np.uint8)


@pytest.mark.parametrize(("count", "labels"), [
    (40, [0] * 40), (40, [2] * 40), (40, None), (15, [0, 1, 2] * 5), (40, [3] + [1] * 39),
], ids=["first of one", "last of three", "none", "too few labels", "two"])  # fmt: skip
def test_a_classifier_needs_images_of_two_classes(
    count: int, labels: list[int] | None, pictures: tuple[str, str], tmp_path: Path
) -> None:
    """Classes count that have images, not names: features of one class are the same for everything, FID 0, IS 1."""
    data = packed(tmp_path, "few", bright(count), None if labels is None else np.array(labels, np.uint8))
    for wanted in ((), ("is",), ("fid",), ("kid", "loss"), ("pr",), ("nn",)):
        for extractor in ("auto", "classifier"):
            settings = EvaluationSettings(pictures[0], data, wanted, str(tmp_path / "out"), extractor=extractor)
            if labels is not None and set(labels) == {1, 3}:
                inputs = load_inputs(settings)
                assert inputs.extractor.kind == "classifier"
                assert needs_training(inputs)
                continue
            with pytest.raises(UserError, match=f"--extractor {extractor}: .*two classes or more"):
                evaluate(settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16])
def test_a_reference_of_too_few_images_is_refused_before_anything_is_drawn(
    count: int, pictures: tuple[str, str], tmp_path: Path
) -> None:
    data = packed(tmp_path, "few", bright(count))

    def drawn(*_: Any) -> None:
        raise KeyError("samples are drawn")

    for wanted in ((), ("fid",), ("kid",), ("pr",), ("sw",), ("nn",), ("fid", "loss")):
        settings = EvaluationSettings(pictures[0], data, wanted, str(tmp_path / "out"), extractor="identity", count=20)
        with pytest.raises(KeyError if count == 16 else UserError, match="drawn" if count == 16 else "of at least 16"):
            evaluate(settings, run=drawn)
    with pytest.raises(KeyError):
        evaluate(EvaluationSettings(pictures[0], data, ("loss",), str(tmp_path / "out")), run=drawn)


def test_a_reference_of_nearly_one_class_is_warned_of(pictures: tuple[str, str], tmp_path: Path) -> None:
    labels = np.array([0] * 57 + [1] * 3, np.uint8)
    data = packed(tmp_path, "lopsided", bright(60), labels)
    short = {"count": 16, "reference_count": 32, "steps": 2, "classifier_images": 64}
    warned = evaluate(EvaluationSettings(pictures[0], data, ("kid",), str(tmp_path / "a"), **short)).record.warnings
    assert any("95% of the reference's labels are" in line for line in warned)
    plain = evaluate(EvaluationSettings(pictures[0], data, ("sw",), str(tmp_path / "b"), **short)).record.warnings
    assert not any("labels" in line for line in plain)


MISPLACED: dict[str, tuple[dict[str, Any], str]] = {
    "nowhere": ({"reference": "/nope"}, r"evaluation\.reference: /nope: no data set here"),
    "of another shape": ({"reference": "points"}, r"evaluation\.reference: .*shape \[4\].*\[1, 12, 12\]"),
    "an unfit metric": ({"metrics": ["ais"]}, "evaluation: metric ais does not fit"),
    "an unknown sampler": ({"metrics": ["loss"], "sampler": "huen"}, "evaluation: unknown sampler.*'heun'"),
    "an extractor that is not there": ({"metrics": ["fid"], "extractor": "/x.pt"}, "evaluation: .*no such file"),
    "too few images": ({"metrics": ["sw"], "reference": "few"}, "evaluation: .*at least 16"),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_an_evaluation_beside_a_run_is_checked_before_it_begins(
    name: str, pictures: tuple[str, str], points: tuple[str, str], tmp_path: Path
) -> None:
    section, words = MISPLACED[name]
    places = {"points": points[1], "few": packed(tmp_path, "few", bright(3))}
    section = {**section, **({"reference": places.get(at, at)} if (at := section.get("reference")) else {})}
    base = {"run": {"name": "a", "storage": str(tmp_path)}, "data": {"url": pictures[1], "global_batch_size": 16},
            "duration": {"images": 16}}  # fmt: skip
    data = Manifest.load(open_store(pictures[1]))
    check = partial(check_evaluation, data=data)
    check(load_config({**base, "evaluation": {"metrics": ["fid", "is"], "sheet": 4}}))
    check(load_config(base))
    with pytest.raises(UserError, match=words):
        check(load_config({**base, "evaluation": section}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": math.nan}, "guidance weight nan"),
        ({"guidance": 1e300}, "guidance weight 1e\\+300"),
        ({"steps": 10**20}, "steps = 100000000000000000000: must be at most 10,000,000"),
        ({"batch_size": 10**20}, "batch_size = .*: must be at most"),
        ({"threads": 10**6}, "threads = 1000000: must be 1 to 1024"),
        ({"rtol": 1e-300}, "rtol = 1e-300: must be in"),
        ({"rtol": math.nan}, "rtol = nan"),
    ],
)
def test_numbers_that_no_evaluation_ends_with_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvaluationSettings("/absent", "/absent", **settings)
