"""Where `scoreray` begins: Ctrl-C is one line from here on, also while the command's modules are being imported."""

import gc
import os
import signal
from types import FrameType


def main() -> None:
    """The `scoreray` command; see `main.py`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    # Imports make some hundred thousand objects and no garbage: by default a fifth of their time is a search for it.
    gc.set_threshold(50_000, 20, 100)
    from scoreray.cluster.cli.main import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)  # SIGTERM is set by `run`
    run()


def _end(number: int, frame: FrameType | None) -> None:
    """Not an exception: out of some import it would be a traceback, or be caught in there. Nothing is open yet."""
    os.write(2, b"scoreray: stopped before anything was started\n")
    os._exit(130)


if __name__ == "__main__":
    main()
