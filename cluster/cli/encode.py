"""The verb `data encode`. See `main.py`."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from typing import Annotated

import typer

from scoreray.cluster.cli.options import AsJson, Verbose, With, grouped, make_bucket
from scoreray.data.errors import UserError

DTYPES = "float16, bfloat16 or float32"
ACTORS = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


@dataclass(frozen=True)
class EncoderOptions:
    """Which encoder makes which field of which other one: the three are given together, again for more."""

    encoder: Annotated[
        list[str],
        typer.Option(
            metavar="KIND=PATH",
            help="diffusers=FOLDER (an autoencoder, or a pipeline's), transformers=FOLDER (CLIP or T5 with its "
            "tokenizer, or of pictures DINOv2, ViT, CLIP, SigLIP; FOLDER:pooled for one vector), scoreray=URL, or "
            "package.module:Name=PATH. Repeatable, with "
            "--field and --to.",
        ),
    ]
    field: Annotated[list[str], typer.Option(metavar="NAME", help="The field that it encodes.")]
    to: Annotated[list[str], typer.Option(metavar="NAME", help="What the field that comes of it is called.")]
    moments: Annotated[
        bool,
        typer.Option(
            "--moments/--sample",
            help="Of a variational autoencoder: store means and standard deviations, from which a run draws each "
            "time that it sees a sample; or one draw of each sample, in half the space.",
        ),
    ] = True
    dtype: Annotated[str, typer.Option(help=f"In which values are stored: {DTYPES}.")] = "float16"
    seed: Annotated[int, typer.Option(help="Of the noise of --sample.", min=0)] = 0


@dataclass(frozen=True)
class CarriedOptions:
    """Which other fields the new data set has."""

    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Carry over a picture or array that is encoded, which is left out else."),
    ] = None
    drop: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Leave out a field. Others are kept.")] = None


@dataclass(frozen=True)
class PipelineOptions:
    """How many processes encode, and in which parts."""

    actors: Annotated[
        str | None,
        typer.Option(
            metavar="N|MIN-MAX",
            help="Processes that encode, with a GPU each where there are any; 0: this one, without Ray. Default: from "
            "1 to as many as the cluster (RAY_ADDRESS) or this machine has GPUs or, without any, cores.",
        ),
    ] = None
    batch_size: Annotated[
        int | None, typer.Option(help="Samples of one call of an encoder (16). Another one may round otherwise.", min=1)
    ] = None
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"
    samples_per_shard: Annotated[
        int | None, typer.Option(help="Samples in one shard. Default: some 64 shards, of at most 64 MB.", min=1)
    ] = None
    name: Annotated[str | None, typer.Option(help="The data set's name; default: the source's.")] = None


@grouped
def encode(
    *,
    url: Annotated[str, typer.Argument(help="A packed data set.")],
    out: Annotated[str, typer.Argument(help="Where the new data set goes.")],
    chosen: EncoderOptions,
    carried: CarriedOptions,
    how: PipelineOptions,
    with_: With = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Fields of a packed data set through encoders into a new one: pictures to latents, captions to tokens; a Ray Data
    pipeline. Run again after a kill, it makes what is missing. The same bytes, whatever --actors is."""
    from scoreray.cluster.verbs.encode import encode_to
    from scoreray.data.own_code import name_in_command
    from scoreray.data.reading.outputs import check_folder
    from scoreray.sampling.encoding.begin import EncodedField, EncodeOptions

    counts = [len(each) for each in (chosen.encoder, chosen.field, chosen.to)]
    if len(set(counts)) > 1:
        raise UserError(
            "--encoder: given {} times, --field {}, --to {}; each encoder needs one of both".format(*counts)
        )
    name_in_command([one.partition("=")[0] for one in chosen.encoder])
    check_folder(out, "OUT")
    make_bucket(out)
    wanted = [EncodedField(*each) for each in zip(chosen.encoder, chosen.field, chosen.to, strict=True)]
    options = EncodeOptions(
        moments=chosen.moments, dtype=chosen.dtype, keep=carried.keep or (), drop=carried.drop or (), seed=chosen.seed,
        batch_size=how.batch_size, samples_per_shard=how.samples_per_shard, name=how.name, device=how.device,
    )  # fmt: skip
    manifest = encode_to(url, out, wanted, options, actors=parse_actors(how.actors), verbose=verbose)
    if as_json:
        fields = {one.name: {"kind": one.kind, "shape": one.shape, "dtype": one.dtype} for one in manifest.fields}
        typer.echo(
            json.dumps(
                {"url": out, "num_samples": manifest.num_samples, "num_shards": len(manifest.shards), "fields": fields}
            )
        )
    else:
        typer.echo(
            f"next: scoreray data inspect {shlex.quote(out)} --config > mine.yaml, then scoreray train mine.yaml"
        )


def parse_actors(given: str | None) -> tuple[int, int | None]:
    """(least, most); None for as many as there is room for."""
    if given is None:
        return 1, None
    found = ACTORS.fullmatch(given)
    least, most = (int(found[1]), int(found[2] or found[1])) if found else (-1, -1)
    if not 0 <= least <= most or (least == 0 and most):
        raise UserError(f"--actors {given}: give a number, or from 1 to another: 2-8; 0 encodes without Ray")
    return least, most
