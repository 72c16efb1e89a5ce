"""`scoreray demo`: packs real images, trains, samples and draws, on this machine alone, in a few minutes."""

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
from pathlib import Path
from typing import Any

from scoreray.cluster.display import bar, say
from scoreray.cluster.verbs.demo_page import loss_picture, summary_page
from scoreray.cluster.verbs.pack import pack_with_bar
from scoreray.cluster.verbs.train import TrainResult, train_to_end
from scoreray.data import fashion_mnist_path
from scoreray.data.errors import StorageError
from scoreray.data.extras import install
from scoreray.data.presets import PRESETS
from scoreray.data.storage import local_s3
from scoreray.trainer.config import Config, dump_config, load_config
from scoreray.trainer.prepare import prepare_run

BUCKET = "scoreray"
NUM_SAMPLES = 64
GUIDANCE = 2.0
QUICK = (
    "duration.images=8k",
    "checkpoint.every_images=4k",
    "log.every_images=500",
    "optimizer.learning_rate=8e-3",
    "optimizer.warmup_images=1k",
    "ema.stds=[0.08]",
)
NEEDED_BYTES = 1 << 30


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's pictures are."""

    folder: Path
    trained: TrainResult
    seconds: float
    data_url: str

    def answer(self) -> dict[str, Any]:
        names = ("samples.png", "loss.png", "config.yaml", "summary.html")
        return {"folder": str(self.folder), "files": list(names), "seconds": self.seconds, **self.trained.answer()}

    def text(self) -> str:
        folder, command = self.folder, typed_command()
        in_s3 = self.data_url.startswith("s3:")
        run, data = shlex.quote(self.trained.run), shlex.quote(self.data_url)
        local = f"{command} --local-s3 {shlex.quote(str(self.folder / 's3'))}" if in_s3 else command
        return (
            f"\nDone in {self.seconds:.0f} s. Look at\n"
            f"  {folder / 'samples.png'}    {NUM_SAMPLES} samples, drawn from the EMA weights\n"
            f"  {folder / 'loss.png'}       the loss, over images and by noise level\n"
            f"  {folder / 'summary.html'}   what was done, with what, on one page\n"
            f"  {folder / 'config.yaml'}    the run's whole config\n"
            "\nNext:\n"
            f"  {local} sample {run} --class-label sneaker --guidance 2 --count 16 --out sneakers\n"
            f"  {local} data inspect {data}\n"
            f"  {command} data pack FOLDER_OF_IMAGES DATA --image-size 32     # your own images, then, on a GPU\n"
            f"  {command} train configs/cifar10.yaml data.url=DATA run.storage=RUNS"
        )


def typed_command() -> str:
    """How to call this program from this folder: by name, or by path where the name is not found."""
    if shutil.which("scoreray"):
        return "scoreray"
    program = Path(sys.argv[0]).absolute()
    return shlex.quote(os.path.relpath(program)) if program.name == "scoreray" else "python -m scoreray.cluster.cli"


def run_demo(out: Path, *, quick: bool, workers: int, fresh: bool, verbose: bool) -> DemoResult:
    """Pack, train, sample and draw into `out`; an interrupted demo goes on where it was. Raises ScorerayErrors."""
    started = time.monotonic()
    out = _writable(out)
    with storage(out) as place:
        config = demo_config(quick=quick, workers=workers, storage=place)
        data_url = str(config.data.url)
        pack_with_bar(str(fashion_mnist_path()), data_url, name="fashion-mnist", samples_per_shard=1000, workers=1)
        prepared = prepare_run(config, fresh=fresh)
        trained = train_to_end(prepared, verbose=verbose)
        samples_s = _draw(trained, out)
        _report(trained, prepared.config, out, samples_s)
    return DemoResult(out, trained, time.monotonic() - started, data_url)


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


def demo_config(*, quick: bool = False, workers: int = 2, storage: str = f"s3://{BUCKET}") -> Config:
    """The demo's preset; `quick` trains it for seconds only."""
    overrides = [f"scaling.workers={workers}"]
    if storage != f"s3://{BUCKET}":
        places = {"data.url": f"{storage}/data/fashion-mnist", "run.storage": f"{storage}/runs"}
        overrides += [f"{key}={json.dumps(place)}" for key, place in places.items()]
    if quick:
        overrides += ["run.name=demo-quick", *QUICK]
    return load_config(PRESETS / "demo.yaml", overrides)


def _draw(trained: TrainResult, out: Path) -> float:
    import torch

    from scoreray.data.fields.normalisation import to_uint8
    from scoreray.sampling.model.load import load
    from scoreray.sampling.offline.generate import Request, generate, png_of_sheet

    started = time.monotonic()
    denoiser = load(trained.checkpoint)
    with bar("sample", NUM_SAMPLES, "samples") as done:
        images = torch.cat([x for x, _ in generate(denoiser, Request(NUM_SAMPLES, guidance=GUIDANCE), done)])
    (out / "samples.png").write_bytes(png_of_sheet(to_uint8(images)))
    return time.monotonic() - started


def _report(trained: TrainResult, config: Config, out: Path, samples_s: float) -> None:
    records = trained.records
    (out / "config.yaml").write_text(dump_config(config))
    loss_picture(records, out / "loss.png")
    (out / "summary.html").write_text(
        summary_page(config, records, trained, num_samples=NUM_SAMPLES, samples_s=samples_s, guidance=GUIDANCE)
    )


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
