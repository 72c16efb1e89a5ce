"""docs/security.md names, for each of its rows, a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
EXEMPT = ("A TorchScript file", "The config of a run")  # trusted, so there is nothing to show


def test_each_row_names_a_test_that_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.M), f"{file}::{name}"


def test_no_row_is_without_one() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| what", "|--"))]
    assert len(rows) > 20
    for row in rows:
        assert "::test_" in row or row.startswith(tuple(f"| {name}" for name in EXEMPT)), row
