"""Verbs of data sets: `data pack`, `data verify`, `data inspect`. See `main.py`."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoreray.cluster.cli.options import AsJson, With, grouped, make_bucket
from scoreray.data.errors import UserError, printable

if TYPE_CHECKING:
    from PIL import Image

    from scoreray.data.buckets.bucketed import BucketedSet
    from scoreray.data.packing.field_summary import FieldSummary
    from scoreray.data.reading.samples import SampleReader

# FIELD_KINDS and NORMALISATIONS of data.fields, which takes 0.3 s to import (numpy, pydantic); a test compares them.
KINDS = "image, array, class, scalar, vector, sequence, text, json"
HOWS = "none, channel, log1p, range"


@dataclass(frozen=True)
class PackFieldOptions:
    """Which fields a data set has beside images and classes."""

    field: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WHERE[:PATH]",
            help="One more field: a tar member (text=txt, t5=t5.npy, cls=json:label), a column, an array. Repeatable.",
        ),
    ] = None
    kind: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=KIND", help=f"Of a field, if its values don't say it: {KINDS}."),
    ] = None
    normalise: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=HOW", help=f"What a run does with a field by default: {HOWS}."),
    ] = None
    decoder: Annotated[
        list[str] | None,
        typer.Option(metavar="EXT=package.module:Name", help="A function of yours: a tar member's bytes to an array."),
    ] = None


@dataclass(frozen=True)
class ReadingOptions:
    """What is made of a source's samples."""

    image_size: Annotated[int | None, typer.Option(help="Resize the shorter side to this and crop the centre.")] = None
    image_format: Annotated[
        str | None, typer.Option(help="png (default), jpg (lossy) or npy. With it, tars are made into new ones.")
    ] = None
    buckets: Annotated[
        str | None,
        typer.Option(
            metavar="WxH,...",
            help="Pack in buckets of sizes, each picture in the one of its aspect ratio: 64x64,48x80,80x48 (width x "
            "height), or 512 for the usual sizes of about 512 x 512 pixels.",
        ),
    ] = None
    aspect_max: Annotated[float, typer.Option(help="With --buckets 512: up to this aspect ratio.", min=1)] = 2.0
    multiple: Annotated[int, typer.Option(help="With --buckets 512: sides are multiples of it.", min=1)] = 64
    max_enlarge: Annotated[
        float,
        typer.Option(help="With --buckets: a picture that had to be enlarged more can't be taken.", min=1),
    ] = 2.0
    channels: Annotated[
        int | None, typer.Option(help="1 packs all as grey, 3 as RGB. Default: as the folder's images are.")
    ] = None
    layout: Annotated[
        str | None,
        typer.Option(
            help="Axes of arrays, a letter each: NT makes signals [1, T] of [N, T]; NC, NT, NCT, NTC, NHW, NCHW, NHWC, "
            "NDHW, NCDHW, NDHWC. Default: channels first, or as the shape of four axes says."
        ),
    ] = None
    no_classes: Annotated[bool, typer.Option("--no-classes", help="Neither subfolders nor labels become classes.")] = (
        False
    )

    def of_buckets(self) -> dict[str, Any]:
        """The sizes as `pack_with_bar` takes them: of buckets, or one. Raises UserError."""
        from scoreray.data.buckets.sizes import parse_buckets

        if self.buckets is None:
            return {"image_size": self.image_size}
        if self.image_size is not None:
            raise UserError(f"--image-size {self.image_size}: --buckets says the sizes; leave one of them out")
        sizes = parse_buckets(self.buckets, self.aspect_max, self.multiple)
        return {"buckets": sizes, "max_enlarge": self.max_enlarge}


@dataclass(frozen=True)
class ShardOptions:
    """How shards are made, and what the data set is called."""

    skip_bad: Annotated[
        int, typer.Option(help="Leave out up to so many samples that can't be read; each is named.", min=0)
    ] = 0
    samples_per_shard: Annotated[
        int | None, typer.Option(help="Samples in one shard. Default: as many as make about 64 MB.", min=1)
    ] = None
    seed: Annotated[int, typer.Option(help="Of the shuffle at packing.", min=0)] = 0
    name: Annotated[str | None, typer.Option(help="The data set's name; default: the source's.")] = None


