"""What the processes of a run import before its first step: seconds of a core in each, which the step waits for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from waiting import PATIENCE_S

from scoreray.data.packing.pack import pack

NOT_NEEDED = {"torch._dynamo", "torch._inductor", "sympy", "deepspeed", "scipy", "matplotlib", "boto3", "optuna"}
CODE = """
import os, sys
from scoreray.trainer.on_ray.hooks import MODULES, import_variables

for name in import_variables(deepspeed=False)[MODULES].split(","):
    __import__(name)
from scoreray.cluster.verbs import train as of_the_driver
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.prepare import prepare_run

config = load_config({
    "run": {"name": "run", "storage": sys.argv[1]},
    "data": {"url": sys.argv[1] + "/data", "global_batch_size": 8},
    "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
    "scaling": {"workers": 1},
    "duration": {"images": 64},
    "checkpoint": {"every_images": 64},
})

def first_step(progress):
    print(*sorted(set(sys.argv[2:]) & set(sys.modules)))
    os._exit(0)

train(prepare_run(config).config, watch=first_step)
"""


def test_no_compiler_and_nothing_else_that_is_not_needed_is_imported_before_the_first_step(tmp_path: Path) -> None:
    """torch's compiler alone takes longer to import than torch does: one decorator of it is enough."""
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "pictures.npz", images=images)
    pack(str(tmp_path / "pictures.npz"), str(tmp_path / "data"))
    words = [sys.executable, "-c", CODE, str(tmp_path), *sorted(NOT_NEEDED)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
