"""From a data set's fields to what a run models and what conditions it: `data.target`, `data.conditions`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import ConfigDict
from torch import Tensor

from scoreray.data.buckets.bucketed import BucketedSet
from scoreray.data.distances import largest_distance
from scoreray.data.errors import UserError, nearest
from scoreray.data.fields.description import DataDescription
from scoreray.data.fields.encoding import Encoding
from scoreray.data.fields.field import NAME, TARGETS, Field, FieldRequest, class_field, target_of
from scoreray.data.fields.field_kinds import FieldDtype, FieldKind
from scoreray.data.fields.normalisation import Normalisation, Normaliser
from scoreray.data.reading.field_values import FieldTensors
from scoreray.data.reading.manifest import Manifest
from scoreray.trainer.config.condition_values import condition_of_fields
from scoreray.trainer.config.sections import AutoencoderSection, ConditionSection, DataSection
from scoreray.trainer.diffusion.condition import LABEL, Condition, ConditionKind, ConditionSpec
from scoreray.trainer.diffusion.levels import LEVELS
from scoreray.trainer.objectives.base import AlignmentConfig

KINDS: dict[FieldKind, tuple[ConditionKind, ...]] = {
    "image": ("concat",),
    "array": ("concat", "vector", "sequence"),
    "class": ("class",),
    "scalar": ("vector",),
    "vector": ("vector",),
    "sequence": ("sequence",),
    "text": ("text",),
    "json": (),
}
"""How a field of each kind can condition a network; the first is the default."""
RANKS: dict[ConditionKind, int] = {"vector": 1, "sequence": 2}  # of arrays that are used so
LONGEST = 1024  # tokens or bytes that a condition has without being asked for, or where the data have fewer
TARGET_STD, CONDITION_STD = 0.5, 1.0  # of normalised values: EDM's default sigma_data, and unit variance


@dataclass(frozen=True)
class TargetField:
    """The field that a run models. dtype: of its values in the data set; normaliser: from its own units to the
    model's, None of images (0 to 255 become -1 to 1).  encoding: what decodes it, of latents (`Field.encoding`)."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    name: str
    kind: FieldKind
    dtype: FieldDtype
    normaliser: Normaliser | None = None
    encoding: Encoding | None = None

    @property
    def holds_moments(self) -> bool:
        """Whether what is read are means and standard deviations, from which the run draws."""
        return self.encoding is not None and self.encoding.moments

    def same_values(self, other: TargetField) -> bool:
        """Whether both are one field of the same values: wherever its encoder is stored now."""
        return self._without_place() == other._without_place()

    def _without_place(self) -> TargetField:
        return self if self.encoding is None else replace(self, encoding=self.encoding.without_place())


