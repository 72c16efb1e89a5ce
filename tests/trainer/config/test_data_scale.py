"""Data of a scale that a model does not expect are said or refused; sigma_data: auto is a number that a run keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from scoreray.cluster.cli.main import app
from scoreray.cluster.doctor.examine import data_set
from scoreray.data.errors import UserError
from scoreray.data.packing.pack import pack
from scoreray.data.reading.manifest import Manifest
from scoreray.data.storage.store import open_store
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import Config, dump_config, load_config
from scoreray.trainer.config.data_scale import Misfit, misfit, resolve_sigma_data
from scoreray.trainer.config.run_fields import run_fields
from scoreray.trainer.loop import train
from scoreray.trainer.prepare import check_run, prepare_run, with_sigma_data
from scoreray.trainer.run_folder import run_store, stored_config
from scoreray.trainer.step import build_training_module


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of 32 packed arrays of 2 x 8 x 8 with standard deviation 0.5."""
    folder = tmp_path_factory.mktemp("floats")
    np.savez(folder / "x.npz", images=0.5 * np.random.default_rng(0).normal(size=(32, 2, 8, 8)))
    pack(folder / "x.npz", folder / "packed")
    return str(folder / "packed")


def described(url: str, mean: list[float], std: list[float]) -> Manifest:
    """The manifest of channels of these means and standard deviations."""
    overall = float(np.sqrt(np.mean(np.square(std)) + np.var(mean)))
    manifest = Manifest.load(open_store(url))
    return replace(manifest, shape=[len(mean), 8, 8], mean=mean, std=std, sigma_data=overall)


def config_of(small_run: Callable[..., dict[str, Any]], url: str, storage: Path, *changes: str) -> Config:
    return load_config(small_run("scaled", storage, 32), [f"data.url={url}", *changes])


def judged(config: Config, manifest: Manifest) -> Misfit | None:
    return misfit(config, run_fields(config.data, manifest))


FITTING = [([0.0, 0.0], [0.5, 0.5]), ([0.0], [1.0]), ([0.4, -0.4], [0.3, 0.6]), ([0.0, 0.3], [0.5, 0.0])]
NORMALISED = r"; set data\.normalisation=channel$"
UNFIT = {
    "a scale": ([0.0, 0.0], [5.0, 5.0], False, NORMALISED),
    "a small scale": ([0.0], [0.1], False, NORMALISED),
    "means": ([3.0, 3.0], [0.5, 0.5], False, NORMALISED),
    "channels": ([0.0, 0.0], [0.01, 0.7], False, NORMALISED),
    "everything": ([0, 1, 10, 100, 1000], [0.001, 0.1, 1, 10, 30], True, NORMALISED),
    "below the noise": ([0.0], [1e-4], True, NORMALISED),
    "above the noise": ([0.0], [1e30], True, NORMALISED),
    "far away": ([-90.0], [0.5], True, NORMALISED),
}


@pytest.mark.parametrize("numbers", FITTING)
def test_data_near_what_the_model_expects_are_good(
    numbers: tuple[list[float], list[float]], small_run: Callable[..., dict[str, Any]], floats: str, tmp_path: Path
) -> None:
    assert judged(config_of(small_run, floats, tmp_path), described(floats, *numbers)) is None


@pytest.mark.parametrize("what", UNFIT)
def test_data_far_from_it_are_reported_in_a_line_and_the_settings_that_it_names_fit(
    what: str, small_run: Callable[..., dict[str, Any]], floats: str, tmp_path: Path
) -> None:
    mean, std, hopeless, fix = UNFIT[what]
    manifest = described(floats, [float(m) for m in mean], std)
    found = judged(config_of(small_run, floats, tmp_path), manifest)
    assert found is not None
    assert found.hopeless == hopeless
    assert "\n" not in found.text
    with pytest.raises(UserError, match=fix):
        raise UserError(found.text)
    settings = found.text.rpartition("set ")[2].split()
    assert judged(config_of(small_run, floats, tmp_path, *settings), manifest) is None


def test_a_constant_channel_is_to_be_left_out_as_no_normalisation_takes_it(
    small_run: Callable[..., dict[str, Any]], floats: str, tmp_path: Path
) -> None:
    found = judged(config_of(small_run, floats, tmp_path), described(floats, [0.0, 1000.0], [5.0, 0.0]))
    assert found is not None
    advice = "pack them without channel 1, the same in every sample, and set data.normalisation=channel"
    assert found.text.endswith(f"; {advice}")


