"""Options and arguments that several verbs share, and the S3 server that `--local-s3` starts."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from scoreray.data.errors import UserError, nearest
from scoreray.data.presets import preset
from scoreray.data.storage.store import local_path, open_store

# typer brings its own copy of click, under a private name, and exports only some of its exceptions.
ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_servers: list[Any] = []  # the S3 server of --local-s3, while it runs


def resolve_config(config: Path | None) -> Path | None:
    """A callback of Typer's. The file may be written as file:///PATH too, of which Path leaves one slash."""
    if config is not None and str(config)[:6].lower() == "file:/":
        config = local_path(f"file://{str(config)[5:]}")
    return None if config is None else preset(config)


def _bring(entries: list[str] | None) -> list[str] | None:
    """A callback of Typer's, before other arguments are read: these may name what is brought."""
    if entries:
        from scoreray.data.own_code import bring

        bring(entries)
    return entries


def _name_autoencoders(places: list[str] | None) -> list[str] | None:
    """A callback of Typer's."""
    if places:
        from scoreray.trainer.encoders.load import name_autoencoders

        name_autoencoders(places)
    return places


With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="PATH|PACKAGE",
        callback=_bring,
        is_eager=True,
        help="Code of yours that a kind may name as package.module:Name; again for more. See docs/own-code.md.",
    ),
]
ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", callback=resolve_config, help="A YAML file; configs/NAME.yaml is a preset.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides: optimizer.learning_rate=1e-4")
]
Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="URL of a run, of one checkpoint in it, or of an exported model.")
]
Ema = Annotated[str | None, typer.Option(help="EMA length, e.g. 0.100; 'none' for raw weights.")]
SamplerOption = Annotated[list[str] | None, typer.Option(help="The sampler's own, e.g. s_churn=40.")]
Compile = Annotated[str, typer.Option("--compile", help="auto, on or off: torch.compile, frozen.")]
AutoencoderPlace = Annotated[
    list[str] | None,
    typer.Option(
        "--autoencoder",
        metavar="KIND=PATH",
        callback=_name_autoencoders,
        help="Where the autoencoder of a model of latents is now, checked by its hash; again for more models.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON on standard output.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also show what Ray and its workers print.")]


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb as Typer takes it, which knows parameters alone: one that is a dataclass, options that belong together, is
    offered as its fields, in its place, and comes to the verb as one value."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = list[Parameter]()
    for parameter in signature(verb).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        own = get_type_hints(group, include_extras=True)
        for one in fields(group):
            default = Parameter.empty if one.default is MISSING else one.default
            parameters.append(Parameter(one.name, Parameter.KEYWORD_ONLY, default=default, annotation=own[one.name]))

    @functools.wraps(verb)
    def called(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{one.name: given.pop(one.name) for one in fields(group)})
        verb(**given)

    called.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return called


@contextlib.contextmanager
def local_s3(folder: Path) -> Iterator[None]:
    from scoreray.data.storage.local_s3 import LocalS3

    with LocalS3(folder) as server:
        os.environ.update(server.env)
        _servers.append(server)
        yield


def make_bucket(url: str) -> None:
    """On a server of our own (--local-s3), the bucket of a URL that is about to be written to."""
    if _servers and url.startswith("s3://"):
        open_store(url)  # raises UserError for what can't be a bucket's name
        _servers[-1].create_bucket(url[5:].partition("/")[0])


def parsed(command: Any, arguments: list[str]) -> dict[str, Any]:
    """A verb's options and arguments, as `command` (the whole `scoreray`) reads them. Raises UserError."""
    path, rest = "scoreray", list(arguments)
    while hasattr(command, "commands"):
        given = rest.pop(0) if rest else ""
        if given not in command.commands:
            raise UserError(f"submit {' '.join([*path.split()[1:], given]).strip()}: no such verb; "
                            f"{nearest(given, command.commands)}")  # fmt: skip
        path, command = f"{path} {given}", command.commands[given]
    try:
        options: dict[str, Any] = command.make_context(path, rest).params
    except ClickException as error:
        reason = error.format_message().rstrip(".")
        raise UserError(f"{reason}; see {path} --help (options of submit come before the verb)") from None
    return options
