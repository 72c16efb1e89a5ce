"""Training records at rest: the same bytes as ever, and the files of other versions are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scoreray.data.storage.store import open_store
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.checkpoints.writer import CheckpointWriter
from scoreray.trainer.monitoring.metrics import SIGMA_EDGES, TrainingRecord
from scoreray.trainer.records import read_metrics, record_objects, remove_uncommitted

NEW = TrainingRecord(32, 0.25, 1e-3, 1.5, 90.0, 0.02, (None, 0.5, *[None] * 9), 1, 2, 0.3, 1700000000.5)
LINE = (
    '{"images": 32, "loss": 0.25, "learning_rate": 0.001, "gradient_norm": 1.5, "images_per_s": 90.0, '
    '"data_stall": 0.02, "sigma_losses": [null, 0.5, null, null, null, null, null, null, null, null, null], '
    '"quarantined": 1, "skipped_steps": 2, "mfu": 0.3, "time": 1700000000.5}\n'
)


def test_a_record_is_a_line_of_json_and_comes_back_as_it_was(tmp_path: Path) -> None:
    run = open_store(tmp_path)
    ((key, data),) = record_objects(32, [NEW], plots=False)
    assert (key, data.decode()) == ("metrics/000000000032.jsonl", LINE)
    old = {name: value for name, value in json.loads(LINE).items() if name not in ("mfu", "skipped_steps", "time")}
    newer = {**json.loads(LINE), "images": 48, "of_a_later_version": 7}
    lines = "".join(json.dumps(one) + "\n" for one in ({**old, "images": 16}, json.loads(LINE), newer))
    writer = CheckpointWriter(run, attempt="one", rank=0, world_size=1, keep=1)
    writer.save(
        Marker(48, 3, {}, {}, [], {}, 1), [], torch.nn.Module(), [("metrics/000000000048.jsonl", lines.encode())]
    )
    writer.wait()
    writer.close()
    first, second, third = read_metrics(run)
    assert (first.images, first.mfu, first.skipped_steps, first.loss) == (16, None, 0, 0.25)
    assert second == NEW
    assert third.images == 48
    assert [record.images for record in read_metrics(run, after=16)] == [32, 48]
    run.put("metrics/000000000064.jsonl", LINE.encode())  # of a checkpoint that a killed start did not commit
    assert len(read_metrics(run)) == 3
    remove_uncommitted(run, 48)
    assert [name for name, _ in run.list("metrics/")] == ["metrics/000000000048.jsonl"]


def test_what_is_plotted_of_a_record_is_every_number_that_it_has() -> None:
    plotted = dict(NEW.scalars())
    assert plotted["sigma_loss/0.00316-0.01"] == 0.5
    assert {name for name in plotted if name.startswith("sigma_loss/")} == {"sigma_loss/0.00316-0.01"}
    assert plotted["train/mfu"] == pytest.approx(0.3)
    assert not {"train/images", "train/time", "train/sigma_losses"} & plotted.keys()
    assert len(NEW.sigma_losses) == len(SIGMA_EDGES) + 1
