"""From a sweep's YAML file to a checked plan: every mistake is reported before any trial, most before any cluster."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scoreray.data.errors import ScorerayError, UserError, key_in_errors, nearest
from scoreray.data.extras import check_installed
from scoreray.data.own_code import is_own, load, name_in_command
from scoreray.data.presets import preset
from scoreray.data.reading.manifest import Manifest
from scoreray.data.storage.store import open_store
from scoreray.sampling.evaluation.prepare import choose_extractor, choose_metrics
from scoreray.sampling.metrics.plan import EvaluationSettings
from scoreray.sampling.model.describe import ModelInfo, describe
from scoreray.sampling.offline.generate import Request
from scoreray.trainer.config import Config, explained, load_config, override, read_yaml, refusal
from scoreray.trainer.config.data_scale import misfit, resolve_sigma_data
from scoreray.trainer.config.run_fields import run_fields
from scoreray.trainer.initial import find_initial, initial_weights
from scoreray.trainer.meta import meta_module
from scoreray.trainer.optim.ema import RAW, choose_length, length_name
from scoreray.trainer.run_data import RunData, open_run_data
from scoreray.trainer.teacher import fitting_teacher
from scoreray.tune.checks import refused, schedule_mistakes, section_mistakes
from scoreray.tune.space import SAMPLE, Space, build_space
from scoreray.tune.sweep import (
    OF_HELD_OUT,
    StudyPlan,
    Sweep,
    draw_settings,
    misshapen,
    need_of,
    of_samples,
)

PROBES = 16  # random points of the space whose configs are checked besides its corners


def load_sweep(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> StudyPlan:
    """The checked sweep of a YAML file. Raises one UserError that lists every mistake, a line each."""
    name = "sweep" if isinstance(source, dict) else str(source)
    raw = read_yaml(source)
    if not raw.keys() & {"study", "space"} and raw.keys() & {"run", "data", "duration"}:
        raise UserError(f"{name}: this is a run's config, not a sweep's: scoreray train {name}")
    folder = Path() if isinstance(source, dict) else Path(source).parent
    others = [one for one in overrides if not one.startswith("base=")]
    if len(others) < len(overrides):
        raw, folder = override(raw, [one for one in overrides if one.startswith("base=")]), Path()
    if isinstance(raw.get("base"), str):
        with key_in_errors("base"):
            raw = {**raw, "base": read_yaml(preset(folder / raw["base"]))}
    raw = name_in_command(override(raw, others))
    if mistakes := misshapen(raw):
        raise refusal(name, mistakes)
    try:
        sweep = Sweep.model_validate(raw)
    except ValidationError as error:
        raise explained(error, Sweep, name) from None
    mistakes = section_mistakes(sweep)
    space, wrong = build_space(sweep.space)
    mistakes += wrong
    if not mistakes:
        assert space is not None
        plan, mistakes = _with_base(sweep, space)
    if mistakes:
        raise refusal(name, mistakes)
    return plan


def check_sweep(plan: StudyPlan) -> list[str]:
    """What needs the stores: the data are there, fit the metric and every corner's network, the study can be written.

    Returns warnings, a line each. Raises ScorerayErrors.
    """
    check_installed("tune", "a sweep", "optuna")  # its report too, whatever searches
    sweep = plan.sweep
    with key_in_errors("metric.reference"):
        manifest = Manifest.at(sweep.metric.reference)
    with key_in_errors("study.storage"):
        open_store(sweep.study.storage).child(sweep.study.name).check_writable()
    with key_in_errors("checkpoint") if sweep.checkpoint else contextlib.nullcontext():
        model = describe(sweep.checkpoint) if sweep.checkpoint else None
        infos = [model.info] if model else list(_described(plan))
    lengths = model.stored.lengths if model else (*infos[0].config.ema.names, RAW)
    mistakes = _metric_mistakes(sweep, manifest, infos[0]) + _sample_mistakes(plan, infos[0], lengths)
    if mistakes:
        raise UserError("\n".join(mistakes))
    trained_on = {url for info in infos if isinstance(url := info.config.data.url, str)}
    warnings = _warnings(sweep, manifest, trained_on)
    if model:
        return warnings
    data: dict[str, RunData] = {}
    unfit = [misfit(c, run_fields(c.data, _data_of(c, data), c.autoencoder)) for c in (info.config for info in infos)]
    if unfit[0] and all(found and found.hopeless for found in unfit):  # every trial would be refused
        raise UserError(f"base: {unfit[0].text}")
    return [*warnings, f"base: {unfit[0].text}"] if unfit[0] else warnings


def check_room(plan: StudyPlan, room: Mapping[str, float]) -> None:
    """Raises UserError when a trial would wait for more than the cluster has."""
    for where, need in needs(plan):
        for name, amount in need.items():
            if amount > room.get(name, 0.0) + 1e-9:
                raise UserError(
                    f"{where}a trial needs {amount:g} {name}, the cluster has {room.get(name, 0.0):g}; ask for less, "
                    "or connect to a larger cluster with RAY_ADDRESS"
                )


def needs(plan: StudyPlan) -> Iterator[tuple[str, dict[str, float]]]:
    """What trials may take, at the ends of the search space: ("resources: ", or the key and value; the need)."""
    for one, value, values in plan.corners():
        config = None if plan.sweep.checkpoint else plan.config(values)
        yield f"space.{one.key}: at {value!r} " if one else "resources: ", need_of(plan, config)


def _warnings(sweep: Sweep, manifest: Manifest, trained_on: set[str]) -> list[str]:
    """Fewer images than asked for; and images that are trained on, where the metric needs such as are not (FID and its
    like are often of those)."""
    found = []
    if sweep.metric.count > manifest.num_samples:
        found.append(
            f"metric.count: {sweep.metric.count:,} images asked for, {sweep.metric.reference} holds "
            f"{manifest.num_samples:,}; all of these are used"
        )
    held_out = [name for name in sweep.metric.names if name in OF_HELD_OUT]
    if not held_out:
        return found
    for url in sorted(trained_on):
        same = url.rstrip("/") == sweep.metric.reference.rstrip("/")
        with contextlib.suppress(ScorerayError):  # a checkpoint's own data need not be within reach
            same = same or Manifest.load(open_store(url)).shards == manifest.shards
        if same:
            return [
                *found,
                f"metric.reference: {sweep.metric.reference} holds the images that are trained on ({url}), so "
                f"{' and '.join(held_out)} will favour trials that learn them by heart; give images that training "
                "does not see",
            ]
    return found


def _with_base(sweep: Sweep, space: Space) -> tuple[StudyPlan, list[str]]:
    """The plan, and what a run's config refuses: at the base, at each corner, and at some points between."""
    if sweep.checkpoint is not None:
        return StudyPlan(sweep, space, {}), []
    if found := refused(lambda: load_config(_tracking(sweep))):
        return StudyPlan(sweep, space, {}), [f"base: {line}" for line in found]
    plan = StudyPlan(sweep, space, load_config(_tracking(sweep)).model_dump(mode="json"))
    if plan.raw["duration"]["images"] is None:
        return plan, ["base.duration: trials are as long as each other, in images; give base.duration.images"]
    names = {one.key for one in space.dimensions} | plan.base.keys()
    found += [
        f"space.{one.key}.when: unknown key '{key}'; {nearest(key, names)}"
        for one in space.dimensions
        for key, _ in one.when
        if key not in names
    ]
    if found:
        return plan, found
    for one, value, values in space.corners(plan.base):
        for line in refused(partial(plan.config, values)):
            unknown = ": unknown key" in line  # whatever the value
            found.append(f"space.{line}" if unknown else f"space.{one.key}: at {value!r}: {line}")
    if not found:
        rng = random.Random(0)
        for values in (space.draw(rng, plan.base) for _ in range(PROBES)):
            shown = ", ".join(f"{key}={value}" for key, value in values.items())
            found += [f"space: at {shown}: {line}" for line in refused(partial(plan.config, values))][:1]
    return plan, list(dict.fromkeys(found)) or schedule_mistakes(plan)


