"""DeepSpeed without two of its imports that no run uses, and that the start of each rank would wait for.

- MLflow, where it is installed, by DeepSpeed's autotuner: 0.8 s of a core.
- torch's compiler, by DeepSpeed's Muon at a run's first step, to compile its own functions: 2.5 s (torch 2.13).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any


@functools.cache
def import_deepspeed() -> Any:
    """The module `deepspeed`."""
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # as where it is not installed
    try:
        import deepspeed
    finally:
        if hidden:
            del sys.modules["mlflow"]
    # Without these names, which are not documented, a rank starts later and trains the same.
    with contextlib.suppress(ImportError, AttributeError):
        from deepspeed.runtime import compiler

        before, compiler.compile = compiler.compile, lambda: lambda function: function
        try:
            import deepspeed.runtime.zero.muon.muon_optimizer
        finally:
            compiler.compile = before
    return deepspeed
