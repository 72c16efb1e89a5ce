"""Kills writers of checkpoints, for test_checkpoint.py: `checkpoint_kills.py FOLDER KILLS` prints facts as JSON.

Each writer is a fork of this process, which has torch imported and one thread: it takes the run over, goes on from the
newest checkpoint and writes one after another, until SIGKILL meets it at a random moment.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from scoreray.data.storage.store import open_store
from scoreray.trainer.checkpoints.checkpoint import committed, latest
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.checkpoints.writer import CheckpointWriter
from scoreray.trainer.optim.fragments import Fragment

FOLDER, KILLS = Path(sys.argv[1]), int(sys.argv[2])
LENGTH = 50_000


def values(images: int) -> torch.Tensor:
    return torch.arange(LENGTH, dtype=torch.float32) + images


def newest_images() -> int:
    newest = latest(open_store(FOLDER))
    return newest.images_seen if newest else 0


def write(attempt: str) -> None:
    run = open_store(FOLDER)
    images = newest_images()
    writers = [CheckpointWriter(run, attempt=attempt, rank=r, world_size=2, keep=2) for r in range(2)]
    while True:
        images += 100
        for rank, writer in enumerate(writers):
            half = values(images)[rank * LENGTH // 2 : (rank + 1) * LENGTH // 2]
            fragment = Fragment("p", rank * LENGTH // 2, LENGTH // 2, {"master": half})
            marker = Marker(images, images // 100, {}, {"p": [LENGTH]}, [], {}, 1)
            writer.save(marker, [fragment], torch.nn.Module())
        for writer in writers:
            writer.wait()


def main() -> None:
    torch.set_num_threads(1)
    choose = random.Random(0)
    facts = {"kills": 0, "commits": 0, "killed while writing": 0, "most folders": 0, "most files": 0}
    before, pace = 0, 0.0
    for kill in range(KILLS):
        child = os.fork()
        if child == 0:
            write(f"{kill:08x}")
        if kill % 10 == 0:  # measures how long two checkpoints take on this machine now
            start = time.monotonic()
            while newest_images() < before + 200:
                time.sleep(0.002)
            pace = time.monotonic() - start
        else:
            time.sleep(choose.uniform(0.05, 1.2) * pace)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        run = open_store(FOLDER)
        newest = latest(run)
        images = newest_images()
        assert images >= before, "a committed checkpoint is gone"
        if newest is not None:
            assert torch.equal(newest.full_state()["p"], values(images)), "the newest checkpoint is another"
        folders = {key.rpartition("/")[0] for key, _ in run.list("checkpoints/")}
        files = [path for path in FOLDER.rglob("*") if path.is_file()]
        facts["kills"] += 1
        facts["commits"] += images > before
        facts["killed while writing"] += bool(folders - set(committed(run)))
        facts["most folders"] = max(facts["most folders"], len(folders))
        facts["most files"] = max(facts["most files"], len(files))
        before = images
    print(json.dumps(facts))


main()