def _tracking(sweep: Sweep) -> dict[str, Any]:
    """The base config, which also tracks every EMA length that is searched: one run has them all."""
    raw = dict(sweep.base or {})
    raw.setdefault("run", {})
    raw["run"] = {"name": sweep.study.name, "storage": sweep.study.storage, **raw["run"]}
    lengths = sweep.space.get("sample.ema")
    if lengths is not None and lengths.choice:
        ema = dict(raw.get("ema") or {})
        given = [float(std) for std in ema.get("stds", (0.05, 0.10))]
        named = {length_name(str(std), given): std for std in given}
        for one in lengths.choice:
            if _is_number(one):
                named.setdefault(length_name(str(one), given), float(one))
        raw["ema"] = {**ema, "stds": list(named.values())}
    return raw


def _described(plan: StudyPlan) -> Any:
    """A model's description at the base and every corner, each of whose networks is built without memory."""
    seen: dict[str, RunData] = {}
    for _, _, values in plan.corners():
        config = plan.config(values)
        with key_in_errors("space.data.url" if "data.url" in values else "base.data.url"):
            data = _data_of(config, seen)
        try:
            fields = run_fields(config.data, data, config.autoencoder, config.alignment)
            config = resolve_sigma_data(config, fields)
            meta_module(config, fields)
            if (initial := find_initial(config)) is not None:
                initial_weights(initial, config, fields)
            fitting_teacher(config, fields, None)
        except UserError as error:
            shown = ", ".join(f"{key}={value}" for key, value in values.items())
            raise UserError(f"space: at {shown}: {error}") from None
        yield ModelInfo.planned(config, fields)


