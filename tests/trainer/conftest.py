"""What several tests of whole runs share: the command, started as a person starts it; ranks; a data set."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from waiting import PATIENCE_S

from scoreray.data.fields.field import Field
from scoreray.data.reading.manifest import Manifest


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

    def wait_for(self, pattern: str, timeout_s: float = PATIENCE_S) -> re.Match[str]:
        deadline = time.monotonic() + timeout_s
        while True:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            assert time.monotonic() < deadline, (pattern, self.lines)
            assert self.process.poll() is None, (pattern, self.lines)
            time.sleep(0.1)

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        try:
            return self.process.wait(timeout=timeout_s)
        finally:
            self.process.kill()
            self._reader.join(timeout=PATIENCE_S)


@pytest.fixture(scope="session")
def start_train() -> Callable[..., Driver]:
    """start_train(config file, within=[...], environment={...})"""
    return Driver


class Forks:
    """A process that has imported everything, and runs scripts in forks: see `tests/trainer/fork_ranks.py`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._environment = folder, {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("fork_ranks.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | self._environment
        )

    def run(
        self, script: Path, arguments: tuple[str, ...], worlds: tuple[int, ...] = (), imports: tuple[str, ...] = ()
    ) -> str:
        output = self._folder / "output.txt"
        output.write_bytes(b"")
        job = {
            "script": str(script), "arguments": arguments, "worlds": worlds, "imports": imports, "output": str(output),
            "environment": os.environ | self._environment | {"DS_ACCELERATOR": "cpu"},
        }  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        child, status = int(self._line()), ""
        try:
            status = self._line()  # as long as pytest lets a test last
        finally:
            with contextlib.suppress(ProcessLookupError):  # a rank that hangs would slow the tests after this
                os.killpg(child, signal.SIGKILL)
            if not status:
                self._line()
        assert int(status) == 0, output.read_text()[-6000:]
        return output.read_text()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    found = Forks(tmp_path_factory.mktemp("forks"))
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="session")
def run_ranks(forks: Forks) -> Callable[..., str]:
    """run_ranks(script, *arguments, worlds=(2,)): the ranks' output. Each is `script RANK WORLD ARGUMENT...`.
    imports: modules that take long to import, which all ranks need."""

    def run(script: Path, *arguments: str, worlds: tuple[int, ...] = (2,), imports: tuple[str, ...] = ()) -> str:
        return forks.run(script, arguments, worlds, imports)

    return run


@pytest.fixture(scope="session")
def run_forked(forks: Forks) -> Callable[..., str]:
    """run_forked(script, *arguments): what a process with everything imported and one thread prints."""

    def run(script: Path, *arguments: str) -> str:
        return forks.run(script, arguments)

    return run


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def conditioned_set(write_fields: Callable[..., Manifest], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of 100 samples: a float16 array `fine` [2, 8, 8], and a field of each kind that can condition it.
    Sequences and texts have lengths of their own, 0 too."""
    g, samples, num_bytes = np.random.default_rng(0), [], lambda array: ("raw", array.tobytes())
    for i in range(100):
        samples.append({
            "fine": num_bytes((280 + 10 * g.standard_normal((2, 8, 8))).astype(np.float16)),
            "coarse": num_bytes(g.standard_normal((1, 4, 4))),
            "place": num_bytes(g.standard_normal(2).astype(np.float32)),
            "t5": num_bytes(g.standard_normal((i % 4, 3)).astype(np.float32)),
            "text": ("txt", f"number {i}".encode()[: i % 10]),
            "hour": float(i % 24),
            "cls": i % 3,
        })  # fmt: skip
    numbers = [("fine", "array", [2, 8, 8], "float16", [280.0] * 2, [10.0] * 2),
               ("coarse", "array", [1, 4, 4], "float64", [0.0], [1.0]),
               ("place", "vector", [2], "float32", [0.0] * 2, [1.0] * 2),
               ("t5", "sequence", [3, 3], "float32", [0.0] * 3, [1.0] * 3),
               ("hour", "scalar", [], "float64", [12.0], [7.0])]  # fmt: skip
    fields = [
        Field(name, kind, shape, dtype, f"{name}.raw" if shape else "json", "" if shape else name, mean=mean, std=std,
              normalisation="channel")
        for name, kind, shape, dtype, mean, std in numbers
    ]  # fmt: skip
    fields.append(Field("text", "text", [9], "uint8", "txt"))
    fields.append(Field("cls", "class", [], "int64", "cls", classes=["a", "b", "c"], class_counts=[34, 33, 33]))
    url = tmp_path_factory.mktemp("conditioned") / "set"
    write_fields(url, fields, samples, samples_per_shard=25)
    return str(url)


@pytest.fixture(scope="session")
def conditions() -> dict[str, dict[str, object]]:
    """`data.conditions` by which every other field of `conditioned_set` conditions its array."""
    cut = {"max_length": 2, "too_long": "cut"}
    return {
        "coarse": {}, "place": {"dropout": 0.3}, "t5": cut, "text": {}, "hour": {}, "label": {"field": "cls"},
    }  # fmt: skip
