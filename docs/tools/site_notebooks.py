"""Notebooks as pages of the site: text, code and the outputs that are stored with them. Nothing is run."""

from __future__ import annotations

import posixpath
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]


def page(path: str, uri: str) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook (its path in the repository) for the page `uri`, and its pictures by their places on
    the site."""
    name = Path(path).stem
    text, resources = MarkdownExporter().from_filename(
        str(ROOT / path), resources={"output_files_dir": name, "unique_key": name}
    )
    title, _, rest = text.partition("\n")
    text = f"{title}\n\n*A notebook, `{path}`, with what it gave when it was last run.*\n{rest}"
    pictures = {posixpath.join(posixpath.dirname(uri), file): content for file, content in resources["outputs"].items()}
    return text.replace("![png](", "![What this code draws]("), pictures
