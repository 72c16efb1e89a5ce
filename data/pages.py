"""HTML pages of all parts, by one set of templates: everything that a page shows is inside it, and text is escaped.
Markdown comes from templates as well."""

from __future__ import annotations

import base64
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

DPI = 110  # of every chart


def render(template: str, **values: Any) -> str:
    """A page. template: PACKAGE/FILE, such as scoreray.tune/report.html; it extends scoreray.data/base.html.

    Values are escaped in .html (in .md the caller sees to it), and one that is missing raises, rather than to leave a
    gap.
    """
    return _environment().get_template(template).render(**values)


def _is_html(template: str | None) -> bool:
    return template is None or template.endswith(".html")


def embedded(picture: bytes, kind: str = "png") -> str:
    """A picture as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def source(name: str) -> str:
        package, _, file = name.partition("/")
        return (files(package) / file).read_text()

    environment = Environment(loader=FunctionLoader(source), autoescape=_is_html, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # fmt: skip
    environment.filters["embedded"] = embedded
    return environment
