"""Plain words: some that readers stumble over, or would not search for, do not occur."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = {  # word -> what to write
    r"told": "reported, said, given",
    r"mend(s|ed|ing)?": "fix, repair",
    r"whoever": "callers, who",
    r"anew": "again",
    r"askers?": "caller, request",
    r"what goes with what": "which parts of a config fit together",
}
FOUND = re.compile(rf"(?<![^\W_])({'|'.join(WORDS)})(?![^\W_])", re.I)
"""Words in prose and between the underscores of a name."""
FOLDERS = (
    "data",
    "trainer",
    "sampling",
    "tune",
    "cluster",
    "docs/tools",
    "k8s",
    "benchmarks",
    "configs",
    "tests",
)
"""Folders whose Python, YAML and HTML files are read."""


def lines(path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FOUND.search(line)
    ]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_uses_plain_words(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".html")]
    assert files
    assert not [line for path in files if path != Path(__file__) for line in lines(path)]


def test_pages_use_plain_words() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
    assert not [line for page in pages for line in lines(page)]
