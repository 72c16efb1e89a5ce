"""Verbs that take models of other libraries: `import diffusers`, `import edm`, `import k-diffusion`. See `main.py`."""

from __future__ import annotations

import json
import shlex
from typing import Annotated

import typer

from scoreray.cluster.cli.options import AsJson, With, make_bucket
from scoreray.data.errors import UserError, listed

Out = Annotated[str, typer.Argument(metavar="OUT", help="A folder or prefix for safetensors and model.json.")]


def diffusers(
    folder: Annotated[
        str,
        typer.Argument(metavar="FOLDER", help="What save_pretrained wrote: a pipeline, or a model with config.json."),
    ],
    out: Out,
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
    from scoreray.cluster.display import waiting
    from scoreray.sampling.imports.import_diffusers import ImportOptions, import_diffusers

    if timesteps not in ("interpolate", "round"):
        raise UserError(f"--timesteps {timesteps}: accepted: interpolate, round")
    _check_out(out)
    nulls = dict[str, str]()
    for text in null or []:
        name, equals, path = text.partition("=")
        if not equals:
            raise UserError(f"--null {text}: write NAME=FILE.npy, e.g. prompt=empty.npy")
        nulls[name] = path
    options = ImportOptions(scheduler, timesteps, _size(size), length, null_class, nulls)
    with waiting("reading the weights, and writing the model"):
        imported = import_diffusers(folder, out, options)
    left_out = [
        f"{key} of its scheduler, which changes samples and is not of the model" for key in imported.noise.left_out
    ]
    _report(out, imported.network.class_name, left_out, as_json)


def edm(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The weights of an EDMPrecond, in safetensors.")],
    out: Out,
    config: Annotated[str, typer.Option(metavar="FILE", help="The arguments of EDMPrecond, as JSON.")],
    package: Annotated[
        str, typer.Option(metavar="MODULE", help="Where its network's class is; --with brings it.")
    ] = "training.networks",
    with_: With = None,
    as_json: AsJson = False,
) -> None:
    """Write a network of NVlabs' edm as a model of ours. Its code is yours to bring, by --with."""
    from scoreray.sampling.imports.import_preconditioned import import_edm

    _check_out(out)
    _report(out, import_edm(file, out, config, package).config["network"]["module"], [], as_json)


def k_diffusion(
    file: Annotated[str, typer.Argument(metavar="FILE", help="What its script convert_for_inference wrote.")],
    out: Out,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="Its config's JSON, in the place of the one in the file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a model of k-diffusion as one of ours; the installed package k_diffusion makes the network."""
    from scoreray.sampling.imports.import_preconditioned import import_k_diffusion

    _check_out(out)
    _report(out, import_k_diffusion(file, out, config).config["network"]["module"], [], as_json)


def lora(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="What peft stored (adapter_config.json), or diffusers (a safetensors file)."
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="A folder or prefix for the LoRA as one of ours.")],
    base: Annotated[str, typer.Option(metavar="CHECKPOINT", help="The model that it adapts.")],
    ema: Annotated[str | None, typer.Option(help="The base's EMA length; default: its first.")] = None,
    with_: With = None,
    as_json: AsJson = False,
) -> None:
    """Write a LoRA of peft or diffusers as one that sample, serve --lora, init and the other verbs take."""
    from scoreray.cluster.display import waiting
    from scoreray.sampling.formats.import_lora import import_lora

    _check_out(out)
    with waiting("reading the LoRA, and writing it"):
        imported = import_lora(folder, out, base, ema)
    left_out = [listed(imported.left_out)] if imported.left_out else []
    _report(out, "LoRA", left_out, as_json)


def _check_out(out: str) -> None:
    from scoreray.data.reading.outputs import check_folder

    check_folder(out, "OUT")
    make_bucket(out)


def _report(out: str, network: str, left_out: list[str], as_json: bool) -> None:
    from scoreray.data.own_code import with_words
    from scoreray.sampling.model.describe import describe

    info = describe(out).info
    if as_json:
        answer = {"out": out, "network": network, "image_shape": info.image_shape, "conditions": list(info.conditions)}
        typer.echo(json.dumps({**answer, "left_out": left_out}))
        return
    typer.echo(f"{network}: samples {list(info.image_shape)}, predicts {info.config.denoiser.parameterization}")
    section = info.config.model_dump(mode="json")["process"]
    section = {key: f"{len(value):,} numbers" if isinstance(value, list) else value for key, value in section.items()}
    typer.echo("process " + ", ".join(f"{key} {value}" for key, value in section.items() if value != "0 numbers"))
    for line in left_out:
        typer.echo(f"left out: {line}")
    typer.echo(f"takes {info.takes}")
    typer.echo("next: " + shlex.join(["scoreray", "sample", out, *with_words(), "--count", "64", "--out", "samples"]))


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
