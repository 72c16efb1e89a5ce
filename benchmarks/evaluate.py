"""What evaluation costs: features against a bare loop, Frechet distance by eigenvalues, memory by number of samples,
and a run while an evaluation goes on beside it.

python benchmarks/evaluate.py [--images 4096] [--dims 256 1024 2048] [--inception-images 256] [--beside-images 8192]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy import linalg

from scoreray.data import fashion_mnist_path
from scoreray.data.packing.pack import pack
from scoreray.sampling.evaluation.evaluate import in_process
from scoreray.sampling.evaluation.prepare import load_inputs, make_plan
from scoreray.sampling.evaluation.stages import STAGES, run_chunk
from scoreray.sampling.measures import frechet
from scoreray.sampling.measures.classifier import Classifier, ClassifierConfig
from scoreray.sampling.measures.inception import InceptionV3
from scoreray.sampling.metrics.chunks import FeatureChunk, read_chunk
from scoreray.sampling.metrics.plan import Chunk, EvaluationPlan, EvaluationSettings
from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion import noise
from scoreray.trainer.loop import train

ROUNDS = 5


def make(folder: Path, images: int) -> tuple[str, str]:
    """(run of one step, packed set) to evaluate."""
    with np.load(fashion_mnist_path()) as file:
        np.savez(folder / "f.npz", images=file["images"][:images], labels=file["labels"][:images])
    data = str(folder / "data")
    pack(str(folder / "f.npz"), data)
    training(folder, data, "run", 16)
    return str(folder / "run"), data


def training(folder: Path, data: str, name: str, images: int) -> None:
    settings = {
        "run": {"name": name, "storage": str(folder)},
        "data": {"url": data, "global_batch_size": 16},
        "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": images},
    }
    train(load_config(settings))


def beside(folder: Path, run: str, data: str, images: int) -> None:
    """A run on all cores, alone and while a process like a follower's (last in the queue for a core) evaluates."""
    torch.set_num_threads(os.cpu_count() or 1)
    took: dict[bool, list[float]] = {False: [], True: []}
    evaluations = 0
    for number in range(ROUNDS):
        for followed in (False, True):
            command = [sys.executable, "-c", FOLLOW, str(folder), run, data, str(number)]
            other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True) if followed else None
            if other is not None:
                assert other.stdout is not None
                other.stdout.readline()  # it has begun
            took[followed].append(seconds(partial(training, folder, data, f"beside-{number}-{followed}", images)))
            if other is not None:
                other.kill()
                evaluations += len(other.communicate()[0].split())
    torch.set_num_threads(1)
    ratios = [alone / followed for alone, followed in zip(took[False], took[True], strict=True)]
    print(
        f"a run of {images:,} images on {os.cpu_count()} cores while an evaluation goes on beside it: "
        f"{statistics.median(ratios):.3f} of its speed alone ({min(ratios):.3f} to {max(ratios):.3f}, {ROUNDS} rounds; "
        f"{evaluations} evaluations of 512 samples ended meanwhile)"
    )


FOLLOW = """
import itertools, sys
import torch
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.evaluation.follow import give_way
from scoreray.sampling.metrics.plan import EvaluationSettings
folder, run, data, number = sys.argv[1:]
torch.set_num_threads(1)
give_way()
print(flush=True)
for k in itertools.count():
    out = f"{folder}/beside-out-{number}-{k}"
    counts = {"count": 512, "reference_count": 512, "loss_count": 512}
    evaluate(EvaluationSettings(run, data, ("sw", "loss"), out, **counts, steps=20))
    print(k, flush=True)
"""


def features(
    folder: Path, run: str, data: str, images: int, network: torch.nn.Module, suffix: str, rounds: int = ROUNDS
) -> None:
    """Chunks of the reference as an evaluation does them (read, verify, decode, extract, store), and bare passes."""
    scripted = folder / f"{suffix}.pt"
    sample = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    torch.jit.trace(network, sample).save(str(scripted))
    pixels = torch.from_numpy(np.load(folder / "f.npz")["images"][:images])[:, None]
    ratios, rates = [], []
    for number in range(rounds):
        settings = EvaluationSettings(
            run, data, ("fid",), str(folder / f"out-{suffix}-{number}"), extractor=str(scripted), reference_count=images
        )
        plan = make_plan(load_inputs(settings))
        module = torch.jit.load(str(scripted)).eval()
        chunks = STAGES["reference"].chunks("reference", plan.inputs)
        run_chunk(plan, chunks[0])  # loads what is kept

        bare_s = seconds(partial(forward, module, pixels[chunks[0].size :], settings.batch_size))
        ours_s = seconds(partial(do, plan, chunks[1:]))
        ratios.append(bare_s / ours_s)
        rates.append((images - chunks[0].size) / ours_s)
        stored = read_chunk(plan.folder("reference"), chunks[-1].key, FeatureChunk)
        assert len(stored.features) == chunks[-1].size
    print(
        f"{suffix}: {statistics.median(rates):,.0f} images/s, {statistics.median(ratios):.3f} of a bare loop of "
        f"forward passes ({min(ratios):.3f} to {max(ratios):.3f}, {rounds} rounds)"
    )


