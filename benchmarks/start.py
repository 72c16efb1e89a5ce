"""How long a run takes to its first step, and from a worker's SIGKILL to the next one.

    python benchmarks/start.py [--workers 2] [--stage auto] [--repeats 3] [--standby 0 --wait 20] [--processes]

Each repeat is what `scoreray train` does, in a process of its own: an embedded Ray, a small U-Net, a small data set in
a folder. After its second commit (and --wait seconds of training) the last worker is killed. Beside the clock, CPU
seconds of all processes of the run that are still there (after a kill the dead ones' are missing); --processes
prints whose they were.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STAGES = ("first line", "first step", "restart noticed", "first new step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stage", default="auto", help="engine.zero_stage")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--standby", type=float, help="scaling.standby_after_s; default none")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds of training before the kill")
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        run(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="start-") as folder:
        pack_some(Path(folder))
        found = [measured(Path(folder, str(number)), arguments) for number in range(arguments.repeats)]
    print(f"{'seconds':36}  {'clock':>6}  {'least':>6}  {'most':>6}  {'CPU':>6}   ({arguments.workers} workers)")
    for name, start, end in (
        ("command to its first line", "start", "first line"),
        ("command to the first step", "start", "first step"),
        ("SIGKILL to the line that tells", "kill", "restart noticed"),
        ("SIGKILL to the first new step", "kill", "first new step"),
    ):
        clock = [one[end]["clock"] - one[start]["clock"] for one in found]
        cpu = [spent(one[start]["cpu"], one[end]["cpu"]) for one in found]
        middle = statistics.median
        print(f"{name:36}  {middle(clock):6.1f}  {min(clock):6.1f}  {max(clock):6.1f}  {middle(cpu):6.1f}")
    if arguments.processes:
        for end in ("first step", "first new step"):
            print(f"CPU seconds up to the {end}, last repeat, since each began:")
            for name, cpu in sorted(found[-1][end]["cpu"].items(), key=lambda entry: -entry[1]):
                print(f"  {cpu:6.1f}  {name}")


def spent(before: dict[str, float], after: dict[str, float]) -> float:
    """CPU seconds between two moments of the processes that are there at the second; names end in the pid."""
    then = {name.rpartition(" ")[2]: cpu for name, cpu in before.items()}
    return sum(cpu - then.get(name.rpartition(" ")[2], 0.0) for name, cpu in after.items())


def pack_some(folder: Path) -> None:
    import numpy as np

    from scoreray.data.packing.pack import pack

    images = np.random.default_rng(0).integers(0, 256, (2000, 8, 8), dtype=np.uint8)
    np.savez(folder / "pictures.npz", images=images)
    pack(str(folder / "pictures.npz"), str(folder / "data"))


def measured(folder: Path, arguments: argparse.Namespace) -> dict[str, dict]:
    """What the run wrote, with the moment before it began."""
    folder.mkdir()
    begin = {"clock": time.time(), "cpu": {}}
    command = [sys.executable, __file__, "--run", str(folder), "--workers", str(arguments.workers)]
    command += ["--stage", arguments.stage, "--wait", str(arguments.wait)]
    command += [] if arguments.standby is None else ["--standby", str(arguments.standby)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the run failed:\n{done.stderr[-3000:]}")
    return {"start": begin, **json.loads((folder / "moments.json").read_text())}


def run(arguments: argparse.Namespace) -> None:
    """In a process of its own: as `cluster/cli/runs.py` trains, but its watch notes moments."""
    from scoreray.cluster.verbs import train as training
    from scoreray.trainer.config import load_config
    from scoreray.trainer.prepare import prepare_run

    moments: dict[str, dict] = {}
    victims: list[int] = []

    def note(name: str) -> None:
        moments.setdefault(name, {"clock": time.time(), "cpu": cpu_by_process()})

    class Watch:
        def __init__(self, total: int, then: float = 0.0) -> None:
            self.commits: set[int] = set()

        def __enter__(self) -> Watch:
            return self

        def __exit__(self, *_: object) -> None: ...

        def __call__(self, progress) -> None:  # type: ignore[no-untyped-def]
            note("first step")
            self.commits.add(progress.committed)
            if not victims and len(self.commits) > 2 and time.time() > progress.started_at + arguments.wait:
                victims.append(worker())
                note("kill")
                os.kill(victims[0], signal.SIGKILL)
            elif victims and "first new step" not in moments and progress.started_at > moments["kill"]["clock"]:
                note("first new step")
                os.kill(os.getpid(), signal.SIGINT)

    def say(line: str) -> None:
        note("restart noticed" if victims else "first line")

    training.TrainLine, training.say = Watch, say  # type: ignore[assignment, misc]
    config = load_config(
        {
            "run": {"name": "run", "storage": str(arguments.run)},
            "data": {"url": str(arguments.run.parent / "data"), "global_batch_size": 32},
            "network": {"kind": "unet", "model_channels": 16, "channel_mult": [1], "num_blocks": 1},
            "engine": {"precision": "fp32", "zero_stage": arguments.stage},
            "scaling": {"workers": arguments.workers, "grace_s": 0, "standby_after_s": arguments.standby},
            "duration": {"images": 10_000_000},
            "checkpoint": {"every_images": 1600},
        },
        [f"engine.zero_stage={arguments.stage}"],
    )
    try:
        training.train_to_end(prepare_run(config))
    except KeyboardInterrupt:
        (arguments.run / "moments.json").write_text(json.dumps(moments))


def worker() -> int:
    import psutil

    family = psutil.Process().children(recursive=True)
    return max(p.pid for p in family if "RayTrainWorker" in name_of(p))


def name_of(process) -> str:  # type: ignore[no-untyped-def]
    import psutil

    try:
        words = process.cmdline()
    except psutil.Error:
        return "gone"
    if words and words[0].startswith("ray::"):
        return words[0].split("(")[0].partition(".")[0]
    shown = [Path(word).name for word in words[:3] if not word.startswith("-")]
    return " ".join(" ".join(shown).split())[:40]


def cpu_by_process() -> dict[str, float]:
    """CPU seconds of each process of this run, by name and pid."""
    import psutil

    found = {}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
            found[f"{name_of(process)} {process.pid}"] = times.user + times.system
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    main()
