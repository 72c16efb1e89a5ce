"""`data inspect` on data of any scale, count and shape: what is known is said, what is not has a reason."""

from __future__ import annotations

import io
import json
import re
import warnings
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from scoreray.cluster.cli.main import app
from scoreray.data.errors import UserError
from scoreray.data.fields.encoding import Encoding
from scoreray.data.fields.field import Field
from scoreray.data.packing.pack import pack
from scoreray.data.reading.samples import SampleReader
from scoreray.data.sources.field_options import parse_field_options
from scoreray.trainer.config import load_config

NOISE = np.random.default_rng(0).normal(size=(6, 4, 8, 8))
SETS = {
    "latents": NOISE.astype(np.float32),
    "vectors": NOISE[:, 0, 0],
    "pictures": np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8),
    "one": np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8),
    "one array": NOISE[:1],
    "tiny": 1e-4 * NOISE,
    "tiniest": 1e-30 * NOISE,
    "huge": 1e30 * NOISE,
    "hugest": 3e38 * np.sign(NOISE),
    "twice the same": np.concatenate([NOISE[:1], NOISE[:1]]),
    "far": 1e6 + NOISE,
}


@pytest.mark.parametrize("name", SETS)
def test_what_is_known_is_said_and_nothing_else_is_made_up(name: str, tmp_path: Path) -> None:
    array, url = SETS[name], str(tmp_path / "set")
    np.savez(tmp_path / "x.npz", images=array)
    pack(tmp_path / "x.npz", url)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = CliRunner().invoke(app, ["data", "inspect", url, "--json"])
        shown = CliRunner().invoke(app, ["data", "inspect", url])
    assert (said.exit_code, shown.exit_code, said.stderr, shown.stderr) == (0, 0, "", "")
    found = json.loads(said.stdout, parse_constant=pytest.fail)  # no NaN, no Infinity
    values = (array / 127.5 - 1 if array.dtype == np.uint8 else array.astype(np.float32)).astype(np.float64)
    assert found["sigma_data"] == pytest.approx(values.std(), rel=1e-3)
    assert len(found["mean"]) == len(found["std"]) == found["shape"][0]
    if len(array) == 1:
        assert (found["sigma_max"], found["ladder"]) == (None, None)
        assert "sigma_max     none: one sample has no distances\n" in shown.stdout
    else:
        flat = values.reshape(len(values), -1)
        distance = np.sqrt(np.square(flat[:, None] / 1e30 - flat / 1e30).sum(-1)).max() * 1e30
        assert found["sigma_max"] == pytest.approx(distance, rel=1e-4)
        assert (found["ladder"] is None) == (distance <= 0.01)
        assert ("ladder        none: the largest distance in the data is" in shown.stdout) == (distance <= 0.01)


def test_the_scale_of_a_set_with_a_normalisation_is_what_a_run_sees(tmp_path: Path) -> None:
    array = np.arange(1, 5)[:, None, None] * NOISE + 280
    np.savez(tmp_path / "x.npz", images=array)
    pack(tmp_path / "x.npz", tmp_path / "set", fields=parse_field_options((), (), ["array=channel"]))
    words = ["data", "inspect", str(tmp_path / "set")]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).stdout)
    seen = 0.5 * (array - array.mean((0, 2, 3), keepdims=True)) / array.std((0, 2, 3), keepdims=True)
    flat = seen.reshape(len(seen), -1)
    assert found["mean"] == pytest.approx([0.0] * 4, abs=1e-9)
    assert found["std"] == pytest.approx([0.5] * 4)
    assert found["sigma_data"] == pytest.approx(0.5)
    assert found["sigma_max"] == pytest.approx(np.sqrt(np.square(flat[:, None] - flat).sum(-1)).max(), rel=1e-4)
    assert found["ladder"]["sigma_max"] == pytest.approx(found["sigma_max"], rel=1e-4)
    assert found["fields"][0]["mean"] == pytest.approx(array.mean((0, 2, 3)).tolist()), "a field's are in its own units"
    assert f"{found['sigma_max']:.3g} of those looked at" in CliRunner().invoke(app, [*words, "--config"]).stdout


def test_a_picture_is_drawn_of_what_has_a_grid_whatever_its_scale(tmp_path: Path) -> None:
    for name, array in (
        ("pixels", 0.4 * NOISE[:, :3]),
        ("scaled", 400 * NOISE[:, :3] + 1000),
        ("faint", NOISE[:, :1] / 1e4),
    ):
        np.savez(tmp_path / "x.npz", images=array)
        pack(tmp_path / "x.npz", tmp_path / name)
        words = ["data", "inspect", str(tmp_path / name), "--picture", str(tmp_path / f"{name}.png")]
        assert CliRunner().invoke(app, words).exit_code == 0
        drawn = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert len(np.unique(drawn)) > 100, "the samples are seen, not clipped to black and white"
    np.savez(tmp_path / "x.npz", images=NOISE[:, :, 0, 0])
    pack(tmp_path / "x.npz", tmp_path / "points")
    refused = CliRunner().invoke(
        app, ["data", "inspect", str(tmp_path / "points"), "--picture", str(tmp_path / "l.png")]
    )
    assert isinstance(refused.exception, UserError)
    assert "--picture: samples of 4 numbers are no pictures, which have a grid" in str(refused.exception)
    assert "signals have it packed as [N, channels, length]" in str(refused.exception)
    shown = CliRunner().invoke(app, ["data", "inspect", str(tmp_path / "points")]).stdout
    assert "class_counts  none\n" in shown, "a data set without classes says so"


