"""Starts a script's ranks as forks of one process: `fork_ranks.py WORLDS MODULES SCRIPT ARGUMENT...`.

Each is `SCRIPT RANK WORLD ARGUMENT...`, for one world size of WORLDS (1,2) after another. MODULES (a,b) are imported
before, and torch's compiler, which optimizers and activation checkpointing import when they are first used: for each
rank on its own that takes more CPU time than most of what the ranks do (torch and DeepSpeed: 14 s, the compiler: 3 s).
"""

from __future__ import annotations

import gc
import importlib
import os
import runpy
import sys

os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported


def start(rank: int, world: int, script: str, arguments: list[str]) -> int:
    if child := os.fork():
        return child
    os.environ["LOCAL_RANK"] = str(rank)
    sys.argv = [script, str(rank), str(world), *arguments]
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


def main(worlds: str, modules: str, script: str, *arguments: str) -> int:
    for module in (*modules.split(","), "torch._dynamo"):
        importlib.import_module(module)
    gc.freeze()  # DeepSpeed collects garbage at each start: half a second with all modules' objects to look through
    for world in map(int, worlds.split(",")):
        left = {start(rank, world, script, list(arguments)) for rank in range(world)}
        while left:
            child, status = os.wait()
            left.discard(child)
            if os.waitstatus_to_exitcode(status):
                return 1  # the others wait for it: the caller kills the group
    return 0


sys.exit(main(*sys.argv[1:]))
