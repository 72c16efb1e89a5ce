"""A rank without Ray of a run that begins, or goes on where it has begun: `growth_ranks.py RANK WORLD FOLDER`.

It leaves in FOLDER, as JSON, its requests to the run's store by kind and place, and how often it reported progress.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TORCH_GLOO_LAZY_INIT"] = "1"

import torch.distributed as dist

from scoreray.data.storage.paths import PathStore
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train

RANK, WORLD, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
SETTINGS = json.loads((FOLDER / "settings.json").read_text())


def main() -> None:
    start = sum(FOLDER.joinpath(f"{WORLD}-{before}-{RANK}.json").exists() for before in range(2))
    meeting = f"file://{FOLDER}/meeting-{WORLD}-{start}"
    dist.init_process_group("gloo", init_method=meeting, rank=RANK, world_size=WORLD)
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
    settings = SETTINGS | {"duration": {"images": images}, "run": SETTINGS["run"] | {"name": f"run-{WORLD}"}}
    train(load_config(settings), rank=RANK, world_size=WORLD, watch=shown.append)
    (FOLDER / f"{WORLD}-{start}-{RANK}.json").write_text(json.dumps({"requests": counts, "reports": len(shown)}))
    dist.barrier()
    dist.destroy_process_group()


main()
