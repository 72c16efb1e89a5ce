"""The verb `sample`, its options in the groups that belong together. See `main.py`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scoreray.cluster.cli.options import (
    AsJson,
    AutoencoderPlace,
    Checkpoint,
    Compile,
    Ema,
    SamplerOption,
    Verbose,
    With,
    grouped,
    make_bucket,
)
from scoreray.data.errors import UserError

if TYPE_CHECKING:
    from scoreray.sampling.guidance.steering import Guidance, Measurement
    from scoreray.sampling.offline.ensembles import ConditionsFrom


@dataclass(frozen=True)
class PlaceOptions:
    """Where samples go, how many, and who draws them."""

    out: Annotated[
        str, typer.Option(help="A folder or prefix, or a .npz. The same command again continues or repairs it.")
    ]
    count: Annotated[
        int | None, typer.Option(help="How many samples: 64, or all of --conditions-from, by default.", min=1)
    ] = None
    format: Annotated[
        str,
        typer.Option(help="png, npz or webdataset (shards with a manifest); auto: webdataset in S3 or of no pictures."),
    ] = "auto"
    actors: Annotated[
        int | None,
        typer.Option(help="Draw by so many Ray actors, on RAY_ADDRESS's cluster or one here; else in-process.", min=1),
    ] = None


@dataclass(frozen=True)
class WalkOptions:
    """How samples are drawn."""

    sampler: Annotated[
        str | None,
        typer.Option(
            help="heun, ddim, dpmpp_2m, edm_sde, ncsnv2, ...; consistency and flow_map for models of few steps; gibbs "
            "for RBMs; package.module:Name. Default: what fits the model."
        ),
    ] = None
    steps: Annotated[
        int | None, typer.Option(help="Noise levels, 18 for heun; sweeps of gibbs, 1000 by default.", min=1)
    ] = None
    grid: Annotated[
        str | None,
        typer.Option(
            help="Noise levels as karras, geometric, linear, interior (without the smallest), process (even in its t), "
            "or optimised (`scoreray grid`); or the levels themselves: 80,2.5."
        ),
    ] = None
    max_calls: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Network calls a sample at most: the best sampler, steps and grid that fit, or checks those given. "
            "Guidance costs rows, not calls.",
            min=1,
        ),
    ] = None
    parallel: Annotated[
        bool, typer.Option("--parallel", help="Several steps a call of the network: lower latency for few samples.")
    ] = False
    seed: Annotated[int, typer.Option(help="Sample i of a seed is always the same picture.", min=0)] = 0
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="Of samples, width x height, from a run on data in buckets: 48x80. Default: the most frequent one.",
        ),
    ] = None
    source: Annotated[
        str | None,
        typer.Option(
            metavar="DATASET",
            help="Of a flow from a data set: sample i begins at record i of this one. Default: the run's, shuffled.",
        ),
    ] = None


@dataclass(frozen=True)
class ConditionOptions:
    """What samples are drawn for."""

    prompt: Annotated[
        str | None, typer.Option(help="A text, for the conditions that take one; or a class, where none does.")
    ] = None
    class_label: Annotated[
        str | None,
        typer.Option(
            help="A class's name or number, -1 for none; name:2 or index:2 where one is the other's; all in turn if "
            "left out."
        ),
    ] = None
    condition: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A condition of all samples: a text, numbers (1.5,-2), an .npy, .npz or picture, a class; again for "
            "more.",
        ),
    ] = None
    conditions_from: Annotated[
        str | None,
        typer.Option(metavar="DATASET", help="Draw under the conditions of each record of a packed data set."),
    ] = None
    per_condition: Annotated[
        int | None, typer.Option(help="Samples for each record of --conditions-from; 1 by default.", min=1)
    ] = None

    def records(self) -> ConditionsFrom | None:
        """Reads the data set's manifest."""
        from scoreray.sampling.offline.ensembles import ConditionsFrom

        if self.conditions_from is not None:
            return ConditionsFrom.of(self.conditions_from, self.per_condition or 1)
        if self.per_condition is not None:
            raise UserError("--per-condition goes with --conditions-from DATASET")
        return None


@dataclass(frozen=True)
class GuidanceOptions:
    """What strengthens conditions, and where."""

    guidance: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]WEIGHT",
            help="Weight of guidance, -100 to 100: 1 is none, 2 strengthens the conditions, NAME=2 one of them.",
        ),
    ] = None
    negative_prompt: Annotated[
        str | None, typer.Option(metavar="PROMPT", help="Lead away from this prompt, by the weight of --guidance.")
    ] = None
    autoguide: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Guide by this weaker model instead (autoguidance).")
    ] = None
    guide_ema: Annotated[
        str | None, typer.Option(help="Guide by this EMA length, of the same model or of --autoguide's.")
    ] = None
    interval: Annotated[str | None, typer.Option(metavar="LOW,HIGH", help="Guide between these noise levels only.")] = (
        None
    )

    def parsed(self) -> Guidance:
        from scoreray.sampling.guidance.steering import Guidance, parse_guidance

        weight, weights = parse_guidance(self.guidance or [])
        interval = _interval(self.interval)
        return Guidance(weight, self.autoguide, self.guide_ema, interval, weights, self.negative_prompt)


