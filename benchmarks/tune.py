"""Sweeps, measured: what a trial costs besides training, what of that is Ray Tune's own, what two cores gain, and how
soon a search is near the optimum.

    python benchmarks/tune.py [--only overhead|parallel|search] [--out FILE.json]

A 2-D target (the ring of eight Gaussians), a perceptron of 32 x 2, batches of 64: steps of about a millisecond, so that
what is not training shows. All of it are studies as `scoreray tune` runs them, on a Ray of their own. Each part ends
within two minutes on two free cores.
"""

from __future__ import annotations

import argparse
import json
import math
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
from scoreray.tune.space import Values
from scoreray.tune.study import Study
from scoreray.tune.trial import Trial, advance, trial_config

SPACE = {
    "objective.sigma_sampling.P_mean": {"uniform": [-4.0, 2.0]},
    "objective.sigma_sampling.P_std": {"log": [0.3, 3.0]},
    "objective.weighting.kind": {"choice": ["edm", "sigma2", "constant", "velocity"]},
    "optimizer.learning_rate": {"log": [1e-3, 5e-2]},
}
NEAR = (0.5, 0.75, 0.9)  # of the best gain that any search found from any seed; a linear denoiser's metric is 1
OVERHEAD_TRIALS = 20
IMAGES = 8192  # of a trial that is not stopped
PARALLEL_IMAGES = 12_288
MOST_S = 115.0  # for the searches, on two free cores
ASHA = {"kind": "asha", "grace_images": 2048, "reduction": 3}
TPE = {"kind": "tpe", "startup": 5, "default_first": False}
SEARCHES: dict[str, tuple[int, dict[str, Any]]] = {  # with as many trials as use up 12 trials' worth of images
    "random": (12, {"search": {"kind": "random", "default_first": False}}),
    "TPE": (12, {"search": TPE}),
    "TPE, ASHA": (28, {"search": TPE, "scheduler": ASHA}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tune.json")
    parser.add_argument("--seeds", type=int, default=6, help="Of the searches.")
    parser.add_argument("--budget", type=int, default=12, help="Whole trials' worth of images for each search.")
    parser.add_argument("--only", choices=list(TABLES), help="One part; the file keeps the others.")
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
            with connected(num_cpus=2):
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
    """Seconds from handing a trial out to its first step's end, in a new process and in one that is used again; and of
    a whole trial: by the study, by a bare loop over the same trials in this process, and by a Tuner whose trials do
    nothing."""
    trials = run(place, "overhead", trials=OVERHEAD_TRIALS, search={"kind": "random"}, images=1024,
                 resources={"concurrent": 1})  # fmt: skip
    waits = [trial.reports[0]["first_step"] - trial.reports[0]["sent"] for trial in trials]
    ends = [trial.reports[0]["started"] + trial.reports[0]["seconds"] for trial in trials]
    return {
        "new_process_s": waits[0],
        "reused_process_s": statistics.median(waits[1:]),
        "advance_s": statistics.median(trial.reports[0]["seconds"] for trial in trials[1:]),
        "study_s_a_trial": (ends[-1] - ends[0]) / (len(ends) - 1),
        "bare_loop_s_a_trial": bare_loop(place, [trial.values for trial in trials]),
        "null_tuner_s_a_trial": null_tuner(place, OVERHEAD_TRIALS),
    }


def bare_loop(place: Path, values: list[Values]) -> float:
    """Seconds a trial where these are trained and measured one after another, with nothing around that."""
    torch.set_num_threads(1)
    plan = load_sweep(sweep_of(place, "bare", search={"kind": "random"}, images=1024))
    ends = []
    for one in values:
        advance(trial_config(plan, one), plan.total, plan.sweep, one)
        ends.append(time.perf_counter())
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def null_tuner(place: Path, count: int) -> float:
    """Seconds a trial of Ray Tune's alone: trials that do nothing, one at a time in an actor that is used again."""
    from ray import tune

    class Nothing(tune.Trainable):
        def step(self) -> dict[str, Any]:
            return {"at": time.time(), "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            Path(checkpoint_dir, "reference.json").write_text("{}")

    settings = tune.TuneConfig(num_samples=count, reuse_actors=True, max_concurrent_trials=1)
    folder = tune.RunConfig(storage_path=str(place / "null"), verbose=0,
                            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1))  # fmt: skip
    results = tune.Tuner(tune.with_resources(Nothing, {"CPU": 1}), tune_config=settings, run_config=folder).fit()
    ends = sorted(one.metrics["at"] for one in results if one.metrics)
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def parallel(place: Path) -> dict[str, float]:
    """The same trials one after another and two at once, from the first reports on: processes have started by then."""
    spans = {}
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

    Two trials at once. No seed is begun after MOST_S.
    """
    started, curves = time.perf_counter(), dict[str, list[Curve]]()
    for seed in range(seeds):
        if seed and time.perf_counter() - started > MOST_S * seed / (seed + 1):
            break
        for name, (trials, settings) in SEARCHES.items():
            made = run(place, f"search-{list(SEARCHES).index(name)}-{seed}", seed=seed, trials=trials, **settings)
            curves.setdefault(name, []).append(best_by_images(made, budget))
    best = min(curve[-1][1] for some in curves.values() for curve in some)
    return {
        "budget": budget, "seeds": len(curves[next(iter(SEARCHES))]), "best": best,
        "searches": {
            name: {
                "ends": [curve[-1][1] for curve in some],
                "trials": [len({number for _, _, number in curve}) for curve in some],
                "images_to": {str(near): [images_to(curve, 1 - near * (1 - best)) for curve in some] for near in NEAR},
            }
            for name, some in curves.items()
        },
    }  # fmt: skip


Curve = list[tuple[int, float, int]]  # images that all trials have seen, the best finished trial by then, who reported


def best_by_images(trials: list[Trial], budget: int) -> Curve:
    """A point for each report in its order, up to `budget` images; infinite where no trial is finished."""
    reports = sorted(((report, trial) for trial in trials for report in trial.reports), key=lambda one: one[0]["seq"])
    seen, best, curve = dict[int, int](), math.inf, Curve()
    for report, trial in reports:
        seen[trial.number] = report["images"]
        if report["images"] == IMAGES:
            best = min(best, report["metrics"]["denoising"])
        if sum(seen.values()) <= budget:
            curve.append((sum(seen.values()), best, trial.number))
    return curve


def images_to(curve: Curve, value: float) -> int | None:
    """Images after which the best is at most this; None where it never was."""
    return next((images for images, best, _ in curve if best <= value), None)


def overhead_table(found: dict[str, Any]) -> str:
    study, bare, null = (found[f"{name}_s_a_trial"] for name in ("study", "bare_loop", "null_tuner"))
    return (
        f"first step's end after handing a trial out: {found['new_process_s']:.2f} s in a new process, "
        f"{found['reused_process_s']:.2f} s in one that is used again\n"
        f"a trial of 1,024 images, one after another: {study:.2f} s by the study, of which {found['advance_s']:.2f} s "
        f"train and measure; {bare:.2f} s by a bare loop; Ray Tune's own: {null:.3f} s where trials do nothing"
    )


def parallel_table(found: dict[str, Any]) -> str:
    return (
        f"{PARALLEL_IMAGES:,} images a trial: {found['sequential_s_a_trial']:.2f} s one after another, "
        f"{found['two_at_once_s_a_trial']:.2f} s two at once, efficiency {found['efficiency']:.0%}"
    )


def search_table(found: dict[str, Any]) -> str:
    """Medians over seeds; a search that never came near counts as more than its budget."""
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
