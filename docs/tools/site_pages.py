"""Which files of the repository are pages of the site, their order in the navigation, and the links between them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import reference_python
import site_math

ROOT = Path(__file__).resolve().parents[2]
FROM_ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "benchmarks/results.md",
    "examples/own-network/README.md": "examples/own-network.md",
    **{f"examples/{path.name}": f"examples/{path.stem}.md" for path in sorted((ROOT / "examples").glob("*.ipynb"))},
}
"""Path in the repository -> page of the site, of pages outside docs/."""
PICTURES = "assets/pictures/"
"""Where pictures from outside docs/ go."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
CODE_OR_LINK = re.compile(
    rf"^(?P<fence>`{{3,}}).*?^(?P=fence)`*[ \t]*$|`[^`\n]+`|(?P<link>{LINK.pattern})", re.M | re.S
)
CODE = re.compile(r"^(`{3,}).*?^\1`*[ \t]*$|^    [^\n]*$|`[^`\n]+`", re.M | re.S)
"""Fenced, indented by four, or in a line."""
NAMED_PAGE = re.compile(rf"{CODE_OR_LINK.pattern}|(?<![\w/.])docs/(?P<page>[\w/-]+\.md)(?![\w#])", re.M | re.S)


def pictures(path: str) -> list[str]:
    """The pictures outside docs/ that a page shows, as paths in the repository; a notebook holds its own."""
    if path.endswith(".ipynb"):
        return []
    links = LINK.findall((ROOT / path).read_text())
    shown = {_joined(path, link) for mark, _, link in links if mark and "://" not in link}
    return sorted(name for name in shown if not name.startswith("docs/"))


def expanded(nav: list[Any], texts: Mapping[str, str]) -> list[Any]:
    """The navigation with its patterns replaced by pages; a page that does not exist is left out with its entry.

    texts: of every page, by its place on the site. Of two patterns that fit a page the longer one has it.
    """
    leaves = list(_leaves(nav))
    left = texts.keys() - set(leaves)
    found: dict[str, list[str]] = {}
    for pattern in sorted((leaf for leaf in leaves if "*" in leaf), key=len, reverse=True):
        fits = {uri for uri in left if fnmatchcase(uri, pattern) and uri.count("/") == pattern.count("/")}
        found[pattern] = in_reading_order(fits, texts)
        left -= fits
    return [one for entry in nav for one in _expanded(entry, found, texts)]


def _expanded(entry: Any, found: Mapping[str, list[str]], texts: Mapping[str, str]) -> Iterator[Any]:
    if isinstance(entry, str):
        yield from found.get(entry, [entry] if entry in texts else [])
        return
    ((title, inner),) = entry.items()
    if isinstance(inner, str):
        if inner in texts:
            yield entry
    elif pages := [one for part in inner for one in _expanded(part, found, texts)]:
        yield {title: pages}


def _leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for inner in nav.values() if isinstance(nav, dict) else nav:
            yield from _leaves(inner)


def in_reading_order(uris: set[str], texts: Mapping[str, str]) -> list[str]:
    """Pages of a folder: its index, then those that the index links, in its order, then the others by name."""
    index = sorted(uri for uri in uris if posixpath.basename(uri) in ("index.md", "README.md"))
    linked = [_joined(uri, link.partition("#")[0]) for uri in index for _, _, link in LINK.findall(texts[uri])]
    order = {uri: place for place, uri in reversed([*enumerate([*index, *linked])])}
    return sorted(uris, key=lambda uri: (order.get(uri, len(order) + len(linked)), uri))


def with_site_links(markdown: str, uri: str, texts: Mapping[str, str], repo_url: str | None) -> str:
    """A page whose links to files of the repository lead to their pages; to a file that is no page, to the repository
    where that has a URL, and nowhere where it has none. A link whose text is the page's path gets the page's title.

    What leads to no file is left as it is: mkdocs refuses it.
    """
    home = next((path for path, page in FROM_ELSEWHERE.items() if page == uri), f"docs/{uri}")

    def rewritten(match: re.Match[str]) -> str:
        if not match["link"]:
            return match[0]
        mark, text, link = match.groups()[2:]
        path, hash_, anchor = link.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        target = _joined(home, path)
        page = page_of(target)
        if page is not None:
            title = re.match(r"# (.+)", texts.get(page, ""))
            text = title[1] if title and text in (path, target, f"docs/{page}", page) else text
            return f"{mark}[{text}]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{hash_}{anchor})"
        if not (ROOT / target).exists():
            return match[0]
        return f"{mark}[{text}]({repo_url.rstrip('/')}/blob/main/{target})" if repo_url else text

    return CODE_OR_LINK.sub(rewritten, markdown)


def page_of(path: str) -> str | None:
    """The page or file of the site that a file or folder of the repository is; None where it is none."""
    readme = path.rstrip("/") + "/README.md"
    if found := FROM_ELSEWHERE.get(path) or FROM_ELSEWHERE.get(readme):
        return found
    if path.startswith("docs/"):
        return (readme if (ROOT / readme).is_file() else path).removeprefix("docs/")
    if path.endswith(".py"):
        return reference_python.page_of(path)
    shown = {picture for page in FROM_ELSEWHERE for picture in pictures(page)}
    return PICTURES + posixpath.basename(path) if path in shown else None


def with_drawn_formulas(markdown: str) -> str:
    """A page's formulas as pictures; code is left as it is."""
    parts, end = [], 0
    for code in CODE.finditer(markdown):
        parts += [site_math.with_formulas(markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, site_math.with_formulas(markdown[end:])])


def with_links_to_pages(text: str, uri: str) -> str:
    """Generated text in which pages that are named (docs/data.md) are links."""
    up = "../" * uri.count("/")
    return NAMED_PAGE.sub(lambda match: f"[{page}]({up}{page})" if (page := match["page"]) else match[0], text)


def _joined(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
