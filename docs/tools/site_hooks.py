"""Hooks of `mkdocs build` (`mkdocs.yml`): pages from outside docs/, those made from the code, navigation, links."""

from __future__ import annotations

import html
import json
from pathlib import Path

import reference_cli
import reference_config
import reference_http
import reference_python
import site_notebooks
import site_pages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what docs/ does not hold, then names every page in the navigation."""
    for path, uri in site_pages.FROM_ELSEWHERE.items():
        text, drawn = (ROOT / path).read_text(), dict[str, bytes]()
        if path.endswith(".ipynb"):
            text, drawn = site_notebooks.page(path, uri)
        files.append(File.generated(config, uri, content=text))
        for target, content in drawn.items():
            files.append(File.generated(config, target, content=content))
        for picture in site_pages.pictures(path):
            target = site_pages.PICTURES + Path(picture).name
            files.append(File.generated(config, target, abs_src_path=str(ROOT / picture)))
    for uri, text in generated().items():
        files.append(File.generated(config, uri, content=site_pages.with_links_to_pages(text, uri)))
    config.nav = site_pages.expanded(config.nav or [], _texts(files))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the repository has them become links of the site, formulas are drawn; logs are found after manuals."""
    if page.file.src_uri in ("changelog.md", "benchmarks/results.md"):
        page.meta["search"] = {"boost": 0.2}
    linked = site_pages.with_site_links(markdown, page.file.src_uri, _texts(files), config.repo_url)
    return site_pages.with_drawn_formulas(linked)


@event_priority(-50)  # after the search plugin writes the index, before the offline one makes a script of it
def on_post_build(config: MkDocsConfig) -> None:
    """Each key of a config is a result of its own: as words in its section's table, it would come after every page
    that has one of its words in a heading. The boost is for names whose words are everywhere, as sigma_data."""
    path = Path(config.site_dir, "search", "search_index.json")
    index = json.loads(path.read_text())
    index["docs"] += [
        {"location": f"reference/config.html#{key}", "title": key, "text": html.escape(words), "boost": 3}
        for key, words in reference_config.described().items()
    ]
    path.write_text(json.dumps(index, separators=(",", ":")))


def generated() -> dict[str, str]:
    """Page -> text, of the reference."""
    return {
        "reference/cli.md": reference_cli.page(),
        "reference/config.md": reference_config.page(),
        "reference/http.md": reference_http.page(),
        **reference_python.pages(),
    }


def _texts(files: Files) -> dict[str, str]:
    return {file.src_uri: file.content_string for file in files.documentation_pages()}
