"""One rank of test_memory.py: `memory_ranks.py RANK WORLD PORT` prints the peak bytes per parameter of each engine.

Measured as the process's resident memory over what it was before the network existed; every tensor of some size has a
mapping of its own (MALLOC_MMAP_THRESHOLD_), which is given back when the tensor goes.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": sys.argv[1]}

import torch
import torch.distributed as dist

from scoreray.trainer.config import load_config
from scoreray.trainer.engine import build_engine

RANK, WORLD, PORT = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
WIDTH, DEPTH = 1400, 16


def resident(field: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_per_parameter(stage: int, precision: str, width: int = WIDTH) -> float:
    config = load_config(
        {
            "run": {"name": "x", "storage": "nowhere"},
            "data": {"url": "nowhere", "global_batch_size": WORLD},
            "duration": {"images": 4},
            "ema": {"stds": [0.05]},
            "engine": {"zero_stage": stage, "precision": precision},
            "scaling": {"workers": WORLD},
        }
    )
    gc.collect()
    before = resident()
    module = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(DEPTH)])
    num_params = sum(p.numel() for p in module.parameters())
    engine = build_engine(
        module,
        config.engine,
        config.optimizer,
        config.ema,
        global_batch_size=config.data.global_batch_size,
        world_size=WORLD,
        device=torch.device("cpu"),
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for step in range(3):
        if step == 2:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        engine.backward(engine.module(torch.randn(1, width, dtype=dtype)).float().square().mean())
        engine.step(1e-3, [0.5])
    return (resident("VmHWM") - before) / num_params


logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=RANK, world_size=WORLD)
for stage in range(4):  # what libraries load at their first use is theirs
    peak_per_parameter(stage, "bf16", width=20)
peaks = {f"{stage} {p}": peak_per_parameter(stage, p) for p in ("fp32", "bf16") for stage in range(4)}
if RANK == 0:
    print(json.dumps(peaks), flush=True)
dist.barrier()
os._exit(0)  # not through the interpreter's end: gloo's and DeepSpeed's threads abort it now and then