@grouped
def pack(
    *,
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images (class = subfolder; here or in S3), .npz, IDX (.gz or not), or tars: their "
            "folder, or x-{000..099}.tar. Rows and columns: parquet, datasets folders, .npy, HDF5, NetCDF, Zarr. Or "
            "package.module:Name, a source of yours. fashion-mnist.npz comes with the installation."
        ),
    ],
    url: Annotated[str, typer.Argument(help="Where the shards and the manifest go; for tars, where they are stored.")],
    chosen: PackFieldOptions,
    read: ReadingOptions,
    made: ShardOptions,
    workers: Annotated[
        int | None,
        typer.Option(help="Shards made at once by Ray. Default: one a core, of RAY_ADDRESS's cluster if set.", min=1),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of a source of yours, e.g. count=1000.")
    ] = None,
    with_: With = None,
    as_json: AsJson = False,
) -> None:
    """Images, arrays and further fields into WebDataset shards and a manifest. Run again after a kill, it goes on. The
    same source and options give the same bytes, whatever --workers is. Tars that are at URL already are indexed in
    place."""
    from scoreray.cluster.verbs.pack import pack_with_bar
    from scoreray.data.own_code import name_in_command
    from scoreray.data.presets import bundled_images
    from scoreray.data.reading.outputs import check_folder, suffix_of
    from scoreray.data.sources.field_options import parse_field_options
    from scoreray.data.yaml_text import parse_options

    name_in_command([source, *(word.partition("=")[2] for word in chosen.decoder or ())])
    if suffix_of(url) != ".npz":  # a data set may be called like the file that it is made of
        check_folder(url, "URL")
    make_bucket(url)
    left_out, more = Counter[str](), read.of_buckets()
    manifest, skipped = pack_with_bar(
        bundled_images(source),
        url,
        workers=workers,
        left_out=left_out,
        name=made.name,
        **more,
        image_format=read.image_format,
        fields=parse_field_options(chosen.field or (), chosen.kind or (), chosen.normalise or (), chosen.decoder or ()),
        source_options=parse_options(option or []),
        channels=read.channels,
        layout=read.layout,
        labelled=not read.no_classes,
        skip_bad=made.skip_bad,
        samples_per_shard=made.samples_per_shard,
        seed=made.seed,
    )
    if as_json:
        answer = {
            "url": url,
            "num_samples": manifest.num_samples,
            "num_shards": len(manifest.shards),
            "left_out": skipped,  # samples; beside them, by kind:
            "unused": dict(left_out),
        }
        typer.echo(json.dumps(answer))
    else:
        typer.echo(
            f"next: scoreray data inspect {shlex.quote(url)} --config > mine.yaml, then scoreray train mine.yaml"
        )


def verify(url: Annotated[str, typer.Argument(help="A packed data set.")], as_json: AsJson = False) -> None:
    """Check every byte of a data set against its manifest; exit status 3 when something is wrong."""
    from scoreray.cluster.display import counted
    from scoreray.data.packing.verify import verify as problems_of
    from scoreray.data.storage.store import open_store

    open_store(url).check_reachable()
    with counted("verify", "samples") as progress:
        problems = problems_of(url, progress)
    if as_json:
        typer.echo(json.dumps({"url": url, "problems": problems}))
    else:
        typer.echo("\n".join(map(printable, problems)) if problems else f"{url}: every shard is what the manifest says")
    if problems:
        raise typer.Exit(3)


