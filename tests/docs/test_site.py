"""The documentation site: it builds without a warning, offline, and has every page, verb and key of a config."""

from __future__ import annotations

import dataclasses
import functools
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import docstrings
import nbformat
import pytest
import reference_config
import reference_python
import site_pages
from mkdocs.commands.build import build
from mkdocs.config import load_config as load_site
from pydantic import BaseModel
from typer.main import get_command

from scoreray.cluster.cli.main import app
from scoreray.sampling.service.body import SampleBody
from scoreray.trainer.config import Config
from scoreray.trainer.diffusion.process import PROCESSES
from scoreray.trainer.diffusion.weighting import WEIGHTINGS
from scoreray.trainer.networks.network import NETWORKS
from scoreray.trainer.objectives.objective import OBJECTIVES

ROOT = Path(__file__).parents[2]
OF_PYTHON = {f"{reference_python.FOLDER}{name}.md" for name in reference_python.AREAS}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strict: a dead link or anchor, or a page that is not in the navigation, aborts it."""
    folder = tmp_path_factory.mktemp("site")
    config = load_site(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
    assert config.strict
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    config.plugins.on_shutdown()
    return folder


@functools.cache
def text_of(page: Path) -> str:
    return page.read_text()


def ids(page: Path) -> list[str]:
    return re.findall(r' id="([^"]+)"', text_of(page))


def verbs(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from verbs(inner, f"{path} {name}")


def test_every_page_is_in_the_navigation(site: Path) -> None:
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    pages |= {*site_pages.FROM_ELSEWHERE.values()} | OF_PYTHON
    assert len(pages) > 35
    navigation = text_of(site / "index.html").partition('class="md-main"')[2].partition('class="md-content"')[0]
    linked = set(re.findall(r'href="([^"#]+)"', navigation))
    for page in pages - {"index.md"}:
        built = page.replace("README.md", "index.md").replace(".md", ".html")
        assert (site / built).is_file(), page
        assert built in linked, page


def test_the_first_page_is_the_readme(site: Path) -> None:
    title = re.match("# (.+)", (ROOT / "README.md").read_text())
    assert title
    assert f">{title[1]}<a" in text_of(site / "index.html").replace("\n", "")
    assert "docs/" not in set(re.findall(r'(?:href|src)="(docs/)', text_of(site / "index.html")))


def test_every_verb_and_option_is_on_the_page_of_the_command_line(site: Path) -> None:
    page = site / "reference" / "cli.html"
    text = html.unescape(re.sub(r"<[^>]+>", "", text_of(page)))
    found = dict(verbs(get_command(app), "scoreray"))
    assert len(found) > 20
    for path, command in found.items():
        assert path == "scoreray" or path.replace(" ", "-") in ids(page), path
        section = text.partition(f"\n{path}¶\n")[2].partition("¶\n")[0] if path != "scoreray" else text
        assert section, path
        for parameter in command.params:
            names = parameter.opts if parameter.param_type_name == "option" else [parameter.metavar or parameter.name]
            assert all(name in section for name in names), (path, names)


def test_every_key_of_a_config_is_on_its_page(site: Path) -> None:
    found = ids(site / "reference" / "config.html")
    assert len(found) == len(set(found)) > 400
    for section, field in Config.model_fields.items():
        assert section in found
        kind: Any = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            assert {f"{section}.{key}" for key in kind.model_fields} <= {*found}, section
    for section, kinds in (("process", PROCESSES), ("network", NETWORKS), ("objective", OBJECTIVES)):
        for name, cls in kinds.items():
            keys = {field.name for field in dataclasses.fields(cls)} - {"kind"}
            assert {f"{section}.{name}.{key}" for key in keys} <= {*found}, name
    assert {f"objective.weighting.{name}" for name in WEIGHTINGS} <= {*found}


def test_every_key_of_a_config_has_a_description() -> None:
    """A key without one: a line "`key`: what it is." in the docstring of its section's class."""
    described = reference_config.described()
    assert len(described) > 300
    assert not [key for key, words in described.items() if not words]


