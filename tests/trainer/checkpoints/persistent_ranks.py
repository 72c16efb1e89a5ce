"""One rank of runs whose chains persist, a process of test_persistent.py: `persistent_ranks.py RANK WORLD FOLDER`.

Continues every run in FOLDER/<case>-zero<stage> to its end at this world size, through the loop itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": sys.argv[1], "GLOO_SOCKET_IFNAME": "lo"}

import torch
import torch.distributed as dist
import yaml

from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train

RANK, WORLD, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{FOLDER}/meeting", rank=RANK, world_size=WORLD)
for file in sorted(FOLDER.glob("*.yaml")):
    train(load_config(yaml.safe_load(file.read_text())), rank=RANK, world_size=WORLD)
    dist.barrier()
os._exit(0)  # not through the interpreter's end: gloo's and DeepSpeed's threads abort it now and then
