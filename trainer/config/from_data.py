"""A config that fits a data set and a machine, with the reasons as comments: what `data inspect --config` writes.

The numbers are where to start from. Those of pictures are the presets' (`configs/`), whose comments say how they were
found; others are assumptions where no source is named.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from scoreray.data.buckets.bucketed import BucketedSet
from scoreray.data.errors import UserError, printable
from scoreray.data.fields.field import Field
from scoreray.data.presets import PRESETS
from scoreray.data.reading.manifest import Manifest
from scoreray.data.storage.store import local_path, open_store
from scoreray.data.yaml_text import dump_yaml, parse_yaml
from scoreray.trainer.config.network_for_data import SCALES, Hardware, network_for
from scoreray.trainer.config.run_fields import KINDS, RunFields, run_fields
from scoreray.trainer.config.sections import ConditionSection, DataSection
from scoreray.trainer.diffusion.process import EDM
from scoreray.trainer.diffusion.sigma_sampling import LogNormal

LONG_TAIL = 20.0  # standard deviations from the mean to the largest value, beyond which log1p is suggested
MAX_TOKENS, MAX_BYTES = 128, 256  # of a sequence's and a text's; longer ones are cut
DISTANCES = 256  # samples whose distances are computed
MOST_WORKERS = 8  # of a machine without GPUs
EPOCHS = 100


@dataclass
class _Draft:
    """Sections in the order in which they are written, each with why it is so."""

    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def add(self, section: str, values: Mapping[str, Any], *reasons: str) -> None:
        self.sections.setdefault(section, {}).update(values)
        self.reasons.setdefault(section, []).extend(reasons)

    def text(self, head: Sequence[str]) -> str:
        lines = [f"# {line}" for line in head]
        for name, values in self.sections.items():
            lines += [f"# {reason}" for reason in self.reasons[name]]
            lines.append(dump_yaml({name: values}).rstrip("\n"))
        return "\n".join(lines) + "\n"


def suggested_config(url: str, data: Manifest | BucketedSet, samples: Tensor, machine: Hardware) -> str:
    """YAML of a config that trains on the data set at `url` here. samples: some of the target's, as they are stored."""
    draft, target = _Draft(), data.target
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", data.name).strip("-._")[:80] or "mine"
    draft.add("run", {"name": name, "storage": _storage(url)})
    section = _data(draft, url, data, target)
    found = run_fields(section, data)
    batch = _workers(draft, data, len(found.shape) - 1, machine)
    _noise(draft, found, samples)
    network, reasons = network_for(found.shape, target, machine)
    if isinstance(data, BucketedSet) and network["kind"] == "dit":
        network["positions"] = "fixed"
        reasons.append("fixed codes of positions: the buckets are of several sizes")
    draft.add("network", network, *reasons)
    _training(draft, data, batch, machine)
    kept = f"{data.num_samples:,} samples of {' x '.join(map(str, found.shape))} ({target.name}, {target.dtype})"
    where = f"{machine.num_gpus} GPUs" if machine.num_gpus else f"{machine.cores} CPU cores"
    return draft.text(
        [
            f"Made by: scoreray data inspect {printable(shlex.quote(url))} --config",
            f"For {kept} and {where}.",
            f"Saved as {name}.yaml, or under another name, it is run by: scoreray train {name}.yaml",
        ]
    )


def _storage(url: str) -> str:
    """A place beside the data set."""
    where = local_path(url)
    if where is not None:
        return str(where.absolute().parent / "runs")
    return f"{'/'.join(open_store(url).url().split('/')[:3])}/runs"


def _data(draft: _Draft, url: str, data: Manifest | BucketedSet, target: Field) -> DataSection:
    """The section `data`: the target, how it is normalised, and a condition for every other field that can be one."""
    where = local_path(url)
    values: dict[str, Any] = {"url": open_store(url).url() if where is None else str(where.absolute())}
    reasons: list[str] = []
    if data.version > 2:
        values["target"] = target.name
    if target.kind != "image":
        chosen, why = _normalisation(target)
        values["normalisation"] = chosen
        reasons.append(f"{target.name}: {why}")
    conditions: dict[str, dict[str, Any]] = {}
    section = DataSection(**values)
    for one in data.fields:
        if one.name == target.name:
            continue
        settings, why = _condition(one)
        try:
            if not KINDS[one.kind]:
                raise UserError(f"is kept with the samples, and not read ({one.kind})")
            if reason := _says_nothing(one):
                raise UserError(reason)
            run_fields(section.model_copy(update={"conditions": {one.name: ConditionSection(**settings)}}), data)
        except UserError as error:
            reasons.append(f"{one.name}: left out of the conditions: {error}")
            continue
        conditions[one.name] = settings
        reasons.append(f"{one.name}: {why}")
    if data.version > 2 or conditions:
        values["conditions"] = conditions
    draft.add("data", values, *reasons)
    return DataSection(**{**values, "conditions": {k: ConditionSection(**v) for k, v in conditions.items()}})


def _says_nothing(one: Field) -> str:
    """Why a network learns nothing from a condition on the field, or ""."""
    if one.kind == "text" and one.shape[0] <= 1:
        return "its texts are empty, or a single byte"  # a manifest has no length 0
    if one.kind != "sequence" and one.low and one.low == one.high:
        return f"is the same in all samples, {', '.join(f'{value:.4g}' for value in one.low[:4])}"
    return ""


