"""COMMITTED.json, what commits a checkpoint: which files it is made of, and what was trained on what; sealed.

This module alone writes and reads it, and the table of files that each rank stores for rank 0. Format 1 had neither the
seal nor the data set: it is read with a note, as far as it can be checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

from scoreray.data.fields.description import DataDescription
from scoreray.data.reading.manifest import Sha256
from scoreray.data.seal import read_sealed, sealed
from scoreray.trainer.config import DataSection
from scoreray.trainer.config.run_fields import TargetField, run_fields
from scoreray.trainer.config.sections import AutoencoderSection
from scoreray.trainer.diffusion.condition import ConditionSpec
from scoreray.trainer.optim.ema import described_length

FORMAT = 2
UNSEALED = 1  # the format before there were seals
Number = Annotated[int, Field(ge=0, lt=1 << 62)]
_CONFIG = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class StoredFile:
    """One safetensors file. `fragments`: (parameter, first element, how many) of what is stored in it."""

    __pydantic_config__ = _CONFIG

    bytes: Number
    sha256: Sha256
    fragments: list[tuple[str, Number, Number]] = field(default_factory=list)


@dataclass(frozen=True)
class DataSet:
    """Which samples a run saw, in which order: the `identity` of the data. num_samples: None where it is not known."""

    __pydantic_config__ = _CONFIG

    num_samples: Number | None
    sha256: Sha256

    @staticmethod
    def of(data: DataDescription) -> DataSet:
        return DataSet(data.num_samples, data.identity)


@dataclass(frozen=True)
class Ancestor:
    """A model that a run began from: where it was, which of its averages, and the SHA-256 of its marker or model.json.

    images_seen: by that model, in its own run.  weights: SHA-256 of its weights as an export of them has it, of what a
    LoRA adapts: so that it is known again in a copy that was exported."""

    __pydantic_config__ = _CONFIG

    checkpoint: str
    ema: str
    images_seen: Number
    sha256: Sha256
    weights: Sha256 | None = None

    def text(self) -> str:
        at = f"at {self.images_seen:,} images, {described_length(self.ema)}"
        return f"{self.checkpoint} {at}, SHA-256 {self.sha256[:12]}"


@dataclass(frozen=True)
class Marker:
    """What a committed checkpoint (or snapshot of averages) is.

    config: of the run, as `Config.model_dump` gives it.  shapes: of every parameter.  state_keys: what is stored of
    each beside its master.  image_shape, classes, data: of what it was trained on; data is None in format 1.
    image_shapes: of data in buckets, the shape in each; image_shape is the first of them.
    time: when it was committed, seconds since 1970.  target, conditions: what is modelled, and what conditions it; None
    of earlier versions, which means the images as they are and the classes.  frozen: parameters that were not trained,
    of which only the master is stored.  lineage: what the run began from, what that began from, and so on.
    Of a LoRA only what is trained is stored, and has its shape in `shapes`; what it adapts is the first of the lineage.
    own_code: SHA-256 of the code of each part of somebody else's that the config names.
    source: the data set of `objective.source`, where a flow starts from one.  teacher: the model of
    `objective.teacher`, exactly.
    """

    __pydantic_config__ = _CONFIG

    images_seen: Number
    num_steps: Number
    config: dict[str, Any]
    shapes: dict[str, list[Number]]
    state_keys: list[str]
    files: dict[str, StoredFile]
    world_size: Annotated[int, Field(ge=1)]
    time: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    image_shape: list[Number] = field(default_factory=list)
    image_shapes: list[list[Number]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    data: DataSet | None = None
    skipped_steps: Number = 0
    target: TargetField | None = None
    conditions: dict[str, ConditionSpec] | None = None
    frozen: list[str] = field(default_factory=list)
    lineage: list[Ancestor] = field(default_factory=list)
    own_code: dict[str, Sha256] = field(default_factory=dict)
    source: DataSet | None = None
    teacher: Ancestor | None = None
    format: Annotated[int, Field(ge=UNSEALED, le=FORMAT)] = FORMAT

    def __post_init__(self) -> None:
        if self.format == UNSEALED and self.data is not None:
            raise ValueError(f"format {UNSEALED} knows no data set")
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        for name, file in self.files.items():
            if "/" in name or "\0" in name:
                raise ValueError(f"bad entry for file {name!r}: its name is a path")
            for parameter, start, length in file.fragments:
                if not length or start + length > sizes.get(parameter, 0):
                    raise ValueError(f"bad entry for file {name!r}: {parameter} has no [{start}, {start + length})")

    @property
    def is_lora(self) -> bool:
        """Whether only what is trained is stored: adapters of the model that the run began from."""
        return self.config.get("lora") is not None

    @property
    def sigma_data(self) -> float:
        """What the run's `denoiser.sigma_data: auto` was settled to when it began."""
        return float(self.config["denoiser"]["sigma_data"])

    def __getitem__(self, name: str) -> Any:
        """A field by its name, as in the file; for notebooks and scripts."""
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def to_json(self) -> bytes:
        """For people too: a field a line, a file a line."""
        fields = {"format": self.format, **{key: value for key, value in page_fields(self).items() if key != "format"}}
        files = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(file)}" for name, file in fields.pop("files").items())
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items()]
        return sealed([*lines, f'"files": {{\n  {files}\n }}']).encode()

    @staticmethod
    def from_json(data: bytes, url: str) -> Marker:
        """Raises DataError in one line that names `url`."""
        place = url.rpartition("/")[0].rpartition("/")[0]
        return read_sealed(_MARKER, data, url, "checkpoint's marker", unsealed_format=UNSEALED, place=place)

    def differences(self, data: DataDescription) -> list[str]:
        """How data differ from those that were trained on, a phrase for each; none where they are the same. Raises
        UserError where they lack a field of the run's."""
        found, known = [], self.data
        fields = None
        if self.target is not None:
            section = self.config.get("autoencoder")
            autoencoder = None if section is None else AutoencoderSection.model_validate(section)
            fields = run_fields(DataSection.model_validate(self.config["data"]), data, autoencoder)
        shape = data.shape if fields is None else fields.shape
        if shape != self.image_shape:
            found.append(f"samples of shape {shape}, not {self.image_shape}")
        if data.classes != self.classes:
            found.append(_other_classes(data.classes, self.classes))
        if known is not None and data.num_samples != known.num_samples:
            found.append(f"{_samples(data.num_samples)}, not {_samples(known.num_samples)}")
        if fields is not None and not found:
            if self.target is not None and not self.target.same_values(fields.target):
                found.append(f"target {_field(fields.target)}, not {_field(self.target)}")
            for name in fields.conditions:
                if not fields.conditions[name].same_values((self.conditions or {}).get(name)):
                    found.append(f"condition '{name}' of another kind, shape or normalisation")
        if not found and known is not None and data.identity != known.sha256:
            what = "other samples or another order" if known.num_samples else "other tars"
            found.append(f"{what} (SHA-256 {data.identity[:12]}, not {known.sha256[:12]})")
        return found


