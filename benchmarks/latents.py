"""A latent line against a pixel line on 64x64 captioned shapes: FID over the CPU seconds that training took.

    python benchmarks/latents.py [--pictures 8000] [--pixels 40000] [--autoencoder 40000] [--latents 60000]
                                 [--classifier 40000] [--count 256] [--folder DIR]

Pictures are packed, the presets configs/shapes.yaml (pixels), configs/shapes-autoencoder.yaml and
configs/shapes-latent.yaml trained on them, each by one process of one thread, whose user and system time counts: other
work on the machine adds little to it. The pixel line runs beside the autoencoder, the encoding and the latent line, in
some 25 minutes in all on two cores. FID is of `--count` samples of each checkpoint, decoded where they are latents,
over features of a classifier of the 18 pairs of colour and shape. In a folder that holds a part of it already, that
part is not made again. What is under way is printed, and at the end a table (Markdown).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from scoreray.data.fields.field import FieldRequest
from scoreray.data.reading.samples import SampleReader
from scoreray.data.shapes import COLOURS, SHAPES, make
from scoreray.data.storage.store import open_store
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.measures.classifier import ClassifierConfig, train_classifier
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.trainer.checkpoints.checkpoint import committed
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.metrics import TrainingProgress

SIDE = 64
CONFIGS = Path(__file__).parents[1] / "configs"
CHECKPOINTS = 5  # of each line
REFERENCE = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description="Latents against pixels, at equal CPU seconds.")
    counts = {
        "pictures": 8000, "pixels": 40_000, "autoencoder": 40_000, "latents": 60_000, "classifier": 40_000,
        "count": 256,
    }  # fmt: skip
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(given, given.folder or Path(scratch))


def measure(given: argparse.Namespace, folder: Path) -> None:
    pictures, latents, extractor = folder / "shapes64", folder / "shapes-latents", folder / "classifier.safetensors"
    say("pictures and the classifier of FID's features")
    if not pictures.exists():
        make(folder / "pictures", given.pictures, SIDE)
        scoreray("data", "pack", str(folder / "pictures"), str(pictures), "--field", "caption=text")
    if not extractor.exists():
        extractor.write_bytes(classifier(str(pictures), given.classifier))
    pixels = line(folder, "shapes", pictures, given.pixels)
    finished(line(folder, "shapes-autoencoder", pictures, given.autoencoder))
    encoding = encoded(pictures, latents, folder / "runs" / "shapes-autoencoder")
    finished(line(folder, "shapes-latent", latents, given.latents))
    finished(pixels)

    say("FID of each checkpoint")
    before = seconds_at(folder, "shapes-autoencoder", given.autoencoder) + encoding
    curves, rows = dict[str, list[tuple[float, float]]](), list[str]()
    for name in ("shapes", "shapes-latent"):
        run = folder / "runs" / name
        for checkpoint in committed(open_store(str(run))):
            images = int(Path(checkpoint).name.split("-")[0])
            fid = distance(f"{run}/{checkpoint}", pictures, extractor, folder / f"fid-{name}-{images}", given.count)
            curves.setdefault(name, []).append((seconds_at(folder, name, images), fid))
            rows.append(f"| {name} | {images:,} | {curves[name][-1][0]:.0f} | {fid:.3g} |")
            say(f"{name}: FID {fid:.3g} after {images:,} images")
    print("\n| line | images | CPU s of training | FID |\n|---|---|---|---|", *rows, sep="\n")
    print(f"\nautoencoder and encoding: {before:.0f} CPU s")
    report(curves["shapes"], curves["shapes-latent"], before)


def report(pixels: list[tuple[float, float]], latents: list[tuple[float, float]], before: float) -> None:
    """How soon the latent line has the FID at which the pixel line ends."""
    took, wanted = pixels[-1]
    reached = next((seconds for seconds, fid in latents if fid <= wanted), None)
    if reached is None:
        print(f"the latent line does not reach the pixel line's FID of {wanted:.3g}")
        return
    print(
        f"FID {wanted:.3g}: pixels {took:.0f} CPU s, latents {reached:.0f}: {reached / took:.2f} of that (goal 0.5); "
        f"{(reached + before) / took:.2f} with the autoencoder and encoding"
    )


def classifier(pictures: str, images: int) -> bytes:
    """Of colour and shape, as captions say them; FID is over its features."""
    reader = SampleReader(pictures)
    found = reader.read_fields(range(reader.manifest.num_samples), [FieldRequest("image"), FieldRequest("caption")])
    captions = [bytes(one.tolist()).rstrip(b"\0").decode().split() for one in found.fields["caption"]]
    pairs = list(itertools.product(COLOURS, SHAPES))
    labels = torch.tensor([pairs.index((words[-2], words[-1])) for words in captions])
    return train_classifier(ClassifierConfig(3, len(pairs), images=images), found.fields["image"], labels)


def distance(checkpoint: str, pictures: Path, extractor: Path, out: Path, count: int) -> float:
    """FID of samples of a checkpoint."""
    settings = EvaluationSettings(
        checkpoint, str(pictures), ("fid",), str(out), extractor=str(extractor), count=count,
        reference_count=REFERENCE, sampler="dpmpp_2m", steps=12,
    )  # fmt: skip
    found = evaluate(settings)
    return float(found.record.metrics["fid"].value)


def line(folder: Path, name: str, data: Path, images: int) -> subprocess.Popen[bytes] | None:
    """Begins to train a preset in a process of its own, which writes when it was where; None where it has been."""
    if (folder / f"{name}.json").exists():
        return None
    say(f"{name}: {images:,} images")
    return subprocess.Popen([sys.executable, __file__, "train", str(folder), name, str(data), str(images)])


def finished(process: subprocess.Popen[bytes] | None) -> float:
    """CPU seconds of a process, once it has ended well; 0 for None."""
    if process is None:
        return 0.0
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return usage.ru_utime + usage.ru_stime


def train_line(folder: Path, name: str, data: str, images: int) -> None:
    torch.set_num_threads(1)
    every = images // CHECKPOINTS
    overrides = [
        f"run.name={name}", f"run.storage={folder / 'runs'}", f"data.url={data}", "scaling.workers=1",
        "engine.zero_stage=0", f"duration.images={images}", f"checkpoint.every_images={every}",
        f"checkpoint.keep={CHECKPOINTS}",
    ]  # fmt: skip
    config, seen = load_config(CONFIGS / f"{name}.yaml", overrides), [(0, 0.0)]
    before = used()

    def watch(progress: TrainingProgress) -> None:
        tenth = 10 * progress.images // images > 10 * seen[-1][0] // images
        seen.append((progress.images, used() - before))
        if tenth:
            say(f"{name}: {progress.images:,} of {images:,} images, {seen[-1][1]:.0f} CPU s")

    train(config, watch=watch)
    (folder / f"{name}.json").write_text(json.dumps(seen))


def seconds_at(folder: Path, name: str, images: int) -> float:
    """CPU seconds of training when a line had seen so many images."""
    return float(np.interp(images, *zip(*json.loads((folder / f"{name}.json").read_text()), strict=True)))


def used() -> float:
    """CPU seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def encoded(pictures: Path, latents: Path, autoencoder: Path) -> float:
    """CPU seconds of `scoreray data encode`."""
    record = latents.with_suffix(".json")
    if not record.exists():
        words = ["--encoder", f"scoreray={autoencoder}", "--field", "image", "--to", "latent", "--actors", "0"]
        record.write_text(json.dumps(scoreray("data", "encode", str(pictures), str(latents), *words)))
    return float(json.loads(record.read_text()))


def scoreray(*words: str) -> float:
    """CPU seconds of a command."""
    say(f"scoreray {' '.join(words[:2])}")
    return finished(subprocess.Popen([sys.executable, "-m", "scoreray.cluster.cli", *words]))


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train_line(Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main()
