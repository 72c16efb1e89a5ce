"""`scoreray doctor` on this machine: what a run lacks and what will not fit, before it starts."""

from __future__ import annotations

import os
from typing import Literal

import torch

from scoreray.cluster.doctor.machine import Machine, gib
from scoreray.cluster.doctor.plan import plan
from scoreray.cluster.finding import Finding
from scoreray.cluster.verbs.beside_run import check_beside
from scoreray.data.errors import ScorerayError
from scoreray.data.unpacked.tars import UnpackedTars
from scoreray.trainer.config import Config
from scoreray.trainer.config.data_scale import misfit
from scoreray.trainer.config.run_fields import RunFields, run_fields
from scoreray.trainer.initial import begins_from, find_initial, initial_weights
from scoreray.trainer.run_data import RunData, open_run_data
from scoreray.trainer.run_folder import run_store
from scoreray.trainer.teacher import fitting_teacher


def examine(config: Config | None, machine: Machine | None = None) -> list[Finding]:
    """Everything that can be found out without starting anything."""
    machine = machine or Machine()
    found = [software(), devices()]
    if config is None:
        return found
    data, fields, about_data = data_set(config)
    found += [about_data, storage(config)]
    shape = machine.image_shape or (tuple(fields.shape) if fields else None)
    if shape is None:
        text = "can't be planned without the samples' shape; fix data.url, or give --shape 3x64x64"
        return [*found, Finding("memory", "problem", text)]
    return [
        *found,
        *initial(config, fields),
        *teacher(config, fields),
        *evaluation(config, data),
        *plan(config, fields, shape, machine),
    ]


def software() -> Finding:
    from importlib.metadata import version

    versions = {name: version(name) for name in ("torch", "ray", "deepspeed", "webdataset")}
    return Finding("software", "good", ", ".join(f"{name} {v}" for name, v in versions.items()), versions)


def devices() -> Finding:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{os.cpu_count()} CPU cores, {gib(total)}, " + (f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU")
    return Finding("this machine", "good", text, {"cpus": os.cpu_count(), "memory_bytes": total, "gpus": gpus})


def data_set(config: Config) -> tuple[RunData | None, RunFields | None, Finding]:
    try:
        data = open_run_data(config, patient=False)
        fields = run_fields(config.data, data, config.autoencoder, config.alignment)
        shape, found = "x".join(map(str, fields.shape)), misfit(config, fields)
    except ScorerayError as error:
        return None, None, Finding("data", "problem", str(error))
    classes = f"{len(data.classes)} classes"
    if isinstance(data, UnpackedTars):
        text = f"{len(data.tars):,} tars without a manifest, samples of {shape}, {classes}"
    else:
        text = f"{data.num_samples:,} samples of {shape}, {classes}"
    facts = {"num_samples": data.num_samples, "sigma_data": data.sigma_data}
    if found:
        state: Literal["note", "problem"] = "problem" if found.hopeless else "note"
        return data, fields, Finding("data", state, f"{text} at {config.data.url}; {found.text}", facts)
    if isinstance(data, UnpackedTars):
        text = "; ".join([f"{text} at {config.data.url}", *data.notes()])
        return data, fields, Finding("data", "note", text, facts)
    return data, fields, Finding("data", "good", f"{text} at {config.data.url}", facts)


def initial(config: Config, fields: RunFields | None) -> list[Finding]:
    """What the run begins from, where the config names a model and the data set can be read."""
    if fields is None:
        return []
    try:
        model = find_initial(config)
        if model is None:
            return []
        found = initial_weights(model, config, fields)
    except ScorerayError as error:
        return [Finding("init", "problem", str(error))]
    return [Finding("init", "note" if found.misfits else "good", begins_from(model, found))]


def teacher(config: Config, fields: RunFields | None) -> list[Finding]:
    """What the run learns from, where the config names a model and the data set can be read."""
    try:
        model = None if fields is None else fitting_teacher(config, fields, None)
    except ScorerayError as error:
        return [Finding("teacher", "problem", str(error))]
    return [] if model is None else [Finding("teacher", "good", f"learns from {model.lineage()[0].text()}")]


def evaluation(config: Config, data: RunData | None) -> list[Finding]:
    """What is measured beside the run, where the config names anything and its data set can be read."""
    if data is None:
        return []
    try:
        check_beside(config, data)
    except ScorerayError as error:
        return [Finding("evaluation", "problem", str(error))]
    section = config.evaluation
    if not section.metrics:
        return []
    return [Finding("evaluation", "good", f"{', '.join(section.metrics)} against {section.reference or 'data.url'}")]


def storage(config: Config) -> Finding:
    try:
        run = run_store(config)
        run.check_reachable()
        run.check_writable()
    except ScorerayError as error:
        return Finding("storage", "problem", str(error))
    text = f"{run.url()} can be written"
    place = config.run.storage
    if "://" not in place and not os.path.isdir(place):
        text += f"; {place} is not there yet and will be made"
    return Finding("storage", "good", text)
