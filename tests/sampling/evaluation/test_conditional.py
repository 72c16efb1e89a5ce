"""A model of pictures under their captions is measured: ensembles by record, a scorer, spectra, conditions' hashes."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from scoreray.data import shapes
from scoreray.data.errors import UserError
from scoreray.data.fields.field import FieldRequest
from scoreray.data.packing.pack import pack
from scoreray.data.sources.field_options import parse_field_options
from scoreray.sampling.evaluation import sample_chunks
from scoreray.sampling.evaluation.compare import differences
from scoreray.sampling.evaluation.evaluate import evaluate
from scoreray.sampling.evaluation.prepare import load_inputs
from scoreray.sampling.measures.held_out import HeldOut
from scoreray.sampling.metrics.plan import Chunk, EvaluationSettings
from scoreray.trainer.config import load_config
from scoreray.trainer.diffusion.condition import Condition, ConditionSpec
from scoreray.trainer.loop import train

WANTED = ("crps", "spread_skill", "rmse", "match", "spectrum")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """(folder of 40 captioned shapes, a run of one step conditioned on the captions, the packed data)."""
    folder = tmp_path_factory.mktemp("captioned")
    shapes.main([str(folder / "pictures"), "--count", "40", "--side", "16"])
    data = str(folder / "data")
    pack(folder / "pictures", data, fields=parse_field_options(("caption=text",)))
    config = {
        "run": {"name": "run", "storage": str(folder)},
        "data": {"url": data, "global_batch_size": 8, "conditions": {"caption": {"kind": "text"}}},
        "network": {"kind": "unet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "patch_size": 2},
        "engine": {"zero_stage": 0, "precision": "fp32"},
        "duration": {"images": 8},
    }
    train(load_config(config))
    return folder, str(folder / "run"), data


def settings(captioned: tuple[Path, str, str], **changes: object) -> EvaluationSettings:
    _, run, data = captioned
    quick: dict[str, object] = {
        "metrics": WANTED, "ensembles": 5, "per_condition": 3, "count": 20, "reference_count": 40, "steps": 2,
        "batch_size": 8, "scorer": "scoreray.data.shapes:MatchesCaption", "extractor": "identity",
    }  # fmt: skip
    return EvaluationSettings(run, data, **{**quick, **changes})  # type: ignore[arg-type]


def test_ensembles_are_scored_and_the_record_names_their_conditions(captioned: tuple[Path, str, str]) -> None:
    made = evaluate(settings(captioned))
    record, metrics = made.record, made.record.metrics
    assert set(metrics) == set(WANTED)
    assert metrics["crps"].value is not None
    assert 0 < metrics["crps"].value < 255, "in the data's own units"
    assert len(metrics["rmse"].get("channels")) == 3
    assert metrics["match"].get("observed") == {"colour and shape": 1, "colour": 1, "shape": 1, "size": 1}
    inputs, digest = load_inputs(settings(captioned)), hashlib.sha256()
    found = inputs.reference.read_fields(inputs.numbers(5), [FieldRequest("caption")])
    for row, mask in zip(found.fields["caption"], found.masks["caption"], strict=True):
        caption = bytes(row[mask].tolist())
        digest.update(len(caption).to_bytes(8, "little") + caption)
    assert record.protocol["ensembles"]["conditions"] == {"caption": digest.hexdigest()}
    assert record.protocol["ensembles"]["count"] == 5
    page = Path(made.report).read_text()
    by_channel = metrics["crps"].channels_text
    assert by_channel.startswith("by channel")
    assert by_channel in page
    assert by_channel in made.text()
    assert "Match with what was requested: colour and shape" in page


def test_other_conditions_or_sampling_are_not_comparable(captioned: tuple[Path, str, str]) -> None:
    one, other = (evaluate(settings(captioned, metrics=("crps",), ensembles=count)).record for count in (5, 6))
    assert any("ensembles.conditions" in line for line in differences("crps", one, other))
    sampling = one.subject.sampling.model_copy(update={"steps": 3})
    other = one.model_copy(update={"subject": one.subject.model_copy(update={"sampling": sampling})})
    assert any("sampling.steps: 2 in the first, 3 in the second" in line for line in differences("crps", one, other))


def test_accuracy_is_of_the_class_that_each_sample_was_drawn_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a class and a text draws under the reference's records, whose classes come in no turn."""
    conditions = {"label": ConditionSpec("class", classes=("a", "b", "c")), "caption": ConditionSpec("text", (4,))}
    info = SimpleNamespace(conditions=conditions, is_machine=False, sample_shape=(1,))
    settings = SimpleNamespace(count=6, batch_size=4)
    inputs = SimpleNamespace(info=info, settings=settings, numbers=lambda count: np.arange(4)[:count])
    labels = torch.tensor([2, 0, 2, 1])
    rows = HeldOut(labels, labels, torch.arange(4), Condition({"label": labels}), labels, {})
    monkeypatch.setattr(sample_chunks, "drawn", lambda inputs, first, last, given, row: given.values["label"][row])
    none = {"features": np.zeros((6, 1)), "projections": np.zeros((6, 1))}
    monkeypatch.setattr(sample_chunks, "_extracted", lambda inputs, x: (dict(none), torch.eye(3)[x]))
    plan: Any = SimpleNamespace(inputs=inputs, metrics=("accuracy",))
    found = sample_chunks.sample_chunk(plan, Chunk("samples", 0, 0, 6), rows)
    assert found.right is not None
    assert found.right.tolist() == [True] * 6


def test_mistakes_are_one_line(captioned: tuple[Path, str, str]) -> None:
    silent = str(captioned[0] / "silent")
    pack(captioned[0] / "pictures", silent)
    with pytest.raises(
        UserError, match="crps does not fit: the reference has nothing of what the model takes: caption"
    ):
        load_inputs(replace(settings(captioned, metrics=("crps",)), reference=silent))
    for name, found in (("", "write package.module:Name"), ("no.such:Name", "ModuleNotFoundError")):
        with pytest.raises(UserError, match=found):
            load_inputs(settings(captioned, scorer=name))
    with pytest.raises(UserError, match="per_condition = 1: at least 2"):
        settings(captioned, per_condition=1)
