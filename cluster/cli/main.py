"""The `scoreray` command: one verb each, one line for a mistake, an exit status that scripts can use."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

# Before torch is imported: threads that spin while they wait make a busy machine crawl, and sleeping ones cost little.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import typer

from scoreray.cluster.cli.data import inspect, pack, verify
from scoreray.cluster.cli.encode import codes, encode, encode_by_model
from scoreray.cluster.cli.grid import grid
from scoreray.cluster.cli.imports import diffusers, edm, k_diffusion, lora
from scoreray.cluster.cli.models import compare, evaluate, export, serve
from scoreray.cluster.cli.options import ClickException
from scoreray.cluster.cli.options import local_s3 as server_on
from scoreray.cluster.cli.runs import demo, doctor, status, submit, train, tune
from scoreray.cluster.cli.sample import sample
from scoreray.cluster.cli.storage import clean, list_
from scoreray.cluster.connect.local_ray import stop
from scoreray.cluster.connect.watch import GOES_ON
from scoreray.cluster.display import opening, use_plain_lines
from scoreray.data.errors import ScorerayError, readable

STOPPED = f"stopped; {GOES_ON}"

app = typer.Typer(
    name="scoreray",
    help="Train score-based generative models on Ray, draw samples from them. "
    "A URL is s3://bucket/prefix, gs://..., az://... or a path.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Pack, check, look at and encode data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
import_app = typer.Typer(help="Pretrained models of other libraries as models of ours.", no_args_is_help=True)
app.add_typer(import_app, name="import")


def print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(installed_version("scoreray"))
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    local_s3: Annotated[
        Path | None,
        typer.Option(
            envvar="SCORERAY_LOCAL_S3",
            help="Run an S3 server on this folder while the command runs, and send s3:// there.",
        ),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option(
            "--plain",
            envvar="SCORERAY_PLAIN",
            help="Progress as lines with their time: no bars, colours or cursor movement. For logs.",
        ),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    if plain:
        use_plain_lines()
    context.with_resource(opening())
    if local_s3 is not None:
        context.with_resource(server_on(local_s3))


VERBS: tuple[Callable[..., None], ...] = (
    demo,
    train,
    status,
    tune,
    sample,
    grid,
    export,
    serve,
    evaluate,
    compare,
    doctor,
    clean,
)
DATA_VERBS: tuple[Callable[..., None], ...] = (pack, verify, inspect, encode, codes)
IMPORT_VERBS: tuple[Callable[..., None], ...] = (diffusers, edm, k_diffusion, lora)
for verb in VERBS:
    app.command()(verb)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)(submit)
app.command("encode")(encode_by_model)
app.command("list")(list_)
for verb in DATA_VERBS:
    data_app.command()(verb)
for verb in IMPORT_VERBS:
    import_app.command()(verb)


def main() -> None:
    """Entry point: runs a verb and turns what went wrong into one line and an exit status."""
    signal.signal(signal.SIGTERM, stop)
    try:
        status = app(standalone_mode=False)
    except ScorerayError as error:
        _fail(str(error), error.exit_status)
    except (typer.Abort, KeyboardInterrupt):
        _fail(STOPPED, 130)
    except ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(2)
        context = getattr(error, "ctx", None)
        _fail(error.format_message().rstrip(".") + (f"; see {context.command_path} --help" if context else ""), 2)
    except BrokenPipeError:
        os._exit(1)
    except Exception as error:
        traceback.print_exc()
        _fail(f"this is a bug in scoreray: {type(error).__name__}: {error}", 1)
    if status == 130:  # how typer reports Ctrl-C
        _fail(STOPPED, 130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    print(f"scoreray: {readable(message)}", file=sys.stderr, flush=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
