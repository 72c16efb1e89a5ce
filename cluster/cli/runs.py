"""Verbs of runs and clusters: `demo`, `train`, `tune`, `doctor`, `submit`. See `main.py`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from scoreray.cluster.cli.options import (
    AsJson,
    ConfigFile,
    Overrides,
    Verbose,
    With,
    make_bucket,
    parsed,
    resolve_config,
)


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo-out"),
    minutes: Annotated[
        float | None, typer.Option(help="How long to train, from the first step; default 4, with --quick a half.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Half a minute of training; the pictures are then rough.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Training workers; default: one on a GPU, or two on CPUs.", min=1, max=16)
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Start over where a demo has already run in this folder.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Everything once, on this machine: pack, train on Ray from S3, draw, measure, and show it on a page.

    It trains as long as --minutes says, on however many images the machine manages in that time. Interrupted, the same
    command goes on.
    """
    from scoreray.cluster.verbs.demo import run_demo
    from scoreray.data.reading.outputs import check_folder

    check_folder(str(out), "--out")
    result = run_demo(out, minutes=minutes, quick=quick, workers=workers, fresh=fresh, verbose=verbose)
    typer.echo(json.dumps(result.answer()) if as_json else result.text())


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Start over under the next unused name (name-2, ...).")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only check the config and what it names.")] = False,
    print_config: Annotated[bool, typer.Option(help="Print the whole config, defaults included, and stop.")] = False,
    with_: With = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train a score network. The same command again goes on from the newest committed checkpoint."""
    from scoreray.trainer.config import dump_config, left_out_by_kinds, load_config

    loaded = load_config(config, overrides or ())
    if print_config:
        typer.echo(dump_config(loaded), nl=False)
        return
    from scoreray.cluster.display import say

    for line in left_out_by_kinds(config, overrides or ()):
        say(line)
    from scoreray.cluster.verbs.beside_run import check_beside
    from scoreray.cluster.verbs.train import check_machine, train_to_end, warn_of_data
    from scoreray.trainer.prepare import check_run, claim_run

    if not check:
        make_bucket(loaded.run.storage)
    checked = check_run(loaded, fresh=fresh)
    check_beside(loaded, checked.data)
    if check:
        check_machine(loaded)
        warn_of_data(checked)
        typer.echo(f"{config}: good" + (", with a warning" if checked.warning else ""))
        return
    result = train_to_end(claim_run(checked, fresh=fresh), verbose=verbose)
    typer.echo(json.dumps(result.answer()) if as_json else result.text())


def tune(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG", callback=resolve_config, help="A sweep's YAML file; configs/tune/ has some."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Dotted overrides: trials=20 of the sweep, base.duration.images=20M of its runs.",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the sweep and what it names.")] = False,
    with_: With = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Search noise schedules, weightings, anything a config has. The same command again goes on where it was."""
    from scoreray.cluster.verbs.tune import check_tune, tune_to_end
    from scoreray.tune.load import load_sweep

    plan = load_sweep(config, overrides or ())
    if check:
        check_tune(plan)
        typer.echo(f"{config}: good")
        return
    make_bucket(plan.sweep.study.storage)
    result = tune_to_end(plan, verbose=verbose)
    typer.echo(json.dumps(result.answer()) if as_json else result.text())


def status(
    url: Annotated[str, typer.Argument(metavar="URL", help="A run, a checkpoint, or an exported model.")],
    print_config: Annotated[bool, typer.Option(help="Print the config that it was trained with, and stop.")] = False,
    with_: With = None,
    as_json: AsJson = False,
) -> None:
    """Say what is committed of a run, or what a model is: images seen, averages, conditions, what it began from."""
    from scoreray.cluster.verbs.status import status_of

    if print_config:
        from scoreray.trainer.checkpoints.stored_model import find_model
        from scoreray.trainer.config import dump_config

        typer.echo(dump_config(find_model(url).config), nl=False)
        return
    found = status_of(url)
    typer.echo(json.dumps(found.answer()) if as_json else found.text())


def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", callback=resolve_config, help="A YAML file, as for train.")
    ] = None,
    overrides: Overrides = None,
    memory: Annotated[str | None, typer.Option(help="Memory of one worker, e.g. 80G; default: this machine's.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines of the workers; default: 8 GPUs each.", min=1)] = None,
    shape: Annotated[str | None, typer.Option(help="Shape of a sample, e.g. 3x64x64; default: the data set's.")] = None,
    with_: With = None,
    as_json: AsJson = False,
) -> None:
    """Say what is missing and what will not fit before a run finds out; exit status 2 when there is a problem.

    Its last line names the page and headings that explain what is not good. With RAY_ADDRESS (or as `submit doctor`)
    every node is examined: versions, clock, disks, storage, network, token, ports.
    """
    from dataclasses import asdict

    from scoreray.cluster.connect.local_ray import connected
    from scoreray.cluster.doctor.examine import examine
    from scoreray.cluster.doctor.facts import RunNeeds
    from scoreray.cluster.doctor.machine import Machine, parse_bytes, parse_shape
    from scoreray.cluster.doctor.nodes import examine_cluster, resources_of_nodes
    from scoreray.cluster.finding import pages
    from scoreray.data.errors import UserError
    from scoreray.trainer.config import load_config

    if config is None and (memory or nodes or shape):
        raise UserError("--memory, --nodes and --shape are for the plan of a CONFIG; give one")
    loaded = load_config(config, overrides or ()) if config else None
    machine = Machine(parse_bytes(memory) if memory else None, nodes, parse_shape(shape) if shape else None)
    if os.environ.get("RAY_ADDRESS"):
        with connected() as dashboard:
            found = examine(loaded, machine.on_nodes(resources_of_nodes()))
            found += examine_cluster(RunNeeds.of(loaded), dashboard)
    else:
        found = examine(loaded, machine)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found]))
    else:
        for one in found:
            typer.echo(f"{one.state:8}{one.topic}: {one.text}")
        if more := pages(found):
            typer.echo(f"{'see':8}{more}")
    if any(one.state == "problem" for one in found):
        raise typer.Exit(2)


def submit(
    context: typer.Context,
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="VERB...", help="A verb with its arguments; or status ID, logs ID, stop ID, list."),
    ],
    address: Annotated[
        str | None, typer.Option(help="http(s)://HOST:PORT of the cluster's dashboard; else RAY_API_SERVER_ADDRESS.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="For the job; no credentials.")] = None,
    from_env: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VARIABLE", help="NAME is what VARIABLE is on the cluster.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the job; default: scoreray, the verb and the run's name.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is submitted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a verb as a job on a remote Ray cluster: this code, its config; RAY_AUTH_TOKEN is the cluster's token.

    Options of submit come before VERB. The same submission again resumes the run.
    """
    from scoreray.cluster.submit.submit import submit as submitted

    status = submitted(
        arguments,
        address=address,
        env=env or [],
        from_env=from_env or [],
        name=name,
        detach=detach,
        as_json=as_json,
        parse=lambda given: parsed(context.find_root().command, given),
    )
    if status:
        sys.exit(status)