def page_fields(page: Any) -> dict[str, Any]:
    """`asdict` of a dataclass that has a `target` and `conditions`: without `encoding` and `data_dtype` of what no
    encoder made, without `image_shapes` where there is one, without `source` where it is noise, and without
    `teacher` where there is none, as before there were any, so that earlier versions read it."""
    found = asdict(page)
    for key in ("image_shapes", "source", "teacher"):
        if not found.get(key, True):
            del found[key]
    for one in (found["target"], *(found["conditions"] or {}).values()):
        for key in ("encoding", "data_dtype"):
            if one is not None and key in one and one[key] is None:
                del one[key]
    return found


@dataclass(frozen=True)
class Share:
    """Table of what a rank has stored of a checkpoint; it is written last, so its existence means the rank is done."""

    __pydantic_config__ = _CONFIG

    files: dict[str, StoredFile]

    def to_json(self) -> bytes:
        return sealed([f'"files": {json.dumps(asdict(self)["files"])}']).encode()

    @staticmethod
    def from_json(data: bytes, url: str) -> Share:
        """Raises DataError in one line that names `url`."""
        return read_sealed(_SHARE, data, url, "table of a rank's share")


def _field(target: TargetField) -> str:
    scaled = target.normaliser is not None and target.normaliser.kind != "none"
    numbers = f" with normalisation {target.normaliser}" if scaled else ""
    encoder = "" if target.encoding is None else f" of {target.encoding.name}, SHA-256 {target.encoding.sha256[:12]}"
    return f"'{target.name}' ({target.kind}, {target.dtype}{numbers}{encoder})"


def _samples(count: int | None) -> str:
    return "tars without a manifest" if count is None else f"{count:,} samples"


def _other_classes(given: Sequence[str], trained: Sequence[str]) -> str:
    text = f"{len(given)} classes, not {len(trained)}" if len(given) != len(trained) else f"{len(given)} other classes"
    for which, names, others in (("new", given, trained), ("missing", trained, given)):
        some = [name for name in names if name not in set(others)]
        if some:
            text += f", {which}: {', '.join(name[:40] for name in some[:3])}{', ...' if len(some) > 3 else ''}"
    return text if set(given) != set(trained) else f"{text}: their order differs"


_MARKER, _SHARE = TypeAdapter(Marker), TypeAdapter(Share)
