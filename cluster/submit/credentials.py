"""Finds credentials in the arguments, variables and files of a job, which everybody with the cluster's token can read.

They are recognised by the format of well-known tokens and by names (`password: ...`). No list of these is complete: a
key without a known format, under a name that says nothing, is not found.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scoreray.data.errors import UserError

NAMES = re.compile(  # TOKENIZERS_PARALLELISM is none
    r"(?i)secret|passw|passphrase|credential|token(?!i[sz])|(?:^|[_.-])pat(?:$|[_.-])|[_.-]pwd$"
    r"|(?:api|access|private|account|auth|ssh|signing|encryption)[_-]?key|_key$"
)
WORDS = re.compile(r"(?i)secret|passw|passphrase|pwd")  # names whose value is a credential also when it is a number
COUNT = re.compile(r"(?i)[\d_.]+(e\d+)?[kmg]?|true|false|null|none")  # as of max_tokens
TOKENS = {  # from the start of a word
    "an AWS key": r"(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a token of GitHub": r"gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}",
    "a token of GitLab": r"glpat-[\w-]{16,}",
    "a token of Hugging Face": r"hf_[A-Za-z0-9]{16,}",
    "a token of Slack": r"xox[a-z]-[\w-]{10,}",
    "an API key": r"sk-[\w-]{20,}",
    "a signed token": r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.",
}
_TOKEN = re.compile(
    r"\b(?:" + "|".join(f"({token})" for token in TOKENS.values()) + ")"
)  # a pass for each takes longer
_OTHERS = {
    "a private key": re.compile("-----BEGIN [A-Z ]*KEY"),
    "a user or password in a URL": re.compile(r"\w://[^/\s@'\"]+@"),
}
_FORTY = re.compile(r"(?<![\w/+.-])[A-Za-z0-9/+]{40}(?![\w/+=-])")
FIX = "all who hold the cluster's token could read it; set it on the nodes and give --from-env NAME=VARIABLE"


def shape_of(text: str) -> str:
    """Which known credential is somewhere in the text; empty: none."""
    if any(_is_aws_secret(found[0]) for found in _FORTY.finditer(text)):
        return "an AWS secret"
    if token := _TOKEN.search(text):
        return tuple(TOKENS)[(token.lastindex or 1) - 1]
    return next((what for what, shape in _OTHERS.items() if shape.search(text)), "")


def _is_aws_secret(text: str) -> bool:
    """Of forty characters: neither a hash, which has no capitals, nor a path, which has several slashes."""
    return all(re.search(some, text) for some in ("[A-Z]", "[a-z]", "[0-9]")) and text.count("/") < 2


def is_secret(name: str, value: Any) -> bool:
    """Whether a name says that its value is a credential, and there is a value."""
    text = "" if value is None or isinstance(value, bool) else str(value)
    return bool(text and NAMES.search(name) and (WORDS.search(name) or not COUNT.fullmatch(text)))


def refuse_arguments(arguments: Sequence[str]) -> None:
    """Raises UserError for `--aws-secret VALUE`, `api_key=VALUE`, and for a known shape in any of them."""
    for i, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if word.startswith("-") and not equals and i + 1 < len(arguments):
            value = "" if arguments[i + 1].startswith("-") else arguments[i + 1]
        if what := shape_of(word):
            raise UserError(f"submit: an argument looks like a credential ({what}); {FIX}")
        if is_secret(name, value):
            raise UserError(f"submit {name}: its value looks like a credential; {FIX}")


def refuse_text(where: str, text: str, page: Any = None) -> None:
    """Raises UserError for a known shape in a file's text (comments too), and for names that say it in its `page`."""
    lines = text.splitlines() if shape_of(text) else []  # at once: line by line takes several times as long
    for number, line in enumerate(lines, 1):
        if what := shape_of(line):
            raise UserError(f"{where}, line {number}: looks like a credential ({what}); {FIX}")
    for key, value in _leaves(page):
        if is_secret(key, value):
            raise UserError(f"{where}: {key}: its value looks like a credential; {FIX}")


def refuse_wheel(wheel: Path) -> None:
    """The same for the code that is sent, by formats only. Raises UserError."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not name.endswith("RECORD"):  # hashes
                refuse_text(name, archive.read(name).decode("utf-8", "replace"))


def refuse_folder(path: Path) -> None:
    """The same for a folder or file of somebody else's code."""
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            refuse_text(str(file), file.read_bytes().decode("utf-8", "replace"))


def _leaves(page: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The values of a parsed YAML file, each with its dotted key."""
    if depth > 50:
        return
    if isinstance(page, dict):
        for key, value in page.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key), depth + 1)
    elif isinstance(page, list):
        for value in page:
            yield from _leaves(value, name, depth + 1)
    else:
        yield name, page