def test_pictures_of_every_usual_contrast_are_good_for_every_process(
    small_run: Callable[..., dict[str, Any]], small_set: str, tmp_path: Path
) -> None:
    for std in (0.25, 0.5, 0.7, 1.0):
        for mean in (-0.95, 0.0, 0.9):
            manifest = replace(Manifest.load(open_store(small_set)), mean=[mean], std=[std], sigma_data=std)
            for kind in ("edm", "vp", "sub_vp", "cosine", "flow_matching"):
                changes = [f"process.kind={kind}", "objective.sigma_sampling.kind=uniform_t"] if kind != "edm" else []
                assert judged(config_of(small_run, small_set, tmp_path, *changes), manifest) is None, (kind, std, mean)


def test_a_manifest_of_an_earlier_version_is_judged_by_its_means_of_values(
    small_run: Callable[..., dict[str, Any]], floats: str, tmp_path: Path
) -> None:
    manifest = replace(Manifest.load(open_store(floats)), mean=[0.0] * 64 + [200.0] * 64, std=[])
    assert manifest.channel_means() == [0.0, 200.0]
    found = judged(config_of(small_run, floats, tmp_path), manifest)
    assert found is not None
    assert found.hopeless


def test_auto_is_the_data_sets_number_in_the_config_the_module_and_the_checkpoint_and_stays(
    small_run: Callable[..., dict[str, Any]], floats: str, tmp_path: Path
) -> None:
    config = config_of(small_run, floats, tmp_path, "denoiser.sigma_data=auto")
    assert load_config_again(config) == config
    manifest = Manifest.load(open_store(floats))
    assert build_training_module(config, run_fields(config.data, manifest)).denoiser.sigma_data == manifest.sigma_data
    prepared = prepare_run(config).config
    assert prepared.denoiser.resolved_sigma_data == manifest.sigma_data
    assert stored_config(run_store(config)) == prepared
    train(config)  # as a debugger starts it, without prepare_run
    checkpoint = latest(run_store(config))
    assert checkpoint is not None
    assert checkpoint.marker.config["denoiser"]["sigma_data"] == manifest.sigma_data
    other = replace(manifest, sigma_data=0.7)  # a copy that was packed with other statistics
    again = with_sigma_data(config, run_fields(config.data, other), checkpoint, None)
    assert again == prepared
    assert prepare_run(config).config == prepared
    with pytest.raises(UserError, match=r"denoiser\.sigma_data: 0\.\d+ in the run, 0\.5 in this config"):
        prepare_run(config_of(small_run, floats, tmp_path))


def load_config_again(config: Config) -> Config:
    import yaml

    return load_config(yaml.safe_load(dump_config(config)))


def test_a_number_is_left_as_it_is(small_run: Callable[..., dict[str, Any]], floats: str, tmp_path: Path) -> None:
    config = config_of(small_run, floats, tmp_path)
    manifest = Manifest.load(open_store(floats))
    assert resolve_sigma_data(config, run_fields(config.data, manifest), 0.9) is config
    assert build_training_module(config, run_fields(config.data, manifest)).denoiser.sigma_data == 0.5


@pytest.mark.parametrize("value", ["abc", "AUTO", "true", "0", "-1", ".inf", ".nan", "[0.5]", "null", "{a: 1}"])
def test_what_is_no_scale_is_one_line(
    value: str, small_run: Callable[..., dict[str, Any]], floats: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"denoiser\.sigma_data.* (is not accepted|give a finite number)") as caught:
        config_of(small_run, floats, tmp_path, f"denoiser.sigma_data={value}")
    assert "\n" not in str(caught.value)


def test_the_check_and_the_doctor_say_it_and_a_hopeless_run_does_not_begin(
    small_run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).normal(size=(32, 2, 8, 8))
    for name, scale in (("far", 1e6), ("off", 5.0)):
        np.savez(tmp_path / "x.npz", images=noise * scale)
        pack(tmp_path / "x.npz", tmp_path / name)
    far, off = (config_of(small_run, str(tmp_path / name), tmp_path) for name in ("far", "off"))
    with pytest.raises(UserError, match=r"noise levels from 0\.002 to 80 only; set data.normalisation=channel"):
        check_run(far)
    with pytest.raises(UserError, match=r"noise levels from 0\.002 to 80 only"):
        prepare_run(far)
    assert data_set(far)[-1].state == "problem"
    assert data_set(off)[-1].state == "note"
    (tmp_path / "off.yaml").write_text(dump_config(off))
    shown = CliRunner().invoke(app, ["train", str(tmp_path / "off.yaml"), "--check"])
    assert shown.exit_code == 0
    assert "warning: data.url: the data have channel means" in shown.stderr
    assert shown.stdout.endswith("good, with a warning\n")
    train(far)  # a run of before that has begun goes on, as its config can't change
    check_run(far)
