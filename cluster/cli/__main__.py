"""Where `scoreray` begins: Ctrl-C is one line from here on, also while the command's modules are being imported."""

import gc
import os
import signal
import sys
import threading
from types import FrameType

SOON_S = 2.0  # as in `cluster/display.py`, which is not imported yet


def main() -> None:
    """The `scoreray` command; see `main.py`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    late = threading.Timer(SOON_S, os.write, (2, b"loading packages\n"))
    late.daemon = True
    if os.isatty(2) and "SCORERAY_PLAIN" not in os.environ and "--plain" not in sys.argv:
        late.start()
    # Imports make some hundred thousand objects and no garbage, and by default look for some every 700.
    gc.set_threshold(50_000)
    from scoreray.cluster.cli.main import main as run

    late.cancel()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # SIGTERM is set by `run`
    try:
        run()
    finally:
        gc.freeze()  # else Python looks through all of torch for cycles as it ends: 0.4 s of a core


def _end(number: int, frame: FrameType | None) -> None:
    """Not an exception: out of some import it would be a traceback, or be caught in there. Nothing is open yet."""
    os.write(2, b"scoreray: stopped before anything was started\n")
    os._exit(130)


if __name__ == "__main__":
    main()
