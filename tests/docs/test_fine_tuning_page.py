"""The example of docs/fine-tuning.md: its commands as they stand, on fewer pictures and a smaller network."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from scoreray.cluster.cli.main import app
from scoreray.data import fashion_mnist_path
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.prepare import prepare_run

PAGE = Path(__file__).parents[2] / "docs" / "fine-tuning.md"
SMALLER = [
    "network={kind: unet, model_channels: 8, channel_mult: [1], num_blocks: 1, patch_size: 4}", "duration.images=128",
    "checkpoint.every_images=128", "engine.zero_stage=0", "scaling.workers=1",
]  # fmt: skip


def test_a_new_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = np.load(fashion_mnist_path())
    np.savez(tmp_path / "few.npz", images=whole["images"][:128], labels=whole["labels"][:128], classes=whole["classes"])
    monkeypatch.setattr("scoreray.data.fashion_mnist_path", lambda: tmp_path / "few.npz")
    section = PAGE.read_text().split("## An example: a new class\n")[1].split("\n## ")[0]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code is not None
    exec(code[1], {})
    commands = [shlex.split(line)[1:] for line in section.splitlines() if line.startswith("    scoreray")]
    assert [one[0] for one in commands] == ["data", "train", "data", "train", "status", "sample", "sample", "sample"]
    for arguments in commands:
        if arguments[0] == "train":
            arguments = [*arguments[:1], str(PAGE.parents[1] / arguments[1]), *arguments[2:], *SMALLER]
        quicker = {"train": ["--check"], "sample": ["--steps", "2"]}.get(arguments[0], [])
        result = CliRunner().invoke(app, [*arguments, *quicker])
        assert result.exit_code == 0, (arguments, result.output, result.exception)
        if arguments[0] == "train":  # without Ray
            prepared = prepare_run(load_config(arguments[1], arguments[2:]))
            assert [note.partition("new: ")[2] for note in prepared.notes] in ([], ["classes of 'label': bag"])
            train(prepared.config)
        elif arguments[0] == "status":
            assert re.search(r"began from  \S+/runs/nine/checkpoints/\S+ at 128 images, EMA 0\.100, ", result.output)
    assert len(list((tmp_path / "bags").glob("*.png"))) >= 16
