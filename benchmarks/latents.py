"""A latent line against a pixel line on 64x64 captioned shapes: FID over the CPU seconds that training took.

    python benchmarks/latents.py [--pictures 8000] [--pixels 40000] [--autoencoder 40000] [--latents 60000]
                                 [--count 256] [--folder DIR]

Pictures are packed, the presets configs/shapes.yaml (pixels), configs/shapes-autoencoder.yaml and
configs/shapes-latent.yaml trained on them, each by one process of one thread, whose user and system time counts: other
work on the machine adds little to it. FID is of `--count` samples of each checkpoint, decoded where they are latents,
over features of a classifier of the 18 pairs of colour and shape. In a folder that holds a part of it already, that
part is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
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

SIDE = 64
CONFIGS = Path(__file__).parents[1] / "configs"
CHECKPOINTS = 5  # of each line
CLASSIFIER_IMAGES = 40_000
REFERENCE = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description="Latents against pixels, at equal CPU seconds.")
    counts = {"pictures": 8000, "pixels": 40_000, "autoencoder": 40_000, "latents": 60_000, "count": 256}
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        measure(given, given.folder or Path(scratch))


def measure(given: argparse.Namespace, folder: Path) -> None:
    pictures, latents, extractor = folder / "shapes64", folder / "shapes-latents", folder / "classifier.safetensors"
    if not pictures.exists():
        make(folder / "pictures", given.pictures, SIDE)
        scoreray("data", "pack", str(folder / "pictures"), str(pictures), "--field", "caption=text")
    if not extractor.exists():
        extractor.write_bytes(classifier(str(pictures)))
    line(folder, "shapes-autoencoder", pictures, given.autoencoder)
    encoding = encoded(pictures, latents, folder / "runs" / "shapes-autoencoder")
    line(folder, "shapes-latent", latents, given.latents)
    line(folder, "shapes", pictures, given.pixels)

    before = seconds_at(folder, "shapes-autoencoder", given.autoencoder) + encoding
    curves = dict[str, list[tuple[float, float]]]()
    for name in ("shapes", "shapes-latent"):
        run = folder / "runs" / name
        for checkpoint in committed(open_store(str(run))):
            images = int(Path(checkpoint).name.split("-")[0])
            fid = distance(f"{run}/{checkpoint}", pictures, extractor, folder / f"fid-{name}-{images}", given.count)
            curves.setdefault(name, []).append((seconds_at(folder, name, images), fid))
            print(f"{name:15} {images:7,} images {curves[name][-1][0]:7.0f} CPU s  FID {fid:.3g}", flush=True)
    print(f"autoencoder and encoding: {before:.0f} CPU s")
    report(curves["shapes"], curves["shapes-latent"], before)


def report(pixels: list[tuple[float, float]], latents: list[tuple[float, float]], before: float) -> None:
    """How soon the latent line has the FID at which the pixel line ends."""
    took, wanted = pixels[-1]
    reached = next((seconds for seconds, fid in latents if fid <= wanted), None)
    if reached is None:
        print(f"the latent line does not reach the pixel line's FID of {wanted:.3g}")
        return
    print(
        f"FID {wanted:.3g}: pixels {took:.0f} CPU s, latents {reached:.0f} ({reached / took:.2f} of that; "
        f"{(reached + before) / took:.2f} with the autoencoder and encoding)"
    )


def classifier(pictures: str) -> bytes:
    """Of colour and shape, as captions say them; FID is over its features."""
    reader = SampleReader(pictures)
    found = reader.read_fields(range(reader.manifest.num_samples), [FieldRequest("image"), FieldRequest("caption")])
    captions = [bytes(one.tolist()).rstrip(b"\0").decode().split() for one in found.fields["caption"]]
    pairs = list(itertools.product(COLOURS, SHAPES))
    labels = torch.tensor([pairs.index((words[-2], words[-1])) for words in captions])
    return train_classifier(ClassifierConfig(3, len(pairs), images=CLASSIFIER_IMAGES), found.fields["image"], labels)


def distance(checkpoint: str, pictures: Path, extractor: Path, out: Path, count: int) -> float:
    """FID of samples of a checkpoint."""
    settings = EvaluationSettings(
        checkpoint, str(pictures), ("fid",), str(out), extractor=str(extractor), count=count,
        reference_count=REFERENCE, sampler="dpmpp_2m", steps=12,
    )  # fmt: skip
    found = evaluate(settings)
    return float(found.record.metrics["fid"].value)


def line(folder: Path, name: str, data: Path, images: int) -> None:
    """Trains a preset in a process of its own, which writes when it was where."""
    if not (folder / f"{name}.json").exists():
        subprocess.run([sys.executable, __file__, "train", str(folder), name, str(data), str(images)], check=True)


def train_line(folder: Path, name: str, data: str, images: int) -> None:
    torch.set_num_threads(1)
    every = images // CHECKPOINTS
    overrides = [
        f"run.name={name}", f"run.storage={folder / 'runs'}", f"data.url={data}", "scaling.workers=1",
        "engine.zero_stage=0", f"duration.images={images}", f"checkpoint.every_images={every}",
        f"checkpoint.keep={CHECKPOINTS}",
    ]  # fmt: skip
    config, seen = load_config(CONFIGS / f"{name}.yaml", overrides), [(0, 0.0)]
    before = used(resource.RUSAGE_SELF)
    train(config, watch=lambda progress: seen.append((progress.images, used(resource.RUSAGE_SELF) - before)))
    (folder / f"{name}.json").write_text(json.dumps(seen))


def seconds_at(folder: Path, name: str, images: int) -> float:
    """CPU seconds of training when a line had seen so many images."""
    return float(np.interp(images, *zip(*json.loads((folder / f"{name}.json").read_text()), strict=True)))


def used(who: int) -> float:
    """CPU seconds of this process, or of those that it started and that ended."""
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def encoded(pictures: Path, latents: Path, autoencoder: Path) -> float:
    """CPU seconds of `scoreray data encode`."""
    record = latents.with_suffix(".json")
    if not record.exists():
        before = used(resource.RUSAGE_CHILDREN)
        words = ["--encoder", f"scoreray={autoencoder}", "--field", "image", "--to", "latent", "--actors", "0"]
        scoreray("data", "encode", str(pictures), str(latents), *words)
        record.write_text(json.dumps(used(resource.RUSAGE_CHILDREN) - before))
    return float(json.loads(record.read_text()))


def scoreray(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "scoreray.cluster.cli", *words], check=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train_line(Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        main()
