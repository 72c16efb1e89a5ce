"""Post-hoc EMA: lengths that were not tracked, out of what was stored, against the truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.data.errors import DataError, UserError
from scoreray.trainer.checkpoints import writer as checkpoint_writer
from scoreray.trainer.checkpoints.checkpoint import SNAPSHOTS, committed, latest, open_checkpoint
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.checkpoints.posthoc import find_mix, inner_products, ranges_of, reconstruct, solve
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.optim.ema import power_of_std
from scoreray.trainer.run_folder import run_store

STEPS = 4096


def profile(step: int, std: float) -> np.ndarray:
    """What the average at `step` weighs each of STEPS steps by, exactly as the optimizer's decays do."""
    k, gamma = np.arange(1, STEPS + 1), power_of_std(std)
    return np.where(k <= step, (k ** (gamma + 1) - (k - 1.0) ** (gamma + 1)) / step ** (gamma + 1), 0.0)


def test_inner_products_are_the_integrals() -> None:
    (product,) = inner_products(np.array([3.0]), np.array([2.0]), np.array([5.0]), np.array([7.0])).flatten()
    s = (np.arange(300_000) + 0.5) / 100_000
    numeric = ((3 / 3) * (s / 3) ** 2 * (8 / 5) * (s / 5) ** 7).sum() / 100_000
    assert product == pytest.approx(numeric, rel=1e-6)


@pytest.mark.parametrize(
    ("num_stored", "std", "profile_error", "weight_error"),
    [(8, 0.07, 2e-2, 2e-3), (32, 0.07, 1.5e-3, 2e-5), (32, 0.2, 1e-2, 1e-3), (64, 0.03, 2e-2, 1e-3)],
)
def test_a_length_between_is_made_of_those_around_it(
    num_stored: int, std: float, profile_error: float, weight_error: float
) -> None:
    """On a random walk of weights; the nearest tracked average is 2e-2 or more away. Half precision costs 1e-3 more."""
    every = STEPS // num_stored
    stored = [(step, length) for step in range(every, STEPS + 1, every) for length in (0.05, 0.10)]
    factors, residual = solve(stored, (STEPS, std))
    assert residual < profile_error
    walk = np.random.default_rng(0).standard_normal((STEPS, 200)) / np.sqrt(np.arange(1, STEPS + 1))[:, None]
    path = walk.cumsum(0)
    averages = np.stack([profile(*one) for one in stored]) @ path
    truth = profile(STEPS, std) @ path
    assert np.linalg.norm(factors @ averages - truth) < weight_error * np.linalg.norm(truth)
    rounded = averages.astype(np.float16).astype(np.float64)
    assert np.linalg.norm(factors @ rounded - truth) < (weight_error + 1e-3) * np.linalg.norm(truth)


def test_a_tracked_length_is_itself() -> None:
    factors, residual = solve([(100, 0.05), (100, 0.1), (50, 0.1)], (100, 0.1))
    assert factors == pytest.approx([0, 1, 0], abs=1e-6)
    assert residual < 1e-6


@pytest.fixture(scope="module")
def config(small_run: Any, small_set: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that tracked three lengths and kept sixteen snapshots."""
    sections: dict[str, Any] = {
        "data": {"url": small_set, "global_batch_size": 8},
        "optimizer": {"learning_rate": 0.01},
        "ema": {"stds": [0.05, 0.07, 0.10]},
        "checkpoint": {"every_images": 160, "keep": 1, "snapshot_every_images": 160},
    }
    config = load_config(small_run("run", tmp_path_factory.mktemp("posthoc"), 2560, **sections))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writer, "PART_BYTES", 20_000)  # so that shares have several files
        train(config)
    return config


def untracked(marker: Marker, length: str) -> Marker:
    return replace(marker, state_keys=[key for key in marker.state_keys if key != f"ema_{length}"])


def forget(patch: pytest.MonkeyPatch, length: str) -> None:
    """Makes checkpoints read as if `length` had not been tracked."""
    read = open_checkpoint

    def without(store, folder):  # type: ignore[no-untyped-def]
        return replace(one := read(store, folder), marker=untracked(one.marker, length))

    patch.setattr("scoreray.trainer.checkpoints.posthoc.open_checkpoint", without)


def test_a_real_runs_length_that_was_left_out(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_store(config)
    newest = latest(run)
    assert newest is not None
    assert len(committed(run)) == 1
    assert len(committed(run, SNAPSHOTS)) == 16
    truth, near = newest.full_state("ema_0.070"), newest.full_state("ema_0.100")
    forget(monkeypatch, "0.070")
    newest = replace(newest, marker=untracked(newest.marker, "0.070"))
    mix = find_mix(newest, 0.07)
    assert mix.residual < 0.01
    made = reconstruct(newest, mix)
    assert made.keys() == truth.keys()

    def distance(a: dict[str, torch.Tensor]) -> float:
        return sum(float((a[name] - truth[name]).square().sum()) for name in truth) ** 0.5

    assert distance(made) < 0.02 * distance(near)
    assert len(ranges_of(newest)) > 1


def test_snapshots_are_half_precision_and_nothing_but_averages(config: Config) -> None:
    run = run_store(config)
    one = open_checkpoint(run, committed(run, SNAPSHOTS)[3])
    assert one.images_seen == 640
    assert one.marker.state_keys == ["ema_0.050", "ema_0.070", "ema_0.100"]
    parameters = sum(length for about in one.marker.files.values() for _, _, length in about.fragments)
    size = sum(about.bytes for about in one.marker.files.values())
    assert 6 * parameters < size < 6 * parameters + 100_000


def test_too_few_snapshots_are_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = latest(run_store(config))
    assert newest is not None
    monkeypatch.setattr("scoreray.trainer.checkpoints.posthoc.committed", lambda run, folder: [])
    with pytest.raises(UserError, match=r"length 0\.200 was not tracked, .* error of .*snapshot_every_images"):
        find_mix(newest, 0.2)
    with pytest.raises(UserError, match=r"0\.3 is outside"):
        find_mix(newest, 0.3)


def test_a_damaged_snapshot_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_store(config)
    newest = latest(run)
    assert newest is not None
    key = f"{committed(run, SNAPSHOTS)[-2]}/rank-00000.safetensors"
    data = bytearray(run.get(key))
    data[-5] ^= 1
    original = run.get(key)
    run.put(key, bytes(data))
    try:
        with pytest.raises(DataError, match="SHA-256"):
            reconstruct(newest, find_mix(newest, 0.12))
    finally:
        run.put(key, original)
