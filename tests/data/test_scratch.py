"""No room in the temporary folder is one line that names it, whatever was written there."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.data.errors import StorageError
from scoreray.data.packing.pack import pack
from scoreray.data.scratch import scratch_file, scratch_folder
from scoreray.data.storage.store import open_store
from scoreray.sampling.model.export import export
from scoreray.sampling.model.load import load
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.run_folder import run_store

LINE = (
    r"^temporary folder /[^:]*: no space left on its disk; free some there, or set TMPDIR to a folder on another disk$"
)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary files are /dev/full: each write of the kernel's is ENOSPC."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "w+b"))  # noqa: SIM115


@pytest.mark.parametrize("num_bytes", [1, 100, 8192, 1 << 20])  # in Python's buffer until it is closed, or beyond it
def test_a_write_that_fails_may_fail_as_late_as_at_the_end(full_disk: None, num_bytes: int) -> None:
    with pytest.raises(StorageError, match=LINE), scratch_file() as (file, _):
        file.write(b"x" * num_bytes)


def test_another_error_is_not_hidden_by_one_at_the_end(full_disk: None) -> None:
    with pytest.raises(ValueError, match="other"), scratch_file():
        raise ValueError("other")
    with pytest.raises(OSError, match="theirs") as passed, scratch_folder():
        raise OSError(errno.EACCES, "theirs")
    assert not isinstance(passed.value, StorageError)


def test_no_temporary_folder_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/nowhere"])
    for scratch in (scratch_file, scratch_folder):
        with pytest.raises(StorageError, match=r"^no temporary folder: .*set TMPDIR") as refused, scratch():
            raise AssertionError
        assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def trained(small_run: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> str:
    config = load_config(small_run("scratch", tmp_path_factory.mktemp("runs"), 32))
    train(config)
    return run_store(config).url()


def test_training_sampling_and_export_end_in_that_line(
    trained: str, small_run: Callable[..., dict[str, Any]], full_disk: None, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=LINE):
        train(load_config(small_run("full", tmp_path, 32)))
    assert latest(open_store(tmp_path / "full")) is None
    with pytest.raises(StorageError, match=LINE):
        load(trained)
    with pytest.raises(StorageError, match=LINE):
        export(trained, str(tmp_path / "out"))


def test_packing_ends_in_that_line(full_disk: None, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 4, 4), dtype=np.uint8)
    np.savez(tmp_path / "p.npz", images=images)
    with pytest.raises(StorageError, match=LINE):
        pack(str(tmp_path / "p.npz"), str(tmp_path / "packed"))


def test_an_export_is_what_safetensors_reads(trained: str, tmp_path: Path) -> None:
    page = export(trained, str(tmp_path), ["none"])
    (about,) = page["files"].values()
    from safetensors.torch import load_file

    found = load_file(tmp_path / about["file"])
    assert found
    assert all(torch.isfinite(value).all() for value in found.values())
