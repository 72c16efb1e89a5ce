"""Where the processes of a service log; tracebacks reach the command that runs it, as its Ray's logs go with it."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

LOOK_EVERY_S = 0.5
FORMAT = "%(asctime)s %(levelname)s %(message)s"


def log_here(errors: str = "") -> None:
    """In a process of a service: our lines go to its standard error, which Ray keeps with its logs.

    errors: a file that errors with their tracebacks are added to as well (`relayed`).
    """
    logger = logging.getLogger("scoreray")
    if logger.handlers:
        return
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if errors:
        handlers.append(logging.FileHandler(errors, encoding="utf-8", errors="backslashreplace", delay=True))
        handlers[-1].setLevel(logging.ERROR)
    for handler in handlers:
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


@contextlib.contextmanager
def relayed(file: Path, write: Callable[[str], object] | None = None) -> Iterator[None]:
    """Writes what is added to a file, by whatever process, to standard error as it comes, the last of it at the end."""
    write = write or (lambda text: print(text, end="", file=sys.stderr, flush=True))
    done, at = threading.Event(), 0

    def take() -> None:
        nonlocal at
        with contextlib.suppress(FileNotFoundError), file.open("rb") as log:
            log.seek(at)
            data = log.read()
            at += len(data)
            if data:
                write(data.decode("utf-8", "backslashreplace"))

    def follow() -> None:
        while not done.wait(LOOK_EVERY_S):
            take()

    thread = threading.Thread(target=follow, name="scoreray-errors", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        take()
