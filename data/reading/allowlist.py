"""What each kind of member is decoded to, and that no other is: webdataset's decoder chain with our handler in it.

    wds.DataPipeline(samples, wds.map(SampleDecoder()), wds.to_tuple("png", "cls"))

webdataset's own `decode()` puts handlers of its own after the given ones, which unpickle `.pkl`, `.pyd` and `.pth` (a
pickle runs any code that its author likes), and one before them that unpacks `.gz`, whatever size it grows to. The
chain here has neither.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from scoreray.data.errors import DataError, nearest, shortened
from scoreray.data.fields.record_layout import FORMATS
from scoreray.data.reading.decode import decode_as_found, decode_class, npy_array
from scoreray.data.reading.pictures import IMAGE_SUFFIXES, plain_format
from scoreray.data.reading.tars import PICKLES

Handler = Callable[[str, bytes], Any]  # (".seg.png", data) -> its value, or None where another handler should try

LABELS = ("cls", "class", "label", "target", "cls.txt", "class.txt", "label.txt", "target.txt")
TEXTS = ("txt", "text", "transcript", "caption")
JSON = "json"
MAX_JSON_BYTES = 1 << 20


class SampleDecoder:
    """Decodes the members of a sample, a dict as webdataset makes them (`__key__`, `png`, `cls`, ...).

    Pictures become uint8 [H, W, 1 or 3], `.npy` the array as it is stored (no pickles inside), `.cls` and the others of
    LABELS an int, `.json` what it says, TEXTS a str. Other kinds stay bytes. A pickle is refused, by its name.

    Args:
      handlers: of the caller, tried before ours; `webdataset.imagehandler("torchrgb8")` is one.

    Raises DataError naming the shard, the sample and the member.
    """

    def __init__(self, *handlers: Handler) -> None:
        from webdataset import Decoder  # imports torch, 0.9 s: only where something is decoded

        self._chain = Decoder([refuse_pickles, *handlers, decode_allowlisted], pre=[], post=[], partial=True)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        from webdataset import DecodingError

        try:
            return self._chain(sample)
        except DecodingError as error:
            raise DataError(f"{error.url}: sample '{error.key}': .{error.k}: {_reason(error.__cause__)}") from error


def refuse_pickles(key: str, data: bytes) -> None:
    if key.lower().endswith(PICKLES):
        raise DataError("is a pickle, which can run code: not read")


def decode_allowlisted(key: str, data: bytes) -> Any:
    """A handler of webdataset's decoder chain. One look-up in place of a handler a kind: each costs 3 us a member."""
    kind = key.lower().rsplit(".", 2)
    found = _KINDS.get(".".join(kind[-2:])) or _KINDS.get(kind[-1])
    try:
        return None if found is None else found(data)
    except DataError:
        raise
    except Exception as error:  # a decoder of untrusted bytes may raise anything
        raise DataError(f"can't be decoded: {_reason(error)}") from error


def found_format(kind: str, data: bytes) -> int:
    """The format (record_layout.FORMATS) by which a member of IMAGE_SUFFIXES or .npy is decoded: by its content."""
    return FORMATS["npy" if kind.endswith("npy") else plain_format(data) or "picture"]


def _picture(data: bytes) -> Any:
    return decode_as_found(data, found_format("", data))


def json_value(data: bytes, path: str) -> Any:
    """What a JSON member says at a path: "a.b" is b in the object a, and "a.0" the first of the list a. Raises
    DataError, without a name."""
    try:
        value = _json(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON: {_reason(error)}") from None
    for part in path.split(".") if path else []:
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            known = f"; {nearest(part, map(shortened, value))}" if isinstance(value, dict) and value else ""
            raise DataError(f"the JSON has no '{path}'{known}")
    return value


def _json(data: bytes) -> Any:
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"{len(data):,} bytes of JSON, the limit is {MAX_JSON_BYTES:,}")
    return json.loads(data)


def _reason(error: BaseException | None) -> str:
    return " ".join(str(error).split()) or type(error).__name__


_KINDS: dict[str, Callable[[bytes], Any]] = {
    **{suffix[1:]: _picture for suffix in IMAGE_SUFFIXES},
    **dict.fromkeys(LABELS, decode_class),
    **dict.fromkeys(TEXTS, bytes.decode),
    "npy": npy_array,
    JSON: _json,
}
