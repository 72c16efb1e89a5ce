"""Runs that learn from a teacher: which model that is, through any resume, and which models can't teach a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scoreray.cluster.verbs.status import status_of
from scoreray.data.errors import UserError
from scoreray.data.fields.normalisation import Normaliser
from scoreray.sampling.model.load import load
from scoreray.trainer.checkpoints.checkpoint import Checkpoint, latest
from scoreray.trainer.checkpoints.marker import Marker
from scoreray.trainer.checkpoints.stored_model import find_model
from scoreray.trainer.config import Config, load_config
from scoreray.trainer.config.run_fields import run_fields
from scoreray.trainer.diffusion.condition import ConditionSpec
from scoreray.trainer.loop import train
from scoreray.trainer.monitoring.stopping import LoopRequest
from scoreray.trainer.prepare import check_run, prepare_run
from scoreray.trainer.run_data import open_run_data
from scoreray.trainer.run_folder import run_store
from scoreray.trainer.teacher import check_teacher, teacher_config

SmallRun = Callable[..., dict[str, Any]]


def newest(config: Config) -> Checkpoint:
    found = latest(run_store(config))
    assert found is not None
    return found


def taught(kind: str, teacher: str, **settings: Any) -> dict[str, Any]:
    return {"kind": kind, "teacher": {"checkpoint": teacher}, **settings}


@pytest.fixture
def teacher(small_run: SmallRun, tmp_path: Path) -> Config:
    """A run of 32 images that may go on."""
    config = load_config(small_run("teacher", tmp_path, 64, optimizer={"learning_rate": 0.05}))
    train(config, requested=lambda: LoopRequest.STOP)
    return config


def test_a_student_resumes_bitwise_with_the_teacher_it_began_with_and_teaches_the_next(
    small_run: SmallRun, tmp_path: Path, teacher: Config
) -> None:
    url, sections = run_store(teacher).url(), {"optimizer": {"learning_rate": 0.02}}
    four = taught("progressive", url, steps=4)

    def student(name: str, images: int = 48, **objective: Any) -> Config:
        settings = small_run(name, tmp_path, images, objective=objective or four, **sections)
        return prepare_run(load_config(settings)).config

    whole, halted = student("whole"), student("halted")
    train(whole)
    train(halted, requested=lambda: LoopRequest.STOP)
    exact = teacher_config(halted)
    assert exact is not None
    assert exact.checkpoint == newest(teacher).url
    assert exact.ema == "0.050"
    train(teacher)  # another newest checkpoint, which is not the one that they learn from
    train(student("halted"))
    said = newest(halted).marker.teacher
    assert said == newest(whole).marker.teacher
    assert said is not None
    assert said.images_seen == 16
    ends = [newest(config).full_state("ema_0.050") for config in (whole, halted)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not any("teacher" in name for name in ends[0])

    assert f"taught by   {exact.checkpoint} at 16 images" in status_of(newest(whole).url).text()
    two = student("two", 16, **taught("progressive", run_store(whole).url(), steps=2))
    train(two)
    with torch.no_grad():
        assert load(newest(two).url, device="cpu")(torch.randn(2, 1, 8, 8), 80.0).isfinite().all()


def test_a_marker_without_a_teacher_is_as_it_was_before_there_were_any(teacher: Config) -> None:
    found = newest(teacher)
    written = found.marker.to_json()
    assert b'\n "teacher"' not in written
    assert Marker.from_json(written, found.url).teacher is None


def test_models_that_cannot_teach_a_run_are_refused_in_one_line(
    small_run: SmallRun, tmp_path: Path, teacher: Config
) -> None:
    url = run_store(teacher).url()
    consistency = load_config(small_run("few", tmp_path, 16, objective=taught("consistency", url)))
    train(prepare_run(consistency).config)
    few = run_store(consistency).url()
    for objective, said in (
        (taught("consistency", few), "no plain denoiser; name the teacher that it had"),
        (taught("progressive", few, steps=2), "no plain denoiser"),
        ({"kind": "consistency", "teacher": {"checkpoint": few, "guidance": 3}}, "keeps what guidance it learned"),
        (taught("consistency", str(tmp_path / "nothing")), "objective.teacher.checkpoint: "),
        ({"kind": "consistency", "teacher": {"checkpoint": url, "ema": 0.33}}, "0.33"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            check_run(load_config(small_run("student", tmp_path, 16, objective=objective)))
        assert "\n" not in str(raised.value)
    config = load_config(small_run("student", tmp_path, 16, objective=taught("consistency", url)))
    fields, model = run_fields(config.data, open_run_data(config)), find_model(url)
    check_teacher(config, fields, model)
    scaled = replace(fields.target, normaliser=Normaliser("range", (0.0,), (2.0,)))
    for other, said in (
        (replace(fields, shape=[1, 16, 16]), r"samples are of shape \[1, 8, 8\], and this run has \[1, 16, 16\]"),
        (replace(fields, target=scaled), "its values are scaled by None"),
        (replace(fields, target=replace(fields.target, kind="array")), "of another encoder or kind"),
        (replace(fields, conditions={}), "conditioned by 'label', which data.conditions leaves out"),
        (replace(fields, conditions={"label": ConditionSpec("class", classes=("a",))}), "'label' is of another kind"),
    ):
        with pytest.raises(UserError, match=f"can't teach this run: .*{said}"):
            check_teacher(config, other, model)


def test_another_model_in_the_teachers_place_ends_a_resume(
    small_run: SmallRun, tmp_path: Path, teacher: Config
) -> None:
    exact = newest(teacher)
    settings = small_run("student", tmp_path, 48, objective=taught("consistency", exact.url))
    config = prepare_run(load_config(settings)).config
    train(config, requested=lambda: LoopRequest.STOP)
    later = replace(exact.marker, time=exact.marker.time + 1)  # as a run of the same name would write it
    exact.store.put(f"{exact.folder}/COMMITTED.json", later.to_json())
    with pytest.raises(UserError, match=r"is another model than .* was trained by"):
        check_run(load_config(settings))


def test_a_consistency_run_that_ends_in_its_first_stage_is_noted(small_run: SmallRun, tmp_path: Path) -> None:
    def notes(**objective: Any) -> tuple[str, ...]:
        settings = small_run("few", tmp_path, 800, objective={"kind": "consistency", **objective})
        return check_run(load_config(settings)).notes

    (note,) = notes()
    assert "\n" not in note
    assert "objective.stage_images is 1,000,000 and duration.images 800: the run ends in the first of 8 stages" in note
    assert "set objective.stage_images=100 " in note
    assert notes(stage_images=100) == ()
    assert notes(num_stages=1) == ()
