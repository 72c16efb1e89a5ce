"""Sweeps, measured: what a trial costs besides training, how soon a search is near the optimum, what two cores gain.

    python benchmarks/tune.py [--out FILE.json]

A 2-D target (the ring of eight Gaussians), a perceptron of 32 x 2, batches of 64: steps of about a millisecond, so that
what is not training shows. Everything is measured in one run on one machine; it starts its own Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from scoreray.cluster.local_ray import connected
from scoreray.data.pack import pack
from scoreray.trainer.targets import sample_target
from scoreray.tune.study import Study
from scoreray.tune.sweep import load_sweep
from scoreray.tune.trial import Trial

SPACE = {
    "objective.sigma_sampling.P_mean": {"uniform": [-6.0, 4.0]},
    "objective.sigma_sampling.P_std": {"log": [0.1, 3.0]},
    "objective.weighting.kind": {"choice": ["edm", "sigma2", "constant", "velocity"]},
    "optimizer.learning_rate": {"log": [1e-5, 1e-2]},
}
NEAR = 1.01  # times the best metric that any search of the same seed found
SEARCHES: dict[str, dict[str, Any]] = {
    "random": {"search": {"kind": "random", "default_first": False}},
    "random, ASHA": {
        "search": {"kind": "random", "default_first": False},
        "scheduler": {"kind": "asha", "grace_images": 1024, "reduction": 3},
    },
    "TPE, ASHA": {
        "search": {"kind": "tpe", "startup": 8, "default_first": False},
        "scheduler": {"kind": "asha", "grace_images": 1024, "reduction": 3},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tune.json")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument(
        "--only", choices=("overhead", "parallel", "search"), help="One part; the file keeps the others."
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scoreray-") as folder, connected(num_cpus=2):
        place = Path(folder)
        for name, count, seed in (("train", 8192, 0), ("held", 512, 1)):
            np.savez(place / f"{name}.npz", images=sample_target("mixture", count, seed).numpy())
            pack(str(place / f"{name}.npz"), str(place / name), name=name)
        parts: dict[str, Callable[[], Any]] = {
            "overhead": lambda: overhead(place),
            "parallel": lambda: parallel(place),
            "search": lambda: search(place, arguments.seeds, arguments.trials),
        }
        found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        for name in [arguments.only] if arguments.only else list(parts):
            found[name] = {"load_before": os.getloadavg()[0], **parts[name]()}
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
            print(json.dumps({name: found[name]}, indent=1), flush=True)


def run(place: Path, name: str, **changes: Any) -> tuple[list[Trial], float]:
    """The trials of a study, and the seconds that it took."""
    sweep = {
        "study": {"name": name, "storage": str(place / "studies"), "seed": changes.pop("seed", 0)},
        "base": {
            "data": {"url": str(place / "train"), "global_batch_size": 64},
            "network": {"kind": "mlp", "hidden_size": 32, "num_layers": 2},
            "ema": {"stds": [0.1]},
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "duration": {"images": changes.pop("images", 8192)},
            "log": {"tensorboard": False},
        },
        "space": SPACE,
        "metric": {"reference": str(place / "held"), "count": 512, "levels": 12, "sigma_min": 0.02, "sigma_max": 5.0},
        **changes,
    }
    started = time.perf_counter()
    trials = Study(load_sweep(sweep), {"CPU": 2.0}).run()
    return trials, time.perf_counter() - started


def overhead(place: Path) -> dict[str, float]:
    """Seconds from handing a trial out to its first step's end, in a new process and in one that is used again."""
    trials, _ = run(place, "overhead", trials=10, search={"kind": "random"}, resources={"concurrent": 1}, images=1024)
    waits = [trial.reports[0]["first_step"] - trial.reports[0]["sent"] for trial in trials]
    whole = [trial.reports[0]["seconds"] for trial in trials[1:]]
    return {
        "new_process_s": waits[0],
        "reused_process_s": statistics.median(waits[1:]),
        "whole_trial_of_1024_images_s": statistics.median(whole),
    }


def parallel(place: Path) -> dict[str, float]:
    """The same trials one after another and two at once, from the first report on: processes have started by then."""
    spans = {}
    for at_once in (1, 2):
        settings = {"search": {"kind": "random"}, "resources": {"concurrent": at_once}, "images": 65536}
        trials, _ = run(place, f"parallel-{at_once}", trials=8 + at_once, **settings)
        ends = sorted(trial.reports[0]["started"] + trial.reports[0]["seconds"] for trial in trials)
        spans[at_once] = (ends[-1] - ends[at_once - 1]) / (len(ends) - at_once)
    return {
        "sequential_s_a_trial": spans[1],
        "two_at_once_s_a_trial": spans[2],
        "efficiency": spans[1] / spans[2] / 2,
    }


def search(place: Path, seeds: int, num_trials: int) -> dict[str, Any]:
    """Images trained until a finished trial is within 1% of the best that any search found with the same seed."""
    found: dict[str, Any] = {name: {"images_to_near": [], "images": [], "best": [], "seconds": []} for name in SEARCHES}
    for seed in range(seeds):
        runs = {
            name: run(place, f"search-{seed}-{i}", trials=num_trials, seed=seed, **settings)
            for i, (name, settings) in enumerate(SEARCHES.items())
        }
        best = min(value for trials, _ in runs.values() for _, value in _ends(trials))
        for name, (trials, seconds) in runs.items():
            near = [images for images, value in _ends(trials) if value <= NEAR * best]
            found[name]["images_to_near"].append(min(near, default=None))
            found[name]["images"].append(sum(trial.images for trial in trials))
            found[name]["best"].append(min(value for _, value in _ends(trials)))
            found[name]["seconds"].append(round(seconds, 1))
    return found


def _ends(trials: list[Trial]) -> list[tuple[int, float]]:
    """(images of all trials by then, metric) of each trial that reached its end, in the order of reports."""
    reports = sorted((r["seq"], t.number, r["images"], r["metrics"]["denoising"], t.state)
                     for t in trials for r in t.reports)  # fmt: skip
    spent: dict[int, int] = {}
    ends = []
    last = {trial.number: trial.images for trial in trials}
    for _, number, images, value, state in reports:
        spent[number] = images
        if state == "done" and images == last[number]:
            ends.append((sum(spent.values()), value))
    return ends


if __name__ == "__main__":
    main()
