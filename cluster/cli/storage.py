"""Verbs of storage: `list`, `clean`. See `main.py`."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from scoreray.cluster.cli.options import AsJson

StorageUrl = Annotated[str, typer.Argument(metavar="STORAGE", help="URL of a folder that holds runs, data sets, ...")]


def list_(url: StorageUrl, as_json: AsJson = False) -> None:
    """List runs, studies, models, data sets and samples: state, images, last metrics, size, when last written.

    What is not done is under way where something was written within 15 minutes, else stopped.
    """
    from scoreray.cluster.verbs.inventory import check_there, inventory, table

    found = inventory(url)
    check_there(url, found)
    if as_json:
        typer.echo(json.dumps([one.answer() for one in found]))
    else:
        typer.echo(table(found, time.time()) if found else f"{url}: nothing of scoreray's is here")


def clean(
    url: StorageUrl,
    older_than: Annotated[
        str, typer.Option(metavar="AGE", help="Only what was last written longer ago: 12h, 1d, 2w; at least 1h.")
    ] = "1d",
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this it is only listed.")] = False,
    as_json: AsJson = False,
) -> None:
    """List, or with --yes remove, what killed starts left: checkpoints, packs and samples never committed, uploads.

    Nothing that is committed is touched, nothing that is being written, nothing of other programs.
    """
    from scoreray.cluster.verbs.inventory import check_there
    from scoreray.cluster.verbs.leftovers import clean as cleaned
    from scoreray.cluster.verbs.leftovers import parse_age

    older_s = parse_age(older_than)
    check_there(url, [])
    result = cleaned(url, older_s, remove=yes)
    typer.echo(json.dumps(result.answer()) if as_json else result.text())
