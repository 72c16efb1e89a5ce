"""Tutorials as scripts: the commands of a page, in order, and what the page says that they print.

A page's fenced blocks are its script, by one rule:

- ```console: a line that begins with `$ ` is a command, `> ` goes on with it; the other lines are what it prints, in
  this order. `...` stands for lines or parts of a line that are left out, and any number for any other number.
- ```sh: commands alone.
- ```python title="NAME", ```yaml title="NAME": a file of that name; ```python without one is run.
- Blocks of other languages are not run.

Comments that readers don't see stand on the lines before a block, several with `;` between: `<!-- test: WHAT -->`:

- `OLD => NEW`: in this block, where it is run by a test: fewer images, so that it is quick.
- `slow`: left out where a page is run quickly. `skip`: left out always (it needs what tests don't have).
- `background`: goes on until the page's end; the page goes on once the lines that the block says are printed.
- `status N`: what the command ends with, where that is not 0.

Ports that a page names are free ones in a test (`PORTS`). `scoreray` and `python` are those of the environment that
runs the test, or of the folder that TUTORIAL_BIN names: with `TUTORIAL_BIN=/tmp/venv/bin` a test walks what a wheel has
installed there.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from waiting import PATIENCE_S, PATIENT_RAY

PORTS = ("8000", "8265", "6379", "9000", "52365")
END = "tutorial-command-ended"
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?[kMG]?")
FENCE = re.compile(
    r"(?P<comments>(?:^<!-- test: [^\n]* -->\n)*)^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?[^\n]*\n"
    r"(?P<body>.*?)^```$",
    re.M | re.S,
)


@dataclass(frozen=True)
class Command:
    """One command of a page and what the page says that it prints."""

    text: str
    printed: tuple[str, ...] = ()
    compared: bool = False  # a console's, whose output the page shows


@dataclass(frozen=True)
class Block:
    """A fenced block: the file that it is, or its commands."""

    language: str
    title: str | None
    body: str
    replaced: Mapping[str, str] = field(default_factory=dict)
    marks: frozenset[str] = frozenset()
    status: int = 0

    @property
    def commands(self) -> list[Command]:
        if self.title is not None or self.language not in ("console", "sh", "python"):
            return []
        if self.language == "console":
            return _console(self.body)
        text = self.body.rstrip()
        return [Command(text if self.language == "sh" else f"python -W ignore - <<'EOF'\n{text}\nEOF")]


def blocks(page: Path) -> list[Block]:
    """A page's blocks, in order."""
    found = []
    for match in FENCE.finditer(page.read_text()):
        replaced, marks, status = {}, set(), 0
        for comment in re.findall(r"<!-- test: (.*) -->", match["comments"]):
            for mark in (one.strip() for one in comment.split(";")):
                old, arrow, new = mark.partition(" => ")
                if arrow:
                    assert old in match["body"], f"{page.name}: {old!r} is not in the block whose comment replaces it"
                    replaced[old] = new
                elif mark.startswith("status "):
                    status = int(mark.split()[1])
                else:
                    assert mark in ("slow", "skip", "background"), f"{page.name}: what is {mark!r}?"
                    marks.add(mark)
        found.append(Block(match["language"], match["title"], match["body"], replaced, frozenset(marks), status))
    return found


def scoreray_commands(page: Path) -> Iterator[list[str]]:
    """The words after `scoreray` of every command of a page, as a shell would split them; none is run."""
    for block in blocks(page):
        for command in block.commands if block.language != "python" else ():
            text = re.sub(r"\\\n", " ", command.text)
            lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>\n")
            lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, "#"
            words: list[str] = []
            for word in [*lexer, "\n"]:
                if set(word) <= set(";&|<>\n"):
                    if words[:1] == ["scoreray"]:
                        yield words[1:]
                    words = []
                elif words or not re.fullmatch(r"\w+=.*", word):  # variables stand before a command
                    words.append(word)


def differs(printed: str, expected: tuple[str, ...]) -> str | None:
    """The first line of `expected` that is not printed after those before it; None where all are."""
    lines = iter(printed.splitlines())
    for line in expected:
        pattern = _pattern(line)
        if line.strip() != "..." and not any(pattern.fullmatch(" ".join(one.split())) for one in lines):
            return line
    return None