@dataclass(frozen=True)
class MeasurementOptions:
    """What is known of each sample."""

    inpaint: Annotated[
        str | None,
        typer.Option(metavar="IMAGE", help="Keep what --mask marks of this picture or array; draw the rest."),
    ] = None
    mask: Annotated[
        str | None, typer.Option(metavar="MASK", help="For --inpaint: white (or 1) where known, else 0.")
    ] = None
    inverse: Annotated[
        str | None,
        typer.Option(metavar="OPERATOR", help="superresolution=FACTOR, gray or matrix=FILE, of --measurement."),
    ] = None
    measurement: Annotated[
        str | None, typer.Option(metavar="FILE", help="For --inverse: what was measured, a picture, npy or npz.")
    ] = None
    noise_std: Annotated[float, typer.Option(help="The measurement's noise, for data in [-1, 1].")] = 0.0
    value_range: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH",
            help="What black and white are in an array that is given; 0,255 of uint8, -1,1 of floats.",
        ),
    ] = None
    inverse_method: Annotated[
        str, typer.Option(help="projection, or jacobian: nearer the posterior, a backward pass a call.")
    ] = "projection"

    def parsed(self) -> Measurement | None:
        from scoreray.sampling.guidance.steering import measurement_of

        return measurement_of(
            self.inpaint,
            self.mask,
            self.inverse,
            self.measurement,
            self.noise_std,
            self.inverse_method,
            self.value_range,
        )


@dataclass(frozen=True)
class FormOptions:
    """How the network is called, and what else the job leaves."""

    precision: Annotated[
        str, typer.Option(help="fp32, bf16 or auto: bf16 where the count pays for compiling and it is exact enough.")
    ] = "auto"
    compile_: Compile = "auto"
    samples_per_shard: Annotated[int | None, typer.Option(help="Default: by count and size.", min=1)] = None
    picture: Annotated[Path | None, typer.Option(help="A picture of the first samples: .png, .jpg, .webp.")] = None
    raw: Annotated[bool, typer.Option("--raw", help="Latents as they are, which are decoded otherwise.")] = False


@grouped
def sample(
    *,
    checkpoint: Checkpoint,
    place: PlaceOptions,
    walk: WalkOptions,
    conditioned: ConditionOptions,
    guided: GuidanceOptions,
    measured: MeasurementOptions,
    ema: Ema = None,
    batch_size: Annotated[int, typer.Option(help="Samples that are drawn together.", min=1)] = 64,
    option: SamplerOption = None,
    form: FormOptions,
    autoencoder: AutoencoderPlace = None,
    with_: With = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Draw samples from a trained model. After a kill the same command goes on, and ends in the same bytes."""
    from scoreray.cluster.verbs.sample import sample_to
    from scoreray.data.own_code import name_in_command
    from scoreray.data.yaml_text import parse_options
    from scoreray.sampling.offline.conditions import parse_conditions
    from scoreray.sampling.offline.generate import Request

    guidance, records = guided.parsed(), conditioned.records()
    request = Request(
        count=place.count or (records.num_samples if records else 64),
        sampler=name_in_command(walk.sampler),
        steps=walk.steps,
        max_calls=walk.max_calls,
        grid=walk.grid,
        seed=walk.seed,
        size=walk.size,
        class_label=conditioned.class_label,
        prompt=conditioned.prompt,
        conditions=parse_conditions(conditioned.condition or []),
        conditions_from=records,
        guidance=guidance,
        measurement=measured.parsed(),
        batch_size=batch_size,
        options=parse_options(option or []),
        source=walk.source,
        parallel=walk.parallel,
    )
    make_bucket(place.out)
    drawn = sample_to(
        place.out,
        checkpoint,
        ema,
        request,
        format=place.format,
        actors=place.actors,
        picture=form.picture,
        verbose=verbose,
        precision=form.precision,
        compile_=form.compile_,
        samples_per_shard=form.samples_per_shard,
        raw=form.raw,
    )
    typer.echo(json.dumps(drawn.answer()) if as_json else drawn.text())


def _interval(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--interval {text}: write two noise levels, LOW,HIGH, e.g. 0.2,5") from None
    return low, high
