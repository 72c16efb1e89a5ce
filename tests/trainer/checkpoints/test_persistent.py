"""Contrastive divergence in the loop itself: chains that persist are training state like any other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.data.packing.pack import pack
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import Config, dump_config, load_config
from scoreray.trainer.loop import train
from scoreray.trainer.records import read_metrics
from scoreray.trainer.run_folder import run_store

RANKS = Path(__file__).with_name("persistent_ranks.py")
BATCH, IMAGES = 16, 16 * 12
PERSISTENT: dict[str, Any] = {"kind": "contrastive", "start": "persistent", "num_chains": 2 * BATCH, "restart": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "energy": {
        "network": {"kind": "mlp", "hidden_size": 16, "num_layers": 1},
        "denoiser": {"parameterization": "energy_dot"},
        "objective": {**PERSISTENT, "sigma_sampling": {"kind": "log_normal", "stratified": True}},
    },
    "rbm": {"network": {"kind": "rbm", "num_hidden": 8}, "objective": {**PERSISTENT, "chain": "gibbs"}},
    "gaussian_rbm": {
        "network": {"kind": "gaussian_rbm", "num_hidden": 8},
        "objective": {**PERSISTENT, "chain": "gibbs", "num_steps": 2},
    },
}


@pytest.fixture(scope="module")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    np.savez(folder / "p.npz", images=rng.integers(0, 256, (60, 4, 4), dtype=np.uint8))
    pack(str(folder / "p.npz"), str(folder / "packed"))
    return str(folder / "packed")


def config(data_url: str, storage: Path, case: str, **engine: Any) -> Config:
    return load_config(
        {
            "run": {"name": "run", "storage": str(storage)},
            "data": {"url": data_url, "global_batch_size": BATCH},
            **CASES[case],
            # A machine of small weights forgets in one sweep where its chain was: let them grow.
            "optimizer": {"learning_rate": 0.01 if case == "energy" else 0.2, "warmup_images": 0},
            "engine": {"zero_stage": 0, "precision": "fp32", **engine},
            "duration": {"images": IMAGES},
            "checkpoint": {"every_images": IMAGES // 2, "keep": 9},
            "log": {"every_images": BATCH},
        }
    )


def state(storage: Path) -> dict[str, torch.Tensor]:
    """Masters, moments, an average and the chains of the newest checkpoint."""
    from scoreray.data.storage.store import open_store

    checkpoint = latest(open_store(storage / "run"))
    assert checkpoint is not None
    assert checkpoint.images_seen == IMAGES
    keys = ("master", "exp_avg", "exp_avg_sq", "ema_0.050")
    return {f"{key}/{name}": value for key in keys for name, value in checkpoint.full_state(key).items()}


def at_half(whole: Path, copy: Path) -> None:
    """The run as it was when its first checkpoint had been committed."""
    shutil.copytree(whole, copy)
    for folder in sorted((copy / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def wholes(data_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted runs on one process, by case."""
    folder = tmp_path_factory.mktemp("wholes")
    for case in CASES:
        train(config(data_url, folder / case, case))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_chains_go_on_bitwise_after_an_interruption(wholes: Path, data_url: str, tmp_path: Path, case: str) -> None:
    at_half(wholes / case, tmp_path / "half")
    c = config(data_url, tmp_path / "half", case)
    train(c)
    whole, resumed = state(wholes / case), state(tmp_path / "half")
    assert "master/chains.pool" in whole
    assert whole["master/chains.pool"].abs().max() > 0
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    losses = [record.loss for record in read_metrics(run_store(c))]
    assert losses == [record.loss for record in read_metrics(run_store(config(data_url, wholes / case, case)))]


@pytest.mark.parametrize("case", CASES)
def test_without_its_stored_chains_a_run_ends_otherwise(wholes: Path, data_url: str, tmp_path: Path, case: str) -> None:
    """The test above can fail: without the chains that a checkpoint holds, another model comes out."""
    at_half(wholes / case, tmp_path / "half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scoreray.trainer.checkpoints.checkpoint.Checkpoint._restore_buffers", lambda *arguments: None)
        train(config(data_url, tmp_path / "half", case))
    whole, resumed = state(wholes / case), state(tmp_path / "half")
    assert any(not torch.equal(value, resumed[name]) for name, value in whole.items() if "weight" in name)


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_do_not_change_where_chains_go(wholes: Path, data_url: str, tmp_path: Path, case: str) -> None:
    train(config(data_url, tmp_path, case, micro_batch_size=4))
    for name, value in state(wholes / case).items():
        torch.testing.assert_close(state(tmp_path)[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_chains_go_on_at_another_world_size_under_every_zero_stage(
    wholes: Path, data_url: str, tmp_path: Path, run_ranks: Callable[..., str]
) -> None:
    """Half of each run on one process, the rest on two, sharded: the same chains to the rounding of the reduction."""
    stages = {"energy": (0, 1, 2, 3), "rbm": (1, 3), "gaussian_rbm": (2, 3)}
    cases = {f"{case}-zero{stage}": (case, stage) for case in CASES for stage in stages[case]}
    for name, (case, stage) in cases.items():
        at_half(wholes / case, tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text(dump_config(config(data_url, tmp_path / name, case, zero_stage=stage)))
    run_ranks(RANKS, str(tmp_path))
    for name, (case, _) in cases.items():
        sharded = state(tmp_path / name)
        for key, value in state(wholes / case).items():
            torch.testing.assert_close(sharded[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
