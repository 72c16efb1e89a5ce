"""Small data sets that the tests of this folder pack and read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scoreray.data.packing.pack import pack
from scoreray.data.reading.manifest import Manifest

NUM_SAMPLES = 501  # no multiple of any batch or world size used here


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """501 grey 12 x 12 images; pixel (0, 0) and (0, 1) hold the sample's number, so that a wrong one shows."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_SAMPLES, 12, 12), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.arange(NUM_SAMPLES) // 256, np.arange(NUM_SAMPLES) % 256
    path = tmp_path_factory.mktemp("source") / "numbers.npz"
    np.savez(path, images=images, labels=np.arange(NUM_SAMPLES) % 7)
    return path


@pytest.fixture(scope="session")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Manifest]:
    """(url, manifest) of the source in 8 shards. Not to be written to."""
    url = str(tmp_path_factory.mktemp("packed") / "set")
    return url, pack(source, url, samples_per_shard=64)
