"""Ranks without Ray that begin a run and go on with it: `growth_ranks.py FOLDER SIZES` prints what each did, as JSON.

For each of SIZES (2,8), of the second start: each rank's requests to the run's store by kind and place, and how often
it reported progress. Ranks are forks of this process, which has everything imported and one thread.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_GLOO_LAZY_INIT": "1"}

import torch
import torch.distributed as dist

from scoreray.data.storage.paths import PathStore
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train

FOLDER = Path(sys.argv[1])
SETTINGS = json.loads((FOLDER / "settings.json").read_text())


def rank_main(start: int, rank: int, world: int) -> None:
    meeting = f"file://{FOLDER}/meeting-{world}-{start}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    counts: Counter[str] = Counter()

    def counted(kind: str) -> None:
        method: Any = getattr(PathStore, kind)

        def request(self: PathStore, what: Any = "", *rest: Any) -> Any:
            if "runs" in self.root and what != []:
                counts[f"{kind} {what.partition('/')[0] if isinstance(what, str) else ''}".strip()] += 1
            return method(self, what, *rest)

        setattr(PathStore, kind, request)

    for kind in ("get", "put", "put_new", "size", "list", "delete"):
        counted(kind)
    shown = []
    images = SETTINGS["duration"]["images"] * (1 + start) // 2
    settings = SETTINGS | {"duration": {"images": images}, "run": SETTINGS["run"] | {"name": f"run-{world}"}}
    train(load_config(settings), rank=rank, world_size=world, watch=shown.append)
    (FOLDER / f"{world}-{start}-{rank}.json").write_text(json.dumps({"requests": counts, "reports": len(shown)}))
    dist.barrier()
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    found = []
    for world in map(int, sys.argv[2].split(",")):
        for start in range(2):
            ranks = []
            for rank in range(world):
                if (child := os.fork()) == 0:
                    try:
                        rank_main(start, rank, world)
                    finally:
                        os._exit(1)
                ranks.append(child)
            assert [os.waitpid(rank, 0)[1] for rank in ranks] == [0] * world
        found.append([json.loads((FOLDER / f"{world}-1-{rank}.json").read_text()) for rank in range(world)])
    print(json.dumps(found))


main()
