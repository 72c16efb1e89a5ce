"""What OpenAPI says of requests and answers, and the page at /docs: the same as plain HTML, without a script."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from scoreray.data.pages import render
from scoreray.sampling.http.parse import in_words
from scoreray.sampling.service.body import KEY, DrawFields
from scoreray.sampling.service.config import ERRORS


def request_schema(body: type[DrawFields]) -> dict[str, Any]:
    """OpenAPI's words for the body and the header of a request for samples."""
    key = {"type": "string", "pattern": f"^{KEY.pattern}$"}
    header = {"name": "Idempotency-Key", "in": "header", "required": False, "schema": key}
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": body.model_json_schema()}}},
        "parameters": [header],
    }


def response_descriptions(*media: str, status_of: Callable[[int], int] = int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: the codes of each status (`status_of` that of ours), and the media of samples."""
    by_status: dict[int, list[str]] = {}
    for code, (status, meaning) in ERRORS.items():
        by_status.setdefault(status_of(status), []).append(f"{code}: {meaning}")
    described: dict[int | str, dict[str, Any]] = {s: {"description": "; ".join(m)} for s, m in by_status.items()}
    described[200] = {"description": "samples", "content": {name: {} for name in media}}
    return described


def docs_page(openapi: dict[str, Any], url: str, tokens: bool) -> str:
    """HTML: every path, every field of requests for samples, every error code.

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
    bodies = {
        path: [(name, _kind(about), about.get("description", "")) for name, about in _properties(methods["post"])]
        for path, methods in openapi["paths"].items()
        if "post" in methods
    }
    errors = [(str(status), code, meaning) for code, (status, meaning) in ERRORS.items()]
    return render("scoreray.sampling.http/docs.html", example=example, paths=paths, bodies=bodies, errors=errors)


def _properties(operation: dict[str, Any]) -> Iterable[tuple[str, dict[str, Any]]]:
    """(name, schema) of each field of a request's body."""
    return operation["requestBody"]["content"]["application/json"]["schema"]["properties"].items()


def _kind(about: dict[str, Any]) -> str:
    default = about.get("default")
    return in_words(about) + ("" if default is None else f"; default {json.dumps(default)}")
