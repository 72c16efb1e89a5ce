"""What a run measures: one catalogue, TensorBoard files that a resumed run does not repeat, and its FLOPs."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.data.storage.stats import ReadStats
from scoreray.trainer import meta
from scoreray.trainer.checkpoints.checkpoint import MARKER, latest
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.config.run_fields import run_fields
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.meter import StepMeter
from scoreray.trainer.monitoring.metrics import (
    CATALOGUE,
    SIGMA_EDGES,
    RunStatus,
    TrainingProgress,
    sigma_labels,
    values,
)
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.monitoring.tensorboard import FOLDER as TENSORBOARD
from scoreray.trainer.networks.dit import DiTConfig
from scoreray.trainer.networks.flops import flops, matmul_rate, training_flops
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_data import open_run_data
from scoreray.trainer.run_folder import run_store

Settings = Callable[..., dict[str, Any]]
OF_MONITOR = {
    f"scoreray_{name}"
    for name in ("last_commit_time_s", "last_commit_age_s", "progress_age_s", "restarts", "skipped_steps",
                 "stopped_nonfinite")
}  # fmt: skip


def config(small_run: Settings, storage: Path, *overrides: str) -> Config:
    sections: dict[str, Any] = {"checkpoint": {"every_images": 96}, "log": {"every_images": 32}}
    return load_config(small_run("run", storage, 320, **sections), overrides)


def plotted(run_folder: str) -> list[tuple[int, str, float]]:
    """(step, tag, value) of all files, read as TensorBoard reads them: framed records with checksums."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def masked(data: bytes) -> int:
        crc = crc32c(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    points = []
    for file in sorted(Path(run_folder, TENSORBOARD).iterdir()):
        data = file.read_bytes()
        first = True
        while data:
            length = int.from_bytes(data[:8], "little")
            assert int.from_bytes(data[8:12], "little") == masked(data[:8])
            payload = data[12 : 12 + length]
            assert int.from_bytes(data[12 + length : 16 + length], "little") == masked(payload)
            event, data = Event.FromString(payload), data[16 + length :]
            assert (event.file_version == "brain.Event:2") == first
            first = False
            points += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return points


def test_tensorboard_has_every_record_once_also_after_a_kill(small_run: Settings, tmp_path: Path) -> None:
    c = config(small_run, tmp_path)

    class Killed(Exception):
        pass

    def kill(progress: TrainingProgress) -> None:
        if progress.images >= 160:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepMeter, "show", lambda self, watch, images, total, commit, skipped, always=False: watch(
            TrainingProgress(images, total, 0.0, 1.0, 0.0, 0)))  # fmt: skip
        with pytest.raises(Killed):
            train(c, watch=kill)
    train(c)
    run = run_store(c)
    points = plotted(run.url())
    assert len({point[:2] for point in points}) == len(points)
    losses = {step: value for step, tag, value in points if tag == "train/loss"}
    records = read_metrics(run)
    assert losses == {record.images: pytest.approx(record.loss) for record in records}
    assert sorted(losses) == [32, 64, 96, 128, 160, 192, 224, 256, 288, 320]
    assert {tag for _, tag, _ in points} > {"train/gradient_norm", "train/mfu", "sigma_loss/0.316-1"}
    train(config(small_run, tmp_path / "off", "log.tensorboard=false"))
    assert not (tmp_path / "off" / "run" / TENSORBOARD).exists()


def test_every_metric_of_the_catalogue_has_a_value(small_run: Settings, tmp_path: Path) -> None:
    shown: list[TrainingProgress] = []
    train(config(small_run, tmp_path), watch=shown.append)
    names = {metric.name for metric in CATALOGUE}
    found = values(RunStatus(shown[-1]))
    assert {name for name, _ in found} == names
    assert {name for name, _ in values(RunStatus())} == OF_MONITOR
    assert {sigma for name, sigma in found if sigma} <= set(sigma_labels())
    assert len(sigma_labels()) == len(SIGMA_EDGES) + 1
    assert found["scoreray_committed_images", ""] == 320
    assert 0 < found["scoreray_mfu", ""] < 1
    assert all(metric.unit and metric.meaning for metric in CATALOGUE)


