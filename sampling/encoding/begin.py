"""What is encoded, by which encoders, into which fields: checked, and tried on a few samples, before work begins."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from scoreray.data.errors import UserError, nearest
from scoreray.data.fields.field import NAME, Field, FieldRequest
from scoreray.data.fields.field_kinds import FieldDtype
from scoreray.data.fields.limits import is_picture
from scoreray.data.fields.normalisation import to_unit_range
from scoreray.data.packing.pack import SHARD_BYTES
from scoreray.data.reading.manifest import Manifest, check_limits
from scoreray.data.reading.samples import SampleReader, spread
from scoreray.data.storage.store import open_store
from scoreray.sampling.encoding.encode import FieldEncoder
from scoreray.sampling.encoding.plan import EncodePlan, without_statistics
from scoreray.sampling.representations.encoder import ModelEncoder, load_any_encoder
from scoreray.trainer.encoders.base import Autoencoder, fit_preview, without_moments

BATCH_SIZE = 16  # fills a CPU's matrix kernels
SHARDS = 64  # about so many at least: they are what actors share, and what a killed start keeps
PREVIEW_SAMPLES = 16
DTYPES: tuple[FieldDtype, ...] = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class EncodeOptions:
    """What a person says of an encoding beside its encoders; of None a default is found in the data.

    moments: a variational autoencoder's means and standard deviations are stored, from which a run draws at every
    epoch again; else one draw of each sample.  keep, drop: names of the source's fields. Without them pictures and
    arrays that are encoded are left out, and all else is kept.
    """

    moments: bool = True
    dtype: str = "float16"
    keep: Sequence[str] = ()
    drop: Sequence[str] = ()
    batch_size: int | None = None
    samples_per_shard: int | None = None
    seed: int = 0
    name: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class EncodedField:
    """One --encoder with its --field and --to."""

    encoder: str
    of: str
    to: str


def plan_encoding(url: str, out: str, wanted: Sequence[EncodedField], options: EncodeOptions) -> EncodePlan:
    """Of a data set of one size. Raises UserError, DataError, StorageError."""
    return with_previews(untried_plan(url, out, wanted, options))


def untried_plan(
    url: str, out: str, wanted: Sequence[EncodedField], options: EncodeOptions, share: float = 1.0
) -> EncodePlan:
    """Checked, but with no sample encoded yet. share: of all samples, where this is a bucket. Raises as
    `plan_encoding`."""
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype {options.dtype}: {nearest(options.dtype, DTYPES)}")
    source, device = SampleReader(url), None if options.device == "auto" else options.device
    if open_store(out).url() == source.url:
        raise UserError(f"{source.url}: is the data set that is encoded; what comes of it needs another URL")
    manifest = source.manifest
    carried = _carried(manifest, wanted, options)
    _check_names(wanted, carried)
    encoders = tuple(_field_encoder(manifest, one, options, device) for one in wanted)
    batch_size, made = options.batch_size or BATCH_SIZE, [one.makes for one in encoders]
    size = options.samples_per_shard or _samples_per_shard(manifest, carried, made, batch_size, share)
    plan = EncodePlan(
        open_store(out).url(), options.name or manifest.name, source, encoders,
        tuple(map(without_statistics, carried)), options.seed, batch_size, size, device,
    )  # fmt: skip
    check_limits(plan.name, plan.fields, plan.num_shards)
    return plan


def _carried(manifest: Manifest, wanted: Sequence[EncodedField], options: EncodeOptions) -> list[Field]:
    """Fields of the source that are kept."""
    encoded = {one.of for one in wanted}
    for name in (*options.keep, *options.drop):
        manifest.find_field(name, "--keep" if name in options.keep else "--drop")
        if name in options.keep and name in options.drop:
            raise UserError(f"--keep {name}, --drop {name}: give one of them")
    left_out = {one.name for one in manifest.fields if one.name in encoded and one.kind in ("image", "array")}
    left_out = (left_out - {*options.keep}) | {*options.drop}
    return [one for one in manifest.fields if one.name not in left_out]


def _check_names(wanted: Sequence[EncodedField], carried: Sequence[Field]) -> None:
    taken = {one.name for one in carried}
    for one in wanted:
        if not re.fullmatch(NAME, one.to):
            raise UserError(f"--to {one.to}: a field's name begins with a letter, and has a to z, 0 to 9 and '_' only")
        if one.to in taken:
            raise UserError(f"--to {one.to}: a field of this name is there already; give another name")
        taken.add(one.to)


def _field_encoder(manifest: Manifest, one: EncodedField, options: EncodeOptions, device: str | None) -> FieldEncoder:
    encoder = load_any_encoder(one.encoder, device)
    made = replace(encoder.output(manifest.find_field(one.of, "--field")), name=one.to)
    if made.dtype in DTYPES:
        made = replace(made, dtype=cast(FieldDtype, options.dtype))
    is_drawn = made.holds_moments and not options.moments
    stored = encoder.conditions(manifest, "the data set") if isinstance(encoder, ModelEncoder) else None
    beside = () if stored is None else tuple(stored.requests)
    return FieldEncoder(one.encoder, one.of, without_moments(made) if is_drawn else made, is_drawn, beside)


def _samples_per_shard(
    manifest: Manifest, carried: Sequence[Field], made: Sequence[Field], batch_size: int, share: float
) -> int:
    """Whole batches of some SHARDS shards, none above SHARD_BYTES: a function of the data alone."""
    sizes = [math.prod(one.shape) * (2 if "16" in one.dtype else 4) for one in made]
    large = any(one.kind in ("image", "array") for one in carried)
    most = SHARD_BYTES // round(sum(sizes) + 1024 * len(made) + (manifest.bytes_per_sample if large else 0))
    return batch_size * max(1, min(most // batch_size, math.ceil(manifest.num_samples / (SHARDS * share) / batch_size)))


def with_previews(plan: EncodePlan) -> EncodePlan:
    """The plan with `Encoding.preview` of each latent of pictures, fitted to a few samples. What an encoder makes of
    these is seen to be storable, too, before work begins. Raises DataError, UserError."""
    numbers = spread(PREVIEW_SAMPLES, plan.num_samples)
    encoders = []
    for one in plan.encoders:
        encoder, encoding = load_any_encoder(one.name, plan.device), one.makes.encoding
        if isinstance(encoder, Autoencoder) and encoding is not None and is_picture(encoding.of_shape):
            pictures = to_unit_range(plan.source.read_fields(numbers, [FieldRequest(one.of)]).fields[one.of])
            batches = pictures.to(encoder.device).split(plan.batch_size)
            latents = torch.cat([encoder.moments(batch)[0] for batch in batches]).cpu()
            rows = [[float(f"{value:.5g}") for value in row] for row in fit_preview(latents, pictures)]
            one = replace(one, makes=replace(one.makes, encoding=replace(encoding, preview=rows)))
        encoders.append(one)
    return replace(plan, encoders=tuple(encoders))
