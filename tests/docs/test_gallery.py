"""The gallery: page and command name the same pictures and functions; the comparison orders samplers as theory does."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import compare
import gallery
import pytest

from scoreray.trainer.diffusion.targets import ring

FOLDER = Path(__file__).parents[2] / "docs" / "gallery"


def test_the_page_shows_every_picture_in_order_and_names_the_function_that_made_it():
    page = (FOLDER / "README.md").read_text()
    shown = re.findall(r"!\[[^\]]*\]\(([\w-]+)\.png\)", page)
    assert shown == list(gallery.PICTURES)
    named = re.findall(r"\*`(pictures(?:_\w+)?)\.(\w+)`", page)
    assert [getattr(sys.modules[module], name) for module, name in named] == list(gallery.PICTURES.values())
    assert all(10_000 < (FOLDER / f"{name}.png").stat().st_size < 250_000 for name in shown)


def test_one_picture_is_made_by_name(tmp_path, capsys):
    gallery.main(["--out", str(tmp_path), "--only", "processes"])
    assert (tmp_path / "processes.png").read_bytes().startswith(b"\x89PNG")
    assert "processes.png" in capsys.readouterr().out


def test_an_unknown_picture_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(SystemExit, match="did you mean 'paths'"):
        gallery.main(["--out", str(tmp_path), "--only", "path"])


def test_with_more_calls_solvers_come_nearer_and_higher_orders_come_nearer_still():
    results, floor = compare.error_against_nfe(
        ring(), samplers=["euler", "heun", "unipc"], budgets=(40, 120), count=256
    )
    error = {(r.sampler, r.nfe > 60): r.ode_error for r in results}
    assert all(r.nfe <= 120 for r in results)
    for name in ("euler", "heun", "unipc"):
        assert error[name, True] < error[name, False] / 2
    assert error["unipc", True] < error["heun", True] < error["euler", True]
    assert 0 < floor < 0.2
