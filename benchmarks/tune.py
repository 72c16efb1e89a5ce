"""Sweeps, measured: what a trial costs besides training, how soon a search is near the optimum, what two cores gain.

    python benchmarks/tune.py [--only overhead|parallel|search] [--out FILE.json]

A 2-D target (the ring of eight Gaussians), a perceptron of 32 x 2, batches of 64: steps of about a millisecond, so that
what is not training shows. `overhead` and `parallel` start their own Ray. `search` needs none: what is tried depends on
reports alone, so each search trains trial after trial in one process, with the study's own decisions, until the same
number of images is spent. Each part ends within two minutes on two free cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scoreray.cluster.connect.local_ray import connected, stop
from scoreray.data.packing.pack import pack
from scoreray.trainer.diffusion.targets import sample_target
from scoreray.tune.load import load_sweep
from scoreray.tune.schedule import Asha, milestones
from scoreray.tune.search import propose
from scoreray.tune.study import Study
from scoreray.tune.trial import Trial, advance, trial_config

SPACE = {
    "objective.sigma_sampling.P_mean": {"uniform": [-4.0, 2.0]},
    "objective.sigma_sampling.P_std": {"log": [0.3, 3.0]},
    "objective.weighting.kind": {"choice": ["edm", "sigma2", "constant", "velocity"]},
    "optimizer.learning_rate": {"log": [1e-3, 5e-2]},
}
NEAR = (0.5, 0.75, 0.9)  # of the best gain that any search found from any seed; a linear denoiser's metric is 1
IMAGES = 8192  # of a trial that is not stopped
PARALLEL_IMAGES = 12_288
MOST_S = 115.0  # for the searches, whatever else the machine does
ASHA = {"kind": "asha", "grace_images": 2048, "reduction": 3}
SEARCHES: dict[str, dict[str, Any]] = {
    "random": {"search": {"kind": "random", "default_first": False}},
    "TPE": {"search": {"kind": "tpe", "startup": 5, "default_first": False}},
    "TPE, ASHA": {"search": {"kind": "tpe", "startup": 5, "default_first": False}, "scheduler": ASHA},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tune.json")
    parser.add_argument("--seeds", type=int, default=6, help="Of the searches.")
    parser.add_argument("--budget", type=int, default=12, help="Whole trials' worth of images for each search.")
    parser.add_argument(
        "--only", choices=("overhead", "parallel", "search"), help="One part; the file keeps the others."
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="scoreray-") as folder:
        place = Path(folder)
        for name, count, seed in (("train", 8192, 0), ("held", 512, 1)):
            np.savez(place / f"{name}.npz", images=sample_target("mixture", count, seed).numpy())
            pack(str(place / f"{name}.npz"), str(place / name), name=name)
        parts: dict[str, Callable[[], Any]] = {
            "overhead": lambda: overhead(place),
            "parallel": lambda: parallel(place),
            "search": lambda: search(place, arguments.seeds, arguments.budget * IMAGES),
        }
        found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        for name in [arguments.only] if arguments.only else list(parts):
            started = time.perf_counter()
            found[name] = {"load_before": os.getloadavg()[0], **parts[name]()}
            found[name]["seconds"] = round(time.perf_counter() - started, 1)
            arguments.out.write_text(json.dumps(found, indent=1) + "\n")
            print(TABLES[name](found[name]), flush=True)


def sweep_of(place: Path, name: str, **changes: Any) -> dict[str, Any]:
    """A sweep over the 2-D target, with changes."""
    return {
        "study": {"name": name, "storage": str(place / "studies"), "seed": changes.pop("seed", 0)},
        "base": {
            "data": {"url": str(place / "train"), "global_batch_size": 64},
            "network": {"kind": "mlp", "hidden_size": 32, "num_layers": 2},
            "ema": {"stds": [0.1]},
            "engine": {"zero_stage": 0, "precision": "fp32"},
            "duration": {"images": changes.pop("images", IMAGES)},
            "log": {"tensorboard": False},
        },
        "space": SPACE,
        "metric": {"reference": str(place / "held"), "count": 512, "levels": 12, "sigma_min": 0.02, "sigma_max": 5.0},
        **changes,
    }


def run(place: Path, name: str, **changes: Any) -> list[Trial]:
    """The trials of a study on this machine's Ray."""
    return Study(load_sweep(sweep_of(place, name, **changes)), {"CPU": 2.0}).run()


