"""The body of a request for samples, from the connection to its fields: strict JSON, and refusals in plain words."""

from __future__ import annotations

import asyncio
import functools
import json
import math
from typing import Any, TypeVar, overload

from fastapi import Request
from pydantic import ValidationError

from scoreray.data.errors import nearest, shortened
from scoreray.sampling.service.body import KEY, DrawFields, SampleBody
from scoreray.sampling.service.config import Refused

LONGEST_NUMBER = 40
BODY_WITHIN_S = 30.0
PARSED_AT_ONCE = 64 << 10  # bytes of JSON: under a millisecond; more would hold up other requests
Body = TypeVar("Body", bound=DrawFields)
TYPES = {"integer": "a whole number", "number": "a number", "string": "a string", "boolean": "true or false"}


async def read_body(request: Request, most: int, kind: type[Body]) -> Body:
    """The fields of a request whose body has at most `most` bytes. Raises Refused."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("not_json", "send the request as JSON, with the header Content-Type: application/json")
    raw = await _read(request, most)
    return parse(raw, kind) if len(raw) <= PARSED_AT_ONCE else await asyncio.to_thread(parse, raw, kind)


async def _read(request: Request, most: int) -> bytes:
    """The body, at most `most` bytes of it, within BODY_WITHIN_S. Raises Refused."""
    too_large = Refused("body_too_large", f"the body is larger than {most} bytes")
    declared = request.headers.get("content-length")
    if declared is not None and not (declared.isascii() and declared.isdigit()):
        raise Refused("bad_header", "Content-Length is no number")
    if declared is not None and (len(declared) > 12 or int(declared) > most):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_WITHIN_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        raise Refused("bad_json", f"the body did not arrive within {BODY_WITHIN_S:g} s") from None
    return bytes(body)


@overload
def parse(body: bytes) -> SampleBody: ...
@overload
def parse(body: bytes, kind: type[Body]) -> Body: ...
def parse(body: bytes, kind: type[Any] = SampleBody) -> Any:
    """The request in a body, with the fields of `kind`. Raises Refused (bad_json, invalid)."""
    try:
        text = body.decode("utf-8")
        data = json.loads(
            text, parse_constant=_no_constant, parse_int=_int, parse_float=_float, object_pairs_hook=_object
        )
    except RecursionError:
        raise Refused("bad_json", "the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise Refused("bad_json", f"the body is not UTF-8: byte {error.start}") from None
    except ValueError as error:
        raise Refused("bad_json", f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise Refused("invalid", 'the body must be a JSON object, such as {"count": 4}')
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _refusal(error, data, kind) from None


def _refusal(error: ValidationError, data: dict[str, Any], kind: type[DrawFields]) -> Refused:
    """A body that does not fit, in plain words: each field that is wrong, its value, and what it may be."""
    mistakes = error.errors(include_url=False, include_context=False, include_input=False)
    first = mistakes[0]
    name = shortened(str(first["loc"][0])) if first["loc"] else "body"
    if first["type"] == "extra_forbidden":
        return Refused("invalid", f"field '{name}' is unknown; {nearest(name, kind.model_fields)}", field=name)
    fields = _fields(kind)
    wrong = list(dict.fromkeys(str(mistake["loc"][0]) for mistake in mistakes))
    mistakes_in_words = []
    for field in [field for field in wrong if field in fields][:4]:
        given = f"{field} = {shortened(json.dumps(data[field]))}" if field in data else f"{field} is missing"
        may_be = in_words(fields[field])
        if any(m["type"] == "string_unicode" for m in mistakes if m["loc"][0] == field):
            may_be = "a string of whole Unicode characters"
        mistakes_in_words.append(f"{given}: must be {may_be}")
    return Refused("invalid", "; ".join(mistakes_in_words), field=name)


@functools.cache
def _fields(kind: type[DrawFields]) -> dict[str, Any]:
    return kind.model_json_schema()["properties"]


def in_words(about: dict[str, Any]) -> str:
    """What a field of a JSON schema may be, in plain words: "a whole number from 1 to 32"."""
    return " or ".join(_variant(one) for one in about.get("anyOf", [about]) if one.get("type") != "null")


def _variant(one: dict[str, Any]) -> str:
    if "enum" in one:
        return " or ".join(json.dumps(value) for value in one["enum"])
    if "pattern" in one:
        return "a string of 1 to 255 printable ASCII characters, no spaces"  # the only pattern there is, KEY
    if "maxProperties" in one:
        values = one["additionalProperties"]
        each = values.get("description") or (_variant(values) if "type" in values else None)
        words = f"each {each}" if each else "numbers, strings, true, false, null or a process as an object"
        return f"an object of at most {one['maxProperties']} values: {words}"
    name = TYPES.get(one.get("type", ""), "a value")
    if "maxLength" in one:
        return f"{name} of at most {one['maxLength']} characters"
    low, high = one.get("minimum"), one.get("maximum")
    if "exclusiveMaximum" in one:
        high = one["exclusiveMaximum"] - 1  # of whole numbers only
    if low is None:
        return name
    return f"{name}, {low:,.0f} or more" if high is None else f"{name} from {low:,.0f} to {high:,.0f}"


def check_key(header: str | None, body: str | None) -> str | None:
    """The idempotency key of a request, which may come either way. Raises Refused."""
    if header is not None and body is not None and header != body:
        raise Refused("bad_header", "the header Idempotency-Key and the field idempotency_key differ")
    key = header if header is not None else body
    if key is not None and not KEY.fullmatch(key):
        raise Refused("bad_header", "an idempotency key has 1 to 255 printable ASCII characters, no spaces")
    return key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Refused("bad_json", f"the name '{shortened(name)}' stands twice in one object")
        if not name.isascii() and any(
            "\ud800" <= one <= "\udfff" for one in name
        ):  # pydantic can't say which name it is
            raise Refused("bad_json", f"the name {shortened(ascii(name))} is not of whole Unicode characters")
        found[name] = value
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _int(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float | int:
    """A number with a point or an exponent; 4.0 is the integer 4, as JSON has one kind of number only."""
    value = float(text) if len(text) <= LONGEST_NUMBER else math.inf
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:LONGEST_NUMBER]} is too large or too long")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