def test_a_resumed_run_reports_when_its_checkpoint_was_committed(small_run: Settings, tmp_path: Path) -> None:
    """Else a run that dies before each commit would look as if it committed at each start."""
    c = config(small_run, tmp_path)
    train(c, requested=lambda: LoopRequest.STOP)
    run = run_store(c)
    checkpoint = latest(run)
    assert checkpoint is not None
    old = replace(checkpoint.marker, time=checkpoint.marker.time - 5000)
    run.put(f"{checkpoint.folder}/{MARKER}", old.to_json())
    shown: list[TrainingProgress] = []
    train(c, watch=shown.append)
    assert shown[0].committed_at == pytest.approx(old.time)
    assert shown[-1].committed_at > old.time + 4900


def test_flops_are_those_of_the_matrix_products() -> None:
    """A DiT's linear layers and attention by hand, forward; backward is twice that, but for the input's gradient."""
    width, depth, tokens = 64, 3, 64
    network = DiTConfig(patch_size=2, hidden_size=width, depth=depth, num_heads=2).build((3, 16, 16))
    block = 2 * tokens * width * width * (3 + 1 + 4 + 4) + 2 * 2 * tokens * tokens * width + 2 * width * 6 * width
    rest = 2 * 2 * tokens * 12 * width + 2 * (256 * width + width * width) + 2 * width * 2 * width
    assert flops(network, (3, 16, 16)) == depth * block + rest
    first = 2 * tokens * 12 * width + 2 * 256 * width  # whose inputs need no gradient
    assert training_flops(network, (3, 16, 16)) == 3 * (depth * block + rest) - first


def test_a_network_is_counted_once_and_another_one_again(
    small_run: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two runs, and of one with other layers, other frozen parts or other conditions."""
    counted: list[int] = []
    monkeypatch.setattr(meta, "training_flops", lambda network, shape: counted.append(0) or len(counted))
    monkeypatch.setattr(meta, "_counted", {})

    def work(name: str, *overrides: str) -> dict[Any, int]:
        c = load_config(small_run(name, tmp_path, 16), overrides)
        return meta.training_work(c, run_fields(c.data, open_run_data(c)), 1, torch.device("cpu"))[0]

    first = work("a")
    assert work("b", "duration.images=32") == first == {(8, 8): 1}
    others = ("network.num_blocks=2", "optimizer.frozen=[conv_in.*]", "data.conditions={}")
    assert [work("a", change) for change in others] == [{(8, 8): 2}, {(8, 8): 3}, {(8, 8): 4}]


def test_the_matmul_rate_is_one_that_products_reach() -> None:
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    assert 1e9 < rate < 1e14
    assert matmul_rate(torch.device("cpu"), torch.float32) == rate
    assert math.isfinite(rate)


def test_what_a_stream_counts_reaches_the_metrics() -> None:
    """Hedged and repeated reads are the first sign of a failing store; the run goes on, so nothing else shows it."""
    meter, shown = StepMeter(1, torch.device("cpu")), list[TrainingProgress]()
    meter.add(torch.ones(4), torch.ones(4), (8, 8))
    counted = {"retries": 1, "hedged": 2, "rereads": 3, "cache_hits": 4, "cache_misses": 5}
    reads = ReadStats(num_retries=1, num_hedges=2, num_rereads=3, cache_hits=4, cache_misses=5)
    meter.record(4, 1e-3, 1.0, 0, 0, reads)
    meter.show(shown.append, 4, 8, None, 0)
    found = values(RunStatus(shown[0]))
    assert {name: found[f"scoreray_data_{name}", ""] for name in counted} == counted


def test_progress_without_a_rate_is_the_same_after_its_way_through_ray() -> None:
    """Else a line that says nothing new is shown again at each look: NaN is not equal to NaN."""
    sent = TrainingProgress(64, 128, 0.5, math.nan, 0.02, 0)
    came = pickle.loads(pickle.dumps(sent))
    assert came != sent
    assert came.same_as(sent)
    assert not replace(came, images=65).same_as(sent)
    assert not came.same_as(None)