def inspect(
    url: Annotated[str, typer.Argument(help="A packed data set, or tars without a manifest: x-{000..099}.tar.")],
    picture: Annotated[Path | None, typer.Option(help="Where a picture of samples goes: .png, .jpg or .webp.")] = None,
    count: Annotated[int, typer.Option(help="Samples in the picture.", min=1, max=1024)] = 64,
    config: Annotated[
        bool, typer.Option("--config", help="Print a config that trains on it, for these data and this machine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a data set holds: every field, counts, sizes, suggested sigma_data, sigma_max and ladder, a picture of its
    samples; or, with --config, a config to train on it: scoreray data inspect URL --config > mine.yaml."""
    from dataclasses import asdict

    from scoreray.data.buckets.bucketed import BucketedSet
    from scoreray.data.packing.inspect import spread, summary
    from scoreray.data.reading.manifest import Manifest
    from scoreray.data.reading.outputs import check_picture, write_picture
    from scoreray.data.reading.samples import SampleReader
    from scoreray.data.unpacked.tars import locate, summary_of

    if picture is not None:
        check_picture(picture)
    if config and (picture is not None or as_json):
        raise UserError("--config: prints YAML alone; leave out --picture and --json")
    unknown = {"sigma_max": "none: one sample has no distances", "labels": "none in the samples that were looked at"}
    located = locate(url)
    if isinstance(located, BucketedSet):
        _inspect_buckets(located, picture, count, config, as_json)
        return
    if not isinstance(located, Manifest):
        if picture is not None or config:
            what = "--picture: is drawn of" if picture else "--config: is written for"
            raise UserError(f"{what} packed data sets; scoreray data pack indexes tars in place")
        _show(asdict(summary_of(url, located)), unknown, as_json)
        return
    samples = SampleReader(url)
    if config:
        from scoreray.trainer.config.from_data import suggested_config
        from scoreray.trainer.config.network_for_data import Hardware

        some = samples.read(spread(samples.manifest, 256), draws=True)[0]
        typer.echo(suggested_config(url, samples.manifest, some, Hardware.here()), nl=False)
        return
    if picture is not None:
        write_picture(_grid(samples, count), picture)
    about = summary(samples)
    scale, unknown["ladder"] = _scale(samples)
    _show({**asdict(about), **scale}, unknown, as_json, about.fields)
    if picture is not None and not as_json:
        typer.echo(f"{'picture':13} {picture}")


def _inspect_buckets(data: BucketedSet, picture: Path | None, count: int, config: bool, as_json: bool) -> None:
    """Of all buckets together: counts and scale, a line for each bucket, a grid for each in one picture."""
    from dataclasses import asdict

    from scoreray.data.packing.inspect import one_below_another, spread, summary
    from scoreray.data.reading.outputs import write_picture
    from scoreray.data.reading.samples import SampleReader

    readers = [SampleReader(data.bucket_url(number)) for number in range(len(data.folders))]
    if config:
        from scoreray.trainer.config.from_data import suggested_config
        from scoreray.trainer.config.network_for_data import Hardware

        some = readers[0].read(spread(readers[0].manifest, 256), draws=True)[0]
        typer.echo(suggested_config(data.url, data, some, Hardware.here()), nl=False)
        return
    if picture is not None:
        write_picture(one_below_another([_grid(reader, count) for reader in readers]), picture)
    whole = {"name": data.name, "url": data.url, "num_samples": data.num_samples, "num_shards": len(data.shards)}
    whole |= {"mean": data.channel_means(), "std": data.std, "sigma_data": data.sigma_data}
    about = [summary(reader) for reader in readers]
    if as_json:
        typer.echo(json.dumps({**whole, "buckets": dict(zip(data.folders, map(asdict, about), strict=True))}))
        return
    _show(whole, {}, False)
    for folder, one in zip(data.folders, about, strict=True):
        share = one.num_samples / data.num_samples
        typer.echo(printable(f"{'bucket':13} {folder:11} {one.num_samples:,} samples ({share:.1%}), {one.url}"))
    if picture is not None:
        typer.echo(f"{'picture':13} {picture}")


def _scale(samples: SampleReader) -> tuple[dict[str, Any], str]:
    """(mean, std, sigma_data, sigma_max and ladder of the target as a run sees it whose config names no other and no
    other normalisation: what it should start from; why there is no ladder, or "")."""
    from dataclasses import asdict

    from scoreray.data.packing.inspect import spread
    from scoreray.trainer.config.run_fields import run_fields
    from scoreray.trainer.config.sections import DataSection
    from scoreray.trainer.networks.ladder import suggest_ladder
    from scoreray.trainer.step import to_model_range

    seen = run_fields(DataSection(url=samples.url), samples.manifest)
    few, many = (samples.read(spread(samples.manifest, count), draws=True)[0] for count in (256, 1024))
    found = {"mean": seen.mean, "std": seen.std, "sigma_data": seen.sigma_data}
    found |= {"sigma_max": seen.largest_distance(few), "ladder": None}
    try:
        found["ladder"] = asdict(suggest_ladder(to_model_range(many, seen.target.normaliser)))
    except UserError as error:  # one sample, or distances below its least noise level
        return found, f"none: {error}"
    return found, ""


def _grid(samples: SampleReader, count: int) -> Image.Image:
    """Samples of the target, and below each its text, if the data set has any."""
    from scoreray.data.fields.field import FieldRequest
    from scoreray.data.packing.inspect import picture_grid, spread, visible

    manifest, numbers = samples.manifest, spread(samples.manifest, count)[:count]
    text = next((one.name for one in manifest.fields if one.kind == "text"), None)
    captions: list[str] = []
    if text is not None:
        found = samples.read_fields(numbers, [FieldRequest(text)])
        rows = zip(found.fields[text], found.masks[text], strict=True)
        captions = [bytes(row[mask].tolist()).decode(errors="replace") for row, mask in rows]
    return picture_grid(visible(samples.read(numbers)[0], manifest), captions=captions)


def _show(found: dict[str, Any], unknown: dict[str, str], as_json: bool, fields: Sequence[FieldSummary] = ()) -> None:
    """A line for each fact; `unknown`: why one is None. Then the fields."""
    from scoreray.data.packing.field_summary import field_lines

    if as_json:
        typer.echo(json.dumps(found))
        return
    for key, value in found.items():
        if key == "fields":
            continue
        if value is None:
            typer.echo(f"{key:13} {unknown[key]}")
            continue
        shown = _number([f"{k} {_number(v)}" for k, v in value.items()] if isinstance(value, dict) else value)
        typer.echo(printable(f"{key:13} {shown or 'none'}"))
    for one in fields:
        for number, line in enumerate(field_lines(one)):
            typer.echo(printable(f"{'' if number else one.name:13} {line}"))


def _number(value: Any) -> str:
    if isinstance(value, list | tuple):
        more = [f"... ({len(value):,} in all)"] if len(value) > 16 else []
        return ", ".join([*(_number(item) for item in value[:16]), *more])
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
