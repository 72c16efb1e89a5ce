"""A run straight from tars without a manifest: it trains, resumes with the tars that it has not finished, and goes on
with no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from scoreray.data.errors import UserError
from scoreray.data.packing.pack import pack
from scoreray.data.packing.shards import encode
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.prepare import PreparedRun, prepare_run
from scoreray.trainer.records import FINISHED_TARS, read_metrics
from scoreray.trainer.run_folder import run_store

NUM_TARS, COUNT = 5, 20


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five tars of 20 pictures of 8 x 8 in three classes, in brace notation."""
    folder = tmp_path_factory.mktemp("tars")
    rng = np.random.default_rng(0)
    for tar in range(NUM_TARS):
        with webdataset.TarWriter(f"{folder}/x-{tar}.tar", encoder=False) as writer:
            for i in range(COUNT):
                pixels = rng.integers(0, 256, (8, 8, 1), np.uint8)
                writer.write({"__key__": f"{i:04d}", "png": encode(pixels, "png"), "cls": b"%d" % (i % 3)})
    return f"{folder}/x-{{0..4}}.tar"


def prepared(url: str, storage: Path, *overrides: str) -> PreparedRun:
    settings: dict[str, Any] = {
        "run": {"name": "run", "storage": str(storage)},
        "data": {"url": url, "num_classes": 3, "global_batch_size": 8, "shuffle_block": 4},
        "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
        "denoiser": {"sigma_data": "auto"},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": 160},
        "checkpoint": {"every_images": 40},
        "log": {"every_images": 40, "tensorboard": False},
    }
    return prepare_run(load_config(settings, overrides))


def finished(config: Config) -> list[tuple[int, int]]:
    """(epoch, tar) of the committed ones, in order."""
    store = run_store(config)
    lines = [line for key, _ in store.list(f"{FINISHED_TARS}/") for line in store.get(key).splitlines()]
    return [(one["epoch"], one["tar"]) for one in map(json.loads, lines)]


def stop_at(images: int) -> Any:
    """A request that stops a run after so many images."""
    calls = iter(range(8, 10_000, 8))
    return lambda: LoopRequest.STOP if next(calls) >= images else LoopRequest.NOTHING


def test_a_run_trains_and_resumes_by_the_tar(tars: str, tmp_path: Path) -> None:
    run = prepared(tars, tmp_path)
    assert len(run.notes) == 1
    assert "tars without a manifest" in run.notes[0]
    assert train(run.config, requested=stop_at(80)) == 80
    first = finished(run.config)
    assert 0 < len(first) < NUM_TARS
    store = run_store(run.config)
    store.put(f"{FINISHED_TARS}/{100:012d}.jsonl", b'{"epoch": 0, "tar": 4}\n' * 2)  # of a start that was killed
    again = prepared(tars, tmp_path)
    assert again.newest is not None
    assert again.newest.images_seen == 80
    assert train(again.config) == 160
    assert not store.exists(f"{FINISHED_TARS}/{100:012d}.jsonl")
    both = finished(run.config)
    assert both[: len(first)] == first
    assert len(set(both)) == len(both), "none is finished twice in an epoch"
    checkpoint = latest(store)
    assert checkpoint is not None
    assert (checkpoint.marker.image_shape, checkpoint.marker.classes) == ([1, 8, 8], ["0", "1", "2"])
    assert 0.5 < checkpoint.marker.sigma_data < 0.65, "uniform bytes: 1 / sqrt(3)"
    assert all(np.isfinite(record.loss) for record in read_metrics(store))


def test_the_same_run_gives_the_same_weights(tars: str, tmp_path: Path) -> None:
    weights = []
    for name in "ab":
        config = prepared(tars, tmp_path / name, "duration.images=48").config
        train(config)
        checkpoint = latest(run_store(config))
        assert checkpoint is not None
        weights.append(checkpoint.full_state())
    assert all(np.array_equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_run_goes_on_with_the_same_tars_alone(tars: str, tmp_path: Path) -> None:
    train(prepared(tars, tmp_path, "duration.images=40").config)
    with pytest.raises(UserError, match=r"is not the data set that .* was trained on: other tars \(SHA-256"):
        prepared(tars.replace("0..4", "0..3"), tmp_path)
    folder = str(Path(tars).parent)
    pack(folder, folder)
    with pytest.raises(UserError, match="100 samples, not tars without a manifest"):
        prepared(folder, tmp_path)
    for file in ("manifest.json", "index.bin"):
        (Path(folder) / file).unlink()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("scaling.workers=8", "data.url: 5 tars can't be shared by 8 workers"),
        ("data.cache_dir=/tmp/cache", "data.cache_dir: /tmp/cache, and tars without a manifest are"),
        ("data.num_classes=2", "data.num_classes: 2, and the first 100 samples have classes 0 to 2"),
    ],
)
def test_what_does_not_fit_is_one_line_before_the_run(override: str, line: str, tars: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line) as caught:
        prepared(tars, tmp_path, override)
    assert "\n" not in str(caught.value)


def test_settings_for_tars_are_refused_for_a_packed_set(small_set: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.num_classes: 4, and the data set's manifest says 3"):
        prepared(small_set, tmp_path, "data.num_classes=4")
    with pytest.raises(UserError, match=r"data.image_size: 4, and the data set's samples are 1 x 8 x 8"):
        prepared(small_set, tmp_path, "data.image_size=4")
