"""What a run can't read is named in its records and its summary, counted once, the same whether or not it stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scoreray.cluster.verbs.train import train_to_end
from scoreray.data.errors import DataError
from scoreray.data.packing.pack import pack
from scoreray.data.reading.manifest import Manifest
from scoreray.data.reading.samples import read_samples
from scoreray.data.storage.store import open_store
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.prepare import prepare_run
from scoreray.trainer.quarantined import read_quarantined
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_folder import run_store

BAD = [41, 43, 77]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """96 images in 4 shards; three members have a flipped byte."""
    folder = tmp_path_factory.mktemp("data")
    images = np.random.default_rng(0).integers(0, 256, (96, 8, 8), np.uint8)
    np.savez(folder / "p.npz", images=images)
    url = str(folder / "set")
    manifest = pack(folder / "p.npz", url, samples_per_shard=24)
    for sample in BAD:
        path = Path(url, manifest.shards[sample // 24].name)
        data = bytearray(path.read_bytes())
        data[1024 * (sample % 24) + 512 + 60] ^= 1
        path.write_bytes(data)
        with pytest.raises(DataError):
            read_samples(url, [sample])
    return url


def config(url: str, storage: Path, *overrides: str) -> Config:
    settings: dict[str, Any] = {
        "run": {"name": "run", "storage": str(storage)},
        "data": {"url": url, "global_batch_size": 16, "on_error": "quarantine", "quarantine_budget": 3},
        "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": 192},
        "checkpoint": {"every_images": 32},
        "log": {"every_images": 16},
    }
    return prepare_run(load_config(settings, overrides)).config


def test_a_run_that_was_killed_and_went_on_counts_what_one_that_was_not_does(damaged: str, tmp_path: Path) -> None:
    whole = config(damaged, tmp_path / "whole")
    notes: list[str] = []
    train(whole, note=notes.append)
    listed = read_quarantined(run_store(whole))
    list_file = next(tmp_path.glob("whole/run/quarantined/*.jsonl"))
    right = list_file.read_bytes()
    for wrong in (b"{", b"{}", b"\0", right.replace(b'"sample": 4', b'"sample": "4')):
        list_file.write_bytes(wrong)
        with pytest.raises(DataError, match="line 1 is no record of a run"):
            read_quarantined(run_store(whole))
    list_file.write_bytes(right)
    assert [entry.sample for entry in listed] == BAD
    assert [entry.key for entry in listed] == [f"{sample:08d}" for sample in BAD]
    assert sorted(notes) == sorted(f"quarantined: {entry.text()}" for entry in listed)
    counts = [record.quarantined for record in read_metrics(run_store(whole))]
    assert counts == sorted(counts)
    assert counts[-1] == 3

    broken = config(damaged, tmp_path / "broken")
    for images in range(16, 192, 16):  # a kill after each step, and one between two checkpoints
        train(broken.model_copy(update={"duration": broken.duration.model_copy(update={"images": images})}))
    train(broken)
    assert read_quarantined(run_store(broken)) == listed
    assert [r.quarantined for r in read_metrics(run_store(broken)) if r.images % 16 == 0] == counts


def test_the_budget_is_the_runs_and_without_quarantine_the_first_one_stops(damaged: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"more than 2 samples \(the budget\) are quarantined; the last: shards/"):
        train(config(damaged, tmp_path / "a", "data.quarantine_budget=2"))
    with pytest.raises(DataError, match=r"sample \d+ at byte \d+: its bytes are not those of the index"):
        train(config(damaged, tmp_path / "b", "data.on_error=stop"))


@pytest.mark.slow
def test_two_workers_report_a_missing_shard_and_samples_in_one_summary(
    damaged: str, tmp_path: Path, ray_cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    url = str(tmp_path / "set")
    shutil.copytree(damaged, url)
    shard = Manifest.load(open_store(url)).shards[0]
    Path(url, shard.name).unlink()
    two = config(url, tmp_path / "runs", "data.quarantine_budget=27", "scaling.workers=2")
    result = train_to_end(prepare_run(two))
    assert [(entry.sample, entry.count) for entry in result.quarantined] == [(0, 24), *((s, 1) for s in BAD)]
    text = result.text()
    assert "could not read 27 samples:" in text
    assert "  shards/000000.tar: samples 0 to 23: there is no such shard" in text
    assert "  shards/000001.tar: sample 41 (key '00000041') at byte" in text
    assert len(result.answer()["quarantined"]) == 4
    assert capfd.readouterr().err.count("quarantined: shards/000000.tar: samples 0 to 23") == 1
    assert read_metrics(run_store(two))[-1].quarantined == 27