@dataclass(frozen=True)
class RunFields:
    """What a run models and what conditions it, resolved against its data.

    shape: of a sample of the target, as the network sees it; of data in buckets, in the one with the most samples.
    shapes, shares: of each bucket's samples, and what share of all it holds; none where all are of one shape.
    conditions: what of the data conditions the network, by name; sources: the field that each is read from; dropout:
    the share of samples that lose each on its own.  requests: what a stream reads.
    mean, std: of each channel of the target as the network sees it; sigma_data: of all its values.  features: the field
    that `objective.alignment` names.  source: what is read of `objective.source`'s data set.
    """

    target: TargetField
    shape: list[int]
    mean: list[float]
    std: list[float]
    sigma_data: float
    conditions: dict[str, ConditionSpec] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    dropout: dict[str, float] = field(default_factory=dict)
    requests: tuple[FieldRequest, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    shares: tuple[float, ...] = ()
    features: Field | None = None
    source: FlowStart | None = None

    @property
    def is_image(self) -> bool:
        return self.target.kind == "image"

    def largest_distance(self, samples: Tensor) -> float | None:
        """Between two of the target's samples [N, ...], given in the data's own units, as the network sees them: noise
        of this size makes any of them reachable from any other (Song & Ermon 2020, technique 1). None for a single
        sample."""
        if len(samples) < 2:
            return None
        normaliser = self.target.normaliser
        return largest_distance(samples) / 127.5 if normaliser is None else largest_distance(normaliser.apply(samples))

    def inputs(self, batch: FieldTensors) -> tuple[Tensor, Condition | None]:
        """(the target's values, what conditions them) of samples, in the data's own units."""
        return batch.fields[self.target.name], condition_of_fields(batch, self.sources, self.conditions)

    def features_of(self, batch: FieldTensors) -> tuple[Tensor, ...]:
        """What `objective.alignment` compares with, as further arguments of the training module; () without it."""
        return () if self.features is None else (batch.fields[self.features.name],)


@dataclass(frozen=True)
class FlowStart:
    """The data set that a flow starts from (`objective.source`), and what is read of it."""

    manifest: Manifest
    fields: RunFields


def run_fields(
    section: DataSection,
    data: DataDescription,
    autoencoder: AutoencoderSection | None = None,
    alignment: AlignmentConfig | None = None,
) -> RunFields:
    """`alignment`: of the config's objective. Raises UserError with every mistake, a line each: a field that is not
    there or of a kind that does not fit, a length, a normalisation of a constant channel."""
    known = {one.name: one for one in data.fields}
    default = target_of(data.fields)
    source, target = _target(section, known, default)
    if autoencoder is not None:
        target = _decoded_by(autoencoder, section, source, target)
    shapes = _shapes(source, data)
    conditions, sources, dropout = dict[str, ConditionSpec](), dict[str, str](), dict[str, float]()
    requests, mistakes = [FieldRequest(source.name)], list[str]()
    for name, one in _sections(section, known).items():
        key = f"data.conditions.{name}"
        try:
            spec, request = _condition(key, name, one, known, source)
            if shapes and (spec.kind == "concat" or _shapes(known[request.field], data)):
                raise UserError(
                    f"{key}: field '{request.field}' has one size, and the data set's buckets have "
                    "several; leave it out"
                )
            if request.field in sources.values():
                raise UserError(
                    f"{key}: field '{request.field}' conditions the network already, under another name; leave one out"
                )
        except UserError as error:
            mistakes.append(str(error))
            continue
        conditions[name], sources[name], dropout[name] = spec, request.field, one.dropout
        requests.append(request)
    features = None
    if alignment is not None:
        try:
            if shapes:
                raise UserError("objective.alignment: the data set is in buckets, whose tokens differ in number")
            features = _features(alignment.field, known, [source.name, *sources.values()])
            requests.append(FieldRequest(features.name))
        except UserError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UserError("\n".join(mistakes))
    as_they_are = target.normaliser is None or target.normaliser.kind == "none"
    if (
        source is default and as_they_are
    ):  # the manifest's own numbers: an auto sigma_data stays what it was, to the bit
        mean, std, sigma_data = data.channel_means(), data.std, data.sigma_data
    else:
        mean, std, sigma_data = _scale(source, target.normaliser)
    shape = list(source.drawn_shape) or [1]
    shares = (
        tuple(count / sum(data.counts) for count in data.counts) if isinstance(data, BucketedSet) and shapes else ()
    )
    return RunFields(
        target, shape, mean, std, sigma_data, conditions, sources, dropout, tuple(requests), shapes, shares, features
    )


def _shapes(of: Field, data: DataDescription) -> tuple[tuple[int, ...], ...]:
    """Of a field in each bucket; none where all are the same."""
    found = data.shapes_of(of.name) if isinstance(data, BucketedSet) and not of.is_varying else []
    return tuple(map(tuple, found)) if any(one != found[0] for one in found) else ()


def _sections(section: DataSection, known: Mapping[str, Field]) -> dict[str, ConditionSection]:
    """The conditions that a config names; where it leaves them out, the data's first classes as `label`."""
    if section.conditions is not None:
        return section.conditions
    classes = class_field(known.values())
    return {} if classes is None else {LABEL: ConditionSection(field=classes.name)}


def _target(section: DataSection, known: Mapping[str, Field], default: Field) -> tuple[Field, TargetField]:
    source = default if section.target is None else known.get(section.target)
    if source is None:
        raise UserError(
            f"data.target: the data set has no field '{section.target}'; {nearest(section.target or '', known)}"
        )
    if source.kind not in TARGETS:
        raise UserError(
            f"data.target: field '{source.name}' is of kind {source.kind}; what is modelled must be one of "
            f"{', '.join(TARGETS)}"
        )
    if source.kind != "image":
        normaliser = normaliser_of("data.normalisation", source, section.normalisation, TARGET_STD)
        return source, TargetField(source.name, source.kind, source.dtype, normaliser, source.encoding)
    if section.normalisation not in (None, "range"):
        raise UserError(
            f"data.normalisation: '{section.normalisation}' of field '{source.name}', and images always go from 0..255 "
            "to -1..1; leave it out"
        )
    return source, TargetField(source.name, source.kind, source.dtype)


def _decoded_by(section: AutoencoderSection, data: DataSection, source: Field, target: TargetField) -> TargetField:
    """The target with the autoencoder and the scale that a config gives. Raises UserError."""
    found = source.encoding
    if found is None or not found.can_decode:
        raise UserError(
            f"autoencoder: field '{source.name}' of the data set was made by none; name one of latents by data.target "
            "(`scoreray data encode` makes them), or leave the section out"
        )
    found = replace(found, kind=section.kind or found.kind, path=section.path or found.path)
    normaliser = target.normaliser
    if section.scale is not None or section.shift is not None:
        if data.normalisation is not None:
            raise UserError("autoencoder.scale and shift: data.normalisation is another scale; leave one of them out")
        channels, measured = source.num_channels, target.normaliser or Normaliser("none")
        offset = (0.0,) if section.shift is None else section.shift
        scale = measured.scale if section.scale is None else tuple(1 / value for value in section.scale)
        parts = {"shift": offset, "scale": scale or (1.0,)}
        for name, values in parts.items():
            if len(values) not in (1, channels):
                raise UserError(
                    f"autoencoder.{name}: {len(values)} numbers, and latents '{source.name}' have {channels} channels; "
                    "give one, or one a channel"
                )
            parts[name] = values * (channels // len(values))
        normaliser = Normaliser("channel", parts["shift"], parts["scale"])
    return replace(target, encoding=found, normaliser=normaliser)


def _condition(
    key: str, name: str, section: ConditionSection, known: Mapping[str, Field], target: Field
) -> tuple[ConditionSpec, FieldRequest]:
    """Raises UserError, which begins with `key`."""
    if not re.fullmatch(NAME, name):
        raise UserError(f"{key}: a condition's name is lower-case letters, digits and '_', 64 at most, a letter first")
    if name in LEVELS:
        raise UserError(f"{key}: the name is reserved for an input that samplers and requests set; name it otherwise")
    wanted = section.field or name
    source = known.get(wanted)
    if source is None:
        raise UserError(f"{key}: the data set has no field '{wanted}'; {nearest(wanted, known)}")
    if source is target:
        raise UserError(f"{key}: field '{wanted}' is what the run models (data.target); it can't condition itself")
    kind = _kind(key, section, source, target)
    if section.max_length is not None and not source.is_varying:
        raise UserError(f"{key}.max_length: is for sequences and text, and field '{wanted}' is {_described(source)}")
    length = _length(key, section, source) if source.is_varying else None
    request = FieldRequest(source.name, length, section.too_long)
    chosen, shape = section.normalisation, tuple(source.shape) or (1,)
    if kind in ("class", "text"):
        if chosen not in (None, "none"):
            raise UserError(f"{key}.normalisation: '{chosen}' is for numbers, and this is a {kind}; leave it out")
        return ConditionSpec(kind, () if length is None else (length,), tuple(source.classes)), request
    if kind == "sequence" and not source.is_varying:  # its statistics are of the first axis, which is the tokens' here
        if chosen not in (None, "none"):
            raise UserError(f"{key}.normalisation: '{chosen}' needs statistics by token's entry; pack it as a sequence")
        chosen = "none"
    normaliser = normaliser_of(f"{key}.normalisation", source, chosen, CONDITION_STD)
    shape = shape if length is None else (length, *shape[1:])
    spec = ConditionSpec(kind, shape, normaliser=normaliser)
    if source.encoding is not None and source.encoding.of_kind == "text":
        spec = replace(spec, encoding=source.encoding, data_dtype=source.dtype)
    return spec, request


def _features(name: str, known: Mapping[str, Field], used: Sequence[str]) -> Field:
    """The field of features that hidden tokens are drawn to. Raises UserError."""
    key, found = "objective.alignment.field", known.get(name)
    if found is None:
        raise UserError(f"{key}: the data set has no field '{name}'; {nearest(name, known)}")
    if name in used:
        raise UserError(f"{key}: field '{name}' is modelled or conditions the network already; name one of features")
    if found.kind not in ("sequence", "array") or len(found.shape) < 2:
        raise UserError(
            f"{key}: field '{name}' is {_described(found)}; features are a sequence, or an array of two axes or more"
        )
    return found


def _kind(key: str, section: ConditionSection, source: Field, target: Field) -> ConditionKind:
    """How a field conditions the network. Raises UserError where it can't so."""
    rank, shown = len(source.shape), _described(source)
    fitting = [kind for kind in KINDS[source.kind] if source.kind != "array" or RANKS.get(kind, rank) == rank]
    if "concat" in fitting and not rank == len(target.shape) > 1:
        fitting.remove("concat")
        shown += f", and the samples {_shape(target)}"
    if not fitting or (section.kind or fitting[0]) not in fitting:
        what = f".kind: {section.kind}" if section.kind else ""
        accepted = f"accepted: {', '.join(fitting)}" if fitting else "it can't condition a network"
        raise UserError(f"{key}{what}: field '{source.name}' is {shown}; {accepted}")
    return section.kind or fitting[0]


def _length(key: str, section: ConditionSection, source: Field) -> int:
    """Tokens or bytes that the network is built for. Raises UserError."""
    longest = source.shape[0]
    unit = "bytes" if source.kind == "text" else "tokens"
    if section.max_length is None:
        if longest > LONGEST:
            raise UserError(
                f"{key}.max_length: missing, and the longest '{source.name}' has {longest:,} {unit}; set it, with "
                f"{key}.too_long=cut to cut longer ones"
            )
        return longest
    if section.max_length > max(longest, LONGEST):
        raise UserError(
            f"{key}.max_length: {section.max_length:,}, and the longest '{source.name}' has {longest:,} {unit}: what "
            f"is beyond is padding, which takes memory and time; set it to {longest:,}"
        )
    if section.max_length < longest and section.too_long == "refuse":
        raise UserError(
            f"{key}.max_length: {section.max_length:,}, and the longest '{source.name}' has {longest:,} {unit}; set "
            f"{key}.too_long=cut to cut longer ones, or a greater one"
        )
    return section.max_length


def normaliser_of(key: str, source: Field, chosen: Normalisation | None, std: float) -> Normaliser:
    """From a field's statistics; None takes the field's own choice. `std`: of normalised values, by "channel" and
    "log1p". Raises UserError, which begins with `key`, where a channel is constant or the statistics are not known."""
    kind = chosen or ("range" if source.kind == "image" and source.normalisation == "none" else source.normalisation)
    if kind == "none":
        return Normaliser("none")
    if kind == "range":
        low, high = (source.low, source.high)
        if source.kind == "image":
            low, high = [0.0] * source.shape[0], [255.0] * source.shape[0]
        offset = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        scale = [(b - a) / 2 for a, b in zip(low, high, strict=True)]
    else:
        offset, spread = (source.mean, source.std) if kind == "channel" else (source.log_mean, source.log_std)
        scale = [value / std for value in spread]
    if not scale or len(offset) != len(scale):
        raise UserError(
            f"{key}: '{kind}' of field '{source.name}' needs statistics that the data set was packed without; pack it "
            "again, or choose another"
        )
    constant = [number for number, value in enumerate(scale) if not (value > 0 and math.isfinite(value))]
    if constant:
        which = f"channel {constant[0]}" if len(scale) > 1 else "it"
        raise UserError(
            f"{key}: '{kind}' of field '{source.name}': {which} has the same value in every sample, which can't "
            "be scaled; leave it out of the data, or choose none"
        )
    return Normaliser(kind, tuple(offset), tuple(scale))


def _scale(source: Field, normaliser: Normaliser | None) -> tuple[list[float], list[float], float]:
    """(mean and std of each channel, std of all values) of normalised values."""
    if normaliser is None:
        normaliser = normaliser_of("", source, "range", TARGET_STD)
    mean, std = source.mean, source.std
    if normaliser.kind == "log1p":
        mean, std = source.log_mean, source.log_std
    if normaliser.kind != "none":
        mean = [(a - b) / c for a, b, c in zip(mean, normaliser.offset, normaliser.scale, strict=True)]
        std = [a / b for a, b in zip(std, normaliser.scale, strict=True)]
    center = sum(mean) / max(1, len(mean))
    squares = [a * a + (b - center) ** 2 for a, b in zip(std, mean, strict=True)]
    return mean, std, math.sqrt(sum(squares) / max(1, len(squares)))


def _described(source: Field) -> str:
    return f"of kind {source.kind} {_shape(source)}" if source.shape else f"of kind {source.kind}"


def _shape(source: Field) -> str:
    return f"[{', '.join(map(str, source.shape))}]"
