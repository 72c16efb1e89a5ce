"""The tables and the picture of `benchmarks/quality.py`, from the files that it left."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

Records = dict[str, dict[str, list[dict[str, Any]]]]
"""Of a data set and a line, one for each seed."""

TITLES = {"fashion": "Fashion-MNIST, 12,000 images", "cifar": "CIFAR-10, 8,000 images"}
OURS = "ours"
HALF = "ours in half the time"  # `--budget` halved: what the peers' last FID is compared with where OURS was not run
COLOURS = ("#8a909c", "#2563a8", "#0f8b8d", "#d1495b", "#7b4fa3", "#e08e1b", "#a05a2c", "#c2a500", "#1f2430")


def read(out: Path) -> Records:
    found: Records = defaultdict(lambda: defaultdict(list))
    for path in sorted(out.glob("*.json")):
        record = json.loads(path.read_text())
        found[record["data"]][record["line"]].append(record)
    return found


def report(out: Path, picture: Path | None) -> str:
    """Markdown; with `picture`, FID against CPU seconds is drawn there."""
    records, lines = read(out), list[str]()
    for data, of_line in sorted(records.items(), reverse=True):
        floor = next(iter(of_line.values()))[0]["floor"]
        lines += [f"{TITLES[data]} (1,000 held-out images themselves: {pm(floor['fid'], floor['error'])})", ""]
        lines += [*table(of_line), "", *by_own(of_line), ""]
    if picture is not None:
        draw(records, picture)
    return "\n".join(lines)


def curve(seeds: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(seconds [P], FID [seeds, P]): all seeds of a line have as many points, at nearly the same seconds."""
    points = [[(point["seconds"], point["fid"]) for point in one["points"]] for one in seeds]
    values = np.array(points)
    return values[..., 0].mean(0), values[..., 1]


def seconds_to(seeds: list[dict[str, Any]], goal: float) -> float:
    """CPU seconds at which the seeds' geometric mean first is at `goal`, between its points by a straight line in both
    logarithms; infinite where it is never, the first point's where it is from there on."""
    seconds, fids = curve(seeds)
    x, y = np.log(seconds), np.log(fids).mean(0)
    below = np.flatnonzero(y <= math.log(goal))
    if not len(below):
        return math.inf
    i = int(below[0])
    if i == 0:
        return float(seconds[0])
    part = (y[i - 1] - math.log(goal)) / (y[i - 1] - y[i])
    return float(np.exp(x[i - 1] + part * (x[i] - x[i - 1])))


def table(of_line: dict[str, list[dict[str, Any]]]) -> list[str]:
    reference = next((name for name in (OURS, HALF) if name in of_line), None)
    ours = of_line[reference] if reference else None
    names = sorted(of_line, key=lambda name: -float(np.mean(curve(of_line[name])[1][:, -1])))
    times = curve(max(of_line.values(), key=lambda seeds: len(seeds[0]["points"])))[0]
    head = " | ".join([*(f"at {one:.0f} s" for one in times[:-1]), "last"])
    lines = [
        f"| | parameters | MFLOPs | images | CPU s | {head} | seeds, last | ours takes |",
        "|---" * (len(times) + 7) + "|",
    ]
    for name in names:
        seeds = of_line[name]
        seconds, fids = curve(seeds)
        cells = [""] * len(times)  # a line of another budget, or measured less often, has its values at its own times
        for at, value in zip(seconds, fids.mean(0), strict=True):
            cells[int(np.abs(np.log(times / at)).argmin())] = f"{value:.3g}"
        last = ", ".join(pm(one["points"][-1]["fid"], one["points"][-1]["error"]) for one in seeds)
        ratio = ""
        if ours and not name.startswith(OURS):
            taken = seconds_to(ours, float(np.exp(np.log(fids[:, -1]).mean()))) / seconds[-1]
            first = taken * seconds[-1] <= curve(ours)[0][0]
            ratio = "longer" if taken == math.inf else f"{'at most ' if first else ''}{taken:.2f} of its time"
        images = np.mean([one["points"][-1]["images"] for one in seeds])
        about = f"{seeds[0]['parameters'] / 1e6:.2f} M | {seeds[0]['mflops']:.0f} | {images:,.0f} | {seconds[-1]:.0f}"
        lines.append(f"| {name} | {about} | {' | '.join(cells)} | {last} | {ratio} |")
    return lines


def by_own(of_line: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| the last weights drawn by | samples | its own default sampler | dpmpp_2m, as all above |",
        "|---|---|---|---|",
    ]
    for name, seeds in of_line.items():
        for own in (one["own"] for one in seeds if "own" in one):
            ours = own["ours"]
            lines.append(
                f"| {name} | {own['count']} | {pm(own['fid'], own['error'])} | {pm(ours['fid'], ours['error'])} |"
            )
    return lines


def pm(value: float, error: float) -> str:
    return f"{value:.3g} ± {error:.2g}"


def draw(records: Records, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axes = plt.subplots(1, len(records), figsize=(5.6 * len(records), 4.4), layout="constrained", squeeze=False)
    names = sorted({name for of_line in records.values() for name in of_line}, key=lambda name: name.startswith(OURS))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)} | {OURS: "#2e8b57", HALF: "#6abf5f"}
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for ax, (data, of_line) in zip(axes[0], sorted(records.items(), reverse=True), strict=True):
        for name in names:
            if name not in of_line:
                continue
            seconds, fids = curve(of_line[name])
            style = {"color": colours[name], "lw": 2.6 if name in (OURS, HALF) else 1.4}
            label = f"{name} ({len(fids)} seed{'s' * (len(fids) > 1)})"
            ax.plot(seconds, np.exp(np.log(fids).mean(0)), "o-", ms=3, label=label, **style)
            ax.fill_between(seconds, fids.min(0), fids.max(0), color=colours[name], alpha=0.18, lw=0)
        floor = next(iter(of_line.values()))[0]["floor"]["fid"]
        ax.axhline(floor, color="#1f2430", lw=0.8, ls=":")
        ax.set(xscale="log", yscale="log", xlabel="CPU seconds of training, one core", title=TITLES[data])
        ticks = curve(max(of_line.values(), key=lambda seeds: len(seeds[0]["points"])))[0]
        ax.set_xticks(ticks, [f"{one:.0f}" for one in ticks])
        ax.xaxis.minorticks_off()
        ax.yaxis.set_major_formatter(plain)
        ax.grid(alpha=0.25, which="both", lw=0.5)
        ax.legend(fontsize=7, frameon=False)
    axes[0][0].set_ylabel("FID of 1,000 samples (dotted: of held-out images)")
    figure.savefig(path, dpi=110)
