"""Runs scripts in forks of one process that has imported everything, for `run_ranks` and `run_forked` of
`tests/trainer/conftest.py`: importing torch, DeepSpeed and torch's compiler takes more CPU time than most of what the
scripts do (8 s, and each process that torch's optimizers or activation checkpointing make import the compiler 3 s).

A line on its standard input, JSON, is a job: {"script", "arguments", "worlds", "imports", "environment", "output"
file}. Answers are lines on its standard output: the process id of the job, which leads a session of its own, and when
it has ended its exit status. With worlds [1, 2] the script is run as the ranks of one world size after another, `SCRIPT
RANK WORLD ARGUMENT...`; with none as it stands, `SCRIPT ARGUMENT...`. Its imports are what it needs beside MODULES.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
MODULES = ("scoreray.trainer.loop", "scoreray.data.storage.s3", "deepspeed", "torch._dynamo")


def run(script: str, *arguments: str) -> int:
    """In this process; its exit status."""
    sys.argv = [script, *arguments]
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    finally:
        if status:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(rank: int, world: int, script: str, arguments: list[str]) -> int:
    if child := os.fork():
        return child
    os.environ["LOCAL_RANK"] = str(rank)
    return run(script, str(rank), str(world), *arguments)


def run_worlds(worlds: list[int], script: str, arguments: list[str]) -> int:
    for world in worlds:
        left = {start(rank, world, script, arguments) for rank in range(world)}
        while left:
            child, status = os.wait()
            left.discard(child)
            if os.waitstatus_to_exitcode(status):
                return 1  # the others wait for it: the caller kills the group
    return 0


def carry_out(job: dict[str, Any]) -> int:
    os.setsid()
    os.environ.clear()
    os.environ.update(job["environment"])
    for stream, file, flags in ((0, os.devnull, os.O_RDONLY), (1, job["output"], os.O_WRONLY | os.O_APPEND)):
        opened = os.open(file, flags)
        os.dup2(opened, stream)
        os.close(opened)
    os.dup2(1, 2)
    if not job["worlds"]:
        return run(job["script"], *job["arguments"])
    return run_worlds(job["worlds"], job["script"], job["arguments"])


def prepare(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # DeepSpeed collects garbage at each start: half a second with all modules' objects to look through


def main() -> None:
    prepare(MODULES)
    for line in sys.stdin:
        job = json.loads(line)
        prepare(job["imports"])
        if not (child := os.fork()):
            os._exit(carry_out(job))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


main()
