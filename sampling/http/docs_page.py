"""What OpenAPI says of requests and answers, and the page at /docs: the same as plain HTML, without a script."""

from __future__ import annotations

import json
import re
from html import escape
from typing import Any

from scoreray.sampling.service.body import KEY, SampleBody, in_words
from scoreray.sampling.service.config import ERRORS

STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%}
td,th{border-bottom:1px solid #ddd;padding:.3rem .6rem .3rem 0;text-align:left;
vertical-align:top}code,pre{font:14px/1.5 ui-monospace,monospace}pre{background:#f4f4f4;padding:.8rem;overflow-x:auto}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}pre{background:#222}td,th{border-color:#444}}"""


def request_schema() -> dict[str, Any]:
    """OpenAPI's words for the body and the header of `POST /v1/samples`."""
    key = {"type": "string", "pattern": f"^{KEY.pattern}$"}
    header = {"name": "Idempotency-Key", "in": "header", "required": False, "schema": key}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": SampleBody.model_json_schema()}}},
        "parameters": [header],
    }


def response_descriptions() -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: the codes of each status."""
    by_status: dict[int, list[str]] = {}
    for code, (status, meaning) in ERRORS.items():
        by_status.setdefault(status, []).append(f"{code}: {meaning}")
    described: dict[int | str, dict[str, Any]] = {s: {"description": "; ".join(m)} for s, m in by_status.items()}
    media = ("application/json", "image/png", "application/x-npz", "text/event-stream")
    described[200] = {"description": "samples", "content": {name: {} for name in media}}
    return described


def docs_page(openapi: dict[str, Any], url: str, tokens: bool) -> str:
    """HTML: every path, every field of the request for samples, every error code.

    url: of the service as its caller knows it. tokens: whether it asks for one.
    """
    token = "-H 'Authorization: Bearer TOKEN' " if tokens else ""
    example = (
        f"curl -s {url}/v1/samples -H 'Content-Type: application/json' \\\n  {token}-H 'Accept: image/png' "
        '-d \'{"count": 16, "seed": 1}\' -o samples.png'
    )
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
        f"<pre>{escape(example)}</pre><h2>Paths</h2>{_table(('path', ''), paths)}"
        f"<h2>POST /v1/samples</h2>{_table(('field', 'value', ''), fields)}"
        f"<h2>Errors</h2><p>JSON: code, message, request_id, field where one is meant.</p>"
        f"{_table(('status', 'code', ''), errors)}"
        '<p>The same for programs: <a href="openapi.json">openapi.json</a></p></html>'
    )


def _kind(about: dict[str, Any]) -> str:
    default = about.get("default")
    return in_words(about) + ("" if default is None else f"; default {json.dumps(default)}")


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(
        "<tr>"
        + "".join(f"<td>{f'<code>{escape(c)}</code>' if i == 0 else _prose(c)}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _prose(text: str) -> str:
    """Text as HTML; what stands in backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