def forward(module: torch.nn.Module, images: torch.Tensor, batch_size: int) -> None:
    with torch.no_grad():
        for batch in images.split(batch_size):
            module(batch)


def do(plan: EvaluationPlan, chunks: list[Chunk]) -> None:
    in_process(run_chunk, [(plan, chunk) for chunk in chunks], lambda count: None)


def distances(dims: list[int]) -> None:
    """Frechet distance of 2 x dims samples a side: symmetric eigenvalues against scipy's matrix square root."""
    for d in dims:
        mixing = torch.eye(d).double() + 0.05 * noise.normal(3, torch.arange(d), (d,), dtype=torch.float64)
        a = frechet.moments(noise.normal(1, torch.arange(2 * d), (d,), dtype=torch.float64) @ mixing)
        b = frechet.moments(noise.normal(2, torch.arange(2 * d), (d,), dtype=torch.float64))
        start = time.perf_counter()
        reference = frechet.Reference.of(a)
        root_s = time.perf_counter() - start
        ours = frechet.distance(reference, b)
        ours_s = time.perf_counter() - start
        start = time.perf_counter()
        root = float(np.trace(linalg.sqrtm((a.covariance @ b.covariance).numpy())).real)  # as most FID code has it
        theirs = float((a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace()) - 2 * root
        theirs_s = time.perf_counter() - start
        print(
            f"{d} dimensions: eigenvalues {ours_s:.2f} s ({root_s:.2f} s of it the reference's root, kept), sqrtm "
            f"{theirs_s:.2f} s: {theirs_s / ours_s:.1f} times; they differ by {abs(ours - theirs) / theirs:.1e}"
        )


def memory(folder: Path) -> None:
    """Peak memory of a whole evaluation's last step (all metrics of stored chunks) at two counts."""
    for count in (20_480, 204_800):
        found = subprocess.run([sys.executable, "-c", FINISH, str(folder), str(count)], capture_output=True, text=True)
        print(f"{count:,} samples: {found.stdout.strip() or found.stderr[-300:]}")


FINISH = """
import sys, tempfile
import numpy as np, torch
from scoreray.sampling.metrics.chunks import FeatureChunk, write_chunk
from scoreray.sampling.metrics.compute import compute_metrics
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.sampling.evaluation.prepare import load_inputs, make_plan
from scoreray.sampling.evaluation.stages import STAGES, stages_of, stored_chunks
folder, count = sys.argv[1], int(sys.argv[2])
with tempfile.TemporaryDirectory(dir=folder) as out:
    settings = EvaluationSettings(f"{folder}/run", f"{folder}/data", ("fid", "kid", "pr", "sw", "nn"), out, count=count,
                                  extractor="identity")
    plan = make_plan(load_inputs(settings))
    rng = np.random.default_rng(0)
    for stage in stages_of(plan):
        for chunk in STAGES[stage].chunks(stage, plan.inputs):
            write_chunk(plan.folder(stage), chunk.key, FeatureChunk(
                rng.standard_normal((chunk.size, 64), dtype=np.float32),
                rng.standard_normal((chunk.size, 128), dtype=np.float32)))
    def peak():
        status = open("/proc/self/status").read()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    before = peak()
    compute_metrics(stored_chunks(plan))
    print(f"peak {peak():,.0f} MiB, of which {peak() - before:,.0f} for the metrics")
"""


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--dims", type=int, nargs="*", default=[256, 1024, 2048])
    parser.add_argument("--inception-images", type=int, default=0)
    parser.add_argument("--beside-images", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="scoreray-benchmark-") as name:
        folder = Path(name)
        run, data = make(folder, arguments.images)
        features(folder, run, data, arguments.images, Classifier(ClassifierConfig(1, 10)).eval(), "classifier")
        if arguments.inception_images:
            features(folder, run, data, arguments.inception_images, InceptionV3().eval(), "inception", 2)
        if arguments.beside_images:
            beside(folder, run, data, arguments.beside_images)
        distances(arguments.dims)
        memory(folder)


if __name__ == "__main__":
    main()