def _data_of(config: Config, seen: dict[str, RunData]) -> RunData:
    """What is at `data.url`, looked at once for each section that says so."""
    key = config.data.model_dump_json()
    if key not in seen:
        seen[key] = open_run_data(config, patient=False)
    return seen[key]


def _metric_mistakes(sweep: Sweep, manifest: Manifest, info: ModelInfo) -> list[str]:
    found = []
    if tuple(manifest.shape) != info.sample_shape:
        found.append(
            f"metric.reference: samples of shape {list(manifest.shape)}, training has {list(info.sample_shape)}; "
            "give a data set of that shape"
        )
    is_8_bit = manifest.dtype == "uint8" and info.encoding is None
    latents = None if info.encoding is None or info.target is None else info.target.name
    measured = of_samples(sweep.metric.names)
    if latents and set(sweep.metric.names) - set(measured) and latents not in {one.name for one in manifest.fields}:
        found.append(f"metric.reference: has no field '{latents}', the latents that training has")
    if "bpd" in sweep.metric.names and not is_8_bit:
        found.append("metric.names: bpd is of 8-bit images; use nats for these data")
    if "nats" in sweep.metric.names and is_8_bit:
        found.append("metric.names: nats is of real-valued data; use bpd for 8-bit images")
    if info.instead_of_mean and (wrong := set(sweep.metric.names) & {"denoising", "bpd", "nats"}):
        found.append(f"metric.names: {min(wrong)}: {info.instead_of_mean}; give fid, kid or sw")
    if found or not measured:
        return found
    try:
        for name in filter(is_own, measured):
            load(name, "names")
        settings = EvaluationSettings("", sweep.metric.reference, measured, extractor=sweep.metric.extractor)
        extractor = choose_extractor(settings, manifest, None)
        choose_metrics(measured, info, manifest, extractor, settings.restoration)
    except ScorerayError as error:
        found.append(f"metric: {error}")
    return found


def _sample_mistakes(plan: StudyPlan, info: ModelInfo, lengths: Sequence[str]) -> list[str]:
    """What drawing samples refuses, at each corner of the `sample.` keys."""
    found = []
    for one, value, values in plan.corners():
        where = "metric: " if one is None else f"space.{one.key}: at {value!r}: "
        if one is not None and not one.key.startswith(SAMPLE):
            continue
        try:
            drawn = draw_settings(plan.sweep, values)
            if drawn["ema"] is not None:
                choose_length(str(drawn["ema"]), lengths, info.url or "the trials' runs", info.config.ema.stds)
            request = Request(count=16, sampler=drawn["sampler"], steps=drawn["steps"], grid=drawn["grid"],
                              guidance=float(drawn["guidance"]), options=drawn["options"])  # fmt: skip
            request.fitted(info).calls(info)
        except (ScorerayError, TypeError) as error:
            found.append(f"{where}{error}")
    return found


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
