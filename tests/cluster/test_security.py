"""docs/security.md names a test for each of its rows (tests/docs/test_names.py: which exists)."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
EXEMPT = ("A TorchScript file", "The config of a run")  # trusted input: no check to test


def test_every_row_names_a_test_or_is_exempt() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| what", "|--"))]
    assert len(rows) > 20
    for row in rows:
        assert "::test_" in row or row.startswith(tuple(f"| {name}" for name in EXEMPT)), row
