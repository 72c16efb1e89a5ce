"""The loop on one process, without Ray and DeepSpeed: resume is bitwise, records are complete, divergence is named."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.data.errors import DataError, UserError
from scoreray.data.fields.normalisation import Normaliser
from scoreray.data.packing.pack import pack
from scoreray.trainer.checkpoints.checkpoint import committed, latest
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.config.run_fields import TargetField
from scoreray.trainer.diffusion.condition import ConditionSpec
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.metrics import TrainingProgress
from scoreray.trainer.monitoring.stopping import LoopRequest, NonFiniteError, Preempted
from scoreray.trainer.prepare import check_run, prepare_run
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_data import open_run_data
from scoreray.trainer.run_folder import run_store


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    np.savez(folder / "p.npz", images=rng.integers(0, 256, (100, 8, 8), dtype=np.uint8), labels=np.arange(100) % 3)
    pack(str(folder / "p.npz"), str(folder / "packed"))
    return str(folder / "packed")


def config(data_url: str, storage: Path, *overrides: str) -> Config:
    settings: dict[str, Any] = {
        "run": {"name": "run", "storage": str(storage)},
        "data": {"url": data_url, "global_batch_size": 16},
        "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "dropout": 0.2},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": 320},
        "checkpoint": {"every_images": 100},
        "log": {"every_images": 50},
    }
    return prepare_run(load_config(settings, overrides)).config


def final(c: Config) -> tuple[dict[str, torch.Tensor], list[float]]:
    checkpoint = latest(run_store(c))
    assert checkpoint is not None
    losses = [record.loss for record in read_metrics(run_store(c))]
    return checkpoint.full_state() | checkpoint.full_state("ema_0.050"), losses


@pytest.mark.parametrize("stop_at", [16, 112, 160, 208])
def test_an_interrupted_run_ends_bitwise_like_an_uninterrupted_one(
    data_url: str,
    conditioned_set: str,
    latent_set: str,
    conditions: dict[str, Any],
    tmp_path: Path,
    stop_at: int,
) -> None:
    """One of the runs is conditioned by a field of each kind, and goes on under a config that names them otherwise. One
    draws its samples from moments of latents, one its weights by Langevin dynamics."""
    length = "duration.images=224"  # two rounds of the data, checkpoints at 112 and 208 images
    fields = [f"data.conditions={json.dumps(conditions)}", "objective.label_dropout=0.2"] if stop_at == 160 else []
    url = {160: conditioned_set, 208: latent_set}.get(stop_at, data_url)
    of_latents = ["data.target=latent"] if stop_at == 208 else []
    if stop_at == 112:
        fields = ["optimizer.kind=sgld", "optimizer.preconditioned=true", "optimizer.learning_rate=1e-5"]
    whole = config(url, tmp_path / "whole", length, *fields, *of_latents)
    assert train(whole) == 224
    broken = config(url, tmp_path / "broken", length, *fields, *of_latents)
    seen = 0

    class Stop(Exception):
        pass

    def stop(batch_end: int) -> None:
        nonlocal seen
        seen = batch_end
        if batch_end >= stop_at:
            raise Stop

    from scoreray.trainer import loop

    original = loop._step

    def counted(*arguments: Any) -> float:
        result = original(*arguments)
        stop(seen + 16)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", counted)
        with pytest.raises(Stop):
            train(broken)
    if stop_at == 160:
        assert broken.data.conditions is not None
        turned = {name: broken.data.conditions[name] for name in reversed(broken.data.conditions)}
        other = broken.model_copy(update={"data": broken.data.model_copy(update={"conditions": turned})})
        assert list(prepare_run(other).config.data.conditions or ()) == list(conditions)
        broken = other  # as a debugger starts it, without prepare_run
    assert train(broken) == 224
    for one, other in zip(final(whole)[0].values(), final(broken)[0].values(), strict=True):
        assert torch.equal(one, other)
    assert final(whole)[1] == final(broken)[1]


@pytest.mark.parametrize("kind", ["classes", "conditions"])
def test_micro_batches_do_not_change_what_is_learnt(
    data_url: str, conditioned_set: str, conditions: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    fields = [f"data.conditions={json.dumps(conditions)}"] if kind == "conditions" else []
    url = conditioned_set if fields else data_url
    few = ["network.dropout=0", "duration.images=80", "log.every_images=16", *fields]  # each step's loss is a record
    whole = config(url, tmp_path / "a", *few)
    parts = config(url, tmp_path / "b", *few, "engine.micro_batch_size=4")
    train(whole)
    train(parts)
    assert len(final(whole)[1]) == 5
    assert final(parts)[1] == pytest.approx(final(whole)[1], rel=1e-4)


def test_records_cover_every_image_once(data_url: str, tmp_path: Path) -> None:
    c = config(data_url, tmp_path)
    shown: list[TrainingProgress] = []
    train(c, watch=shown.append)
    records = read_metrics(run_store(c))
    images = [record.images for record in records]
    assert images == sorted(set(images))
    assert images[-1] == 320
    assert all(len(record.sigma_losses) == 11 for record in records)
    assert shown[-1].images == shown[-1].committed == 320
    assert len(committed(run_store(c))) == c.checkpoint.keep


def test_divergence_stops_before_the_step_and_names_sample_and_sigma(data_url: str, tmp_path: Path) -> None:
    c = config(data_url, tmp_path, "optimizer.learning_rate=1e18", "optimizer.gradient_clip=0")
    with pytest.raises(NonFiniteError, match=r"sample \d+ \(sigma [\d.e+-]+\)"):
        train(c)


def test_skipped_steps_are_counted_within_the_budget_also_over_a_resume(data_url: str, tmp_path: Path) -> None:
    """Two steps (images 64 to 80, 192 to 208) have a loss that is not finite; each changes nothing but the count."""
    from scoreray.trainer import loop

    original, bad = loop._step, {80, 208}
    seen, before = 0, {}

    def spoilt(engine: Any, batch: Any, *rest: Any) -> float:
        nonlocal seen
        seen = int(batch.position[-1]) + 1
        if seen not in bad:
            return original(engine, batch, *rest)
        before[seen] = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        try:
            return original(engine, replace(batch, fields={**batch.fields, "image": batch.images * math.nan}), *rest)
        finally:
            for name, parameter in engine.module.named_parameters():
                assert torch.equal(parameter, before[seen][name]), name

    def stop_at_112() -> LoopRequest:
        return LoopRequest.STOP if seen >= 112 else LoopRequest.NOTHING

    notes: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", spoilt)
        c = config(data_url, tmp_path / "allowed", "optimizer.skip_nonfinite=2")
        assert train(c, note=notes.append, requested=stop_at_112) == 112
        checkpoint = latest(run_store(c))
        assert checkpoint is not None
        assert (checkpoint.marker.skipped_steps, checkpoint.num_steps) == (1, 6)
        assert train(c, note=notes.append) == 320
        assert before.keys() == bad
        records = read_metrics(run_store(c))
        assert [(r.images, r.skipped_steps) for r in records] == [
            (64, 0), (112, 1), (160, 1), (208, 2), (256, 2), (304, 2), (320, 2)]  # fmt: skip
        assert all(math.isfinite(r.loss) for r in records)
        assert [line for line in notes if "1 of optimizer.skip_nonfinite" in line and "to 80 images" in line]
        assert [line for line in notes if "2 of optimizer.skip_nonfinite" in line and "to 208 images" in line]

        c = config(data_url, tmp_path / "too-many", "optimizer.skip_nonfinite=1")
        train(c, requested=stop_at_112)
        with pytest.raises(NonFiniteError, match=r"sample \d+ \(sigma"):  # the budget is the run's, not this start's
            train(c)
        checkpoint = latest(run_store(c))
        assert checkpoint is not None
        assert checkpoint.images_seen == 112  # what was committed stays


def test_on_a_request_to_save_or_stop_it_commits_at_once(data_url: str, tmp_path: Path) -> None:
    """SAVE commits once and goes on; PREEMPT and STOP commit and end; the end is bitwise an uninterrupted run's."""
    whole = config(data_url, tmp_path / "whole", "duration.images=144")
    train(whole)
    c = config(data_url, tmp_path / "requested", "checkpoint.every_images=1000", "checkpoint.keep=9",
               "duration.images=144")  # fmt: skip
    calls = iter([LoopRequest.NOTHING, LoopRequest.SAVE, LoopRequest.NOTHING, LoopRequest.NOTHING, LoopRequest.PREEMPT])
    with pytest.raises(Preempted, match="80 images"):
        train(c, requested=lambda: next(calls))
    assert [int(folder.split("/")[1].split("-")[0]) for folder in committed(run_store(c))] == [32, 80]
    assert train(c, requested=lambda: LoopRequest.STOP) == 96
    assert train(c) == 144
    for one, other in zip(final(whole)[0].values(), final(c)[0].values(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_says_what_was_modelled_and_conditioned_and_goes_on_with_the_same_only(
    conditioned_set: str, conditions: dict[str, Any], tmp_path: Path
) -> None:
    few = {name: conditions[name] for name in ("place", "label")}
    c = config(
        conditioned_set, tmp_path, f"data.conditions={json.dumps(few)}", "network={kind: mlp, hidden_size: 8}",
        "duration.images=16",
    )  # fmt: skip
    train(c)
    checkpoint = latest(run_store(c))
    assert checkpoint is not None
    marker, data = checkpoint.marker, open_run_data(c)
    assert marker.target == TargetField("fine", "array", "float16", Normaliser("channel", (280.0,) * 2, (20.0,) * 2))
    assert marker.conditions == {
        "place": ConditionSpec("vector", (2,), normaliser=Normaliser("channel", (0.0,) * 2, (1.0,) * 2)),
        "label": ConditionSpec("class", classes=("a", "b", "c")),
    }
    assert marker.differences(data) == []
    fine, coarse, place, *rest = data.fields
    packed_otherwise = replace(data, fields=[fine, coarse, replace(place, std=[2.0, 1.0]), *rest])
    assert marker.differences(packed_otherwise) == ["condition 'place' of another kind, shape or normalisation"]
    (line,) = marker.differences(replace(data, fields=[replace(fine, normalisation="none"), coarse, place, *rest]))
    assert line.startswith("target 'fine' (array, float16), not 'fine' (array, float16 with normalisation")
    with pytest.raises(UserError, match=r"data\.conditions"):
        config(conditioned_set, tmp_path, "network={kind: mlp, hidden_size: 8}", "duration.images=16")


def test_fits_are_checked_before_the_run(data_url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="attention_resolutions"):
        config(data_url, tmp_path, "network.attention_resolutions=[5]")
    c = config(data_url, tmp_path)
    check_run(c)
    with pytest.raises(UserError, match=re.escape("no data set here")):
        check_run(load_config(c.model_dump(mode="json"), [f"data.url={tmp_path}/absent"]))


@pytest.mark.parametrize(("ahead", "most"), [("0", 96), ("32", 128), ("null", 192)])
def test_training_goes_so_far_ahead_of_a_slow_commit(data_url: str, tmp_path: Path, ahead: str, most: int) -> None:
    """What a kill would cost, at the end of each step: images since the newest commit, which takes 0.2 s here."""
    from scoreray.trainer import loop

    original, writers, uncommitted = loop._step, [], []

    class Slow(loop.CheckpointWriter):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            writers.append(self)

        def _commit(self, *arguments: Any) -> None:
            time.sleep(0.2)
            super()._commit(*arguments)

    def noted(engine: Any, batch: Any, *rest: Any) -> float:
        committed = writers[0].last_commit[0] if writers[0].last_commit else 0
        uncommitted.append(int(batch.position[-1]) + 1 - committed)
        return original(engine, batch, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_step", noted)
        patch.setattr(loop, "CheckpointWriter", Slow)
        train(config(data_url, tmp_path, "checkpoint.every_images=96", f"checkpoint.ahead_images={ahead}"))
    assert 96 <= max(uncommitted) <= most


@pytest.fixture(scope="module")
def stopped(data_url: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that was stopped after its first steps."""
    c = config(data_url, tmp_path_factory.mktemp("stopped"))
    train(c, requested=lambda: LoopRequest.STOP)
    return c


def packed(folder: Path, name: str = "packed", **arrays: np.ndarray) -> str:
    folder.mkdir(exist_ok=True)
    np.savez(folder / "p.npz", **arrays)
    pack(str(folder / "p.npz"), str(folder / "packed"), name=name)
    return str(folder / "packed")


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_a_run_goes_on_with_its_data_set_wherever_that_is(data_url: str, stopped: Config, tmp_path: Path) -> None:
    """A copy, and the same pictures packed again under another name; with either the next steps are the same."""
    shutil.copytree(data_url, tmp_path / "copy")
    again = packed(tmp_path / "again", "renamed", images=pictures(100, 8, 8), labels=np.arange(100) % 3)
    states = []
    for url in (data_url, str(tmp_path / "copy"), again):
        shutil.copytree(run_store(stopped).url(), tmp_path / "runs" / "run")
        c = config(url, tmp_path / "runs", "duration.images=48")
        train(c)
        states.append(final(c)[0])
        shutil.rmtree(tmp_path / "runs")
    assert all(torch.equal(states[0][name], other[name]) for other in states[1:] for name in other)


OTHER = "other samples or another order"
OTHER_SETS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "colour": ({"images": pictures(100, 8, 8, 3), "labels": np.arange(100) % 3}, r"shape \[3, 8, 8\], not \[1, 8, 8\]"),
    "larger": ({"images": pictures(100, 16, 16), "labels": np.arange(100) % 3}, r"shape \[1, 16, 16\]"),
    "fewer classes": ({"images": pictures(100, 8, 8), "labels": np.arange(100) % 2}, "2 classes, not 3, missing: 2"),
    "more classes": ({"images": pictures(100, 8, 8), "labels": np.arange(100) % 5}, "5 classes, not 3, new: 3, 4"),
    "no classes": ({"images": pictures(100, 8, 8)}, "0 classes, not 3"),
    "more samples": ({"images": pictures(101, 8, 8), "labels": np.arange(101) % 3}, "101 samples, not 100"),
    "a grown set": ({"images": pictures(200, 8, 8), "labels": np.arange(200) % 3}, "200 samples, not 100"),
    "other labels": ({"images": pictures(100, 8, 8), "labels": np.arange(1, 101) % 3}, OTHER),
    "another order": ({"images": pictures(100, 8, 8)[::-1], "labels": np.arange(100) % 3}, OTHER),
    "one bit": ({"images": pictures(100, 8, 8) ^ (np.arange(6400) == 77).reshape(100, 8, 8).astype(np.uint8),
                 "labels": np.arange(100) % 3}, OTHER),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_SETS)
def test_a_run_does_not_go_on_with_another_data_set(stopped: Config, tmp_path: Path, name: str) -> None:
    """Refused before anything starts, and by the workers, in one line with what differs; another run may have it."""
    arrays, reason = OTHER_SETS[name]
    section = stopped.data.model_copy(update={"url": packed(tmp_path, **arrays)})
    other = stopped.model_copy(update={"data": section})
    checkpoint = latest(run_store(other))
    assert checkpoint is not None
    for refuse in (prepare_run, check_run, train):
        with pytest.raises(UserError, match=reason) as caught:
            refuse(other)
        assert re.match("data.url: .* is not the data set that .*--fresh", str(caught.value))
        assert "\n" not in str(caught.value)
    check_run(other, fresh=True)
    assert committed(run_store(other)) == [checkpoint.folder]


def test_another_data_set_under_the_same_url_is_refused(data_url: str, tmp_path: Path) -> None:
    shutil.copytree(data_url, tmp_path / "data")
    c = config(str(tmp_path / "data"), tmp_path / "runs")
    train(c, requested=lambda: LoopRequest.STOP)
    shutil.rmtree(tmp_path / "data")
    shutil.copytree(packed(tmp_path / "other", images=pictures(99, 8, 8)), tmp_path / "data")
    for refuse in (prepare_run, train):
        with pytest.raises(UserError, match="0 classes, not 3, missing: 0, 1, 2; 99 samples, not 100"):
            refuse(c)


def test_damaged_records_are_one_line_and_foreign_files_beside_them_are_ignored(
    small_run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    c = load_config(small_run("run", tmp_path, 48, checkpoint={"every_images": 16}, log={"every_images": 16}))
    train(c)
    run, folder = run_store(c), tmp_path / "run" / "metrics"
    for name in (".DS_Store", "notes 99.txt", "000000000016.jsonl.bak"):
        (folder / name).write_bytes(b"\xff")
    whole = read_metrics(run)
    assert [record.images for record in whole] == [16, 32, 48]
    file = folder / "000000000032.jsonl"
    right, rng = file.read_bytes(), random.Random(0)
    damaged = [b"\0" * len(right), b"[]", b"{}", b'{"images": "32", "loss": 1}', b"\xff\xfe"]
    damaged.append(right.replace(b"loss", b"boss"))
    for _ in range(100):
        flipped = bytearray(right)
        flipped[rng.randrange(len(right))] ^= 1 << rng.randrange(8)
        damaged += [bytes(flipped), right[: rng.randrange(1, len(right) - 1)]]
    refused: list[str] = []
    for data in damaged:
        file.write_bytes(data)
        try:
            read_metrics(run)
        except DataError as error:
            refused.append(str(error))
    line = (
        rf"{re.escape(str(file))}: line \d+ is no record of a run \(.{{,110}}\); the checkpoints are not affected: .*"
    )
    assert [text for text in refused if not re.fullmatch(line, text)] == []
    assert len(refused) > 106  # all that were cut, and flips in names and brackets; a flipped digit is another number
    file.unlink()
    assert read_metrics(run) == [whole[0], whole[2]]
    train(load_config(small_run("run", tmp_path, 64, checkpoint={"every_images": 16}, log={"every_images": 16})))
    assert len(list(folder.iterdir())) == 6  # nothing of others was removed
