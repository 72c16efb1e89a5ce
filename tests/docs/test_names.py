"""What pages, docstrings and comments name exists: links, files, tests."""

from __future__ import annotations

import ast
import functools
import io
import re
import shlex
import sysconfig
import tokenize
from collections import Counter
from pathlib import Path

import pytest
from typer.main import get_command

from scoreray.cluster.cli.main import app
from scoreray.cluster.cli.options import parsed
from scoreray.data.errors import UserError

ROOT = Path(__file__).parents[2]
FOLDERS = ("data", "trainer", "sampling", "tune", "cluster", "docs", "tests", "benchmarks", "configs", "k8s")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "RESULTS.md"]
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
SITE = Path(sysconfig.get_path("purelib"))
FILE = re.compile(r"(?<![\w./*-])(?:[\w.-]+/)*\w[\w-]*\.py\b")
WRITTEN = {"pipeline.py", "denoiser/denoiser.py"}  # by an export to diffusers, into its folder
OF_ANY_PACKAGE = {"__init__.py"}
BASENAMES = Counter(path.name for path in SOURCES)


def text_of(page: Path) -> str:
    """A page; CONTRIBUTING.md and tutorials without their code, which adds files and names (tests/test_contributing.py
    and tests/docs/test_tutorials.py run it)."""
    text = page.read_text()
    run = page.name == "CONTRIBUTING.md" or page.parent.name == "tutorials"
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S) if run else text


@functools.cache
def prose(source: Path) -> str:
    """Docstrings and comments of a module. Comments of one without names after a `#` are not looked for: reading all
    modules as Python reads them takes 4 s."""
    text, comments = source.read_text(), []
    if re.search(r"#.*(\.py\b|scoreray\.)", text):
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Expr)]
    docs = [node.value for node in strings if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join([*comments, *docs])


def exists(name: str, named_in: Path) -> bool:
    """A path from the root, from the file that names it, or in an installed package; a bare name that only one of our
    files has will do too."""
    places = (ROOT / name, named_in.parent / name, SITE / name)
    return (
        name in WRITTEN | OF_ANY_PACKAGE
        or any(place.is_file() for place in places)
        or ("/" not in name and BASENAMES[name] == 1)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^()\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings}, link


def test_files_that_are_named_exist() -> None:
    texts = {page: text_of(page) for page in PAGES if page.name not in ("modules.md", "CHANGELOG.md")}
    texts |= {source: prose(source) for source in SOURCES}
    named = [(path, name) for path, text in texts.items() for name in FILE.findall(text)]
    assert len(named) > 200
    wrong = [f"{path.relative_to(ROOT)} names {name}" for path, name in named if not exists(name, path)]
    assert not wrong, "\n".join(wrong)


def test_names_of_the_package_exist() -> None:
    """`scoreray.trainer.diffusion.process.VP`: the module, and what it defines or imports under that name."""
    texts = [text_of(path) for path in PAGES] + [prose(path) for path in SOURCES]
    named = {name for text in texts for name in re.findall(r"scoreray((?:\.\w+)+)", text)}
    assert len(named) > 10
    for name in named:
        folder, *parts = name.strip(".").split(".")
        if folder not in FOLDERS:
            continue  # names of metrics, labels and buckets
        path = ROOT / folder
        while parts and (path / parts[0]).is_dir():
            path /= parts.pop(0)
        path = path / f"{parts.pop(0)}.py" if parts and (path / f"{parts[0]}.py").is_file() else path / "__init__.py"
        assert not parts or re.search(rf"\b{parts[0]}\b", path.read_text()), f"scoreray{name}: {path} has no such name"


def test_tests_that_pages_name_exist() -> None:
    named = {pair for page in PAGES for pair in re.findall(r"`([\w/]+\.py)::(\w+)", page.read_text())}
    assert len(named) > 80
    for file, test in named:
        (path,) = [ROOT / file] if "/" in file else (ROOT / "tests").rglob(file)
        assert re.search(rf"^(async )?def {test}\(", path.read_text(), re.M), f"{file}::{test}"


def test_commands_that_pages_name_are_files() -> None:
    """`python docs/tools/...`, `python benchmarks/...`, `make ...`"""
    text = "\n".join(page.read_text() for page in PAGES)
    for script in re.findall(r"python3? ((?:docs|benchmarks)/[\w/.]+)", text):
        assert (ROOT / script).is_file(), script
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([\w-]+)", text)) <= targets


def commands() -> list[tuple[str, list[str]]]:
    """(page, words after `scoreray`) of every command on a line of its own; two spaces or a redirection end it."""
    found = []
    for page in PAGES:
        for line in re.findall(r"^    (?:[A-Z_]+=\S+ )*scoreray (?:--local-s3 \S+ )?(.+)$", page.read_text(), re.M):
            found += [(page.name, shlex.split(one)) for one in re.split(r"  .*| > .*| && scoreray ", line) if one]
    return found


def test_commands_of_pages_are_taken_by_the_command_line() -> None:
    command = get_command(app)
    assert len(commands()) > 30
    for page, words in commands():
        if words[0] == "submit":  # its own options, then a verb
            words = words[3:] if words[1] == "--address" else words[1:]
        if words[0] in ("list", "status", "logs", "stop"):
            continue
        try:
            parsed(command, words)
        except UserError as error:
            pytest.fail(f"{page}: scoreray {' '.join(words)}: {error}")
