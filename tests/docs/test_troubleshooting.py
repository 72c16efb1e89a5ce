"""docs/troubleshooting: an index of every message, complete both ways, and headings for the doctor's findings."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import sys
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from scoreray.cluster.cli.main import app
from scoreray.cluster.finding import Finding, pages
from scoreray.trainer.config import Config

ROOT = Path(__file__).parents[2]
UPDATE = "run: python docs/tools/update_messages.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs" / "tools"))
    try:
        return importlib.import_module("update_messages")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def made(tool: ModuleType) -> dict[str, str]:
    made, wrong = tool.files()
    assert not wrong, "\n".join(wrong)
    return made  # type: ignore[no-any-return]


def test_the_index_has_every_message_and_no_other(made: dict[str, str]) -> None:
    found = {
        path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "docs/troubleshooting").glob("*.md")
    }
    for name in made.keys() | found.keys():
        new, old = (set(text.get(name, "").splitlines()) for text in (made, found))
        assert new == old, f"{name}: lacks {sorted(new - old)[:3]}, has {sorted(old - new)[:3]} that is gone; {UPDATE}"
    assert made == found, UPDATE


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('raise UserError(f"{url}: holds no tars; give others")', "{url}: holds no tars; give others"),
        (
            'raise UserError(f"--size {len(many)}: at most " f"{MOST} are taken")',
            "--size {many}: at most {MOST} are taken",
        ),
        ('def f():\n    raise DataError("one thing" if a else "another thing")', "another thing"),
        ('def mistakes():\n    return [f"{key}: is not known"]', "{key}: is not known"),
        ('W = {1: "no space left"}\ndef f(n):\n    raise StorageError(W[n])', "no space left"),
        ('def why(n):\n    return "too many of them"\ndef f(n):\n    raise UserError(why(n))', "too many of them"),
        (
            'def f(n):\n    found = []\n    found.append(f"{n} is wrong here")\n    raise UserError("; ".join(found))',
            "{n} is wrong here",
        ),
        ('def g(text):\n    raise UserError(text)\ndef f():\n    g("given by a caller")', "given by a caller"),
    ],
)
def test_messages_are_found_however_they_are_made(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    found = importlib.import_module("messages")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "errors.py").write_text(
        "class ScorerayError(Exception): ...\nclass UserError(ScorerayError): ...\n"
        "class DataError(ScorerayError): ...\nclass StorageError(ScorerayError): ...\n" + source
    )
    monkeypatch.setattr(found, "ROOT", tmp_path)
    assert words in [one.words for one in found.messages()]


def test_a_message_without_a_group_and_a_note_without_a_message_say_what_to_do(tool: ModuleType) -> None:
    message = importlib.import_module("messages").Message
    group = {"title": "Here", "about": "", "modules": ["data/*"], "notes": {"old words": "gone"}}
    _, wrong = tool.sorted_into(
        {"page": {"groups": [group]}}, [message("data/new.py", "new words", 1), message("tune/new.py", "others", 1)]
    )
    assert wrong == [
        f"tune/new.py: is in no group of docs/tools/messages.yaml; name it in one, then {UPDATE}",
        "docs/tools/messages.yaml: 'Here': no message holds \"old words\"; change the note's key",
    ]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_each_topic_of_the_doctor_has_a_heading() -> None:
    code = "".join(path.read_text() for path in (ROOT / "cluster").rglob("*.py"))
    topics = {topic for topic, state in re.findall(r'Finding\(\s*"([^"]+)",\s*(\S+)', code) if state != '"good",'}
    topics |= set(re.findall(r'\("(disk|/dev/shm)"', code))  # of several by one line
    assert {"storage", "memory", "room", "/dev/shm"} <= topics
    given = re.findall(r"^### doctor: (.+)$", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert set(given) == topics
    found = [Finding(topic, "problem", "") for topic in given] + [Finding("software", "good", "")]
    for link in pages(found).split(", "):
        page, _, anchor = link.partition("#")
        assert anchor in anchors(ROOT / page), link
    assert pages(found[-1:]) == ""


PAGES = [ROOT / "docs/troubleshooting.md", ROOT / "docs/faq.md", *sorted((ROOT / "docs").glob("troubleshooting/*.md")),
         *sorted((ROOT / "docs").glob("migration/*.md"))]  # fmt: skip


BY_HAND = [page for page in PAGES if page.parent.name != "troubleshooting"] + [ROOT / "docs/tools/messages.yaml"]


def commands() -> list[tuple[str, str]]:
    """(page, command) between backticks; those on lines of their own are read by tests/docs/test_names.py."""
    return [(page.name, code) for page in BY_HAND for code in re.findall(r"`(scoreray [^`\n]+)`", page.read_text())]


def test_commands_have_these_verbs_and_options() -> None:
    root = typer.main.get_command(app)
    assert len(commands()) > 20
    for page, command in commands():
        node: Any = root
        words = shlex.split(command)[1:]
        while words and hasattr(node, "get_command"):
            words = words[2:] if words[0] == "--local-s3" else words
            node, words = node.get_command(typer.Context(node), words[0]), words[1:]
            assert node is not None, f"{page}: {command}: no such verb"
        known = {name for option in node.params for name in (*option.opts, *option.secondary_opts)}
        given = {word.split("=")[0] for word in words if word.startswith("-")}
        assert node.name == "submit" or given <= known, f"{page}: {command}: {given - known}"


def keys(of: object) -> set[str]:
    """Names of the fields of a section, of each of its kinds, and of the sections in it with dots."""
    found: set[str] = set()
    for one in (of, *typing.get_args(of)):
        if one is not of:
            found |= keys(one)
        elif isinstance(one, type) and (dataclasses.is_dataclass(one) or hasattr(one, "model_fields")):
            for name, inner in typing.get_type_hints(one).items():
                found |= {name} | {f"{name}.{key}" for key in keys(inner)}
    return found


def test_config_keys_exist() -> None:
    known = keys(Config)
    sections = {key.partition(".")[0] for key in known if "." in key}
    assert {"engine", "data", "optimizer"} <= sections
    assert "engine.micro_batch_size" in known
    for page in BY_HAND:
        for code in re.findall(r"`([^`\n]+)`", page.read_text()):
            for key in re.findall(rf"(?<![\w./:-])((?:{'|'.join(sections)})(?:\.[a-z_]+)+)(?![\w/(]|\.\w)", code):
                assert key in known or key.endswith((".md", ".py", ".yaml", ".safetensors")), f"{page.name}: {key}"


def test_gauges_exist() -> None:
    known = set(re.findall(r"^\| `([a-z_]+)", (ROOT / "docs/metrics.md").read_text(), re.M))
    assert len(known) > 40
    for page in BY_HAND:
        for name in re.findall(r"\b(?:ray_)?scoreray_[a-z_]+\w", page.read_text()):
            assert name.removesuffix("_sum").removesuffix("_count") in known, f"{page.name}: {name}"
