"""Runs of minutes: what the first steps make of them, decided once, however fast the rest and whatever interrupts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.data.errors import UserError
from scoreray.data.packing.pack import pack
from scoreray.trainer import loop
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.checkpoints.duration import RunClock, has_ended, with_images
from scoreray.trainer.config import Config, differing_keys, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.prepare import prepare_run
from scoreray.trainer.run_folder import run_store

MINIMAL: dict[str, Any] = {
    "run": {"name": "run", "storage": "runs"},
    "data": {"url": "data", "global_batch_size": 16},
    "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
    "engine": {"zero_stage": 0, "precision": "fp32"},
    "optimizer": {"schedule": "cosine", "warmup_images": 64},
    "duration": {"minutes": 0.4},
    "checkpoint": {"every_images": 100},
    "log": {"every_images": 50},
}


class Seconds:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


@pytest.mark.parametrize("minutes", [1, 4, 20])
@pytest.mark.parametrize("step_s", [0.05, 0.5, 4.0])
def test_steps_of_the_same_time_fill_the_minutes(minutes: float, step_s: float) -> None:
    now, seen = Seconds(), 0
    clock = RunClock(minutes, 64, now)
    found = None
    while found is None:
        now.at += step_s + (10 if seen == 0 else 1 if seen == 64 else 0)  # the first two take longer
        seen += 64
        found = clock.images(seen)
    measured = now.at - (1011 + 2 * step_s)
    assert measured <= max(min(60 * minutes / 16, 30), 4 * step_s) + step_s + 1e-6
    assert found % 64 == 0
    ends = measured + (found - seen) / 64 * step_s
    assert 60 * minutes - step_s - 1e-6 <= ends <= max(60 * minutes, measured) + 1e-6


def test_what_must_be_known_at_once_is_known_after_one_step() -> None:
    now = Seconds()
    clock = RunClock(1, 16, now)
    now.at += 2
    assert clock.expected(16) == 480
    assert clock.images(16, at_once=True) == 16 + 30 * 16
    slow, found = RunClock(1, 16, now), list[int | None]()
    for i in range(3):
        now.at += 70  # the third step alone takes longer than the minute
        found.append(slow.images(16 * (i + 1)))
    assert found == [None, None, 48]


def test_a_warm_up_is_no_longer_than_an_eighth_of_a_run_of_minutes() -> None:
    config = load_config(MINIMAL)
    assert with_images(config, 320).optimizer.warmup_images == 40  # type: ignore[union-attr]
    assert with_images(config, 6400).optimizer.warmup_images == 64  # type: ignore[union-attr]
    assert config.optimizer.rate(1_000_000, float("inf")) == config.optimizer.learning_rate


@pytest.mark.parametrize("given", [{}, {"images": 1, "minutes": 1}])
def test_a_run_has_images_or_minutes(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"duration: .*give images or minutes"):
        load_config({**MINIMAL, "duration": given})
    with pytest.raises(UserError, match="minutes"):
        load_config({**MINIMAL, "duration": {"minutes": 0}})


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "p.npz", images=np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8))
    pack(str(folder / "p.npz"), str(folder / "packed"))
    return str(folder / "packed")


def ticking(step_s: float) -> Callable[[], float]:
    """A clock that is `step_s` further each time that it is read."""
    now = Seconds()

    def read() -> float:
        now.at += step_s
        return now.at

    return read


@pytest.mark.parametrize("stop_at", [32, 176])
def test_a_run_of_minutes_that_was_stopped_ends_as_if_it_was_not(
    data_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    """Stopped while the speed is measured, and after; it goes on ten times as fast, and no later than it was to end."""

    def config(name: str) -> Config:
        run = {"name": name, "storage": str(tmp_path)}
        return prepare_run(load_config({**MINIMAL, "run": run, "data": {**MINIMAL["data"], "url": data_url}})).config

    def weights(c: Config) -> dict[str, torch.Tensor]:
        checkpoint = latest(run_store(c))
        assert checkpoint is not None
        assert has_ended(c, checkpoint)
        return checkpoint.full_state() | checkpoint.full_state("ema_0.050")

    seen = 0

    def stop() -> LoopRequest:
        nonlocal seen
        seen += 16
        return LoopRequest.STOP if seen == stop_at else LoopRequest.NOTHING

    monkeypatch.setattr(loop, "RunClock", partial(RunClock, now=ticking(0.7)))
    assert train(config("broken"), requested=stop) == stop_at
    found = latest(run_store(config("broken")))
    assert found is not None
    total = found.marker.config["duration"]["images"]
    assert total > stop_at
    assert config("broken").duration.images == total
    monkeypatch.setattr(loop, "RunClock", partial(RunClock, now=ticking(0.07)))
    assert train(config("broken")) == total
    if stop_at == 32:
        return  # decided by what was measured until then: another number of images than without a stop
    monkeypatch.setattr(loop, "RunClock", partial(RunClock, now=ticking(0.7)))
    assert train(config("whole")) == total
    for one, other in zip(weights(config("whole")).values(), weights(config("broken")).values(), strict=True):
        assert torch.equal(one, other)


def test_another_number_of_minutes_is_refused_under_a_cosine() -> None:
    one, other = load_config(MINIMAL), load_config(MINIMAL, ["duration.minutes=2"])
    assert differing_keys(one, other) == ["duration.minutes: 0.4 in the run, 2.0 in this config"]
