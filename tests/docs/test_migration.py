"""docs/migration: the Python on these pages runs, and the names on them exist, ours and diffusers'."""

from __future__ import annotations

import re
import typing
from pathlib import Path

import pytest
import typer

from scoreray.cluster.cli.main import app
from scoreray.sampling.samplers import SAMPLERS
from scoreray.trainer.config import Config

PAGES = sorted((Path(__file__).parents[2] / "docs" / "migration").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_snippets_run_one_after_the_other(page: Path) -> None:
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    assert len(found) >= 2
    exec(compile("\n".join(found), page.name, "exec"), {})


def words_of(of: object, found: set[str], seen: list[object]) -> set[str]:
    """Names of all fields below a section, and the words that they accept."""
    if any(one is of for one in seen):
        return found
    seen.append(of)
    if typing.get_origin(of) is typing.Literal:
        found.update(map(str, typing.get_args(of)))
    elif isinstance(of, type) and (hasattr(of, "__dataclass_fields__") or hasattr(of, "model_fields")):
        for name, inner in typing.get_type_hints(of).items():
            found.add(name)
            words_of(inner, found, seen)
    for one in typing.get_args(of):
        words_of(one, found, seen)
    return found


def commands(node: typing.Any) -> typing.Iterator[typing.Any]:
    yield node
    for one in getattr(node, "commands", {}).values():
        yield from commands(one)


@pytest.fixture(scope="module")
def ours() -> set[str]:
    known = words_of(Config, set(), []) | set(SAMPLERS) | {"scoreray", "nats", "bpd", "fid", "kid"}
    known |= {name for sampler in SAMPLERS.values() for name in typing.get_type_hints(sampler, include_extras=True)}
    known |= {"process", "karras", "geometric", "linear", "small", "ancestral", "edm", "npz"}
    for command in commands(typer.main.get_command(app)):
        known.add(command.name or "")
        known.update(option.lstrip("-") for one in command.params for option in one.opts)
    return known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_of_ours_exist(page: Path, ours: set[str]) -> None:
    checked = 0
    for row in re.findall(r"^\| (?!---)(.+) \|$", page.read_text(), re.M):
        cell = row.split(" | ")[1] if " | " in row else ""
        for code in re.findall(r"`([^`]+)`", cell):
            for word in re.findall(r"(?<![\w.-])-*([A-Za-z][\w-]*)", code):
                assert word in ours, f"{page.name}: {code}: {word}"
                checked += 1
    assert checked > 20


def test_names_of_diffusers_exist() -> None:
    diffusers = pytest.importorskip("diffusers")
    page = next(page for page in PAGES if page.stem == "from-diffusers").read_text()
    names = {word for code in re.findall(r"`([^`\n]+)`", page) for word in re.findall(r"^([A-Z]\w+[a-z]\w+)$", code)}
    names |= {"EMAModel"} & names
    from diffusers.training_utils import EMAModel  # not at the top of the package

    assert len(names) > 15
    for name in names - {EMAModel.__name__}:
        assert hasattr(diffusers, name), name
