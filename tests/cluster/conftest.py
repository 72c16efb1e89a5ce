"""What several tests of the command line and of clusters share: the command."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def scoreray() -> Command:
    """The command: in this process, or with `env`, where the environment matters, in one of its own."""

    def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        if env is not None:
            command = [sys.executable, "-m", "scoreray.cluster.cli", *arguments]
            return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **env})
        from scoreray.cluster.cli import main as cli

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
