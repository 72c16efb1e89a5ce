"""Tutorials: every command of a page is run, in order, in an empty folder; what the page says is printed is printed.

How a page becomes a script: `tests/tools/tutorial.py`. All are slow; one is run up to its training too.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from tutorial import Session, blocks, differs, scoreray_commands
from typer.main import get_command
from waiting import PATIENCE_S

from scoreray.cluster.cli.main import app
from scoreray.cluster.cli.options import parsed
from scoreray.data.errors import UserError
from scoreray.trainer.config import load_config
from scoreray.tune.load import load_sweep

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "tutorials"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "index.md")
QUICK = ("own-photos.md",)


def run(page: Path, folder: Path, *, quick: bool, timeout_s: float) -> None:
    if "k8s/" in page.read_text():  # it is about a checkout
        shutil.copytree(ROOT / "k8s", folder / "k8s")
    with Session(folder) as session:
        for block in blocks(page):
            if not block.marks & ({"skip", "slow"} if quick else {"skip"}):
                session.run(block, timeout_s)


@pytest.mark.slow  # 30 s of CPU time
@pytest.mark.parametrize("name", QUICK)
def test_a_tutorial_up_to_its_training(name: str, tmp_path: Path) -> None:
    run(FOLDER / name, tmp_path, quick=True, timeout_s=PATIENCE_S)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_whole_tutorial(page: Path, tmp_path: Path) -> None:
    run(page, tmp_path, quick=False, timeout_s=1200)


def config_of(page: Path, name: str) -> Path | dict[str, object]:
    """What a page trains: a file that it writes, a preset, or what `data inspect --config` makes of the page's data."""
    if name.startswith("configs/"):
        return ROOT / name
    for block in blocks(page):
        if block.title == name:
            return yaml.safe_load(block.body)
    return {"run": {"name": "page", "storage": "runs"}, "data": {"url": "data"}}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_tutorial_are_taken_by_the_command_line(page: Path) -> None:
    """Also those that no test runs: verbs, options, and the keys and values of overrides."""
    command, found = get_command(app), list(scoreray_commands(page))
    assert len(found) >= 3
    variables = re.findall(r"export (\w+)=\"([^\"]*)\"", page.read_text())
    expanded = {f"${name}": value.split() for name, value in variables}
    for words in found:
        words = [one for word in words for one in expanded.get(word, [word])]
        if words[0] == "--local-s3":
            words = words[2:]
        if words[0] == "submit":  # its own options, then a verb
            while words[1].startswith("--"):
                words = [words[0], *words[2 if words[1] == "--detach" else 3 :]]
            words = words[1:]
        if words[0] in ("list", "status", "logs", "stop"):
            continue
        try:
            parsed(command, words)
            if words[0] == "train":
                load_config(config_of(page, words[1]), [word for word in words[2:] if not word.startswith("--")])
            elif words[0] == "tune":
                load_sweep(config_of(page, words[1]), [word for word in words[2:] if not word.startswith("--")])
        except UserError as error:
            pytest.fail(f"{page.name}: scoreray {' '.join(words)}: {error}")


def test_what_a_page_says_is_compared_in_order_with_any_numbers() -> None:
    printed = "pack x: 800 samples in 2.3 s\npacked 800 samples  in 1 shard at data/x\n"
    assert differs(printed, ("pack x: 12 samples in 0.1 s", "packed 8 samples in 2 shards at data/x")) is not None
    assert differs(printed, ("pack x: 12 samples in 0.1 s", "...", "packed ... shard at data/x")) is None
    assert differs(printed, ("packed 8 samples in 1 shard at data/x", "pack x: 12 samples in 0.1 s")) is not None


def test_a_block_that_ends_otherwise_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```console\n$ x=1\n$ echo got $x\ngot 2\n```\n<!-- test: status 3 -->\n```sh\nbash -c 'exit 3'\n```\n"
        "<!-- test: here => there -->\n```console\n$ echo here\nhere\n```\n```console\n$ false\n```\n"
    )
    same, status, other, failing = blocks(page)
    with Session(tmp_path) as session:
        session.run(same, 60)
        session.run(status, 60)
        with pytest.raises(AssertionError, match="the page says that this is printed"):
            session.run(other, 60)
        with pytest.raises(AssertionError, match="ended with 1, not 0"):
            session.run(failing, 60)
