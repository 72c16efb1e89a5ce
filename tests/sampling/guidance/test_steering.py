"""`scoreray sample`: its words become the wrappers and samplers that they name, and nonsense is one line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from scoreray.cluster.cli import main as cli
from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.normalisation import Normaliser, to_unit_range
from scoreray.data.packing.pack import pack
from scoreray.sampling.guidance.guidance import Autoguidance, ClassifierFree, Interval
from scoreray.sampling.guidance.inverse import LinearInverse
from scoreray.sampling.guidance.operators import average_pool, gray, mask
from scoreray.sampling.guidance.steering import Guidance, Measurement, steered
from scoreray.sampling.model.load import load, load_machine, load_model
from scoreray.sampling.offline.generate import Request, RequestError, generate, prepare
from scoreray.sampling.samplers.gibbs import gibbs
from scoreray.sampling.samplers.options import check_options
from scoreray.sampling.samplers.sample import SAMPLERS
from scoreray.trainer.checkpoints.checkpoint import committed
from scoreray.trainer.config import load_config
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion.condition import ConditionSpec
from scoreray.trainer.loop import train
from scoreray.trainer.networks.ladder import ladder_ratio
from scoreray.trainer.run_folder import run_store

KINDS: dict[str, dict[str, Any]] = {
    "unet": {"network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}},
    "rbm": {
        "network": {"kind": "rbm", "num_hidden": 6},
        "objective": {"kind": "contrastive", "chain": "gibbs", "start": "persistent"},
        "optimizer": {"learning_rate": 0.1, "warmup_images": 0},
    },
    "gaussian_rbm": {
        "network": {"kind": "gaussian_rbm", "num_hidden": 6},
        "objective": {"kind": "contrastive", "chain": "gibbs"},
    },
    "energy": {
        "network": {"kind": "mlp", "hidden_size": 8, "num_layers": 1},
        "denoiser": {"parameterization": "energy_dot"},
        "objective": {"kind": "contrastive"},
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Runs of 32 images, committed at 16 and 32, on 8 x 8 pictures in colour of two classes, by kind."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    np.savez(folder / "p.npz", images=rng.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8), labels=np.arange(32) % 2)
    pack(str(folder / "p.npz"), str(folder / "packed"))
    urls = {}
    for kind, sections in KINDS.items():
        config = load_config(
            {
                "run": {"name": kind, "storage": str(folder)},
                "data": {"url": str(folder / "packed"), "global_batch_size": 16},
                "engine": {"zero_stage": 0, "precision": "fp32"},
                "duration": {"images": 32},
                "checkpoint": {"every_images": 16},
                **sections,
            }
        )
        train(config)
        urls[kind] = run_store(config).url()
    return urls


def scoreray(*arguments: str | Path) -> None:
    cli.app([str(argument) for argument in arguments], standalone_mode=False)


def drawn(url: str, out: Path, *arguments: str | Path) -> torch.Tensor:
    scoreray("sample", url, "--out", out, "--count", "3", "--steps", "6", *arguments)
    with np.load(out) as samples:
        return to_unit_range(torch.from_numpy(samples["images"]).permute(0, 3, 1, 2))


def picture(path: Path, array: np.ndarray) -> Path:
    Image.fromarray(array).save(path)
    return path


def bytes_of(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def test_guidance_words_make_the_wrappers_that_they_name(runs: dict[str, str]) -> None:
    denoiser = load(runs["unet"])
    early = committed(run_store(denoiser.info.config))[0]
    assert steered(denoiser, Guidance()) is denoiser
    assert isinstance(steered(denoiser, Guidance(2.0)), ClassifierFree)
    by_ema = steered(denoiser, Guidance(2.0, ema="0.1"))
    by_checkpoint = steered(denoiser, Guidance(2.0, f"{runs['unet']}/{early}"))
    assert isinstance(by_ema, Autoguidance)
    assert isinstance(by_checkpoint, Autoguidance)
    x, sigma, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 2.0]), torch.tensor([0, 1])
    for guided, weak in ((by_ema, load(runs["unet"], "0.1")), (by_checkpoint, load(f"{runs['unet']}/{early}"))):
        good, bad = denoiser(x, sigma, labels), weak(x, sigma, labels)
        assert not torch.equal(good, bad)
        torch.testing.assert_close(guided(x, sigma, labels), 2 * good - bad)


def test_an_interval_guides_the_rows_inside_it_and_asks_for_no_more(runs: dict[str, str]) -> None:
    denoiser = load(runs["unet"])
    guided = steered(denoiser, Guidance(3.0, interval=(0.2, 1.0)))
    assert isinstance(guided, Interval)
    x, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    sigma = torch.tensor([0.1, 0.2, 1.0, 1.1])
    expected = denoiser(x, sigma, labels)
    full = ClassifierFree(denoiser, 3.0)(x, sigma, labels)
    got = guided(x, sigma, labels)
    torch.testing.assert_close(got[[0, 3]], expected[[0, 3]])
    torch.testing.assert_close(got[[1, 2]], full[[1, 2]])
    for level, reference in ((5.0, denoiser), (0.5, ClassifierFree(denoiser, 3.0))):
        levels = torch.full((4,), level)
        assert torch.equal(guided(x, levels, labels), reference(x, levels, labels))
    seen: list[int] = []
    counting = Interval(lambda x, *_: seen.append(len(x)) or x, lambda x, *_: x, 0.2, 1.0)
    counting(x, sigma)
    counting(x, torch.full((4,), 9.0))
    assert seen == [2]


def test_an_inpainted_sample_keeps_what_is_known(runs: dict[str, str], tmp_path: Path) -> None:
    image = bytes_of((8, 8, 3))
    known = np.zeros((8, 8), dtype=np.uint8)
    known[:, :5] = 255
    words = "--inpaint", picture(tmp_path / "i.png", image), "--mask", picture(tmp_path / "m.png", known)
    samples = drawn(runs["unet"], tmp_path / "s.npz", *words)
    wanted = to_unit_range(torch.from_numpy(image).permute(2, 0, 1))
    assert (samples - wanted)[..., :5].abs().max() < 0.01
    assert (samples - wanted)[..., 5:].abs().mean() > 0.2
    assert (samples[0] - samples[1])[..., 5:].abs().mean() > 0.05
    np.savez(tmp_path / "m.npz", mask=known > 0)
    words = "--inpaint", tmp_path / "i.png", "--mask", tmp_path / "m.npz"
    assert torch.equal(drawn(runs["unet"], tmp_path / "t.npz", *words), samples)
    np.save(tmp_path / "unit.npy", image / 255)
    words = "--inpaint", tmp_path / "unit.npy", "--mask", tmp_path / "m.png", "--value-range", "0,1"
    assert (drawn(runs["unet"], tmp_path / "u.npz", *words) - samples).abs().max() < 0.01


@pytest.mark.parametrize("method", ["projection", "jacobian"])
@pytest.mark.parametrize("operator", ["superresolution=4", "gray", "matrix"])
def test_samples_of_an_inverse_problem_meet_its_measurement(
    runs: dict[str, str], tmp_path: Path, operator: str, method: str
) -> None:
    if operator == "matrix":
        a = np.random.default_rng(2).normal(size=(5, 192)) / 14
        np.save(tmp_path / "a.npy", a.astype(np.float32))
        np.save(tmp_path / "y.npy", np.linspace(-0.2, 0.2, 5))
        operator, file = f"matrix={tmp_path}/a.npy", tmp_path / "y.npy"
        forward, y = (lambda x: x.flatten(1) @ torch.from_numpy(a).float().T), torch.linspace(-0.2, 0.2, 5)
    elif operator == "gray":
        file = picture(tmp_path / "y.png", bytes_of((8, 8)) // 2 + 64)
        forward, y = gray().apply, to_unit_range(torch.from_numpy(bytes_of((8, 8)) // 2 + 64))[None]
    else:
        file = picture(tmp_path / "y.png", bytes_of((2, 2, 3)) // 2 + 64)
        y = to_unit_range(torch.from_numpy(bytes_of((2, 2, 3)) // 2 + 64).permute(2, 0, 1))
        forward = average_pool(4).apply
    request = Request(
        3,
        "dpmpp_2m",
        8,
        measurement=Measurement(operator, str(file), method=method),  # type: ignore[arg-type]
    )
    (x, _), *_ = generate(load(runs["unet"]), request)
    assert (forward(x) - y).abs().max() < (1e-4 if method == "projection" else 0.2)
    free = prepare(load(runs["unet"]), Request(3, "dpmpp_2m", 8))(torch.arange(3), torch.arange(3) % 2)
    assert (forward(free) - y).abs().max() > 0.3


@pytest.mark.parametrize("operator", ["inpaint", "superresolution=2", "matrix"])
def test_measurements_of_a_field_are_in_its_own_units(
    new_run: Callable[..., str], operator: str, tmp_path: Path
) -> None:
    field = TargetField("height", "array", "float32", Normaliser("channel", (250.0,), (40.0,)))
    model = load(new_run(str(tmp_path / "run"), shape=(1, 4, 4), target=field))
    np.save(tmp_path / "mask.npy", np.eye(4, dtype=np.uint8))
    np.save(tmp_path / "matrix.npy", rows := np.linspace(0, 1, 32, dtype=np.float32).reshape(2, 16) ** 2)
    forward, shape = {
        "inpaint": (mask(torch.eye(4, dtype=torch.bool)).apply, (1, 4, 4)),
        "superresolution=2": (average_pool(2).apply, (1, 2, 2)),
        "matrix": (lambda x: x.flatten(1) @ torch.from_numpy(rows).T, (2,)),
    }[operator]
    np.save(tmp_path / "y.npy", np.full(shape, 270 if operator != "matrix" else 1500, np.float32))
    word = f"matrix={tmp_path / 'matrix.npy'}" if operator == "matrix" else operator
    measurement = Measurement(word, str(tmp_path / "y.npy"), str(tmp_path / "mask.npy") if word == "inpaint" else None)
    (x, _), *_ = generate(model, Request(2, "dpmpp_2m", 8, measurement=measurement))
    y = torch.from_numpy(np.load(tmp_path / "y.npy"))
    expected = forward(y[None]) if operator == "inpaint" else y[None]
    assert (forward(model.info.in_data_units(x)) - expected).abs().max() < 0.05


def test_guidance_and_a_measurement_go_together(runs: dict[str, str], tmp_path: Path) -> None:
    image, known = bytes_of((8, 8, 3)), np.eye(8, dtype=np.uint8) * 255
    measurement = Measurement(
        "inpaint", str(picture(tmp_path / "i.png", image)), str(picture(tmp_path / "m.png", known))
    )
    bent = steered(load(runs["unet"]), Guidance(2.0, ema="0.1"), measurement)
    assert isinstance(bent, LinearInverse)
    assert isinstance(bent.denoiser, Autoguidance)
    assert bent.data_std == 0.5


def test_a_guide_in_other_units_or_of_another_condition_is_refused(new_run: Callable[..., str], tmp_path: Path) -> None:
    def run(name: str, scale: float, most_tokens: int) -> str:
        field = TargetField("field", "array", "float32", Normaliser("channel", (270.0,), (scale,)))
        tokens = {"tokens": ConditionSpec("sequence", (most_tokens, 2))}
        return new_run(str(tmp_path / name), shape=(1, 4, 4), classes=0, target=field, conditions=tokens)

    model = load(run("model", 10.0, 4))
    with pytest.raises(UserError, match="normalises samples otherwise than this model; take a guide of its units"):
        steered(model, Guidance(2.0, run("units", 20.0, 4)), None)
    with pytest.raises(UserError, match="knows another condition 'tokens' than this model; take a guide of the same"):
        steered(model, Guidance(2.0, run("tokens", 10.0, 5)), None)


NONSENSE: dict[str, tuple[list[str], str]] = {
    "guide without weight": (["--autoguide", "{unet}"], "--autoguide does nothing at guidance 1"),
    "ema without weight": (["--guide-ema", "0.1"], "--guide-ema does nothing at guidance 1"),
    "interval without weight": (["--interval", "0.1,1"], "--interval does nothing at guidance 1"),
    "interval of words": (["--guidance", "2", "--interval", "low,high"], "write two noise levels"),
    "interval upside down": (["--guidance", "2", "--interval", "5,1"], "--interval 5,1: must be"),
    "guided by itself": (["--guidance", "2", "--autoguide", "{unet}"], "is this very model"),
    "guided by another shape": (["--guidance", "2", "--autoguide", "{rbm}"], "knows no noise level"),
    "unknown ema": (["--guidance", "2", "--guide-ema", "0.2"], "EMA length '0.2'"),
    "nan weight": (["--guidance", "nan"], "guidance weight nan"),
    "inpaint without mask": (["--inpaint", "{png}"], "--inpaint needs it"),
    "mask alone": (["--mask", "{png}"], "nothing is measured"),
    "noise alone": (["--noise-std", "0.1"], "--noise-std: nothing is measured"),
    "two measurements": (["--inpaint", "{png}", "--mask", "{png}", "--inverse", "gray"], "one measurement at a time"),
    "inverse of nothing": (["--inverse", "gray"], "needs --measurement FILE"),
    "unknown operator": (["--inverse", "grey", "--measurement", "{png}"], "did you mean 'gray'"),
    "factor left out": (["--inverse", "superresolution", "--measurement", "{png}"], "superresolution=FACTOR"),
    "factor too much": (["--inverse", "superresolution=3", "--measurement", "{png}"], "divide 8 x 8"),
    "wrong size": (["--inverse", "superresolution=2", "--measurement", "{png}"], "must be [3, 4, 4]"),
    "absent": (["--inverse", "gray", "--measurement", "/nowhere/y.png"], "no such file"),
    "no picture": (["--inverse", "gray", "--measurement", "{text}"], "must end in .png"),
    "unknown method": (["--inverse", "gray", "--measurement", "{png}", "--inverse-method", "dps"], "accepted: jac"),
    "floats of 0 to 1": (["--inpaint", "{unit}", "--mask", "{half}"], "float64 values from 0"),
    "a soft mask": (["--inpaint", "{png}", "--mask", "{soft}"], "and a mask has two"),
    "a range alone": (["--value-range", "0,1"], "--value-range: nothing is measured"),
    "a range of words": (["--inpaint", "{unit}", "--mask", "{half}", "--value-range", "dark"], "LOW,HIGH"),
    "all known": (["--inpaint", "{png}", "--mask", "{white}"], "marks all as known"),
    "negative noise": (["--inverse", "gray", "--measurement", "{png}", "--noise-std", "-1"], "--noise-std -1"),
    "unknown sampler": (["--sampler", "gibs"], "did you mean 'gibbs'"),
    "gibbs for a network": (["--sampler", "gibbs"], "is for RBMs, and network.kind is 'unet'"),
    "endless noise": (
        ["--inverse", "gray", "--measurement", "{png}", "--noise-std", "1e300"],
        "a number from 0 to 1e+09",
    ),
    "coloured mask": (["--inpaint", "{png}", "--mask", "{red}"], "red.png: has colours, and one channel is wanted"),
    "no arrays": (["--inverse", "gray", "--measurement", "{none}"], "none.npz: holds no arrays"),
    "unknown grid": (["--grid", "karas"], "did you mean 'karras'"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_refused_in_one_line(runs: dict[str, str], tmp_path: Path, name: str) -> None:
    words, message = NONSENSE[name]
    (tmp_path / "y.txt").write_text("y")
    files = {
        "png": picture(tmp_path / "y.png", bytes_of((8, 8, 3))),
        "white": picture(tmp_path / "white.png", np.full((8, 8), 255, dtype=np.uint8)),
        "text": tmp_path / "y.txt",
        "unit": tmp_path / "unit.npy",
        "half": picture(tmp_path / "half.png", np.tile(np.array([0, 255], np.uint8), (8, 4))),
        "soft": picture(tmp_path / "soft.png", bytes_of((8, 8))),
        "red": picture(tmp_path / "red.png", np.eye(8, dtype=np.uint8)[..., None] * np.array([255, 0, 0], np.uint8)),
        "none": tmp_path / "none.npz",
    }
    np.savez(files["none"])
    np.save(files["unit"], bytes_of((8, 8, 3)) / 255)
    with pytest.raises(UserError) as caught:
        drawn(runs["unet"], tmp_path / "s.npz", *(word.format(**files, **runs) for word in words))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "s.npz").exists()


def test_a_file_that_is_no_array_or_holds_a_pickle_is_refused(runs: dict[str, str], tmp_path: Path) -> None:
    np.save(tmp_path / "y.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "z.npz").write_bytes(b"PK\x03\x04 no zip")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    for file in ("y.npy", "z.npz", "broken.png"):
        with pytest.raises(DataError, match=file):
            drawn(runs["unet"], tmp_path / "s.npz", "--inverse", "gray", "--measurement", tmp_path / file)


@pytest.mark.parametrize("kind", ["rbm", "gaussian_rbm"])
def test_a_trained_rbm_is_drawn_by_gibbs_row_by_row(runs: dict[str, str], kind: str) -> None:
    model = load_model(runs[kind])
    (whole, labels), *_ = generate(model, Request(5, steps=7, seed=3))
    assert whole.shape == (5, 3, 8, 8)
    assert labels.tolist() == [-1] * 5
    rows = [x for x, _ in generate(model, Request(5, steps=7, seed=3, batch_size=2))]
    torch.testing.assert_close(torch.cat(rows), whole)
    assert not torch.equal(whole, next(generate(model, Request(5, steps=8, seed=3)))[0])
    if kind == "rbm":
        assert set(whole.flatten().tolist()) == {-1.0, 1.0}
    assert Request(1).fitted(model.info).steps == 1000
    machine = load_machine(runs[kind])
    assert torch.equal(machine.picture(gibbs(machine, Request(5, seed=3).sample_seeds(0, 5), 7)), whole.flatten(1))


def test_gibbs_reaches_the_distribution_of_an_enumerated_machine() -> None:
    from scoreray.trainer.networks.rbm import RBM, _states

    machine = RBM(4, 3).requires_grad_(False)
    machine.weight.copy_(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    states = _states(torch.zeros(4))
    exact = (-machine.free_energy(states) - machine.log_partition()).exp()
    v = gibbs(machine, range(20_000), 40)
    seen = torch.bincount((v @ torch.tensor([8.0, 4.0, 2.0, 1.0])).long(), minlength=16) / len(v)
    assert ((seen - exact).abs() < 4.5 * (exact * (1 - exact) / len(v)).sqrt()).all()


def test_ais_of_a_trained_rbm_is_its_enumerated_normaliser(runs: dict[str, str]) -> None:
    from scoreray.sampling.measures.ais import GaussianRBMPath, RBMPath, ais

    betas = torch.linspace(0, 1, 100)
    for kind, path in (("rbm", RBMPath), ("gaussian_rbm", GaussianRBMPath)):
        machine = load_machine(runs[kind])
        estimate = ais(path(machine), betas, range(200))
        assert estimate.log_z == pytest.approx(float(machine.log_partition()), abs=5 * estimate.std_error + 1e-3)


def test_what_does_not_fit_an_rbm_is_refused_all_at_once(runs: dict[str, str], tmp_path: Path) -> None:
    words = ["--sampler", "heun", "--grid", "karras", "--class-label", "0", "--guidance", "2"]
    with pytest.raises(UserError, match="--sampler heun, --grid karras, --class-label 0, --guidance: are not for"):
        drawn(runs["rbm"], tmp_path / "s.npz", *words)
    with pytest.raises(UserError, match="has no denoiser; `scoreray sample` draws from it by Gibbs"):
        load(runs["rbm"])
    with pytest.raises(UserError, match="'unet' is no RBM; use load"):
        load_machine(runs["unet"])


def test_the_sampler_fits_the_model_unless_a_word_says_otherwise(runs: dict[str, str], tmp_path: Path) -> None:
    unet, energy = load(runs["unet"]), load(runs["energy"])
    plain = Request(1).fitted(unet.info)
    assert (plain.sampler, plain.steps, plain.grid) == ("heun", 18, "karras")
    annealed = Request(1).fitted(energy.info)
    assert (annealed.sampler, annealed.grid) == ("ncsnv2", "geometric")
    # Technique 2 of NCSNv2: the fewest levels from 80 to 0.002 whose neighbours are near enough in 192 dimensions.
    assert annealed.steps is not None
    assert 4e4 ** (1 / (annealed.steps - 1)) <= ladder_ratio(192) < 4e4 ** (1 / (annealed.steps - 2))
    assert Request(1, "heun").fitted(energy.info).steps == 18
    assert Request(1, "rk45").fitted(unet.info).options == {"sigma_data": unet.sigma_data}
    assert Request(1, "rk45", options={"sigma_data": 2.0}).fitted(unet.info).options == {"sigma_data": 2.0}
    down = Request(1, "hmc", options={"anneal": True}).fitted(unet.info)
    assert (down.steps, down.grid, down.options) == (annealed.steps, "geometric", {"anneal": True})
    assert Request(1, "hmc").fitted(unet.info).options == {"warm_start": True}
    for sampler in ("reverse_sde", "predictor_corrector"):  # the run's own process, unless a word says otherwise
        options = Request(1, sampler).fitted(unet.info).options
        assert check_options(sampler, SAMPLERS[sampler], options) == {"process": unet.info.config.process}
    words = ["--sampler", "reverse_sde", "--steps", "6", "--option"]
    wide = drawn(runs["unet"], tmp_path / "wide.npz", *words, "process={kind: edm, sigma_max: 100}")
    own = drawn(runs["unet"], tmp_path / "own.npz", *words, "process={kind: edm}")
    assert torch.equal(wide, own)  # the same SDE over the same levels
    assert not torch.equal(own, drawn(runs["unet"], tmp_path / "none.npz", *words, "process=none"))
    with pytest.raises(UserError, match=r"process\.beta_max is -1\.0: give a finite number above 0"):
        Request(1, "reverse_sde", options={"process": {"kind": "vp", "beta_max": -1}})
    for grid in ("karras", "geometric", "linear", "interior", "process"):
        sigmas = unet.info.sigmas(9, grid)
        assert len(sigmas) == 10
        samples = drawn(runs["unet"], tmp_path / f"{grid}.npz", "--grid", grid)
        assert samples.isfinite().all()
    assert drawn(runs["energy"], tmp_path / "e.npz").shape == (3, 3, 8, 8)


def test_levels_in_the_place_of_a_grids_name_are_the_steps(runs: dict[str, str], tmp_path: Path) -> None:
    info = load(runs["unet"]).info
    levels = info.sigmas(6)[:-1].tolist()
    words = ",".join(map(str, levels))
    assert torch.equal(
        drawn(runs["unet"], tmp_path / "levels.npz", "--grid", words), drawn(runs["unet"], tmp_path / "named.npz")
    )
    fitted = Request(1, grid=[80, 2.5]).fitted(info)
    assert (fitted.steps, fitted.grid) == (2, (80.0, 2.5))
    assert replace(fitted, seed=3).fitted(info).steps == 2
    for given, words in (
        ({"grid": "80,2.5", "steps": 18}, r"steps = 18: grid 80.0,2.5 has 2 noise levels; leave steps out"),
        ({"grid": "2.5,80"}, r"grid 2.5,80.0: 2.5 is followed by 80"),
        ({"grid": "kerras"}, r"unknown noise grid 'kerras': did you mean 'karras'.*or noise levels as 80,0.8"),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            Request(1, **given)
        assert caught.value.field == next(reversed(given))
