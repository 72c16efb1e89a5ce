"""How the costs of a run's control plane grow with its workers: counted, fitted, and predicted for 1,024 GPUs.

    python benchmarks/scale.py [--quick] [--parts commits,streams,votes,cluster] [--workers 1,2,4,8] [--save FILE]
    python benchmarks/scale.py --load FILE [--picture docs/images/scale.png]

commits: ranks one after another in this process commit to a real S3 server, and restore (`simulated_ranks.py`).
streams: rank 0 and the last rank open a data set of 1e9 samples.  votes: ranks as threads vote at each step.
cluster: runs of a tiny network on Ray's local cluster of several nodes (`cluster_run.py`): start, steps, commits, a
worker's SIGKILL, stop. As many workers as fit into memory with 6 GB left free.

Requests are the S3 server's own counts; messages are counted at the Monitor actor. Counts and CPU seconds do not depend
on what else the machine does; seconds do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from simulated_ranks import BUCKET, CountedS3, commit, stream, votes, write_set

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("commits", "streams", "votes", "cluster")
RANKS = {False: (2, 8, 32, 128, 512, 1024), True: (2, 8, 32)}
VOTERS = {False: (2, 4, 8, 16, 32, 64), True: (2, 8)}
WORKERS = {False: (1, 2, 4, 8, 16, 32, 64), True: (1, 2)}
NUM_PARAMETERS = 64
MOST = 1024
FREE_GB, WORKER_GB = 6.0, 0.6  # left to others; of a worker, measured, with what its node's daemons take
COMMIT_EVERY_S = 600.0  # assumption: an interval between commits at which a kill costs ten minutes at most
Series = dict[int, float]


@dataclass(frozen=True)
class Row:
    """A cost by the number of ranks. `may_grow`: 0 what every step costs, 1 as the number of ranks."""

    name: str
    values: Series
    may_grow: int = 1

    @property
    def exponent(self) -> float:
        """The slope of the last three sizes on log-log axes; 0 of what is always 0."""
        points = [(n, v) for n, v in sorted(self.values.items()) if v > 0][-3:]
        return float(np.polyfit(*np.log(np.array(points)).T, 1)[0]) if len(points) > 1 else 0.0

    @property
    def per_worker(self) -> float:
        """The slope of a line through all sizes."""
        points = sorted(self.values.items())
        return float(np.polyfit(*np.array(points).T, 1)[0]) if len(points) > 1 else 0.0

    @property
    def at_most_ranks(self) -> float:
        """At 1,024 ranks: measured, or by the line through all sizes, but no less than the largest measured; of what
        every step costs, the median."""
        if MOST in self.values:
            return self.values[MOST]
        points = np.array(sorted(self.values.items()))
        if len(points) < 2 or self.may_grow == 0:
            return float(np.median(points[:, 1]))
        slope, at_0 = np.polyfit(*points.T, 1)
        return float(max(points[:, 1].max(), at_0 + slope * MOST))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes: small sizes")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--ranks", help="of commits, instead of 2,8,32,128,512,1024")
    parser.add_argument("--workers", help="of the cluster, instead of 1,2,4,... as far as memory lets")
    parser.add_argument("--save", type=Path, help="adds what was measured to this JSON file")
    parser.add_argument("--load", type=Path, help="measures nothing: the report of a file of --save")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(options.load.read_text()) if options.load else {}
    if not options.load:
        measure(options, found)
    report(found)
    if options.picture:
        picture(rows_of(found), options.picture)


def measure(options: argparse.Namespace, found: dict[str, Any]) -> None:
    parts = options.parts.split(",")
    if options.save and options.save.exists():
        found |= json.loads(options.save.read_text())

    def note(part: str, size: str, value: Any) -> None:
        found.setdefault(part, {})[size] = value
        print(f"{part} {size}: {json.dumps(value)}", file=sys.stderr, flush=True)
        if options.save:
            options.save.write_text(json.dumps(found, indent=1) + "\n")

    if "votes" in parts:
        for ranks in VOTERS[options.quick]:
            note("votes", str(ranks), votes(ranks))
    with tempfile.TemporaryDirectory(prefix="scale-") as name, CountedS3(Path(name) / "s3") as s3:
        if "commits" in parts:
            for ranks in numbers(options.ranks) or RANKS[options.quick]:
                for kind, replicated in (("replicated", True), ("sharded", False)):
                    note(f"commits, {kind}", str(ranks), commit(s3, ranks, NUM_PARAMETERS, replicated=replicated))
        if "streams" in parts:
            from scoreray.data.storage.store import open_store

            url = f"s3://{BUCKET}/large"
            write_set(open_store(url), Path(name))
            for ranks, rank in ((1, 0), (8, 7), (128, 127), (MOST, 0), (MOST, MOST - 1)):
                note("streams", f"{ranks} {rank}", stream(s3, url, rank, ranks))
        if "cluster" in parts:
            for workers in numbers(options.workers) or WORKERS[options.quick]:
                if (free := free_gb()) < FREE_GB + WORKER_GB * workers:
                    print(f"{workers} workers and more are left out: {free:.1f} GB are free", file=sys.stderr)
                    break
                if (moments := cluster(s3, Path(name), workers)) is not None:
                    note("cluster", str(workers), moments)


def numbers(text: str | None) -> tuple[int, ...]:
    return tuple(map(int, text.split(","))) if text else ()


def free_gb() -> float:
    import psutil

    return float(psutil.virtual_memory().available / 1e9)


def cluster(s3: CountedS3, folder: Path, workers: int) -> dict[str, Any] | None:
    """The moments of a run on a cluster; None, with its last lines, where it failed."""
    from scoreray.data.packing.pack import pack

    data, place = f"s3://{BUCKET}/data", folder / f"cluster-{workers}"
    place.mkdir()
    np.savez(folder / "small.npz", images=np.random.default_rng(0).integers(0, 256, (2048, 8, 8), dtype=np.uint8))
    with contextlib.redirect_stdout(sys.stderr):
        pack(str(folder / "small.npz"), data)
    script = str(Path(__file__).with_name("cluster_run.py"))
    command = [sys.executable, script, str(place), str(workers), data, f"s3://{BUCKET}/runs", str(s3.metrics_port)]
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:
        environment = {**os.environ, "RAY_TMPDIR": short, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if not (place / "moments.json").exists():
        print(f"{workers} workers failed: {done.stderr[-1500:]}", file=sys.stderr)
        return None
    moments: dict[str, Any] = json.loads((place / "moments.json").read_text())
    return moments


def rows_of(found: Mapping[str, Any]) -> list[Row]:
    """What was measured, by cost."""
    rows = []

    def add(name: str, part: str, value: Any, may_grow: int = 1) -> None:
        values = {int(n): float(v) for n, one in found.get(part, {}).items() if (v := value(one)) is not None}
        if values:
            rows.append(Row(name, values, may_grow))

    step = "step, each rank: "
    add(f"{step}CPU of the vote, us", "votes", lambda one: one["step: CPU us a rank"], 0)
    add("a sum around a ring instead: CPU of all ranks, us", "votes", lambda one: one.get("ring, all ranks: CPU us"))
    add("start: reads of the rendezvous store by a rank", "votes", lambda one: one["reads of the store"] / one["ranks"])
    streams = {one["ranks"]: one for one in found.get("streams", {}).values() if one["rank"] == one["ranks"] - 1}
    for name, key, may_grow in (
        (f"{step}CPU of a batch's positions, us", "positions of a batch: CPU us", 0),
        ("stream of 1e9 samples, opened: CPU s", "open: CPU s", 0),
        ("stream of 1e9 samples, first batch: CPU s", "first batch: CPU s", 0),
        ("stream of 1e9 samples, first batch: MB", "first batch: MB", 0),
    ):
        if streams:
            rows.append(Row(name, {n: one[key] for n, one in streams.items()}, may_grow))
    if streams:
        name = "stream of 1e9 samples, to its first batch: requests"
        rows.append(Row(name, {n: one["requests"]["all"] for n, one in streams.items()}, 0))
    for kind in ("replicated", "sharded"):
        part = f"commits, {kind}"
        add(f"commit, {kind}: requests", part, lambda one: one["commit"]["all"])
        add(f"commit, {kind}: requests of rank 0", part, lambda one: one["commit, rank 0"]["all"])
        add(f"commit, {kind}: CPU s of rank 0", part, lambda one: one["commit, rank 0: CPU s"])
        add(f"commit, {kind}: CPU s of another rank", part, lambda one: one["commit, another rank: CPU s"])
        if kind == "sharded":
            add("restore, sharded: requests of the last rank", part, lambda one: one["restore, last rank"]["all"])
        add(f"newest checkpoint, {kind}: CPU s", part, lambda one: one["newest checkpoint: CPU s"])
        add(f"newest checkpoint, {kind}: bytes of the marker", part, lambda one: one["marker: bytes"])
    for name, value, may_grow in CLUSTER:
        add(name, "cluster", value, may_grow)
    return rows


def between(one: Mapping[str, Any], start: str, end: str) -> dict[str, float] | None:
    """What was counted between two moments; CPU seconds of the processes that are there at the second."""
    if start not in one or end not in one:
        return None
    a, b = one[start], one[end]
    then = {pid: cpu for of_kind in a["cpu"].values() for pid, cpu in of_kind.items()}
    cpu = {kind: sum(cpu - then.get(pid, 0.0) for pid, cpu in of_kind.items()) for kind, of_kind in b["cpu"].items()}
    messages = {name: count - a["messages"].get(name, 0) for name, count in b["messages"].items()}
    return {
        "s": b["clock"] - a["clock"],
        "CPU s": sum(cpu.values()),
        "CPU s of the controller": cpu.get("TrainController", 0.0),
        "requests": sum(b["requests"].values()) - sum(a["requests"].values()),
        "messages": sum(messages.values()),
        "reports": messages.get("update", 0),
        "images": b["images"] - a["images"],
    }


def _of(start: str, end: str, key: str, divisor: Any = lambda one: 1.0) -> Any:
    def value(one: Mapping[str, Any]) -> float | None:
        counted = between(one, start, end)
        return None if counted is None else counted[key] / max(divisor(one), 1e-9)

    return value


def _commits(one: Mapping[str, Any]) -> float:
    from cluster_run import COMMITS

    return COMMITS


def _seconds(one: Mapping[str, Any]) -> float:
    counted = between(one, "training", "trained")
    return counted["s"] if counted else math.nan


TRAINED = ("training", "trained")
CLUSTER: tuple[tuple[str, Any, int], ...] = (
    ("cluster, start: s", _of("command", "first step", "s"), 1),
    ("cluster, start: CPU s", _of("command", "first step", "CPU s"), 1),
    ("cluster, start: requests", _of("command", "first step", "requests"), 1),
    ("cluster, start: messages to the Monitor", _of("command", "first step", "messages"), 1),
    ("cluster, a second: reports to the Monitor", _of(*TRAINED, "reports", _seconds), 0),
    ("cluster, a second: messages to the Monitor", _of(*TRAINED, "messages", _seconds), 0),
    ("cluster, a second: CPU s of Ray Train's controller", _of(*TRAINED, "CPU s of the controller", _seconds), 1),
    ("cluster, a commit and its steps: requests", _of(*TRAINED, "requests", _commits), 1),
    ("cluster, a commit and its steps: CPU s", _of(*TRAINED, "CPU s", _commits), 1),
    ("cluster, restart after SIGKILL: s", _of("kill", "restarted", "s"), 1),
    ("cluster, restart after SIGKILL: CPU s", _of("kill", "restarted", "CPU s"), 1),
    ("cluster, restart after SIGKILL: requests", _of("kill", "restarted", "requests"), 1),
    ("cluster, stop: s", _of("stop", "stopped", "s"), 1),
    ("cluster, stop: requests", _of("stop", "stopped", "requests"), 1),
)


def report(found: Mapping[str, Any]) -> None:
    rows = rows_of(found)
    sizes = sorted({n for row in rows for n in row.values})
    heads = [f"{n:,}" for n in sizes]
    print(f"| cost | {' | '.join(heads)} | exponent | a worker more | at 1,024 |")
    print("|---|" + "---:|" * (len(sizes) + 3))
    for row in rows:
        cells = [short(row.values[n]) if n in row.values else "" for n in sizes]
        by = "" if MOST in row.values else " (line)" if row.may_grow else " (median)"
        fit = f"{row.exponent:.2f} | {short(row.per_worker)} | {short(row.at_most_ranks)}{by}"
        print(f"| {row.name} | {' | '.join(cells)} | {fit} |")
    print()
    for line in prediction(rows):
        print(line)


def short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def prediction(rows: list[Row]) -> list[str]:
    """What the control plane adds to a step at 1,024 GPUs, beside what communication does."""
    sys.path.insert(0, str(ROOT / "docs" / "tools"))
    from scaling import NODES, WAYS, WORKS

    from scoreray.trainer.engine.communication import step_time

    by_name = {row.name: row for row in rows}
    name, work = next(iter(WORKS.items()))
    step = step_time(WAYS["zero0"], MOST, work, NODES)
    lines = [f"{name}, zero_stage 0, {MOST:,} GPUs: {1e3 * step.compute_s:.1f} ms of computing in a step, "
             f"communication leaves {step.efficiency:.1%}"]  # fmt: skip
    total = step.total_s
    for what, row, each_s in (
        ("the vote's CPU time", "step, each rank: CPU of the vote, us", None),
        ("positions of the batch", "step, each rank: CPU of a batch's positions, us", None),
        ("a commit's CPU time on rank 0, replicated", "commit, replicated: CPU s of rank 0", COMMIT_EVERY_S),
        ("a commit's CPU time on rank 0, sharded", "commit, sharded: CPU s of rank 0", COMMIT_EVERY_S),
    ):
        if row in by_name:
            value = by_name[row].at_most_ranks
            share = value * 1e-6 / total if each_s is None else value / each_s
            lines.append(
                f"  {what}: {short(value)} {'us' if each_s is None else 's'}, {share:.2%} of the time if none is hidden"
            )
    if "a sum around a ring instead: CPU of all ranks, us" in by_name:
        cpu_ms = by_name["a sum around a ring instead: CPU of all ranks, us"].at_most_ranks / 1e3
        ring_ms = cpu_ms + 1e3 * 2 * (MOST - 1) * NODES.between_latency_s
        lines.append(
            f"  a vote around a ring, one message after another: {ring_ms:.0f} ms in a step of {1e3 * total:.1f} ms"
        )
    return lines


def picture(rows: list[Row], file: Path) -> None:
    """Costs against ranks, log-log, each over its value at the fewest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = {
        "a step": [row for row in rows if row.name.startswith(("step", "cluster, a step", "cluster, a second"))],
        "a commit, a start": [
            row for row in rows if "CPU" not in row.name and row.name.startswith(("commit", "restore"))
        ],
        "a run on Ray's local cluster": [
            row for row in rows if row.name.startswith("cluster") and "a s" not in row.name and ": s" not in row.name
        ],  # no seconds: of many processes on one machine's cores
    }
    groups = {title: chosen for title, chosen in groups.items() if chosen}
    figure, axes = plt.subplots(1, len(groups), figsize=(5 * len(groups), 4.2), layout="constrained", squeeze=False)
    for axis, (title, chosen) in zip(axes[0], groups.items(), strict=True):
        for row in chosen:
            points = [(n, v) for n, v in sorted(row.values.items()) if v > 0]
            if len(points) > 1:
                sizes, values = np.array(points).T
                axis.loglog(sizes, values / values[0], "o-", ms=3, lw=1.3, label=row.name)
        low, high = axis.get_xlim()
        ends = np.array([max(low, 1), high])
        axis.loglog(ends, ends / ends[0], ":", color="#8a909c", lw=1, label="as the number of ranks")
        axis.set(title=title, xlabel="ranks", ylabel="cost over that at the fewest ranks")
        axis.legend(fontsize=6, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