def test_every_key_of_a_config_is_a_result_of_the_search(site: Path) -> None:
    """By its whole name, which leads to its row."""
    index = json.loads((site / "search" / "search_index.js").read_text().partition("=")[2].rstrip().rstrip(";"))
    places = [entry["location"] for entry in index["docs"] if entry["title"] in reference_config.described()]
    rows = {f"reference/config.html#{place}" for place in ids(site / "reference" / "config.html")}
    assert len({*places} & rows) == len(reference_config.described())


def test_a_row_of_a_key_has_type_default_and_description(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", text_of(site / "reference" / "config.html"))
    row = re.search(r"\nprefetch_batches\n(.*)\n(.*)\n(.*)\n", text)
    assert row
    assert row.groups() == ("whole number from 1 to 1,024", "4", "batches that a rank reads ahead of its step")


def test_every_field_of_a_request_is_on_the_page_of_http(site: Path) -> None:
    text = text_of(site / "reference" / "http.html")
    for path in ("POST /v1/samples", "POST /v1/images/generations", "GET /v1/model", "GET /readyz"):
        assert f"<code>{path}</code>" in text
    assert not [name for name in SampleBody.model_fields if f"<code>{name}</code>" not in text]


def test_the_pages_of_python_have_what_docs_use(site: Path) -> None:
    found = {name for page in OF_PYTHON for name in ids((site / page).with_suffix(".html"))}
    for name in ("process.VP", "denoiser.Denoiser", "denoiser.tweedie"):
        assert f"scoreray.trainer.{name}" in found
    for name in (
        "load.load",
        "sigmas.karras",
        "samplers.sample.sample",
        "samplers.sample.SAMPLERS",
        "batcher.StepBatcher",
    ):
        assert f"scoreray.sampling.{name}" in found
    assert "scoreray.data.stream.Stream" in found


@pytest.mark.slow
@chromium.NEEDED
def test_no_page_is_wider_than_a_phone(site: Path) -> None:
    """What is wider scrolls by itself: code, tables. Pages of every kind, and those with the widest of both."""
    names = "index config metrics scaling reference/config reference/cli reference/http reference/python/sampling"
    names += " gallery/index troubleshooting/config tutorials/own-photos benchmarks/results examples/demo-model"
    with chromium.started() as browser:
        browser.size(*chromium.PHONE)
        for name in names.split():
            browser.open((site / f"{name}.html").as_uri())
            assert browser.run("return document.documentElement.scrollWidth") <= chromium.PHONE[0], name
            assert not browser.run("return [...document.images].filter(i => i.complete && !i.naturalWidth).length"), (
                name
            )
        assert not browser.errors()


def test_a_notebook_is_a_page_with_its_code_and_pictures(site: Path) -> None:
    notebooks = [path for path in site_pages.FROM_ELSEWHERE if path.endswith(".ipynb")]
    assert {"examples/demo-model.ipynb", "examples/points.ipynb"} <= {*notebooks}
    for path in notebooks:
        page = site / site_pages.FROM_ELSEWHERE[path].replace(".md", ".html")
        pictures = re.findall(r'<img alt="What this code draws" src="([^"]+)"', text_of(page))
        stored = [one for cell in nbformat.read(ROOT / path, 4).cells for one in cell.get("outputs", [])]
        assert len(pictures) == sum("image/png" in one.get("data", {}) for one in stored) >= 4
        for picture in pictures:
            assert (page.parent / picture).read_bytes().startswith(b"\x89PNG"), picture
        text = html.unescape(re.sub(r"<[^>]+>", "", text_of(page)))
        assert "import torch" in text
        for one in stored:
            assert one.get("text", "").strip() in text


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        head = re.findall(r"<(?:script|img|iframe|source)\b[^>]*?src=\"?([^\" >]+)", text_of(page))
        head += re.findall(r"<link\b[^>]*?href=\"?([^\" >]+)", text_of(page))
        assert head
        assert not [address for address in head if "://" in address or address.startswith("//")], page
    assert not [page for page in site.rglob("*.html") if re.search(r"\$\$|\\\\sigma|\\\\alpha", text_of(page))]
    assert (site / "search" / "search_index.js").stat().st_size > 100_000  # what file:// can read


def test_links_to_files_lead_to_their_pages_and_never_nowhere() -> None:
    texts = {"data.md": "# The data\n", "index.md": "# scoreray\n"}
    for text, expected in (
        ("[here](docs/data.md#order)", "[here](data.md#order)"),
        ("[docs/data.md](docs/data.md)", "[The data](data.md)"),
        ("![x](docs/images/page.png)", "![x](images/page.png)"),
        ("[the gallery](docs/gallery)", "[the gallery](gallery/README.md)"),
        ("[`process.py`](trainer/process.py)", "[`process.py`](reference/python/processes.md)"),
        ("[the loop](trainer/loop.py)", "the loop"),
        ("[x](docs/no-such.md), [y](https://example.org/a.py)", "[x](no-such.md), [y](https://example.org/a.py)"),
        ("`[x](trainer/loop.py)`", "`[x](trainer/loop.py)`"),
        ("```\n[x](trainer/loop.py)\n```\n", "```\n[x](trainer/loop.py)\n```\n"),
    ):
        assert site_pages.with_site_links(text, "index.md", texts, None) == expected
    linked = site_pages.with_site_links("[the loop](../trainer/loop.py)", "data.md", texts, "https://example.org/ours/")
    assert linked == "[the loop](https://example.org/ours/blob/main/trainer/loop.py)"
    assert site_pages.with_site_links("[r](../README.md#a)", "data.md", texts, None) == "[r](index.md#a)"


def test_a_pattern_of_the_navigation_is_the_pages_that_no_other_entry_names() -> None:
    index = "# How\n[b](b.md), [a](a.md#x)"
    texts = dict.fromkeys(["index.md", "new.md", "faq.md", "t/a.md", "t/b.md", "t/c.md", "t/deep/e.md"], "") | {
        "t/index.md": index
    }
    nav = [{"Start": "index.md"}, {"T": ["t/*.md"]}, {"How": ["*.md"]}, {"Help": ["f*.md", {"More": ["m/*.md"]}]}]
    assert site_pages.expanded(nav, texts) == [
        {"Start": "index.md"},
        {"T": ["t/index.md", "t/b.md", "t/a.md", "t/c.md"]},
        {"How": ["new.md"]},
        {"Help": ["faq.md"]},
    ]


def test_formulas_are_drawn_on_the_line_and_code_is_left_alone() -> None:
    drawn = site_pages.with_drawn_formulas("So $x_t$ of `$HOME$`.\n\n    echo $A $B\n\n$$\\frac{a}{b}$$\n")
    assert drawn.count("<svg ") == 2
    assert 'aria-label="x&#95;t"' in drawn
    assert '<div class="formula"><svg ' in drawn
    assert "`$HOME$`" in drawn
    assert "echo $A $B" in drawn
    assert site_pages.with_drawn_formulas("from $5 to $10, $a or $b") == "from $5 to $10, $a or $b"
    with pytest.raises(ValueError, match="nosuch"):
        site_pages.with_drawn_formulas("$\\nosuch{a}$")


def test_docstrings_are_plain_text() -> None:
    text = "E[x_0 | x] [B, ...], a * b.\n\nrate: of a step.  `seed`: of\nall, `x[i]`.\n\n    code[0] * 2"
    expected = (
        "E\\[x_0 | x\\] \\[B, ...\\], a \\* b.\n\n- `rate`: of a step.\n- `seed`: of all, `x[i]`.\n\n    code[0] * 2"
    )
    assert docstrings.markdown(text) == expected


def test_a_keys_description_is_that_of_its_docstring_or_of_a_bases() -> None:
    @dataclasses.dataclass
    class Base:
        """What all have.

        depth, width: of the network,
        in layers.  `rate`: a number.
        """

        depth: int = 1
        width: int = 2
        rate: float = 1

    @dataclasses.dataclass
    class Own(Base):
        """One.  `rate`: another number; see paper.

        Not more than mean_rate, whatever size has.
        """

        size: int = 1

    assert reference_config.description(Own, "width") == "of the network, in layers"
    assert reference_config.description(Own, "rate") == "another number; see paper"
    assert reference_config.description(Own, "size") == "Not more than mean_rate, whatever size has"
    assert reference_config.description(Base, "rate") == "a number"