def test_every_field_is_described_and_a_config_that_fits_is_written(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=NOISE, labels=np.arange(len(NOISE)) % 3, classes=["a", "b", "c"])
    pack(tmp_path / "x.npz", tmp_path / "latents")
    words = ["data", "inspect", str(tmp_path / "latents")]
    said = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [(one["name"], one["kind"], one["shape"]) for one in said["fields"]] == [
        ("array", "array", [4, 8, 8]), ("label", "class", []),
    ]  # fmt: skip
    assert [sum(counts) for counts in said["fields"][0]["histogram"]] == [64 * len(NOISE)] * 4
    shown = CliRunner().invoke(app, [*words, "--picture", str(tmp_path / "l.png")]).stdout
    assert "array         array [4, 8, 8] float32" in shown
    assert re.search(r"channel 3: \|[ ▁-█]{16}\| mean \S+, std \S+", shown)
    assert np.asarray(Image.open(tmp_path / "l.png")).std() > 20, "four channels by a colour map"
    result = CliRunner().invoke(app, [*words, "--config"])
    (tmp_path / "mine.yaml").write_text(result.stdout)
    config = load_config(tmp_path / "mine.yaml")
    assert config.data.url == str(tmp_path / "latents")
    assert config.network.kind == "dit"
    refused = CliRunner().invoke(app, [*words, "--config", "--json"])
    assert "--config: prints YAML alone" in str(refused.exception)


def test_the_scale_of_moments_is_that_of_what_is_drawn_from_them(write_fields: Any, tmp_path: Path) -> None:
    """Means 0 and standard deviations 2: draws of N(0, 4), of which the means know nothing."""
    encoding = Encoding("diffusers", "vae", "0" * 64, "image", "image", [3, 16, 16], moments=True)
    field = Field(
        "latent", "array", [4, 4, 4], "float16", "latent.npy", mean=[0.0] * 2, std=[2.0] * 2, low=[0.0] * 2,
        high=[0.0] * 2, encoding=encoding,
    )  # fmt: skip
    file = io.BytesIO()
    np.save(file, np.repeat(np.array([0, 2], np.float16), 2)[:, None, None] * np.ones((1, 4, 4), np.float16))
    write_fields(tmp_path / "set", [field], [{"latent": ("npy", file.getvalue())}] * 64)
    said = CliRunner().invoke(app, ["data", "inspect", str(tmp_path / "set"), "--json"])
    found = json.loads(said.stdout)
    # The distance of two draws of d = 32 values is some sqrt(2 d) 2 = 16 with a standard deviation of 2: the largest of
    # 2,016 is 3 to 5 of these above.
    assert found["sigma_max"] == pytest.approx(24, abs=2.5)
    assert found["ladder"]["sigma_max"] == pytest.approx(found["sigma_max"], rel=1e-4)
    (about,) = found["fields"]
    for low, high, counts in zip(about["low"], about["high"], about["histogram"], strict=True):
        # The ends of 1,024 draws are 2.6 to 4.9 standard deviations away, but for 1 time in 100.
        assert -9.8 < low < -5.2
        assert 5.2 < high < 9.8
        shares = np.diff([NormalDist(0, 2).cdf(edge) for edge in np.linspace(low, high, 17)])
        np.testing.assert_allclose(np.array(counts) / 1024, shares, atol=0.05)
    samples = SampleReader(str(tmp_path / "set"))
    assert samples.read(range(64))[0].abs().max() == 0  # the means
    assert torch.equal(samples.read(range(64), draws=True)[0], samples.read(range(64), draws=True)[0])


def test_control_characters_of_data_are_escaped_and_the_next_command_is_quoted(tmp_path: Path) -> None:
    url, rows = tmp_path / "a set", [f"a\x00b\x1b[31mred\x07{i}\u202e\nend" for i in range(4)]
    np.savez(
        tmp_path / "x.npz", images=SETS["pictures"][:4], caption=np.array(rows), cls=np.array(["\x1b[1m", "b"] * 2)
    )
    words = ["data", "pack", str(tmp_path / "x.npz"), str(url), "--field", "caption=caption", "--field", "label=cls"]
    packed = CliRunner().invoke(app, [*words, "--kind", "label=class", "--workers", "1"], catch_exceptions=False)
    assert f"scoreray data inspect '{url}' --config" in packed.stdout
    shown = CliRunner().invoke(app, ["data", "inspect", str(url)], catch_exceptions=False).stdout
    assert r'"a\x00b\x1b[31mred\x070\u202e\nend"' in shown
    assert r"\x1b[1m 2" in shown
    assert shown.replace("\n", "").isprintable()
