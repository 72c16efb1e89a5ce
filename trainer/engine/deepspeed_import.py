"""DeepSpeed without two of its imports that no run uses, and that the start of each rank would wait for.

- MLflow, where it is installed, by DeepSpeed's autotuner: 0.8 s of a core.
- torch's compiler, by DeepSpeed's Muon at a run's first step, to compile its own functions: 2.5 s (torch 2.13).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def _not_installed(name: str) -> Iterator[None]:
    """Inside, `import name` fails as it does where there is no such package; one that was imported before stays."""
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@functools.cache
def import_deepspeed() -> Any:
    """The module `deepspeed`."""
    with _not_installed("mlflow"):
        import deepspeed
    # Without these names, which are not documented, a rank starts later and trains the same.
    with contextlib.suppress(ImportError, AttributeError):
        from deepspeed.runtime import compiler

        with _replaced(compiler, "compile", lambda: lambda function: function):
            import deepspeed.runtime.zero.muon.muon_optimizer
    return deepspeed
