"""Tables of the site's reference."""

from __future__ import annotations

from collections.abc import Iterable


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Markdown, a line a row; `|` in a cell is escaped."""
    cells = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in cells)


def keys(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table of names and what they mean, of which each row is a block on a phone (docs/assets/site.css)."""
    return f'<div class="keys" markdown>\n\n{table(head, rows)}\n\n</div>'