def _normalisation(one: Field) -> tuple[str, str]:
    """(a normalisation of a field's numbers, why)."""
    if not one.std or min(one.std) <= 0:
        return "none", "used as it is: a channel is constant, or no statistics are known, so it can't be scaled"
    tail = (
        max((high - mean) / std for high, mean, std in zip(one.high, one.mean, one.std, strict=True)) if one.high else 0
    )
    if one.low and one.log_std and min(one.low) >= 0 and tail > LONG_TAIL and min(one.log_std) > 0:
        return "log1p", f"never negative, and the largest value is {tail:.0f} standard deviations from the mean"
    s = "s" if len(one.std) > 1 else ""
    mean, std = (f"{min(of):.3g} to {max(of):.3g}" if s else f"{of[0]:.3g}" for of in (one.mean, one.std))
    return "channel", f"mean{s} {mean} and standard deviation{s} {std} become 0 and 0.5; samples leave in its own units"


def _condition(one: Field) -> tuple[dict[str, Any], str]:
    """(settings of a condition, why)."""
    if one.kind == "class":
        return {"field": one.name}, f"{len(one.classes):,} classes"
    if one.kind in ("text", "sequence"):
        most, unit = (MAX_BYTES, "bytes") if one.kind == "text" else (MAX_TOKENS, "tokens")
        settings: dict[str, Any] = {"field": one.name, "max_length": min(one.shape[0], most)}
        if one.shape[0] > most:
            settings["too_long"] = "cut"
            return settings, f"the longest has {one.shape[0]:,} {unit}; what is beyond {most} is cut"
        return settings, f"the longest has {one.shape[0]:,} {unit}"
    if one.kind == "image":
        return {"field": one.name}, "a picture, resized to the sample's and joined to its channels"
    chosen, why = _normalisation(one)
    kinds = {"array": "joined to the sample's channels, resized to it", "scalar": "a number"}
    kind = kinds.get(one.kind, f"{one.shape[0] if one.shape else 1:,} numbers")
    return {"field": one.name, "normalisation": chosen}, f"{kind}; {why.replace('0 and 0.5', '0 and 1').split(';')[0]}"


def _workers(draft: _Draft, data: Manifest | BucketedSet, axes: int, machine: Hardware) -> int:
    """`scaling`, and the global batch, which is returned: a power of two that no data set is smaller than."""
    workers = _power_of_two(machine.num_gpus or min(MOST_WORKERS, machine.cores))
    batch = SCALES[machine.device].batch[axes] * workers
    batch = max(workers, min(batch, _power_of_two(data.num_samples)))
    draft.add("data", {"global_batch_size": batch})
    why = "a worker for each GPU" if machine.num_gpus else "no GPU was found: workers share the cores"
    values = {"workers": workers, "use_gpu": machine.num_gpus > 0, "cpus_per_worker": max(1, machine.cores // workers)}
    draft.add("scaling", values, why)
    return batch


def _noise(draft: _Draft, found: RunFields, samples: Tensor) -> None:
    """`denoiser`, `process` and the noise levels of training: Karras 2022, table 1, in units of the data's scale."""
    factor = found.sigma_data / 0.5
    scale = f"the standard deviation of the data as the network sees them, {found.sigma_data:.3g}"
    draft.add("denoiser", {"sigma_data": "auto"}, scale)
    distance = found.largest_distance(samples[:DISTANCES]) or 0.0
    largest = max(distance, 20 * found.sigma_data)
    if len(found.shape) > 1:
        largest = max(largest, EDM().sigma_max * factor)
    draft.add(
        "process",
        {"kind": "edm", "sigma_min": _rounded(EDM().sigma_min * factor), "sigma_max": _rounded(largest)},
        "noise from 1/250 of that to more than the largest distance of two samples,",
        f"{distance:.3g} of those looked at (Song & Ermon 2020, technique 1)",
    )
    P_mean = round(LogNormal().P_mean + math.log(factor), 2)
    values: dict[str, Any] = {"kind": "edm", "sigma_sampling": {"kind": "log_normal", "P_mean": P_mean}}
    reasons = []
    if found.conditions:
        values["label_dropout"] = 0.1
        reasons.append("a tenth of the samples lose all conditions, so that guidance works (Ho & Salimans 2022)")
    draft.add("objective", values, *reasons)


def _training(draft: _Draft, data: Manifest | BucketedSet, batch: int, machine: Hardware) -> None:
    least, most = SCALES[machine.device].images
    images = max(least, min(most, EPOCHS * data.num_samples))
    optimizer, reasons = _optimizer(draft.sections["network"]["kind"], machine)
    draft.add("optimizer", {**optimizer, "warmup_images": images // 20, "schedule": "cosine"}, *reasons)
    draft.add("ema", {"stds": [0.05, 0.1]})
    why = "has units for bf16" if machine.has_bf16 else "computes no faster in bf16"
    precision = "bf16" if machine.has_bf16 else "fp32"
    draft.add("engine", {"precision": precision, "compile": machine.num_gpus > 0}, f"this machine {why}")
    epochs = f"{images / data.num_samples:.0f} times each sample; look at samples on the way"
    draft.add("duration", {"images": images}, epochs)
    draft.add("checkpoint", {"every_images": max(batch, images // 20)})
    draft.add("log", {"every_images": max(batch, images // 200)})


def _optimizer(network: str, machine: Hardware) -> tuple[dict[str, Any], list[str]]:
    """(which optimizer, with its learning rate, why): the demo's where the network is one of its kind."""
    if network == "unet" and not machine.num_gpus:
        demo = parse_yaml((PRESETS / "demo.yaml").read_text(), "demo.yaml")["optimizer"]
        return {key: demo[key] for key in ("kind", "learning_rate")}, [
            "as of the demo: small U-Nets had a lower FID by Muon than by AdamW after 20,000 images "
            "(longer runs were not compared), docs/networks.md"
        ]
    return {"learning_rate": 3e-4 if network == "dit" else 1e-3}, []


def _power_of_two(number: int) -> int:
    """The largest that is not above `number`."""
    return 1 << (max(1, number).bit_length() - 1)


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
