"""One of four ranks of test_hpz.py: `hpz_ranks.py RANK PORT` trains with ZeRO-3, without and with a partition group."""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": sys.argv[1]}

import torch
import torch.distributed as dist

from scoreray.trainer.config import load_config
from scoreray.trainer.engine import build_engine

# More parameters than DeepSpeed may keep gathered (2 M at least, `bucket_sizes`): of a smaller network no weight is
# released between the forward and the backward pass, so after the first step there is no second copy to look at.
RANK, WORLD, WIDTH, DEPTH = int(sys.argv[1]), 4, 600, 8
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=RANK, world_size=WORLD)
facts = {}
for group in (1, 2):
    torch.manual_seed(0)
    config = load_config(
        {
            "run": {"name": "x", "storage": "nowhere"},
            "data": {"url": "nowhere", "global_batch_size": WORLD},
            "duration": {"images": 4},
            "engine": {"zero_stage": 3, "precision": "bf16", "partition_group": group},
            "scaling": {"workers": WORLD},
        }
    )
    module = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])
    engine = build_engine(
        module,
        config.engine,
        config.optimizer,
        config.ema,
        global_batch_size=WORLD,
        world_size=WORLD,
        device=torch.device("cpu"),
    )
    norms, second = [], []
    for step in range(3):
        x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(10 * step + RANK)).bfloat16()
        loss = engine.module(x).float().square().mean()
        copy = module[1].weight.ds_secondary_tensor  # dropped by the step, which changes the weights
        second.append(None if copy is None else copy.numel())
        engine.backward(loss)
        norms.append(engine.step(1e-3, [0.5] * len(config.ema.names)))
    facts[group] = {"norms": norms, "second": second}
if RANK == 0:
    print(json.dumps(facts), flush=True)
dist.barrier()
os._exit(0)  # not through the interpreter's end: gloo's and DeepSpeed's threads abort it now and then
