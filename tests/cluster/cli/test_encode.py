"""`scoreray data encode`: mistakes of its options are one line."""

from __future__ import annotations

import pytest
import typer

from scoreray.cluster.cli.encode import parse_actors
from scoreray.cluster.cli.main import app
from scoreray.cluster.cli.options import parsed
from scoreray.data.errors import UserError


def test_actors_are_a_number_or_a_range() -> None:
    assert [parse_actors(given) for given in (None, "0", "3", "2-8")] == [(1, None), (0, 0), (3, 3), (2, 8)]
    for wrong in ("-1", "8-2", "0-2", "many"):
        with pytest.raises(UserError, match=rf"^--actors {wrong}: give a number"):
            parse_actors(wrong)


def test_each_encoder_needs_a_field_and_a_name() -> None:
    words = ["data", "encode", "url", "out", "--encoder", "diffusers=vae", "--encoder", "x=y", "--field", "image"]
    with pytest.raises(UserError, match="Missing option '--to'"):
        parsed(typer.main.get_command(app), words)
    with pytest.raises(UserError, match=r"given 2 times, --field 1, --to 1; each encoder needs"):
        app([*words, "--to", "latent"], standalone_mode=False)
