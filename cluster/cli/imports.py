"""Verbs that take models of other libraries: `import diffusers`. See `main.py`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from scoreray.cluster.cli.options import AsJson, make_bucket
from scoreray.data.errors import UserError


def diffusers(
    folder: Annotated[
        str,
        typer.Argument(metavar="FOLDER", help="What save_pretrained wrote: a pipeline, or a model with config.json."),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder or prefix for safetensors and model.json.")],
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A scheduler_config.json: the noise that a model alone was trained on."),
    ] = None,
    timesteps: Annotated[
        str, typer.Option(help="Noise levels between two steps of a discrete model: interpolate, or round to one.")
    ] = "interpolate",
    size: Annotated[
        str | None, typer.Option(metavar="HEIGHT,WIDTH", help="Of samples (latents); default: the config's.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Most tokens of a prompt; default: the pipeline's.", min=1)] = None,
    null_class: Annotated[
        int | None, typer.Option(help="The class number that means none, where the model has one.", min=0)
    ] = None,
    null: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE.npy",
            help="What the model was given for no prompt (the encoded empty text) or no pooled; zeros if left out.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a pretrained model of diffusers as one that sample, serve, evaluate and the other verbs take."""
    from scoreray.data.reading.outputs import check_folder
    from scoreray.sampling.imports.import_diffusers import ImportOptions, import_diffusers
    from scoreray.sampling.model.describe import describe

    if timesteps not in ("interpolate", "round"):
        raise UserError(f"--timesteps {timesteps}: accepted: interpolate, round")
    check_folder(out, "OUT")
    make_bucket(out)
    nulls = dict[str, str]()
    for text in null or []:
        name, equals, path = text.partition("=")
        if not equals:
            raise UserError(f"--null {text}: write NAME=FILE.npy, e.g. prompt=empty.npy")
        nulls[name] = path
    options = ImportOptions(scheduler, timesteps, _size(size), length, null_class, nulls)
    imported = import_diffusers(folder, out, options)
    info = describe(out).info
    if as_json:
        answer = {"out": out, "class": imported.network.class_name, "image_shape": info.image_shape}
        typer.echo(json.dumps({**answer, "conditions": list(info.conditions), "left_out": imported.noise.left_out}))
        return
    predicted = info.config.denoiser.parameterization
    typer.echo(f"{imported.network.class_name}: samples {list(info.image_shape)}, predicts {predicted}")
    typer.echo(f"process {info.config.process}")
    for key in imported.noise.left_out:
        typer.echo(f"left out: {key} of its scheduler, which changes samples and is not of the model")
    typer.echo(f"takes {info.takes}")
    typer.echo(f"next: scoreray sample {out} --count 64 --out samples")


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    try:
        height, width = (int(part) for part in text.split(","))
    except ValueError:
        height = width = 0
    if min(height, width) < 1:
        raise UserError(f"--size {text}: write two whole numbers, HEIGHT,WIDTH, e.g. 64,64")
    return height, width
