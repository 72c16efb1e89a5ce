"""The verb `grid`. See `main.py`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from scoreray.cluster.cli.options import AsJson, Checkpoint, Ema, SamplerOption, With, grouped
from scoreray.cluster.cli.sample import GuidanceOptions


@grouped
def grid(
    *,
    checkpoint: Checkpoint,
    sampler: Annotated[
        str, typer.Option(help="One that adds no noise: euler, heun, dpmpp_2m, unipc, ...")
    ] = "dpmpp_2m",
    steps: Annotated[int, typer.Option(help="Of the grid.", min=1)] = 6,
    samples: Annotated[int, typer.Option(help="Half are fitted to, half decide.", min=1)] = 256,
    budget: Annotated[int, typer.Option(help="So many grids are tried at most.", min=1)] = 150,
    seed: Annotated[int, typer.Option(help="Of the samples' noise.", min=0)] = 0,
    class_label: Annotated[
        str | None, typer.Option(help="A class for all samples, by name or number; default: all in turn.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A text for all samples.")] = None,
    condition: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="For all samples, as for sample; again for more.")
    ] = None,
    guided: GuidanceOptions,
    ema: Ema = None,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.", min=1)] = 64,
    option: SamplerOption = None,
    with_: With = None,
    as_json: AsJson = False,
) -> None:
    """Optimise the noise levels of a sampler for a model: stored beside it, and drawn on by --grid optimised."""
    from scoreray.cluster.verbs.grid import optimise_to
    from scoreray.data.own_code import name_in_command
    from scoreray.data.yaml_text import parse_options
    from scoreray.sampling.offline.conditions import parse_conditions
    from scoreray.sampling.offline.generate import Request

    request = Request(
        count=samples,
        sampler=name_in_command(sampler),
        steps=steps,
        seed=seed,
        class_label=class_label,
        prompt=prompt,
        conditions=parse_conditions(condition or []),
        guidance=guided.parsed(),
        batch_size=batch_size,
        options=parse_options(option or []),
    )
    made = optimise_to(checkpoint, ema, request, budget)
    typer.echo(json.dumps(made.answer()) if as_json else made.text())
