"""A model card says what is known of a model and nothing else, whatever names its data have."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from scoreray.cluster.verbs.export import ExportOptions, export_model
from scoreray.data.errors import UserError
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.sampling.metrics.record import as_text
from scoreray.trainer.checkpoints.checkpoint import latest
from scoreray.trainer.config import load_config
from scoreray.trainer.loop import train
from scoreray.trainer.run_folder import run_store


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_a_card_has_data_training_metrics_and_samples(small_run: Any, small_set: str, tmp_path: Path) -> None:
    config = load_config(small_run("run", tmp_path / "runs", 32))
    train(config)
    run = run_store(config)
    newest = latest(run)
    assert newest is not None
    assert newest.marker.data is not None
    record = evaluate(EvaluationSettings(run.url(), small_set, ("loss",), loss_count=16)).record
    export_model(run.url(), str(tmp_path / "model"), ["0.05"], ExportOptions("scoreray", "cc-by-4.0", 4))
    card = (tmp_path / "model" / "README.md").read_text()
    front = front_matter(card)
    assert front["license"] == "cc-by-4.0"
    assert front["library_name"] == "scoreray"
    loss = record.metrics["loss"]
    for text in (
        f"| SHA-256 | `{newest.marker.data.sha256}` |",
        "| samples | 64 |",
        "samples of each: 22, 21, 21",
        "| samples seen | 32, 16 a step |",
        f"| checkpoint | `{newest.url}` |",
        f"| {as_text(loss.value)} | {loss.interval_text} |",
        "4 of EMA 0.050 by heun, 18 steps, seed 0.",
        f"scoreray sample {tmp_path / 'model'} --count 64",
    ):
        assert text in card, text
    assert Image.open(tmp_path / "model" / "samples.png").size[0] >= 16
    stored = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert stored is not None
    assert load_config(yaml.safe_load(stored[1])) == load_config(newest.marker.config)
    export_model(run.url(), str(tmp_path / "model"), ["0.1"])
    card = (tmp_path / "model" / "README.md").read_text()
    assert "No evaluation of these weights was found" in card
    assert "No licence was given" in card
    assert "license" not in front_matter(card)
    assert not (tmp_path / "model" / "samples.png").exists()


def test_names_out_of_data_are_no_markup(new_run: Callable[..., str], tmp_path: Path) -> None:
    run = new_run(str(tmp_path / "run"), classes=["<script>", "a|b`c\n# title", "![x](y)"])
    export_model(run, str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    assert "0 `<script>`, 1 `a/b'c # title`, 2 `![x](y)`" in card
    assert "\n# title" not in card
    assert "| samples | not known |" in card  # of a checkpoint that does not know its data


def test_a_sheet_of_vectors_is_refused_before_anything_is_written(new_run: Callable[..., str], tmp_path: Path) -> None:
    run = new_run(str(tmp_path / "run"), shape=(2,))
    with pytest.raises(UserError, match=r"^--samples: no picture can be made of samples of shape \[2\]; leave it out$"):
        export_model(run, str(tmp_path / "model"), (), ExportOptions(samples=4))
    assert not (tmp_path / "model").exists()


def test_a_licence_is_an_identifier() -> None:
    with pytest.raises(UserError, match=r"--licence mit\nx: 1: give a licence's identifier"):
        ExportOptions("scoreray", "mit\nx: 1")
    with pytest.raises(UserError, match="--format onx: did you mean 'onnx'"):
        ExportOptions("onx")