class Session:
    """One bash in an empty folder, in which the commands of a page are run in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {port: _free_port() for port in PORTS}
        self._ray = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp")  # a short name: Ray's sockets are in it
        commands = os.environ.get("TUTORIAL_BIN", Path(sys.executable).parent)
        path = f"{commands}{os.pathsep}{os.environ['PATH']}"
        self._env = {
            **os.environ,
            **PATIENT_RAY,
            "PATH": path,
            "RAY_TMPDIR": self._ray.name,
            "COLUMNS": "120",
            "PS1": "",
        }
        self._behind: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._bash = subprocess.Popen(
            ["bash", "--noprofile", "--norc"], cwd=folder, env=self._env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        for process, _ in reversed(self._behind):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self._bash.kill()
        self._bash.communicate()
        self._ray.cleanup()

    def run(self, block: Block, timeout_s: float) -> None:
        """A block as its comments say. Raises AssertionError with the command and what it printed, where that or the
        status is not as the page says."""
        if block.title is not None:
            Path(self.folder, block.title).write_text(self._as_tested(block.body, block))
            return
        for command in block.commands:
            text = self._as_tested(command.text, block)
            if "background" in block.marks:
                printed, status = self._start(text, command.printed, timeout_s), 0
            else:
                printed, status = self._wait(text, timeout_s)
            assert status == block.status, f"$ {text}\n{printed}\nended with {status}, not {block.status}"
            wrong = differs(printed, command.printed) if command.compared else None
            assert wrong is None, f"$ {text}\n{printed}\nthe page says that this is printed, in this order: {wrong!r}"

    def _as_tested(self, text: str, block: Block) -> str:
        for old, new in block.replaced.items():
            text = text.replace(old, new)
        return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda match: self.ports[match[0]], text)

    def _wait(self, text: str, timeout_s: float) -> tuple[str, int]:
        """What a command of the session prints, on either stream, and its status."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        late = threading.Timer(timeout_s, self._bash.kill)
        late.start()
        self._bash.stdin.write(f"{{ {text}\n}} </dev/null\necho {END} $?\n")
        self._bash.stdin.flush()
        printed = ""
        for line in self._bash.stdout:
            before, ended, status = line.partition(END)
            printed += before
            if ended:
                late.cancel()
                return printed, int(status)
        raise AssertionError(f"$ {text}\n{printed}\nbash ended, or {timeout_s:.0f} s were over")

    def _start(self, text: str, expected: tuple[str, ...], timeout_s: float) -> str:
        """Starts a command that goes on, and waits until it has printed what is expected, for `timeout_s` at most."""
        log, variables = Path(self._ray.name, f"printed-{len(self._behind)}"), Path(self._ray.name, "environment")
        self._wait(f"env -0 > {variables}", PATIENCE_S)  # with what the page has exported so far
        exported = dict(one.split("=", 1) for one in variables.read_text().split("\0") if one)
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {text}"], cwd=self.folder, env=exported, stdout=file, stderr=subprocess.STDOUT
            )
        self._behind.append((process, log))
        waiting = threading.Event()
        for _ in range(int(timeout_s / 0.2)):
            if differs(log.read_text(), expected) is None or process.poll() is not None:
                break
            waiting.wait(0.2)
        return log.read_text()


def _console(body: str) -> list[Command]:
    found: list[tuple[str, list[str]]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.startswith("> ") or (found and not found[-1][1] and found[-1][0].endswith("\\")):
            command, printed = found.pop()
            found.append((f"{command}\n{line.removeprefix('> ')}", printed))
        elif line.strip():
            found[-1][1].append(line)
    return [Command(text, tuple(printed), compared=True) for text, printed in found]


def _pattern(line: str) -> re.Pattern[str]:
    """A line as a page shows it: spaces are alike, numbers any numbers, `...` anything."""
    parts = [NUMBER.sub("\0", " ".join(part.split())) for part in line.split("...")]
    escaped = [re.escape(part).replace(re.escape("\0"), f"(?:{NUMBER.pattern})") for part in parts]
    return re.compile(r"\s*.*?\s*".join(escaped))


def _free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])
