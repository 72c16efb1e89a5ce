"""Time to quality: FID against CPU seconds of training, of scoreray's own run and of what others would take instead.

    python benchmarks/quality.py run OUT [--fashion FILE.npz] [--cifar FILE.npz] [--lines ...] [--seeds 0 1 2]
                                         [--budget 160] [--core 1] [--only train|measure]
    python benchmarks/quality.py report OUT [--picture docs/images/quality.png]

Peers are wanted in the environment that runs it: `pip install diffusers denoising-diffusion-pytorch k-diffusion`.
Lines: those of `quality_peers.LINES`, or NAME=CONFIG.yaml for ours with another config (`before=old.yaml`).

Every line trains without classes on the same images on one core with one thread, each in a process of its own, until
that has used `--budget` seconds of user time (not wall time; imports before are not counted, the building of networks,
reading, averaging and, of ours, packed data and commits are). A probe of 10 s before says how many images that will be,
for the schedules that must know. Weights are kept at budget / 2^k and measured afterwards, in processes whose time does
not count: FID (that of `scoreray evaluate`: 64 features of a small classifier, standard error by the jackknife) of
`--count` samples drawn by the same sampler for all, against images that none has seen; the last weights also by each
line's own default sampler, of one seed.

Images: the demo's 12,000 of Fashion-MNIST. --fashion: a file of all 70,000, whose others are held out (without it the
last 2,000 of the demo's are). --cifar: a file of CIFAR-10 images, a fifth of which is held out. The classifier learns
from the images held out of Fashion-MNIST, from all of CIFAR-10.

What is done already in OUT is kept; a JSON file for each data set, line and seed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_lines import Next, Task, starts
from quality_peers import LINES, line_of
from quality_report import report
from safetensors.torch import load as tensors_of
from safetensors.torch import save as saved_tensors
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scoreray.cluster.verbs.pack import pack_with_bar
from scoreray.data import fashion_mnist_path
from scoreray.sampling.measures.classifier import ClassifierConfig, read_classifier, train_classifier
from scoreray.sampling.measures.frechet import GROUPS, FeatureMoments, Reference, estimate, moments
from scoreray.sampling.samplers.sample import sample
from scoreray.sampling.samplers.sigmas import karras

PROBE_S, WARM_S = 10.0, 3.0
STEPS = 8  # of dpmpp_2m, by which all are drawn
HELD_OUT = 10_000  # at most
BATCH = 125
OWN_COUNT = dict.fromkeys(("diffusers", "diffusers, lr 1e-3", "denoising-diffusion-pytorch"), 128)  # of many calls each
HUGE = ("diffusers as it comes",)  # its last weights alone are measured, by 128 samples, and not by its 1,000 steps


@dataclass(frozen=True)
class Data:
    """images uint8 [N, C, H, W] that are trained on, and as many again as there are held out, with labels."""

    images: Tensor
    held_out: Tensor
    of_classifier: tuple[Tensor, Tensor]


def read_data(name: str, out: Path) -> Data:
    with np.load(out / f"{name}.npz") as file:
        found = {key: torch.from_numpy(file[key]) for key in file.files}
    return Data(found["images"], found["held_out"], (found["classifier_images"], found["classifier_labels"]))


def write_data(name: str, source: str | None, out: Path) -> None:
    """OUT/NAME.npz, and the same images packed without labels in OUT/NAME."""
    if (out / name / "manifest.json").exists():
        return
    if name == "fashion":
        with np.load(fashion_mnist_path()) as file:
            images, labels = file["images"], file["labels"]
        if source is None:
            images, held, classes = images[:-2000], images[-2000:], (images, labels)
        else:
            known = {one.tobytes() for one in images}
            with np.load(source) as file:
                new = np.array([one.tobytes() not in known for one in file["images"]])
                held, held_labels = file["images"][new], file["labels"][new]
            classes = held[HELD_OUT:], held_labels[HELD_OUT:]
            held = held[:HELD_OUT]
    else:
        assert source is not None
        with np.load(source) as file:
            images, labels = file["images"], file["labels"]
        classes, num = (images, labels), len(images) * 4 // 5
        images, held = images[:num], images[num:]
    planes = {"images": images, "held_out": held, "classifier_images": classes[0]}
    planes = {key: value[:, None] if value.ndim == 3 else value.transpose(0, 3, 1, 2) for key, value in planes.items()}
    np.savez(out / f"{name}.npz", **planes, classifier_labels=classes[1].astype(np.int64))
    np.savez(out / f"{name}-train.npz", images=images)
    pack_with_bar(str(out / f"{name}-train.npz"), str(out / name), name=name, samples_per_shard=1000, workers=1)


class Judge:
    """FID of samples in [-1, 1] against a data set's held-out images."""

    def __init__(self, name: str, out: Path) -> None:
        weights, reference = out / f"{name}-classifier.safetensors", out / f"{name}-reference.safetensors"
        if not weights.exists():
            images, labels = read_data(name, out).of_classifier
            config = ClassifierConfig(images.shape[1], int(labels.max()) + 1)
            weights.write_bytes(train_classifier(config, images, labels))
        self.extract = read_classifier(str(weights), weights.read_bytes()).eval().requires_grad_(False)
        if not reference.exists():
            held = self.features(read_data(name, out).held_out)
            reference.write_bytes(saved_tensors({"features": held}))
        self.held_out = tensors_of(reference.read_bytes())["features"]
        self.reference = Reference.of(moments(self.held_out))

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([self.extract(part)[0] for part in images.split(500)])

    def fid(self, images: Tensor) -> dict[str, float]:
        """uint8 [N, C, H, W]."""
        return self.of_features(self.features(images), self.reference)

    def floor(self, count: int) -> dict[str, float]:
        """FID of `count` held-out images against the others."""
        return self.of_features(self.held_out[:count], Reference.of(moments(self.held_out[count:])))

    @staticmethod
    def of_features(features: Tensor, reference: Reference) -> dict[str, float]:
        groups = features[: len(features) // GROUPS * GROUPS].split(len(features) // GROUPS)
        found = estimate(reference, [centred(group, features.double().mean(0)) for group in groups])
        assert found.std_error is not None
        return {"fid": found.value, "error": found.std_error}


def centred(features: Tensor, center: Tensor) -> FeatureMoments:
    sums = FeatureMoments.zero(center)
    sums.add(features)
    return sums


def user_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def task_of(chosen: argparse.Namespace, total: int, folder: Path) -> Task:
    images = read_data(chosen.data, chosen.out).images
    return Task(images, str(chosen.out / chosen.data), chosen.seed, total, folder)


def folder_of(chosen: argparse.Namespace) -> Path:
    title = chosen.line.partition("=")[0].replace(" ", "-").replace(",", "")
    return chosen.out / "weights" / f"{chosen.data}-{title}-{chosen.seed}"


def fresh(folder: Path) -> Path:
    """An empty folder: a run in what an interrupted one left would go on from there, in less than its own time."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def probe(chosen: argparse.Namespace) -> tuple[float, float]:
    """(images a second, seconds before the first step), by user time."""
    folder = fresh(folder_of(chosen) / "probe")
    task, seen = task_of(chosen, 10_000_000, folder), [(0, 0.0)]
    began = user_seconds()

    def between(images: int) -> Next:
        seen.append((images, user_seconds() - began))
        return Next.STOP if seen[-1][1] > PROBE_S and len(seen) > 3 else Next.GO_ON

    line_of(chosen.line, task).train(between)
    warm = next((one for one in seen[1:-1] if one[1] > WARM_S), seen[1])
    rate = (seen[-1][0] - warm[0]) / (seen[-1][1] - warm[1])
    return rate, max(0.0, seen[1][1] - seen[1][0] / rate)


def train_line(chosen: argparse.Namespace) -> None:
    """Weights and their CPU seconds, in the line's folder."""
    folder = folder_of(chosen)
    if not (folder / "probe.json").exists():
        (folder / "probe.json").write_text(json.dumps(probe(chosen)))
        return  # the run has a process of its own
    rate, start = json.loads((folder / "probe.json").read_text())
    batch = 64  # whole batches
    total = max(1, int(rate * (chosen.budget - start) / batch)) * batch
    task, points = task_of(chosen, total, fresh(folder / "kept")), list[tuple[float, int]]()
    left = [chosen.budget / 2**k for k in range(chosen.points - 1, 0, -1)]
    began, seen = user_seconds(), 0

    def between(images: int) -> Next:
        nonlocal seen
        seen, now = images, user_seconds() - began
        if now >= chosen.budget:
            return Next.STOP
        if left and now >= left[0] and images < total:
            while left and now >= left[0]:
                left.pop(0)
            points.append((now, images))
            return Next.KEEP
        return Next.GO_ON

    line_of(chosen.line, task).train(between)
    points.append((user_seconds() - began, seen))
    (folder / "points.json").write_text(json.dumps({"total": total, "points": points}))


def measure_line(chosen: argparse.Namespace) -> None:
    """OUT/<data>-<line>-<seed>.json."""
    folder = folder_of(chosen)
    trained = json.loads((folder / "points.json").read_text())
    judge, line = (
        Judge(chosen.data, chosen.out),
        line_of(chosen.line, task_of(chosen, trained["total"], folder / "kept")),
    )
    points, seeds = list(enumerate(trained["points"])), list(range(chosen.count))
    if chosen.line in HUGE:
        points, seeds = points[-1:], seeds[:128]
    rows, drawn = [], torch.empty(0)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            line.network()(torch.zeros(1, *line.drawn_shape), torch.ones(1))
        for number, (seconds, images) in points:
            denoise = line.denoiser(number)
            drawn = as_bytes(line.as_images(in_parts(lambda part, d=denoise: ours(d, line.drawn_shape, part), seeds)))
            rows.append({"seconds": seconds, "images": images, **judge.fid(drawn)})
            print(chosen.data, chosen.line, chosen.seed, rows[-1], flush=True)
        record = {"data": chosen.data, "line": chosen.line.partition("=")[0], "seed": chosen.seed, "points": rows}
        record["count"] = len(seeds)
        record["mflops"] = counter.get_total_flops() / 1e6
        record["parameters"] = sum(one.numel() for one in line.network().parameters())
        record["floor"] = judge.floor(chosen.count)
        if chosen.own and record["line"] not in HUGE:
            count = OWN_COUNT.get(record["line"], min(chosen.count, 256))
            own = in_parts(lambda part: line.own_samples(denoise, len(part), part), seeds[:count])
            record["own"] = {"count": count, **judge.fid(as_bytes(line.as_images(own)))}
            record["own"]["ours"] = judge.fid(drawn[:count])
            print(chosen.line, record["own"], flush=True)
    path = chosen.out / f"{folder.name}.json"
    path.with_suffix(".part").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".part").rename(path)


