"""The commands of docs/data.md about tables and arrays, as they stand, on files as the page says they are."""

from __future__ import annotations

import io
import math
import re
import shlex
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from PIL import Image
from typer.testing import CliRunner

from scoreray.cluster.cli.main import app
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import SampleReader
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.config.run_fields import run_fields
from scoreray.trainer.step import build_training_module

N = 12
PAGE = Path(__file__).parents[2] / "docs" / "data.md"
EXPECTED = {
    "shapes": {"image": "image", "caption": "text", "place": "vector", "label": "class"},
    "hub-train": {"image": "image", "label": "class"},
    "hub-saved": {"image": "image", "caption": "text", "label": "class"},
    "latents": {"array": "array"},
    "beats": {"array": "array"},
    "pairs": {"latent": "array", "cls": "class", "t5": "sequence"},
    "weather": {"wind": "array", "hour": "scalar"},
    "volumes": {"scan": "array"},
    "cells": {"image": "image", "cls": "class"},
}


def commands(heading: str) -> list[list[str]]:
    """The words of the section's commands; what stands after several spaces is about them."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    found = [
        re.split(r"   +(?=\S)", line.strip())[0] for line in section.splitlines() if line.startswith("    scoreray")
    ]
    return [shlex.split(line)[1:] for line in found]


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "image": [picture(i) for i in range(N)], "text": [f"a square, {i}" for i in range(N)],
            "x": rng.normal(size=N), "y": rng.normal(size=N), "label": [i % 2 for i in range(N)],
        }
    )  # fmt: skip
    for name in ("hub/data", "saved"):
        Path(name).mkdir(parents=True)
    pq.write_table(table, "shapes.parquet")
    for split in ("train", "test"):
        pq.write_table(table, f"hub/data/{split}-00000-of-00001.parquet")
    with pa.OSFile("saved/data-00000-of-00001.arrow", "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    np.save("latents.npy", rng.normal(size=(N, 4, 8, 8)).astype(np.float16))
    np.save("heartbeats.npy", rng.normal(size=(N, 32)).astype(np.float32))
    np.savez("arrays.npz", z=rng.normal(size=(N, 4, 8, 8)), y=np.arange(N) % 2, tokens=rng.normal(size=(N, 5, 3)))
    for year in ("2001", "2002"):
        with h5py.File(f"era5-{year}.nc", "w") as netcdf:
            for name, length in (("time", N), ("lat", 4), ("lon", 6)):
                netcdf[name] = np.arange(length)
                netcdf[name].make_scale(name)
            for name in ("u", "v"):
                netcdf[name] = rng.normal(size=(N, 4, 6))
                for axis, of in enumerate(("time", "lat", "lon")):
                    netcdf[name].dims[axis].attach_scale(netcdf[of])
    scans = zarr.open_group("cube.zarr", mode="w")
    scans.create_array("ct", shape=(N, 1, 4, 4, 4), dtype="f4", chunks=(4, 1, 4, 4, 4))[:] = rng.normal(
        size=(N, 1, 4, 4, 4)
    )
    with h5py.File("cells.h5", "w") as cells:
        cells["x"], cells["y"] = rng.integers(0, 256, (N, 8, 8, 3), np.uint8), np.arange(N) % 2
    return tmp_path


def loss_of(config: Config) -> float:
    """Of two samples and all that conditions them, in the module that the config trains."""
    reader = SampleReader(str(config.data.url))
    found = run_fields(config.data, reader.manifest)
    images, condition = found.inputs(reader.read_fields(range(2), found.requests))
    module = build_training_module(config, found)
    loss, _ = module(images, condition, torch.arange(2))
    loss.mean().backward()
    return float(loss.mean())


def test_tars_and_folders_are_packed_with_the_fields_that_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("laion").mkdir()
    Path("photos").mkdir()
    with tarfile.open("laion/00000.tar", "w") as tar:
        for i in range(N):
            tokens = io.BytesIO()
            np.save(tokens, np.full((i, 4), i, np.float16))
            members = {"jpg": picture(i), "json": b'{"label": %d, "score": 0.5}' % (i % 2), "txt": b"a square",
                       "t5.npy": tokens.getvalue()}  # fmt: skip
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{i:05d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            Path(f"photos/{i}.png").write_bytes(picture(i))
    rows = [f'{{"file_name": "{i}.png", "text": "a square", "latlon": [{i}, 0.5]}}' for i in range(N)]
    Path("photos/metadata.jsonl").write_text("\n".join(rows))
    expected = [
        {"image": "image", "caption": "text", "t5": "sequence", "cls": "class"},
        {"image": "image", "caption": "text", "label": "class"},
        {"image": "image", "caption": "text", "score": "scalar", "label": "class"},
        {"image": "image", "text": "text", "place": "vector"},
    ]
    for words, kinds in zip(commands("Several fields of a sample"), expected, strict=True):
        result = CliRunner().invoke(app, [*words, "--workers", "1"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert {one.name: one.kind for one in Manifest.at(words[3]).fields} == kinds, words
        assert CliRunner().invoke(app, ["data", "verify", words[3]]).exit_code == 0


def test_each_command_packs_the_fields_that_the_page_says_and_a_step_is_made_of_each(files: Path) -> None:
    found = commands("Packing tables and arrays")
    assert [words[3] for words in found] == list(EXPECTED)
    for words in found:
        result = CliRunner().invoke(app, [*words, "--workers", "1"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        manifest = Manifest.at(words[3])
        assert {one.name: one.kind for one in manifest.fields} == EXPECTED[words[3]], words
    assert Manifest.at("latents").dtype == "float16"
    assert (Manifest.at("weather").shape, Manifest.at("weather").num_samples) == ([2, 4, 6], 2 * N)
    for name in EXPECTED:
        text = CliRunner().invoke(app, ["data", "inspect", name, "--config"], catch_exceptions=False).stdout
        Path(f"{name}.yaml").write_text(text)
        assert math.isfinite(loss_of(load_config(f"{name}.yaml"))), text
    looked, as_json, config, train = commands("Looking at a data set")
    for words in (looked, as_json):
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert Image.open("look.png").width > 100
    assert config[-2:] == [">", "mine.yaml"]
    Path("mine.yaml").write_text(CliRunner().invoke(app, config[:-2], catch_exceptions=False).stdout)
    assert train == ["train", "mine.yaml"]
    conditions = load_config("mine.yaml").data.conditions
    assert conditions is not None
    assert set(conditions) == {"caption", "place", "label"}
