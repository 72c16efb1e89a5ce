"""The site's page of the service's HTTP: every path, field and answer, from the OpenAPI that the service describes."""

from __future__ import annotations

import json
from typing import Any

from reference_tables import keys, table

from scoreray.sampling.http.app import make_app
from scoreray.sampling.http.parse import in_words

HEAD = """# HTTP

Every path of a sampling service, as its own `/openapi.json` and `/docs` describe it. How to run one, limits, tokens and
retries: docs/serving.md.
"""


def page() -> str:
    service: Any = None  # at which routes and schemas don't look
    paths = make_app(service).openapi()["paths"]
    return "\n".join([HEAD, *(_section(path, *one) for path, methods in paths.items() for one in methods.items())])


def _section(path: str, method: str, operation: dict[str, Any]) -> str:
    lines = [f"## `{method.upper()} {path}`", "", operation.get("description", ""), ""]
    if body := operation.get("requestBody"):
        fields = body["content"]["application/json"]["schema"]["properties"]
        rows = [(f"`{name}`", in_words(one), _default(one), one.get("description", "")) for name, one in fields.items()]
        lines += [keys(("field", "type", "default", "description"), rows), ""]
    answers = [
        (
            status,
            about["description"].replace("; ", "<br>"),
            ", ".join(f"`{name}`" for name in about.get("content", {})),
        )
        for status, about in sorted(operation["responses"].items())
    ]
    rows_of = table(("status", "codes", "media"), answers).replace("\n", "\n    ")
    return "\n".join([*lines, f'??? note "Answers"\n\n    {rows_of}\n'])


def _default(about: dict[str, Any]) -> str:
    default = about.get("default")
    return "" if default is None or default == {} else f"`{json.dumps(default)}`"
