"""What several tests of whole runs share: the command, started as a person starts it."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest


class Driver:
    """`scoreray train FILE`, after the words `within`; its lines as they come."""

    def __init__(self, file: Path, within: list[str] | None = None, environment: dict[str, str] | None = None) -> None:
        command = [*(within or []), sys.executable, "-m", "scoreray.cluster.cli", "train", str(file)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def wait_for(self, pattern: str, timeout_s: float = 150) -> re.Match[str]:
        deadline = time.monotonic() + timeout_s
        while True:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            assert time.monotonic() < deadline, (pattern, self.lines)
            assert self.process.poll() is None, (pattern, self.lines)
            time.sleep(0.1)

    def end(self, timeout_s: float = 90) -> int:
        try:
            return self.process.wait(timeout=timeout_s)
        finally:
            self.process.kill()
            self._reader.join(timeout=10)


@pytest.fixture(scope="session")
def start_train() -> Callable[..., Driver]:
    """start_train(config file, within=[...], environment={...})"""
    return Driver
