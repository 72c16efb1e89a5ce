"""What the processes of a run import before its first step: seconds of a core in each, which the step waits for."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from waiting import PATIENCE_S

from scoreray.data.packing.pack import pack

NOT_NEEDED = {
    "torch._dynamo", "torch._inductor", "sympy", "deepspeed", "mlflow", "scipy", "matplotlib", "boto3", "optuna",
}  # fmt: skip
CODE = """
import os, sys
from scoreray.trainer.on_ray.hooks import import_variables, warm

storage, stage, *names = sys.argv[1:]
os.environ |= import_variables(deepspeed=stage != "0")
warm()
assert stage == "0" or "deepspeed" in sys.modules
from scoreray.cluster.verbs import train as of_the_driver
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.prepare import prepare_run

config = load_config({
    "run": {"name": "run", "storage": storage},
    "data": {"url": storage + "/data", "global_batch_size": 8},
    "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
    "engine": {"zero_stage": int(stage)},
    "scaling": {"workers": 1},
    "duration": {"images": 64},
    "checkpoint": {"every_images": 64},
})
if stage != "0":
    import torch.distributed
    torch.distributed.init_process_group("gloo", init_method=f"file://{storage}/meeting", rank=0, world_size=1)

def first_step(progress):
    print("imported:", *sorted(set(names) & set(sys.modules)), flush=True)
    if stage != "0":
        import torch
        from deepspeed.runtime import compiler
        assert compiler.compile() is torch.compile  # what DeepSpeed compiles later is compiled
    import mlflow  # can be imported afterwards
    os._exit(0)

train(prepare_run(config).config, watch=first_step)
"""


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_no_compiler_and_nothing_else_that_is_not_needed_is_imported_before_the_first_step(
    tmp_path: Path, stage: int
) -> None:
    """torch's compiler alone takes longer to import than torch does: one decorator of it is enough."""
    assert importlib.util.find_spec("mlflow")  # DeepSpeed imports it only where it is installed
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", images=images)
    pack(str(tmp_path / "pictures.npz"), str(tmp_path / "data"))
    needed = {"deepspeed"} if stage else set()
    words = [sys.executable, "-c", CODE, str(tmp_path), str(stage), *sorted(NOT_NEEDED - needed)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("imported:")] == ["imported:"], done.stderr
