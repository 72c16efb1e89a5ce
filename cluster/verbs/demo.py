"""`scoreray demo`: packs real images, trains for minutes, draws, measures and shows it all, on this machine alone."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scoreray.cluster.display import bar, say
from scoreray.cluster.verbs.demo_page import PAGE, Measured, NextStep, expected_lines, moving_picture, page
from scoreray.cluster.verbs.pack import pack_with_bar
from scoreray.cluster.verbs.train import TrainResult, train_to_end
from scoreray.data import fashion_mnist_path
from scoreray.data.errors import StorageError
from scoreray.data.extras import install
from scoreray.data.presets import PRESETS
from scoreray.data.scratch import scratch_folder
from scoreray.data.storage import local_s3
from scoreray.data.units import counted_noun
from scoreray.trainer.config import Config, dump_config, load_config
from scoreray.trainer.monitoring.metrics import TrainingRecord
from scoreray.trainer.prepare import PreparedRun, prepare_run

BUCKET = "scoreray"
HELD_OUT = 2000  # of the images that come with the package: the last ones, which are not trained on
MINUTES = 4.0
QUICK_MINUTES = 0.5
CPU_WORKERS = 2
QUICK = (
    "checkpoint.every_images=2k",
    "log.every_images=250",
    "optimizer.learning_rate=8e-3",
    "optimizer.warmup_images=1k",
    "ema.stds=[0.08]",
)
NUM_SAMPLES = 64
STEPS = 18
GUIDANCE = 2.0
FORWARD = 3.0  # a forward pass takes about a third of a training step
STAGES = ("pack", "train", "draw", "measure", "page")
NEEDED_BYTES = 1 << 30


@dataclass(frozen=True)
class Effort:
    """How much is measured at the end: samples of the FID, images that its classifier learns from."""

    samples: int = 1000
    classifier_images: int = 8000

    def calls(self) -> int:
        """Forward passes of single images that drawing and measuring take, about."""
        return 2 * NUM_SAMPLES * STEPS + 2 * self.samples * 8 + self.classifier_images // 2


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's page and pictures are."""

    folder: Path
    trained: TrainResult
    seconds: float
    finding: Measured
    steps: list[NextStep]

    def answer(self) -> dict[str, Any]:
        names = (PAGE, "samples.png", "samples.webp", "config.yaml")
        return {"folder": str(self.folder), "files": list(names), "seconds": self.seconds, **self.trained.answer(),
                **self.finding.answer()}  # fmt: skip

    def text(self) -> str:
        folder = self.folder
        lines = [
            f"\nDone in {_minutes(self.seconds)}: {self.finding.sentence()} Look at",
            f"  {folder / PAGE}    everything on one page, for a browser",
            f"  {folder / 'samples.png'}     {NUM_SAMPLES} samples",
            "\nNext:",
        ]
        return "\n".join([*lines, *(f"  # {step.what}\n  {step.command}" for step in self.steps)])


def typed_command() -> str:
    """How to call this program from any folder: by name, or by path where the name is not found."""
    if shutil.which("scoreray"):
        return "scoreray"
    program = Path(sys.argv[0]).absolute()
    return shlex.quote(str(program)) if program.name == "scoreray" else f"{shlex.quote(sys.executable)} -m scoreray"


def run_demo(
    out: Path,
    *,
    minutes: float | None = None,
    quick: bool = False,
    workers: int | None = None,
    fresh: bool = False,
    verbose: bool = False,
) -> DemoResult:
    """Pack, train, draw and measure into `out`; an interrupted demo goes on where it was. Raises ScorerayErrors.

    minutes: of training; None: MINUTES, or with `quick` QUICK_MINUTES.  workers: a GPU for each, where this machine has
    as many; None: one on a GPU, or two on CPUs.
    """
    started = time.monotonic()
    out = _writable(out).absolute()
    effort = Effort(200, 4000) if quick else Effort()
    gpu = _num_gpus() >= (workers or 1)
    workers = workers or (1 if gpu else CPU_WORKERS)
    configured = partial(demo_config, minutes=minutes, quick=quick, workers=workers, gpu=gpu)
    introduce(configured())
    with storage(out) as place:
        _stage("pack", "the pictures into archives with checksums, as a cluster would read them")
        config = configured(storage=place)
        data_url, held_out_url = _packed(str(config.data.url))
        prepared = prepare_run(config, fresh=fresh)
        _stage("train", f"for {_minutes(60 * (config.duration.minutes or 0))} from the first step; Ray starts first")
        trained = train_to_end(prepared, verbose=verbose, then=effort.calls() / FORWARD)
        finding = _found(trained, prepared, held_out_url, effort, out)
        _stage("page", f"write {out / PAGE}")
        steps = next_steps(out, trained.run, data_url, held_out_url, minutes=config.duration.minutes or MINUTES)
        (out / "config.yaml").write_text(dump_config(prepared.config))
        (out / PAGE).write_text(page(prepared.config, trained, finding, steps))
    return DemoResult(out, trained, time.monotonic() - started, finding, steps)


