"""Writes README's tree of folders and docs/modules.md from docstrings: `python docs/tools/update_index.py`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("data", "trainer", "sampling", "tune", "cluster")
OTHERS = {
    "configs/": "presets",
    "k8s/": "KubeRay manifests: kustomize base and overlays, Dockerfile",
    "examples/": "own-network: a repository of somebody else's that trains, samples and serves its own network",
    "benchmarks/": "speed, as ratios measured in one run",
    "docs/": "the manual, the gallery, and docs/tools, which make what is generated",
    "tests/": "mirrors the folders",
}


def rooms(folder: str) -> list[Path]:
    """The folder itself, then its sub-packages; cluster/package is `scoreray` itself, a version and nothing else."""
    inner = sorted(path.parent for path in (ROOT / folder).glob("*/__init__.py"))
    return [ROOT / folder, *(room for room in inner if room.name != "package")]


def files() -> dict[str, str]:
    """Path in the repository -> text, of what is generated."""
    readme = (ROOT / "README.md").read_text()
    head, _, rest = readme.partition("<!-- tree -->\n")
    tail = rest.partition("<!-- /tree -->")[2]
    return {"README.md": f"{head}<!-- tree -->\n{_tree()}\n<!-- /tree -->{tail}", "docs/modules.md": _index()}


def _tree() -> str:
    lines = []
    for folder in FOLDERS:
        home, *inner = rooms(folder)
        lines.append(f"    {f'{folder}/':17}{_first_line(home / '__init__.py')}")
        if inner:
            lines.append(f"    {'':17}({', '.join(room.name for room in inner)})")
    return "\n".join(lines + [f"    {name:17}{what}" for name, what in OTHERS.items()])


def _index() -> str:
    lines = ["# Every module, a line each", "", "Made from their docstrings by `python docs/tools/update_index.py`."]
    for folder in FOLDERS:
        for room in rooms(folder):
            lines += ["", f"## {room.relative_to(ROOT)}/", "", f"{_first_line(room / '__init__.py')}.", ""]
            modules = [file for file in sorted(room.glob("*.py")) if file.name != "__init__.py"]
            lines += [f"- `{file.name}`: {_first_line(file)}" for file in modules]
    return "\n".join(lines) + "\n"


def _first_line(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0].replace("\n", " ").rstrip(".")


if __name__ == "__main__":
    for name, text in files().items():
        (ROOT / name).write_text(text)
        print(name)