def overhead(place: Path) -> dict[str, float]:
    """Seconds from handing a trial out to its first step's end, in a new process and in one that is used again."""
    with connected(num_cpus=2):
        trials = run(place, "overhead", trials=10, search={"kind": "random"}, resources={"concurrent": 1}, images=1024)
    waits = [trial.reports[0]["first_step"] - trial.reports[0]["sent"] for trial in trials]
    whole = [trial.reports[0]["seconds"] for trial in trials[1:]]
    return {
        "new_process_s": waits[0],
        "reused_process_s": statistics.median(waits[1:]),
        "whole_trial_of_1024_images_s": statistics.median(whole),
    }


def parallel(place: Path) -> dict[str, float]:
    """The same trials one after another and two at once, from the first reports on: processes have started by then."""
    spans = {}
    with connected(num_cpus=2):
        for at_once in (1, 2):
            settings = {"search": {"kind": "random"}, "resources": {"concurrent": at_once}, "images": PARALLEL_IMAGES}
            trials = run(place, f"parallel-{at_once}", trials=5 + at_once, **settings)
            ends = sorted(trial.reports[0]["started"] + trial.reports[0]["seconds"] for trial in trials)
            spans[at_once] = (ends[-1] - ends[at_once - 1]) / (len(ends) - at_once)
    return {
        "sequential_s_a_trial": spans[1],
        "two_at_once_s_a_trial": spans[2],
        "efficiency": spans[1] / spans[2] / 2,
    }