def ours(denoise: Any, shape: tuple[int, ...], seeds: list[int]) -> Tensor:
    return sample(denoise, starts(shape, seeds) * 80, karras(STEPS), sampler="dpmpp_2m", generator=seeds)


def in_parts(draw: Any, seeds: list[int]) -> Tensor:
    return torch.cat([draw(seeds[i : i + BATCH]) for i in range(0, len(seeds), BATCH)])


def as_bytes(samples: Tensor) -> Tensor:
    return ((samples.nan_to_num(0.0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def run(chosen: argparse.Namespace) -> None:
    """Every line of every data set and seed, in processes of their own; what is there already is kept."""
    sets = ["fashion"] * (not chosen.no_fashion) + ["cifar"] * (chosen.cifar is not None)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in sets:
        write_data(name, chosen.fashion if name == "fashion" else chosen.cifar, chosen.out)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in sets:
        for seed in chosen.seeds:
            for line in chosen.lines:
                chosen.data, chosen.seed, chosen.line = name, seed, line
                folder = folder_of(chosen)
                folder.mkdir(parents=True, exist_ok=True)
                common = [chosen.out, "--data", name, "--seed", seed, "--line", line, "--budget", chosen.budget]
                common += ["--points", chosen.points, "--count", chosen.count]
                steps = []
                if chosen.only != "measure" and not (folder / "points.json").exists():
                    known = sorted(chosen.out.glob(f"weights/{folder.name.rpartition('-')[0]}-[0-9]*/probe.json"))
                    if known and not (folder / "probe.json").exists():
                        (folder / "probe.json").write_bytes(known[0].read_bytes())
                    steps += ["train"] * (1 if (folder / "probe.json").exists() else 2)
                done = (chosen.out / f"{folder.name}.json").exists()
                if chosen.only != "train" and not done and (steps or (folder / "points.json").exists()):
                    steps.append("measure")
                for step in steps:
                    own = ["--own"] if seed == chosen.seeds[0] else []
                    pinned = ["taskset", "-c", str(chosen.core)] if chosen.core is not None else []
                    command = [*pinned, sys.executable, __file__, step, *map(str, common), *own]
                    subprocess.run(command, check=True, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("run", "train", "measure"):
        one = verbs.add_parser(verb, help="what `run` starts" if verb != "run" else "train and measure all")
        one.add_argument("out", type=Path)
        one.add_argument("--budget", type=float, default=160.0, help="CPU seconds")
        one.add_argument("--points", type=int, default=4, help="times at which weights are kept")
        one.add_argument("--count", type=int, default=1000, help="samples")
        if verb == "run":
            one.add_argument("--fashion", help="all of Fashion-MNIST, .npz")
            one.add_argument("--no-fashion", action="store_true")
            one.add_argument("--cifar", help="CIFAR-10 images, .npz")
            one.add_argument("--lines", nargs="*", default=list(LINES))
            one.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
            one.add_argument("--core", type=int)
            one.add_argument("--only", choices=["train", "measure"])
        else:
            one.add_argument("--data", required=True)
            one.add_argument("--seed", type=int, required=True)
            one.add_argument("--line", required=True)
            one.add_argument("--own", action="store_true")
    shown = verbs.add_parser("report", help="a table, and a picture")
    shown.add_argument("out", type=Path)
    shown.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.verb == "report":
        print(report(chosen.out, chosen.picture))
    else:
        {"run": run, "train": train_line, "measure": measure_line}[chosen.verb](chosen)


if __name__ == "__main__":
    main()
