"""An extension of griffe (`mkdocs.yml`): docstrings, which are plain text, as Markdown for the pages of the API.

`x [B, ...]` is a shape and no link, and lines that describe an argument or a key each are a list.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`]*`)")
NAME = r"`?([A-Za-z]\w*)`?"
DESCRIBES = re.compile(r"(?:^|(?<=  ))(`?[a-zP]\w*`?(?:, `?[a-zP]\w*`?)*): (?=\S)", re.M)
"""What begins a line, or follows two spaces: `url`: where its manifest is."""


class PlainDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """A docstring as Markdown. Code blocks, indented by four, stay as they are."""
    return "\n\n".join(part if part.startswith("    ") else _paragraph(part) for part in text.split("\n\n"))


def _paragraph(text: str) -> str:
    head, *described = DESCRIBES.split(escaped(text))
    if not described:
        return head
    items = [
        f"- {re.sub(NAME, lambda name: f'`{name[1]}`', names)}: {' '.join(words.split())}"
        for names, words in zip(described[::2], described[1::2], strict=True)
    ]
    return "\n".join([*([head.rstrip(), ""] if head.strip() else []), *items])


def escaped(text: str) -> str:
    """`text` with what Markdown would take for a link, a tag or emphasis outside code as it is written."""
    pieces = CODE.split(text)
    return "".join(one if one.startswith("`") else re.sub(r"([\[\]<*])", r"\\\1", one) for one in pieces)
