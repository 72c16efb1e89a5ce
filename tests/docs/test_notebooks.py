"""Notebooks run from top to bottom, and are stored with outputs that are small and free of errors."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from waiting import PATIENCE_S

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    book = nbformat.read(path, 4)
    NotebookClient(
        book, timeout=int(PATIENCE_S), kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    stored = nbformat.read(path, 4)
    for ran, kept in zip(book.cells, stored.cells, strict=True):
        kinds = [[one.output_type for one in cell.get("outputs", [])] for cell in (ran, kept)]
        assert kinds[0] == kinds[1], ran.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_small_and_names_no_machine(path: Path) -> None:
    text = path.read_text()
    assert len(text) < 400_000
    assert "/work/" not in text
    assert "/home/" not in text