def search(place: Path, seeds: int, budget: int) -> dict[str, Any]:
    """Each search from each seed for the same images: what they took to come near the best, and how good they ended.

    After MOST_S only the seeds count that all searches are through with; where there is none, the first, up to the
    images that all of them have trained on by then.
    """
    jobs = [(str(place), name, seed, budget) for seed in range(seeds) for name in SEARCHES]
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(len(SEARCHES)) as pool, contextlib.suppress(multiprocessing.TimeoutError):
        pool.map_async(race, jobs, chunksize=1).get(MOST_S)
    made: dict[int, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        files = [_record(place, name, seed) for name in SEARCHES]
        if all(file.exists() for file in files):
            made[seed] = [json.loads(file.read_text()) for file in files]
    through = {seed: races for seed, races in made.items() if min(map(_spent, races)) >= budget}
    through = through or dict(list(made.items())[:1])
    budget = min((min(map(_spent, races)) for races in through.values()), default=0)
    best = min((_best(one, budget) for races in through.values() for one in races), default=math.nan)
    found: dict[str, Any] = {"budget": budget, "seeds": len(through), "best": best, "searches": {}}
    for i, name in enumerate(SEARCHES):
        mine = [races[i] for races in through.values()]
        curves = [[point for point in one["best_by_images"] if point[0] <= budget] for one in mine]
        found["searches"][name] = {
            "ends": [_best(one, budget) for one in mine],
            "trials": [len(curve) for curve in curves],
            "images_to": {str(near): [images_to(curve, 1 - near * (1 - best)) for curve in curves] for near in NEAR},
            "seconds": [one["seconds"] for one in mine],
        }
    return found


def _record(place: Path, name: str, seed: int) -> Path:
    return place / f"race-{list(SEARCHES).index(name)}-{seed}.json"


def _spent(race: dict[str, Any]) -> int:
    return int(race["best_by_images"][-1][0])


def _best(race: dict[str, Any], budget: int) -> float:
    """The best finished trial after `budget` images; infinite where none is finished."""
    return float(min((value for images, value in race["best_by_images"] if images <= budget), default=math.inf))


def race(job: tuple[str, str, int, int]) -> None:
    """One search until `budget` images are trained on; it writes down the best finished trial by images spent."""
    folder, name, seed, budget = job
    torch.set_num_threads(1)
    place, started = Path(folder), time.perf_counter()
    sweep = sweep_of(place, f"search-{list(SEARCHES).index(name)}-{seed}", seed=seed, trials=10_000, **SEARCHES[name])
    plan = load_sweep(sweep)
    trials: list[Trial] = []
    asha = Asha(plan, []) if plan.sweep.scheduler.kind == "asha" else None
    best, spent, seq, curve = math.inf, 0, 0, list[tuple[int, float]]()
    while spent < budget:
        trial = Trial(len(trials), propose(plan, len(trials), trials))
        trials.append(trial)
        config = trial_config(plan, trial.values)
        for target in milestones(plan):
            report = advance(config, target, plan.sweep, trial.values) | {"seq": seq}
            spent, seq = spent + target - trial.images, seq + 1
            trial.reports.append(report)
            if target == plan.total:
                trial.state = "done"
                best = min(best, report["metrics"]["denoising"])
            elif asha is not None and not asha.goes_on(trial, report):
                trial.state = "stopped"
                break
        curve.append((spent, best))
        took = round(time.perf_counter() - started, 1)
        record = {"best_by_images": curve, "trials": len(trials), "seconds": took}
        part = _record(place, name, seed).with_suffix(".part")
        part.write_text(json.dumps(record))
        part.rename(_record(place, name, seed))


def images_to(curve: list[tuple[int, float]], value: float) -> int | None:
    """Images after which the best is at most this; None where it never was."""
    return next((images for images, best in curve if best <= value), None)


def overhead_table(found: dict[str, Any]) -> str:
    return (
        f"first step's end after handing a trial out: {found['new_process_s']:.2f} s in a new process, "
        f"{found['reused_process_s']:.2f} s in one that is used again\n"
        f"a whole trial of 1,024 images: {found['whole_trial_of_1024_images_s']:.2f} s"
    )


def parallel_table(found: dict[str, Any]) -> str:
    return (
        f"{PARALLEL_IMAGES:,} images a trial: {found['sequential_s_a_trial']:.2f} s one after another, "
        f"{found['two_at_once_s_a_trial']:.2f} s two at once, efficiency {found['efficiency']:.0%}"
    )


def search_table(found: dict[str, Any]) -> str:
    """Medians over seeds; a search that never came near counts as more than its budget."""
    if not found["seeds"]:
        return f"no trial ended in {MOST_S:.0f} s; free the machine"
    lines = [f"{found['seeds']} seeds, {found['budget']:,} images each; the best of all: {found['best']:.4f}",
             f"{'search':14}{'trials':>7}{'mean end':>10}{'worst end':>11}" + "".join(
                 f"{f'to {near:.0%}':>14}" for near in NEAR)]  # fmt: skip
    for name, one in found["searches"].items():
        row = f"{name:14}{statistics.median(one['trials']):>7.0f}{statistics.mean(one['ends']):>10.4f}"
        row += f"{max(one['ends']):>11.4f}"
        for near in NEAR:
            reached = [math.inf if images is None else images for images in one["images_to"][str(near)]]
            middle, count = statistics.median(reached), sum(images < math.inf for images in reached)
            row += f"{'never' if middle == math.inf else f'{middle:,.0f}':>9}" + f" {count}/{len(reached)}".rjust(5)
        lines.append(row)
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "overhead": overhead_table,
    "parallel": parallel_table,
    "search": search_table,
}

if __name__ == "__main__":
    main()