@contextlib.contextmanager
def storage(out: Path) -> Iterator[str]:
    """URL of where data and runs go: an S3 server of our own while it lasts; a folder where none is installed."""
    if not local_s3.is_installed():
        place = out.resolve() / "storage"
        say(f"data and runs go to the folder {place}; into S3, as on a cluster, they go after "
            f"{install('local-s3')}")  # fmt: skip
        yield str(place)
        return
    with local_s3.LocalS3(out / "s3") as server:
        os.environ.update(server.env)
        server.create_bucket(BUCKET)
        say(f"S3 server (SeaweedFS) on {server.env['AWS_ENDPOINT_URL']}, data in {out / 's3'}")
        yield f"s3://{BUCKET}"


def demo_config(
    *,
    minutes: float | None = None,
    quick: bool = False,
    workers: int = CPU_WORKERS,
    gpu: bool = False,
    storage: str = f"s3://{BUCKET}",
) -> Config:
    """The demo's preset for so many minutes, each length a run of its own name; `quick` is meant for seconds, `gpu`
    gives each worker one."""
    usual = QUICK_MINUTES if quick else MINUTES
    length = usual if minutes is None else minutes
    name = "demo-quick" if quick else "demo"
    name = name if length == usual else f"{name}-{length:g}-min"
    overrides = [f"scaling.workers={workers}", f"run.name={name}", "duration.images=null",
                 f"duration.minutes={length:g}", f"scaling.use_gpu={json.dumps(gpu)}",
                 *(QUICK if quick else ())]  # fmt: skip
    if storage != f"s3://{BUCKET}":
        places = {"data.url": f"{storage}/data/fashion-mnist", "run.storage": f"{storage}/runs"}
        overrides += [f"{key}={json.dumps(place)}" for key, place in places.items()]
    return load_config(PRESETS / "demo.yaml", overrides)


def _num_gpus() -> int:
    """Of this machine; none where RAY_ADDRESS says that others train."""
    import torch

    return 0 if os.environ.get("RAY_ADDRESS") else torch.cuda.device_count()


def introduce(config: Config) -> None:
    """What is about to happen, for somebody who has never trained such a model."""
    minutes = config.duration.minutes or 0
    workers = config.scaling.range[1]
    where = "CPUs" if not config.scaling.use_gpu else "a GPU" if workers == 1 else "GPUs"
    say(
        "A network learns to draw clothes. It is shown 10,000 small pictures (Fashion-MNIST: 28x28 pixels, ten kinds\n"
        "of clothing) under noise of every strength, and learns to say what is beneath. Afterwards it draws: it\n"
        f"begins with noise alone and takes it away in {STEPS} steps.\n\n"
        f"  how long    {_minutes(60 * minutes)} of training by {counted_noun(workers, 'worker')} on "
        f"{where} of this machine (--minutes changes that), and a minute\n"
        "              or two for starting and for what comes after. Ctrl-C saves; the same command goes on.\n"
        "  how good    by the number of pictures that the machine gets through in that time; it says so soon:\n"
        + "\n".join(f"              {line}" for line in expected_lines())
        + "\n"
    )


