"""The first seconds of a command, in which its modules are imported."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from types import ModuleType

import pytest
from waiting import PATIENCE_S

from scoreray.cluster.cli import __main__ as entry


class SlowModule(ModuleType):
    """Takes a while to be imported."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        self.__dict__["wait"]()
        return lambda: None


@pytest.mark.parametrize(
    ("terminal", "words", "said"), [(True, [], b"loading packages\n"), (True, ["--plain"], b""), (False, [], b"")]
)
def test_a_slow_import_is_not_silent_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, words: list[str], said: bytes
) -> None:
    written = list[bytes]()
    slow = SlowModule("main")

    def wait() -> None:
        deadline = time.monotonic() + (PATIENCE_S if said else 0.2)
        while not written and time.monotonic() < deadline:
            time.sleep(0.01)

    slow.__dict__["wait"] = wait
    monkeypatch.setitem(sys.modules, "scoreray.cluster.cli.main", slow)
    monkeypatch.setattr(sys, "argv", ["scoreray", *words])
    monkeypatch.delenv("SCORERAY_PLAIN", raising=False)
    monkeypatch.setattr(os, "isatty", lambda number: terminal)
    monkeypatch.setattr(os, "write", lambda number, data: written.append(data))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "set_threshold", lambda *counts: None)
    monkeypatch.setattr(entry, "SOON_S", 0.01)
    entry.main()
    assert b"".join(written) == said
