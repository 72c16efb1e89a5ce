"""The page at /docs: the service's OpenAPI description as plain HTML, without a script."""

from __future__ import annotations

from html import escape
from typing import Any

from scoreray.sampling.serve_config import ERRORS

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%}
td,th{border-bottom:1px solid #ddd;padding:.3rem .6rem .3rem 0;text-align:left;
vertical-align:top}code,pre{font:14px/1.5 ui-monospace,monospace}pre{background:#f4f4f4;padding:.8rem;overflow-x:auto}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}pre{background:#222}td,th{border-color:#444}}"""

EXAMPLE = """curl -s localhost:8000/v1/samples -H 'Content-Type: application/json' \\
  -H 'Authorization: Bearer TOKEN' -H 'Accept: image/png' -d '{"count": 16, "seed": 1}' -o samples.png"""


def docs_page(openapi: dict[str, Any]) -> str:
    """HTML: every path, every field of the request for samples, every error code."""
    paths = [
        (f"{method.upper()} {path}", operation.get("description", ""))
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    body = openapi["paths"]["/v1/samples"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = [(name, _kind(about), about.get("description", "")) for name, about in body["properties"].items()]
    errors = [(str(status), code, meaning) for code, (status, meaning) in ERRORS.items()]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>scoreray: HTTP</title><style>{STYLE}</style><h1>scoreray: HTTP</h1>"
        f"<pre>{escape(EXAMPLE)}</pre><h2>Paths</h2>{_table(('path', ''), paths)}"
        f"<h2>POST /v1/samples</h2>{_table(('field', 'value', ''), fields)}"
        f"<h2>Errors</h2><p>JSON: code, message, request_id, field where one is meant.</p>"
        f"{_table(('status', 'code', ''), errors)}"
        '<p>The same for programs: <a href="openapi.json">openapi.json</a></p></html>'
    )


def _kind(about: dict[str, Any]) -> str:
    """The type, range and default of a field, in a few words."""
    variants = about.get("anyOf", [about])
    names = [_variant(one) for one in variants if one.get("type") != "null"]
    default = about.get("default")
    return " or ".join(names) + ("" if default is None else f", default {default}")


def _variant(one: dict[str, Any]) -> str:
    if "enum" in one:
        return " or ".join(one["enum"])
    low, high = one.get("minimum"), one.get("maximum", one.get("exclusiveMaximum"))
    bounds = "" if low is None else f" from {low:,}" + ("" if high is None else f" to {high:,}")
    return f"{one.get('type', 'value')}{bounds}"


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        "<tr>"
        + "".join(f"<td>{f'<code>{escape(c)}</code>' if i == 0 else escape(c)}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{cells}</tr>{lines}</table>"
