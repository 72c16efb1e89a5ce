"""The teacher of a run: which model it is, whether it fits, and every rank's copy of it.

A run's checkpoints name it in their marker, so that a resume learns from the same model, or not at all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from scoreray.data.errors import UserError
from scoreray.data.traces import span
from scoreray.trainer.checkpoints.checkpoint import Checkpoint
from scoreray.trainer.checkpoints.marker import Ancestor
from scoreray.trainer.checkpoints.stored_model import StoredModel, find_named
from scoreray.trainer.config import Config
from scoreray.trainer.config.run_fields import RunFields
from scoreray.trainer.diffusion.denoiser import Denoiser
from scoreray.trainer.diffusion.levels import data_conditions
from scoreray.trainer.engine.base import resolve_precision
from scoreray.trainer.networks.network import build_network, load_weights
from scoreray.trainer.objectives.autoencoding import AutoencodingObjective
from scoreray.trainer.objectives.base import FewStepObjective
from scoreray.trainer.objectives.progressive import ProgressiveObjective
from scoreray.trainer.objectives.teacher import Teacher, TeacherConfig
from scoreray.trainer.ranks import from_rank_0


def teacher_config(config: Config) -> TeacherConfig | None:
    """What the objective says of its teacher; None where it has none."""
    return config.objective.teacher if isinstance(config.objective, FewStepObjective) else None


def find_teacher(config: Config, newest: Checkpoint | None) -> StoredModel | None:
    """The model that `objective.teacher` names; of a run that goes on, the one that its newest checkpoint names. None
    where there is no teacher. Raises UserError (also where it is another by now), DataError, StorageError."""
    section = teacher_config(config)
    if section is None:
        return None
    origin = None if newest is None else newest.marker.teacher
    if origin is None:
        return find_named("objective.teacher", section.checkpoint, section.ema)
    found = find_named("objective.teacher", origin.checkpoint, origin.ema)
    if found.lineage()[0].sha256 != origin.sha256:
        raise UserError(
            f"objective.teacher.checkpoint: {origin.checkpoint} is another model than {newest and newest.url} was "
            "trained by; put that one back, or begin a new run (another run.name, or --fresh)"
        )
    return found


def check_teacher(config: Config, fields: RunFields, model: StoredModel) -> None:
    """Raises UserError, in one line with everything that does not fit, unless a run on these fields can learn from
    `model`."""
    section = teacher_config(config)
    assert section is not None
    found = _no_teacher_for(config, model) or [
        *_other_samples(fields, model),
        *_other_conditions(fields, model, section),
    ]
    if found:
        raise UserError(f"objective.teacher.checkpoint: {model.url} can't teach this run: {'; '.join(found)}")


def fitting_teacher(config: Config, fields: RunFields, newest: Checkpoint | None) -> StoredModel | None:
    """`find_teacher`, checked by `check_teacher`."""
    model = find_teacher(config, newest)
    if model is not None:
        check_teacher(config, fields, model)
    return model


def pinned(config: Config, model: StoredModel) -> Config:
    """`config` with the exact checkpoint and EMA length of its teacher, so that all starts of its workers take it."""
    objective: Any = config.objective
    exact = replace(objective.teacher, checkpoint=model.url, ema=model.ema)
    return config.model_copy(update={"objective": replace(objective, teacher=exact)})


def load_teacher(
    config: Config, fields: RunFields, device: torch.device, rank: int, world_size: int, newest: Checkpoint | None
) -> tuple[Teacher | None, Ancestor | None]:
    """This rank's teacher, in the precision of the run's network, and what the run's markers say of it. Every rank
    calls it. Errors as of `find_teacher`, `check_teacher`."""
    section = teacher_config(config)
    if section is None:
        return None, None
    model = from_rank_0(find_teacher(config, newest) if rank == 0 else None, world_size)
    assert model is not None
    check_teacher(config, fields, model)
    shape = (*model.page.image_shapes, model.page.image_shape)[0]
    network, theirs = build_network(model.config.network, shape, model.conditions), model.config.denoiser
    with span("train.teacher", checkpoint=model.url):
        load_weights(network, model.weights(), model.url)
    denoiser = Denoiser(network, theirs.parameterization, theirs.resolved_sigma_data)
    denoiser = denoiser.to(device, resolve_precision(config.engine.precision, device))
    weight = 1.0 if isinstance(section.guidance, tuple) else section.guidance
    return Teacher(denoiser, weight), model.lineage()[0]


def _no_teacher_for(config: Config, model: StoredModel) -> list[str]:
    """Where a model has no denoiser along whose ODE an objective could go."""
    objective, theirs = config.objective, model.config
    kind = theirs.objective.kind
    if theirs.network.is_machine or isinstance(theirs.objective, AutoencodingObjective):
        return [f"network.kind '{theirs.network.kind}' has no denoiser"]
    if theirs.objective.only_flow:
        return [f"a flow of objective.kind '{kind}' with a coupling or a source is no denoiser of noise"]
    if theirs.objective.map == "none":
        return []
    assert isinstance(objective, FewStepObjective)
    if objective.teacher is not None and objective.teacher.guidance != 1:
        return [f"a few-step model ('{kind}') keeps what guidance it learned; leave objective.teacher.guidance out"]
    if theirs.objective.map == "flow_map":  # with its own level as the target it is the plain denoiser
        return []
    if not isinstance(theirs.objective, ProgressiveObjective) or not isinstance(objective, ProgressiveObjective):
        return [f"a few-step model ('{kind}') is no plain denoiser; name the teacher that it had"]
    found = []
    if theirs.objective.steps != 2 * objective.steps:
        found.append(f"it takes {theirs.objective.steps} steps, and twice objective.steps is {2 * objective.steps}")
    if theirs.process.sampling_range() != config.process.sampling_range():
        found.append(f"its grid is over {theirs.process.sampling_range()}, not {config.process.sampling_range()}")
    return found


def _other_samples(fields: RunFields, model: StoredModel) -> list[str]:
    """How its samples differ from the run's in shape, scale or encoder."""
    page, found = model.page, []
    shapes = {tuple(shape) for shape in (page.image_shape, *page.image_shapes)}
    if missing := [list(shape) for shape in fields.shapes or [tuple(fields.shape)] if tuple(shape) not in shapes]:
        found.append(f"its samples are of shape {list(page.image_shape)}, and this run has {missing[0]}")
    if page.target is not None:
        ours, theirs = fields.target, replace(page.target, name=fields.target.name, dtype=fields.target.dtype)
        if theirs.normaliser != ours.normaliser:
            found.append(f"data.normalisation: its values are scaled by {theirs.normaliser}, not {ours.normaliser}")
        elif not theirs.same_values(ours):
            found.append(f"it models {page.target.kind} values of another encoder or kind than '{ours.name}'")
    return found


def _other_conditions(fields: RunFields, model: StoredModel, section: TeacherConfig) -> list[str]:
    """Which of its conditions the run lacks, and guidance without any."""
    theirs, found = data_conditions(model.conditions), []
    for name, spec in theirs.items():
        if name not in fields.conditions:
            found.append(f"it is conditioned by '{name}', which data.conditions leaves out")
        elif not spec.same_values(fields.conditions[name]):
            found.append(f"its condition '{name}' is of another kind, shape, normalisation or classes")
    if not theirs and section.guidance != 1:
        found.append("it has no conditions to be guided by; leave objective.teacher.guidance out")
    return found
