"""Several starts of one run at once, for test_checkpoint.py: `racing_starts.py URL ROUNDS STARTS` prints facts as JSON.

Each start is a fork of this process, which has torch imported and one thread: it takes the run over, goes on from the
newest checkpoint and writes one after another, with a record for each as the loop does, until it is taken over or, as
the last one, stopped by SIGTERM.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time

import torch

from scoreray.data.errors import ScorerayError
from scoreray.data.storage.lease import TakenOver
from scoreray.data.storage.store import Store, open_store
from scoreray.trainer.checkpoints.checkpoint import OWNER, committed, latest
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.checkpoints.writer import CheckpointWriter
from scoreray.trainer.monitoring.metrics import TrainingRecord
from scoreray.trainer.optim.fragments import Fragment
from scoreray.trainer.records import read_metrics, record_objects, remove_uncommitted

LENGTH, WORLD = 5_000, 2
STOPPED, TAKEN_OVER, FAILED = 0, 2, 1


def values(images: int) -> torch.Tensor:
    return torch.arange(LENGTH, dtype=torch.float32) + images


def start(url: str, attempt: str) -> None:
    """Writes checkpoints until SIGTERM."""
    stop = False

    def on_sigterm(*_: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_sigterm)
    run = open_store(url)
    writers = [CheckpointWriter(run, attempt=attempt, rank=r, world_size=WORLD, keep=2) for r in range(WORLD)]
    newest = latest(run)
    images = newest.images_seen if newest else 0
    if newest is not None:
        with writers[0].while_reading():
            assert torch.equal(newest.full_state()["p"], values(images)), "another start's state"
    writers[0].check_lease()
    remove_uncommitted(run, images)
    while not stop:
        images += 100
        for rank, writer in enumerate(writers):
            half = values(images)[rank * LENGTH // WORLD : (rank + 1) * LENGTH // WORLD]
            fragment = Fragment("p", rank * LENGTH // WORLD, LENGTH // WORLD, {"master": half})
            marker = Marker(images, images // 100, {}, {"p": [LENGTH]}, [], {}, 1)
            record = TrainingRecord(images, 1.0, 1e-3, 1.0, 1.0, 0.0)
            writer.save(marker, [fragment], torch.nn.Module(), record_objects(images, [record], plots=False))
        for writer in writers:
            writer.wait()


def fork(url: str, attempt: str, after_s: float) -> int:
    child = os.fork()
    if child:
        return child
    status = FAILED
    try:
        time.sleep(after_s)
        start(url, attempt)
        status = STOPPED
    except TakenOver:
        status = TAKEN_OVER
    except ScorerayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def race(url: str, tokens: list[str], choose: random.Random, facts: dict[str, int]) -> None:
    children = {fork(url, token, choose.uniform(0, 0.05)): token for token in tokens}
    while len(children) > 1:  # all but the newest end of themselves
        child, status = os.wait()
        token, code = children.pop(child), os.waitstatus_to_exitcode(status)
        facts["taken over" if code == TAKEN_OVER else "failed"] += 1
        if code != TAKEN_OVER:
            print(f"{token} ended with {code}", file=sys.stderr)
    ((child, token),) = children.items()
    run = open_store(url)
    before = latest(run)
    seen = before.images_seen if before else 0
    deadline = time.monotonic() + 240
    while ((newest := latest(run)) is None or newest.images_seen < seen + 200) and time.monotonic() < deadline:
        time.sleep(0.02)  # it is the newest, and it goes on
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    facts["went on"] += os.waitstatus_to_exitcode(status) == STOPPED and run.get(OWNER) == token.encode()
    check(run, facts)


def check(run: Store, facts: dict[str, int]) -> None:
    """The newest checkpoint is whole, and each of its records is stored once."""
    newest = latest(run)
    assert newest is not None
    facts["whole"] += bool(torch.equal(newest.full_state()["p"], values(newest.images_seen)))
    images = [record.images for record in read_metrics(run)]
    facts["records"] += images == list(range(100, newest.images_seen + 1, 100))
    facts["most folders"] = max(facts["most folders"], len(committed(run)))


def main() -> None:
    url, rounds, starts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    facts = dict.fromkeys(("rounds", "went on", "taken over", "failed", "whole", "records", "most folders"), 0)
    choose = random.Random(0)
    for number in range(rounds):
        race(url, [f"{number:04x}{one:04x}" for one in range(starts)], choose, facts)
        facts["rounds"] += 1
    print(json.dumps(facts))


main()