def next_steps(out: Path, run: str, data_url: str, held_out_url: str, *, minutes: float) -> list[NextStep]:
    """What to try next: commands that work as they are, in any folder. minutes: for how long the demo trained."""
    command = typed_command()
    local = f"{command} --local-s3 {_quoted(out / 's3')}" if data_url.startswith("s3:") else command
    run, data, held_out = map(shlex.quote, (run, data_url, held_out_url))
    return [
        NextStep("sixteen sneakers", f"{local} sample {run} --class-label sneaker --guidance 2 --count 16 "
                 f"--out {_quoted(out / 'sneakers')}"),
        NextStep("the pictures that it learned from",
                 f"{local} data inspect {data} --picture {_quoted(out / 'data.png')}"),
        NextStep("how good it is by other measures, with a page of its own",
                 f"{local} evaluate {run} --reference {held_out} --metrics fid,kid,pr --count 500"),
        NextStep("what is stored of the run", f"{local} status {run}"),
        NextStep("five times as long, for better pictures",
                 f"{command} demo --minutes {5 * minutes:g} --out {_quoted(out)}"),
        NextStep("pictures on request, by HTTP and on a page of its own; Ctrl-C ends it", f"{local} serve {run}"),
    ]  # fmt: skip


def _packed(url: str) -> tuple[str, str]:
    """Packs the images to train on at `url`, and those that are held out beside it; returns both URLs."""
    import numpy as np

    held_out = f"{url}-held-out"
    with np.load(fashion_mnist_path()) as file:
        images, labels, classes = file["images"], file["labels"], file["classes"]
    for place, part in ((url, slice(None, -HELD_OUT)), (held_out, slice(-HELD_OUT, None))):
        with scratch_folder() as folder:
            source, name = folder / f"{place.rpartition('/')[2]}.npz", place.rpartition("/")[2]
            np.savez(source, images=images[part], labels=labels[part], classes=classes)
            pack_with_bar(str(source), place, name=name, samples_per_shard=1000, workers=1)
    return url, held_out


def _found(trained: TrainResult, prepared: PreparedRun, held_out_url: str, effort: Effort, out: Path) -> Measured:
    """Draws samples, measures them, and leaves their pictures in `out`."""
    left = _left(trained.records, effort.calls(), "with what comes after")
    _stage("draw", f"{NUM_SAMPLES} pictures, each from noise of its own{left}")
    with bar("draw", STEPS, "steps", "loading the model, and its first step") as done:  # imports take seconds too
        from scoreray.cluster.verbs.demo_measures import copies_of, drawn, fid_of
        from scoreray.sampling.offline.generate import png_of_sheet

        samples, frames = drawn(trained.checkpoint, NUM_SAMPLES, STEPS, GUIDANCE, done)
        (out / "samples.png").write_bytes(png_of_sheet(samples))
        (out / "samples.webp").write_bytes(moving_picture(frames))
    left = _left(trained.records, 2 * effort.samples * 8 + effort.classifier_images // 2)
    _stage("measure", f"{effort.samples:,} more pictures against {HELD_OUT:,} that it has never seen{left}")
    fid = fid_of(trained.checkpoint, held_out_url, effort.samples, effort.classifier_images, GUIDANCE, bar)
    copies = copies_of(samples, *_images_of_both(prepared))
    return Measured(trained.images_seen, fid, copies, samples, frames)


def _images_of_both(prepared: PreparedRun) -> tuple[Any, Any]:
    """uint8 [N, 1, H, W]: what was trained on, and what was held out."""
    import numpy as np
    import torch

    with np.load(fashion_mnist_path()) as file:
        images = torch.from_numpy(file["images"])[:, None]
    return images[:-HELD_OUT], images[-HELD_OUT:]


def _stage(name: str, what: str) -> None:
    say(f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}: {what}")


def _left(records: list[TrainingRecord], calls: float, of_what: str = "") -> str:
    """About how long so many forward passes take, by the rate of training; "" where that is not known."""
    rates = sorted(record.images_per_s for record in records if record.images_per_s > 0)
    if not rates:
        return ""
    return f"; about {_minutes(calls / (FORWARD * rates[len(rates) // 2]))} {of_what}".rstrip()


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds)):.0f} s" if seconds < 100 else f"{seconds / 60:.3g} minutes"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _writable(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise StorageError(f"{out}: can't be written to: {error.strerror}; choose another folder with --out") from None
    if free < NEEDED_BYTES:
        raise StorageError(f"{out}: {free >> 20} MiB are free on its disk, the demo needs {NEEDED_BYTES >> 20} MiB")
    return out
