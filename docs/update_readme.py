"""Writes the tree in README.md from the modules' first docstring lines: `python docs/update_readme.py`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("data", "trainer", "sampling", "tune", "cluster")


def tree() -> str:
    lines = []
    for folder in FOLDERS:
        lines.append(f"    {folder + '/':27}{_first_line(ROOT / folder / '__init__.py')}")
        for file in sorted((ROOT / folder).glob("*.py")):
            if file.name != "__init__.py":
                lines.append(f"      {file.name:25}{_first_line(file)}")
    for name, what in (
        ("configs/", "presets"),
        ("benchmarks/", "speed, as ratios measured in one run"),
        ("docs/", "design, configs, networks"),
        ("tests/", "mirrors the folders"),
    ):
        lines.append(f"    {name:27}{what}")
    return "\n".join(lines)


def _first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")


def updated(readme: str) -> str:
    head, _, rest = readme.partition("<!-- tree -->\n")
    _, _, tail = rest.partition("<!-- /tree -->")
    return f"{head}<!-- tree -->\n{tree()}\n<!-- /tree -->{tail}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
