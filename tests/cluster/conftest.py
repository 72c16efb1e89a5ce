"""What several tests of the command line and of clusters share: a small data set, a config of it, the command."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from scoreray.data.pack import pack

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of 64 packed images of 8x8 in three classes."""
    folder = tmp_path_factory.mktemp("small")
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8), dtype=np.uint8)
    np.savez(folder / "p.npz", images=images, labels=np.arange(64) % 3)
    pack(str(folder / "p.npz"), str(folder / "packed"))
    return str(folder / "packed")


@pytest.fixture(scope="session")
def small_run(small_set: str) -> Callable[..., dict[str, Any]]:
    """Settings of a run of `small_set` that takes next to nothing: small_run(name, storage, images, **sections)."""

    def settings(name: str, storage: object, images: int, **sections: Any) -> dict[str, Any]:
        return {
            "run": {"name": name, "storage": str(storage)},
            "data": {"url": small_set, "global_batch_size": 16},
            "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "duration": {"images": images},
            **sections,
        }

    return settings


@pytest.fixture(scope="session")
def scoreray() -> Command:
    """The command: in this process, or with `env`, where the environment matters, in one of its own."""

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        if env is not None:
            command = [sys.executable, "-m", "scoreray.cluster.cli", *arguments]
            return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env})
        from scoreray.cluster import cli

        out, errors = io.StringIO(), io.StringIO()
        handler, status = signal.getsignal(signal.SIGTERM), 0
        with (
            mock.patch.object(sys, "argv", ["scoreray", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            try:
                cli.main()
            except SystemExit as end:
                status = int(end.code or 0)
        signal.signal(signal.SIGTERM, handler)
        return subprocess.CompletedProcess(arguments, status, out.getvalue(), errors.getvalue())

    return run
