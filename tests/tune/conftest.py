"""A 2-D target packed twice, to train on and to measure on, and a sweep of tiny networks over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_code import own_code_forgotten

from scoreray.cluster.connect.local_ray import set_environment
from scoreray.data.packing.pack import pack
from scoreray.trainer.diffusion.targets import sample_target


@pytest.fixture(scope="session", autouse=True)
def ray_environment() -> None:
    """As `connected` sets it, for tests that import Ray Tune's searchers and need no cluster."""
    set_environment()


@pytest.fixture(autouse=True)
def parts_of_ones_own() -> Iterator[None]:
    """A sweep that names a searcher, a metric or a callback of one's own brings it to its process."""
    with own_code_forgotten():
        yield


@pytest.fixture(scope="session")
def points(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Packed points of the ring mixture: "train" and "held"."""
    folder = tmp_path_factory.mktemp("points")
    for name, count, seed in (("train", 4096, 0), ("held", 512, 1)):
        np.savez(folder / f"{name}.npz", images=sample_target("mixture", count, seed).numpy())
        pack(str(folder / f"{name}.npz"), str(folder / name), name=name)
    return {name: str(folder / name) for name in ("train", "held")}


@pytest.fixture
def sweep(points: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A small sweep as a dict: tests change what they are about."""
    return {
        "study": {"name": "study", "storage": str(tmp_path / "studies")},
        "base": {
            "data": {"url": points["train"], "global_batch_size": 64},
            "network": {"kind": "mlp", "hidden_size": 16, "num_layers": 1},
            "optimizer": {"learning_rate": 2e-3},
            "ema": {"stds": [0.1]},
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "duration": {"images": 2048},
            "log": {"tensorboard": False},
        },
        "space": {"objective.sigma_sampling.P_mean": {"uniform": [-3.0, 1.0]}},
        "metric": {"reference": points["held"], "count": 256, "levels": 8, "sigma_min": 0.02, "sigma_max": 5.0},
        "search": {"kind": "random"},
        "trials": 4,
    }
