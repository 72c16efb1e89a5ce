"""The verbs `data encode`, `encode` and `data codes`. See `main.py`."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scoreray.cluster.cli.options import AsJson, Checkpoint, Verbose, With, grouped, make_bucket
from scoreray.data.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scoreray.sampling.encoding.begin import EncodedField

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
    from scoreray.data.own_code import name_in_command
    from scoreray.sampling.encoding.begin import EncodedField

    counts = [len(each) for each in (chosen.encoder, chosen.field, chosen.to)]
    if len(set(counts)) > 1:
        raise UserError(
            "--encoder: given {} times, --field {}, --to {}; each encoder needs one of both".format(*counts)
        )
    name_in_command([one.partition("=")[0] for one in chosen.encoder])
    wanted = [EncodedField(*each) for each in zip(chosen.encoder, chosen.field, chosen.to, strict=True)]
    kept = {"moments": chosen.moments, "dtype": chosen.dtype, "seed": chosen.seed}
    _encode(url, out, wanted, carried, how, kept, verbose=verbose, as_json=as_json)


@dataclass(frozen=True)
class CodingOptions:
    """How a denoiser encodes: names and defaults as in CodeOptions (sampling/representations/codes.py)."""

    sampler: Annotated[
        str | None,
        typer.Option(help="Solver of the probability-flow ODE: heun, euler (DDIM), dpm2, rk45."),
    ] = None
    steps: Annotated[int | None, typer.Option(help="Of the solver (32).")] = None
    rtol: Annotated[float | None, typer.Option(help="Tolerance of rk45 (1e-5).")] = None
    layer: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE", help="Instead: the activations of a module of the network, their mean over positions."
        ),
    ] = None
    sigma: Annotated[float | None, typer.Option(help="Noise level at which --layer is read (0.3).")] = None
    conditions: Annotated[
        bool | None,
        typer.Option("--conditions/--no-conditions", help="Whether fields of the data condition the model (they do)."),
    ] = None

    @property
    def text(self) -> str:
        """As `scoreray=URL?TEXT` has them: those that are given."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        return ",".join(f"{name}={str(value).lower() if isinstance(value, bool) else value}"
                        for name, value in given.items() if value is not None)  # fmt: skip


@grouped
def encode_by_model(
    *,
    checkpoint: Checkpoint,
    url: Annotated[str, typer.Argument(metavar="DATA", help="A packed data set.")],
    out: Annotated[str, typer.Argument(help="Where the new data set goes: its fields, and the codes.")],
    field: Annotated[
        str | None, typer.Option(metavar="NAME", help="The field that is encoded; default: what the model models.")
    ] = None,
    to: Annotated[str, typer.Option(metavar="NAME", help="What the field of codes is called.")] = "code",
    dtype: Annotated[str, typer.Option(help=f"In which codes are stored: {DTYPES}.")] = "float32",
    coding: CodingOptions,
    carried: CarriedOptions,
    how: PipelineOptions,
    with_: With = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Codes of a data set under a trained model, as a field of a new one: the noise that a denoiser's probability-flow
    ODE takes each sample to, a machine's hidden probabilities, an autoencoder's latents. The same as data encode
    --encoder scoreray=CHECKPOINT."""
    from scoreray.data.buckets.bucketed import BucketedSet, is_bucketed
    from scoreray.data.reading.samples import SampleReader
    from scoreray.data.storage.store import open_store
    from scoreray.sampling.encoding.begin import EncodedField
    from scoreray.sampling.model.describe import describe

    target, store = describe(checkpoint).info.target, open_store(url)
    first = BucketedSet.load(store).bucket_url(0) if is_bucketed(store) else url
    manifest = SampleReader(first).manifest
    modelled = target.name if target is not None and target.name in {one.name for one in manifest.fields} else None
    encoder = f"scoreray={checkpoint}" + (f"?{coding.text}" if coding.text else "")
    wanted = [EncodedField(encoder, field or modelled or manifest.target.name, to)]
    _encode(url, out, wanted, carried, how, {"dtype": dtype}, verbose=verbose, as_json=as_json)


def codes(
    url: Annotated[str, typer.Argument(metavar="DATA", help="A packed data set with a field of codes.")],
    field: Annotated[str, typer.Option(metavar="NAME", help="Of `scoreray encode`, or any other numbers.")] = "code",
    metrics: Annotated[
        str, typer.Option(help="Those of representations, with commas between. docs/evaluation.md has all.")
    ] = "homogeneity,completeness,v_measure,probe",
    metric_option: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC.NAME=VALUE", help="A metric's own, e.g. mig.bins=10; again for more."),
    ] = None,
    count: Annotated[int, typer.Option(help="Samples, evenly over the data set.", min=2)] = 10_000,
    as_json: AsJson = False,
) -> None:
    """Measure codes that are a field of a data set, against its class and scalar fields: clusters, a linear probe,
    disentanglement."""
    from scoreray.data.yaml_text import parse_metric_options
    from scoreray.sampling.evaluation.evaluate import described
    from scoreray.sampling.metrics.record import finite
    from scoreray.sampling.metrics.representation_metrics import result_of
    from scoreray.sampling.representations.scores import measure_field

    names = [name.strip() for name in metrics.split(",") if name.strip()]
    found = measure_field(url, field, names, parse_metric_options(metric_option or []), count)
    values = {name: result_of(score).value() for name, score in found.items()}
    if as_json:
        typer.echo(json.dumps(finite({name: one.model_dump() for name, one in values.items()})))
        return
    width = max(map(len, names), default=0)
    for name, one in values.items():
        typer.echo(f"  {name:{width}} {described(one)}")


def _encode(
    url: str,
    out: str,
    wanted: Sequence[EncodedField],
    carried: CarriedOptions,
    how: PipelineOptions,
    kept: Mapping[str, Any],
    *,
    verbose: bool,
    as_json: bool,
) -> None:
    """kept: EncodeOptions of how values are stored."""
    from scoreray.cluster.verbs.encode import encode_to
    from scoreray.data.reading.outputs import check_folder
    from scoreray.sampling.encoding.begin import EncodeOptions

    check_folder(out, "OUT")
    make_bucket(out)
    options = EncodeOptions(
        **kept, keep=carried.keep or (), drop=carried.drop or (), batch_size=how.batch_size,
        samples_per_shard=how.samples_per_shard, name=how.name, device=how.device,
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
