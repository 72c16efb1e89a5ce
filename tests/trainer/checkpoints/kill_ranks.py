"""Plain ranks without Ray, started again whenever they are killed: `kill_ranks.py FOLDER PLAN` prints facts as JSON.

PLAN: [[world size, kill after how many steps or null], ...], each a start of all ranks from the newest commit. Ranks
are forks of this process, which has everything imported and one thread, so that a start costs little. A ledger under
FOLDER/ledger says which positions each start trained on, which samples these were, and what was committed before.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}

import deepspeed  # noqa: F401 (before the forks)
import torch
import torch.distributed as dist

from scoreray.trainer import loop
from scoreray.trainer.config import load_config

FOLDER = Path(sys.argv[1])
SETTINGS = json.loads((FOLDER / "settings.json").read_text())


def rank_main(start: int, rank: int, world: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    meeting = f"file://{FOLDER}/meeting-{start}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    ledger = open(FOLDER / "ledger" / f"{start}-{rank}", "a", buffering=1)  # noqa: SIM115 (until it is killed)
    step, writers = loop._step, []

    class Writer(loop.CheckpointWriter):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            writers.append(self)

    def noted(engine: Any, batch: Any, *rest: Any) -> float:
        commit = writers[0].last_commit
        norm = step(engine, batch, *rest)
        pairs = zip(batch.position.tolist(), batch.index.tolist(), strict=True)
        ledger.write(json.dumps([commit[0] if commit else 0, list(pairs)]) + "\n")
        return norm

    loop._step, loop.CheckpointWriter = noted, Writer
    loop.train(load_config(SETTINGS), rank=rank, world_size=world)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    (FOLDER / "ledger").mkdir()
    choose = random.Random(0)
    starts = []
    for start, (world, kill_after) in enumerate(json.loads(sys.argv[2])):
        began = time.monotonic()
        ranks = []
        for rank in range(world):
            if (child := os.fork()) == 0:
                try:
                    rank_main(start, rank, world)
                finally:
                    os._exit(1)
            ranks.append(child)
        facts = {"world": world, "from": loop.latest(loop.run_store(load_config(SETTINGS)))}
        facts["from"] = facts["from"].images_seen if facts["from"] else 0  # type: ignore[attr-defined]
        if kill_after is not None:
            first = FOLDER / "ledger" / f"{start}-0"
            while not first.exists() or first.read_text().count("\n") < kill_after:
                time.sleep(0.001)
            time.sleep(choose.uniform(0, 0.02))
            victim = choose.choice(ranks)
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
            for other in set(ranks) - {victim}:  # as Ray Train does with what is left of a group
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
        else:
            assert [os.waitpid(rank, 0)[1] for rank in ranks] == [0] * world
        starts.append({**facts, "seconds": time.monotonic() - began})
    print(json.dumps(starts))


main()
